package outbound

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fake counts what a pool does with a connection.
type fake struct {
	broken atomic.Bool
	closed atomic.Int32
}

func (f *fake) Usable() bool { return !f.broken.Load() }
func (f *fake) Close()       { f.closed.Add(1) }

// dials hands out fakes, slowly.
type dials struct {
	mu   sync.Mutex
	made []*fake
	err  error
}

func (d *dials) dial() (*fake, error) {
	time.Sleep(time.Second)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	f := &fake{}
	d.made = append(d.made, f)
	return f, nil
}

func (d *dials) all() []*fake {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.made
}

func take(t *testing.T, p *Pool[string, *fake], d *dials) *Lease[string, *fake] {
	t.Helper()
	l, err := p.Take(t.Context(), "key", d.dial)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestPoolSharesOneDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pool[string, *fake]
		d := &dials{}
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { take(t, &p, d).Done() })
		}
		wg.Wait()
		if len(d.all()) != 1 {
			t.Errorf("%d dials, want 1", len(d.all()))
		}
		p.Close()
		if n := d.all()[0].closed.Load(); n != 1 {
			t.Errorf("closed %d times, want once", n)
		}
	})
}

func TestPoolClosesWhatIsIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pool[string, *fake]
		d := &dials{}
		l := take(t, &p, d)
		time.Sleep(2 * IdleTimeout)
		if d.all()[0].closed.Load() != 0 {
			t.Error("closed while in use")
		}
		l.Done()
		for range 3 { // used again and again, it stays
			time.Sleep(IdleTimeout - time.Second)
			take(t, &p, d).Done()
		}
		if len(d.all()) != 1 || d.all()[0].closed.Load() != 0 {
			t.Errorf("%d dials, closed %d times, before it was idle", len(d.all()), d.all()[0].closed.Load())
		}
		time.Sleep(IdleTimeout + time.Second)
		if d.all()[0].closed.Load() != 1 {
			t.Error("not closed once it was idle")
		}
		take(t, &p, d).Done()
		if len(d.all()) != 2 {
			t.Errorf("%d dials, want a second one", len(d.all()))
		}
		p.Close()
	})
}

func TestPoolReplacesWhatIsOldOrBroken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pool[string, *fake]
		d := &dials{}
		first := take(t, &p, d)
		d.all()[0].broken.Store(true)
		second := take(t, &p, d)
		second.Retire()
		second.Retire()
		third := take(t, &p, d)
		time.Sleep(MaxAge)
		fourth := take(t, &p, d)
		if len(d.all()) != 4 {
			t.Fatalf("%d dials, want 4", len(d.all()))
		}
		for i, l := range []*Lease[string, *fake]{first, second, third} {
			if l.Conn != d.all()[i] || d.all()[i].closed.Load() != 0 {
				t.Errorf("connection %d was closed under its user, or is another's", i)
			}
			l.Done()
			synctest.Wait()
			if d.all()[i].closed.Load() != 1 {
				t.Errorf("connection %d was not closed by its last user", i)
			}
		}
		fourth.Done()
		p.Close()
	})
}

func TestPoolTellsEveryWaiterOfAFailedDialAndForgetsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pool[string, *fake]
		d := &dials{err: errors.New("refused")}
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := p.Take(t.Context(), "key", d.dial); !errors.Is(err, d.err) {
					t.Errorf("error %v, want that of the dial", err)
				}
			})
		}
		wg.Wait()
		d.err = nil
		take(t, &p, d).Done()
		p.Close()
	})
}

func TestPoolDialOutlivesWhoAskedForIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p Pool[string, *fake]
		d := &dials{}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := p.Take(ctx, "key", d.dial); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want the context's", err)
		}
		take(t, &p, d).Done()
		if len(d.all()) != 1 {
			t.Errorf("%d dials, want that of the first", len(d.all()))
		}
		time.Sleep(2 * IdleTimeout)
		if d.all()[0].closed.Load() != 1 {
			t.Error("not closed when idle")
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, _ = p.Take(ctx, "key", d.dial)
		time.Sleep(2*time.Second + IdleTimeout)
		if len(d.all()) != 2 || d.all()[1].closed.Load() != 1 {
			t.Error("a connection that nobody came for is kept")
		}
	})
}
