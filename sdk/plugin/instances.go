package plugin

import "sync/atomic"

const (
	chunkSize = 256
	// maxRef bounds the table against a host that counts from the wrong end.
	maxRef = 1 << 26
)

// instances finds an instance by its ref without a lock: refs are small rising numbers, so it is a table
// in chunks. Writers hold the server's mutex.
type instances struct {
	chunks atomic.Pointer[[]atomic.Pointer[chunk]]
}

type chunk struct {
	slots [chunkSize]atomic.Pointer[instance]
	live  int // guarded by the writers' mutex
}

func (t *instances) get(ref uint32) *instance {
	chunks := t.chunks.Load()
	if chunks == nil || int(ref/chunkSize) >= len(*chunks) {
		return nil
	}
	c := (*chunks)[ref/chunkSize].Load()
	if c == nil {
		return nil
	}
	return c.slots[ref%chunkSize].Load()
}

// put returns the instance that had the ref before, or nil.
func (t *instances) put(ref uint32, inst *instance) *instance {
	at := int(ref / chunkSize)
	chunks := t.chunks.Load()
	if chunks == nil || at >= len(*chunks) {
		grown := make([]atomic.Pointer[chunk], at+1+at/2)
		if chunks != nil {
			for i := range *chunks {
				grown[i].Store((*chunks)[i].Load())
			}
		}
		chunks = &grown
		t.chunks.Store(chunks)
	}
	c := (*chunks)[at].Load()
	if c == nil {
		c = &chunk{}
		(*chunks)[at].Store(c)
	}
	before := c.slots[ref%chunkSize].Swap(inst)
	if before == nil {
		c.live++
	}
	return before
}

// each calls f for all that there are; no writer may be at work.
func (t *instances) each(f func(*instance)) {
	chunks := t.chunks.Load()
	if chunks == nil {
		return
	}
	for i := range *chunks {
		c := (*chunks)[i].Load()
		if c == nil {
			continue
		}
		for j := range c.slots {
			if inst := c.slots[j].Load(); inst != nil {
				f(inst)
			}
		}
	}
}

// remove forgets ref and returns what it was.
func (t *instances) remove(ref uint32) *instance {
	inst := t.get(ref)
	if inst == nil {
		return nil
	}
	at := &(*t.chunks.Load())[ref/chunkSize]
	c := at.Load()
	c.slots[ref%chunkSize].Store(nil)
	if c.live--; c.live == 0 {
		at.Store(nil)
	}
	return inst
}
