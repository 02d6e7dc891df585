package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/grapnel/grapnel/sdk/webhook"
)

// arrival is one request at the receiver.
type arrival struct {
	path, id  string
	signature string
	body      string
	at        time.Time
	verified  bool
	status    int // what it was answered with; 0 when it never was
}

// receiver is what a customer would run: it verifies signatures. The story makes it fail and stall.
type receiver struct {
	listener net.Listener
	server   *http.Server
	serving  sync.WaitGroup

	mu       sync.Mutex // guards the fields below
	verifier *webhook.Verifier
	refuse   int           // how many requests to /flaky are still answered 503
	hold     chan struct{} // while not nil, requests to /slow wait for it to close
	arrivals []arrival
	changed  chan struct{} // closed and renewed with every arrival
}

func startReceiver() (*receiver, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &receiver{listener: listener, changed: make(chan struct{})}
	r.server = &http.Server{Handler: r, ReadTimeout: 30 * time.Second}
	r.serving.Go(func() { _ = r.server.Serve(listener) })
	return r, nil
}

func (r *receiver) addr() string { return r.listener.Addr().String() }

func (r *receiver) close() error {
	err := r.server.Close() // cuts the requests that are held, too
	r.serving.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// trust sets the secret to verify with.
func (r *receiver) trust(secret string) error {
	v, err := webhook.NewVerifier(secret)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.verifier = v
	return nil
}

// refuseNext makes the next n requests to /flaky fail.
func (r *receiver) refuseNext(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refuse = n
}

// holdSlow makes requests to /slow wait until release is called.
func (r *receiver) holdSlow() (release func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	hold := make(chan struct{})
	r.hold = hold
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.hold = nil
		close(hold)
	}
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, 1<<20))
	if err != nil {
		return
	}
	r.mu.Lock()
	a := arrival{
		path: req.URL.Path, id: req.Header.Get(webhook.HeaderID), signature: req.Header.Get(webhook.HeaderSignature),
		body: string(body), at: time.Now(), status: http.StatusNoContent,
		verified: r.verifier != nil && r.verifier.Verify(req.Header, body) == nil,
	}
	hold := r.hold
	switch {
	case !a.verified:
		a.status = http.StatusUnauthorized
	case a.path == "/flaky" && r.refuse > 0:
		r.refuse--
		a.status = http.StatusServiceUnavailable
	case a.path == "/slow" && hold != nil:
		a.status = 0
	}
	r.arrivals = append(r.arrivals, a)
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
	if a.status == 0 {
		select {
		case <-hold:
		case <-req.Context().Done():
		}
		// The sender is gone by now; answering 503 makes sure that this try does not count.
		a.status = http.StatusServiceUnavailable
	}
	w.WriteHeader(a.status)
}

// wait returns the arrivals that match once there are n of them with different ids.
func (r *receiver) wait(ctx context.Context, n int, match func(arrival) bool) ([]arrival, error) {
	for {
		r.mu.Lock()
		var found []arrival
		ids := map[string]bool{}
		for _, a := range r.arrivals {
			if match(a) && !ids[a.id] {
				ids[a.id] = true
				found = append(found, a)
			}
		}
		changed := r.changed
		r.mu.Unlock()
		if len(found) >= n {
			return found, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return found, ctx.Err()
		}
	}
}
