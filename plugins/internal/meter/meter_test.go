package meter_test

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/meter"
)

// endless is a connection that always has something to read.
type endless struct{ net.Conn }

func (endless) Read(p []byte) (int, error) { return len(p), nil }
func (endless) Close() error               { return nil }

// TestGateIsClosedHalfOfTheTime: however many wait, what they do takes half of the time.
func TestGateIsClosedHalfOfTheTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := meter.NewGate()
		begin, turns := time.Now(), make(chan struct{})
		const workers, work = 20, 3 * time.Millisecond
		for range workers {
			go func() {
				leave, entered := g.Enter(nil, 0)
				if !entered {
					t.Error("a gate that nobody closed")
				}
				time.Sleep(work)
				leave()
				leave()
				turns <- struct{}{}
			}()
		}
		for range workers {
			<-turns
		}
		if took, want := time.Since(begin), time.Duration(2*workers-1)*work; took != want {
			t.Errorf("%v for %d turns of %v, want %v", took, workers, work, want)
		}
	})
}

// TestGateDoesNotWaitForWhoWaits: one that keeps its turn keeps others out for a moment only, and one that gives up does
// not get a turn.
func TestGateDoesNotWaitForWhoWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := meter.NewGate()
		if _, entered := g.Enter(nil, 10*time.Millisecond); !entered {
			t.Fatal("not entered")
		}
		given := make(chan struct{})
		time.AfterFunc(time.Millisecond, func() { close(given) })
		if _, entered := g.Enter(given, 0); entered {
			t.Error("entered although it was given up")
		}
		begin := time.Now()
		leave, entered := g.Enter(nil, 0)
		if took := time.Since(begin); !entered || took > 20*time.Millisecond {
			t.Errorf("entered %v after %v", entered, took)
		}
		leave()
	})
}

// TestGrants: what was granted can be read, at once as far as it is ordinary, and what requests did not need is gone when
// they have ended.
func TestGrants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const grant = 1 << 20
		read := func(m *meter.Conn, size int) (n int) {
			for {
				got, err := m.Read(make([]byte, size))
				if n += got; err != nil {
					return n
				}
			}
		}
		m := meter.New(endless{}, grant, meter.NewGate())
		m.Begin()
		m.Grant()
		if n := read(m, 1024); n != 2*grant {
			t.Errorf("%d bytes were read, want %d", n, 2*grant)
		}
		m = meter.New(endless{}, grant, meter.NewGate())
		m.Begin()
		for range 1000 { // one after the other, beside a long one
			m.Grant()
			m.Settle(1)
		}
		if n := read(m, 1024); n > 4*grant {
			t.Errorf("%d bytes were read behind a thousand short answers, want %d at most", n, 4*grant)
		}
		gate := meter.NewGate()
		leave, _ := gate.Enter(nil, 0)
		m = meter.New(endless{}, grant, gate)
		m.Begin()
		m.Grant()
		if n, err := io.ReadFull(m, make([]byte, 8<<10)); n != 8<<10 || err != nil {
			t.Errorf("%d bytes of an ordinary answer, %v", n, err)
		}
		time.AfterFunc(time.Second, func() { _ = m.Close() })
		if n := read(m, 8<<10); n > 16<<10 {
			t.Errorf("%d bytes were read while the gate was closed", n)
		}
		leave()
	})
}
