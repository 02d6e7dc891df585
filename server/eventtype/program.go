package eventtype

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/server/eventtype/schema"
)

// compiled is a schema ready to check, or why it is not.
type compiled struct {
	schema *schema.Schema
	err    error
	// used since the cache last looked for room.
	used atomic.Bool
}

// programs compiles schemas in turns and keeps them, up to a number of bytes: the one that was not used for longest goes
// first, roughly.
type programs struct {
	gate *gate.Gate
	// samples are made through a gate of their own: no event waits for them.
	samples *gate.Gate
	most    int

	mu    sync.Mutex // guards what follows
	size  int
	kept  *list.List // of *version, the oldest first
	place map[*version]*list.Element
}

func newPrograms(most int) *programs {
	return &programs{gate: gate.New(), samples: gate.New(), most: most, kept: list.New(), place: make(map[*version]*list.Element)}
}

// enter waits for the turn of a namespace's work. Its error is ctx's.
func enter(ctx context.Context, g *gate.Gate, namespace string) (leave func(), err error) {
	leave, entered := g.Enter(ctx.Done(), 0, namespace)
	if !entered {
		return nil, context.Cause(ctx)
	}
	return leave, nil
}

// get is one atomic read for what is kept.
func (p *programs) get(ctx context.Context, v *version) (*compiled, error) {
	if c := v.compiled.Load(); c != nil {
		if !c.used.Load() {
			c.used.Store(true)
		}
		return c, nil
	}
	leave, err := enter(ctx, p.gate, v.namespace)
	if err != nil {
		return nil, err
	}
	defer leave()
	if c := v.compiled.Load(); c != nil { // by somebody else meanwhile
		return c, nil
	}
	c := &compiled{}
	c.schema, c.err = schema.Compile([]byte(v.text))
	p.keep(v, c)
	return c, nil
}

// cost is what a version's program takes.
func (c *compiled) cost() int {
	if c.schema == nil {
		return 512
	}
	return c.schema.Size()
}

// keep puts a program where the next event finds it.
func (p *programs) keep(v *version, c *compiled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.place[v] != nil {
		return
	}
	v.compiled.Store(c)
	p.size += c.cost()
	p.place[v] = p.kept.PushBack(v)
	for looked := 0; p.size > p.most; looked++ {
		oldest := p.kept.Front()
		other, _ := oldest.Value.(*version)
		// v itself goes when it alone is too much.
		if used := &other.compiled.Load().used; p.kept.Len() > 1 && (other == v || used.Load() && looked < p.kept.Len()) {
			used.Store(false)
			p.kept.MoveToBack(oldest)
			continue
		}
		p.remove(other)
	}
}

// forget drops the programs of a type that is gone or replaced.
func (p *programs) forget(t *Type) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, v := range t.versions {
		p.remove(v)
	}
}

// remove drops one, if it is there. mu is held.
func (p *programs) remove(v *version) {
	if at := p.place[v]; at != nil {
		p.size -= v.compiled.Swap(nil).cost()
		p.kept.Remove(at)
		delete(p.place, v)
	}
}
