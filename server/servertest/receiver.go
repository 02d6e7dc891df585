package servertest

import (
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
)

// Request is one arrival at a Receiver.
type Request struct {
	Method string
	// URL is whole, as the sender wrote it.
	URL    string
	Path   string
	ID     string
	Header http.Header
	Body   []byte
	// Status is what was answered.
	Status int
}

// Receiver is a webhook endpoint on a socket. It answers with Answer and keeps a ledger.
type Receiver struct {
	// URL is its base; every path below it is received.
	URL string

	mu       sync.Mutex
	answer   func(Request) int
	requests []Request
}

// NewReceiver starts one that answers by answer, or 204 when that is nil; it ends with the test. answer
// may block: it runs on the request's goroutine.
func NewReceiver(t testing.TB, answer func(Request) int) *Receiver {
	r := &Receiver{answer: answer}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	r.URL = srv.URL
	return r
}

// ServeHTTP implements http.Handler.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	got := Request{
		Method: req.Method, URL: "http://" + req.Host + req.RequestURI, Path: req.URL.Path, ID: req.Header.Get("Webhook-Id"), Header: req.Header, Body: body, Status: http.StatusNoContent,
	}
	r.mu.Lock()
	answer := r.answer
	r.mu.Unlock()
	if answer != nil {
		got.Status = answer(got)
	}
	r.mu.Lock()
	r.requests = append(r.requests, got)
	r.mu.Unlock()
	w.WriteHeader(got.Status)
}

// Answer changes what is answered from now on; nil is 204.
func (r *Receiver) Answer(answer func(Request) int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

// Requests is the ledger so far, in order of answering.
func (r *Receiver) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Request(nil), r.requests...)
}

// Accepted counts the different webhook-ids that were answered with 2xx.
func (r *Receiver) Accepted() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	ids := map[string]bool{}
	for _, q := range r.requests {
		if q.Status/100 == 2 {
			ids[q.ID] = true
		}
	}
	return len(ids)
}
