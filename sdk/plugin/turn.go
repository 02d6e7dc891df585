package plugin

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
)

const (
	// swift is how long a signature may take for others not to notice how many there are.
	swift = 500 * time.Microsecond
	// longBody is a body that takes longer to hash than that.
	longBody = 512 << 10
)

// errTurn is a signature whose turn did not come while the attempt lasted.
var errTurn = errors.New("the signature's turn did not come in time: this process is at work on many that take long, as with large RSA keys")

// turns are for signatures that take long: keys and bodies are for tenants to choose, and a few hundred signatures with
// large keys would hold up all other work of the process for seconds.
type turns struct {
	// slow is for instances that are known to take long, fresh for those of which nothing is known: who is new does not
	// wait behind all that is slow.
	slow, fresh *gate.Gate
}

func newTurns() turns { return turns{slow: gate.New(), fresh: gate.New()} }

// effort is what a signature of an instance takes: the shortest time that one has taken, in nanoseconds, since longer
// times may be the machine's doing. 0 is unknown. Once it is swift it is not measured any more.
type effort struct{ least atomic.Int64 }

// slow reports whether a signature over so many bytes has to wait for its turn.
func (e *effort) slow(body int) bool {
	least := e.least.Load()
	return least == 0 || least > int64(swift) || body > longBody
}

// took notes a signature's time. A long body's says nothing of the others'.
func (e *effort) took(d time.Duration, body int) {
	for body <= longBody {
		had := e.least.Load()
		if had != 0 && had <= int64(d) || e.least.CompareAndSwap(had, max(1, int64(d))) {
			return
		}
	}
}

// sign calls f, a signature by inst over so many bytes, in its turn if it takes long. ctx ends the wait, with errTurn.
func (t *turns) sign(ctx context.Context, inst *instance, body int, f func() error) error {
	e := &inst.effort
	if !e.slow(body) {
		return f()
	}
	at := t.slow
	if e.least.Load() == 0 {
		at = t.fresh
	}
	leave, entered := at.Enter(ctx.Done(), 0, inst.tenant)
	if !entered {
		return errTurn
	}
	defer leave()
	var err error
	began := time.Now()
	gate.Modestly(func() { err = f() })
	e.took(time.Since(began), body)
	return err
}
