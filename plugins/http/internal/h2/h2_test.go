package h2

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
)

// TestConnectionsAge: a connection that is busy all the time takes no new requests after its day.
func TestConnectionsAge(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv.EnableHTTP2 = true
	closed := make(chan struct{}, 2)
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			closed <- struct{}{}
		}
	}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	roots := x509.NewCertPool()
	roots.AddCert(srv.Certificate())
	var dials atomic.Int32
	o := New(NewTransport(), srv.Listener.Addr().String(), func(*answer.Timings) (*tls.Conn, error) {
		dials.Add(1)
		return tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}})
	})
	t.Cleanup(o.Drop)
	send := func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		req, err := http.NewRequest(http.MethodPost, srv.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		if a, err := o.Do(ctx, &Request{HTTP: req, Body: []byte("x"), Wants: answer.Wants{Body: 10}}); err != nil || a.Status != 200 {
			t.Fatalf("%v, %v", a, err)
		}
	}
	send()
	send()
	old := o.conns[0]
	old.made = old.made.Add(-maxAge - time.Second)
	send()
	if n := dials.Load(); n != 2 || len(o.conns) != 1 || o.conns[0] == old {
		t.Errorf("%d dials, %d connections", n, len(o.conns))
	}
	// It closes when its last request has left it, which net/http may do a moment after its answer.
	select {
	case <-closed:
	case <-time.After(time.Minute):
		t.Error("the old connection is open although nothing is under way on it")
	}
	if o.conns[0].Err() != nil {
		t.Error("the new connection is closed")
	}
}
