package meter_test

import (
	"io"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/meter"
)

// endless is a connection that always has something to read.
type endless struct{ net.Conn }

func (endless) Read(p []byte) (int, error) { return len(p), nil }
func (endless) Close() error               { return nil }

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
		m := meter.New(endless{}, grant, gate.New())
		m.Begin()
		m.Grant()
		if n := read(m, 1024); n != 2*grant {
			t.Errorf("%d bytes were read, want %d", n, 2*grant)
		}
		m = meter.New(endless{}, grant, gate.New())
		m.Begin()
		for range 1000 { // one after the other, beside a long one
			m.Grant()
			m.Settle(1)
		}
		if n := read(m, 1024); n > 4*grant {
			t.Errorf("%d bytes were read behind a thousand short answers, want %d at most", n, 4*grant)
		}
		closed := gate.New()
		for range max(1, runtime.GOMAXPROCS(0)/2) {
			leave, _ := closed.Enter(nil, 0, "")
			defer leave()
		}
		m = meter.New(endless{}, grant, closed)
		m.Begin()
		m.Grant()
		if n, err := io.ReadFull(m, make([]byte, 8<<10)); n != 8<<10 || err != nil {
			t.Errorf("%d bytes of an ordinary answer, %v", n, err)
		}
		time.AfterFunc(time.Second, func() { _ = m.Close() })
		if n := read(m, 8<<10); n > 16<<10 {
			t.Errorf("%d bytes were read while the gate was closed", n)
		}
		// A connection that is closed in its turn, because of what was read, holds up nobody.
		free, begin := gate.New(), time.Now()
		for range 100 {
			m := meter.New(endless{}, grant, free)
			m.Begin()
			_, _ = io.ReadFull(m, make([]byte, 8<<10))
			if _, err := m.Read(make([]byte, 1<<10)); err != nil {
				t.Fatal(err)
			}
			_ = m.Close()
		}
		if took := time.Since(begin); took > 10*time.Millisecond {
			t.Errorf("%v until a hundred such connections were closed", took)
		}
		// An answer that comes with the flood behind it is there before the flood waits.
		m = meter.New(endless{}, grant, closed)
		m.Begin()
		if n, err := m.Read(make([]byte, 64<<10)); n != 64<<10 || err != nil {
			t.Errorf("%d bytes of the read that has the answer in it, %v", n, err)
		}
	})
}
