package webhook_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/webhook"
)

func signedRequest(t testing.TB, id, body string) *http.Request {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/hooks", strings.NewReader(body))
	now := time.Now()
	r.Header.Set(webhook.HeaderID, id)
	r.Header.Set(webhook.HeaderTimestamp, strconv.FormatInt(now.Unix(), 10))
	r.Header.Set(webhook.HeaderSignature, sign(vectorSecret, id, now, body))
	return r
}

func serve(h http.Handler, r *http.Request) int {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Code
}

func TestHandlerHandsOutTheEvent(t *testing.T) {
	var got webhook.Event
	h := webhook.Handler(newVerifier(t, vectorSecret), func(_ context.Context, e webhook.Event) error {
		got = e
		return nil
	})
	r := signedRequest(t, "evt_1", `{"n":1}`)
	for name, value := range map[string]string{
		"content-type": "application/json", "ce-specversion": "1.0", "ce-id": "order-1", "ce-source": "/shop",
		"ce-type": "order.created", "ce-subject": "caf%C3%A9%20%22x%22", "ce-tenant": "100%", "x-other": "no",
	} {
		r.Header.Set(name, value)
	}
	if status := serve(h, r); status != http.StatusNoContent {
		t.Fatalf("status %d, want 204", status)
	}
	want := webhook.Event{
		ID: "evt_1", Timestamp: got.Timestamp, Type: "order.created", Source: "/shop", Subject: `café "x"`,
		ContentType: "application/json", Body: []byte(`{"n":1}`),
		Attributes: map[string]string{"specversion": "1.0", "id": "order-1", "tenant": "100%"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if strconv.FormatInt(got.Timestamp.Unix(), 10) != r.Header.Get(webhook.HeaderTimestamp) {
		t.Errorf("timestamp %v, want the signed one", got.Timestamp)
	}
}

func TestHandlerRefuses(t *testing.T) {
	calls := 0
	h := webhook.Handler(newVerifier(t, vectorSecret), func(context.Context, webhook.Event) error {
		calls++
		return nil
	}, webhook.MaxBody(16))
	tests := []struct {
		name   string
		change func(*http.Request)
		want   int
	}{
		{"method", func(r *http.Request) { r.Method = http.MethodGet }, http.StatusMethodNotAllowed},
		{"no headers", func(r *http.Request) { r.Header = http.Header{} }, http.StatusBadRequest},
		{"old", func(r *http.Request) { r.Header.Set(webhook.HeaderTimestamp, "1614265330") }, http.StatusUnauthorized},
		{"other signature", func(r *http.Request) { r.Header.Set(webhook.HeaderSignature, vectorHMAC) }, http.StatusUnauthorized},
		{"large body", func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(strings.Repeat("x", 17))) }, http.StatusRequestEntityTooLarge},
		{"broken body", func(r *http.Request) { r.Body = io.NopCloser(iotest.ErrReader(io.ErrUnexpectedEOF)) }, http.StatusBadRequest},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := signedRequest(t, "evt_1", "{}")
			tt.change(r)
			if got := serve(h, r); got != tt.want {
				t.Errorf("status %d, want %d", got, tt.want)
			}
		})
	}
	if calls != 0 {
		t.Errorf("handle was called %d times", calls)
	}
}

func TestHandlerHandsOutOnce(t *testing.T) {
	calls := map[string]int{}
	h := webhook.Handler(newVerifier(t, vectorSecret), func(_ context.Context, e webhook.Event) error {
		calls[e.ID]++
		return nil
	})
	for range 3 {
		for _, id := range []string{"a", "b"} {
			if status := serve(h, signedRequest(t, id, "{}")); status != http.StatusNoContent {
				t.Errorf("event %s: status %d, want 204", id, status)
			}
		}
	}
	if diff := cmp.Diff(map[string]int{"a": 1, "b": 1}, calls); diff != "" {
		t.Error(diff)
	}
}

func TestHandlerFailureIsRetried(t *testing.T) {
	var log bytes.Buffer
	calls := 0
	h := webhook.Handler(newVerifier(t, vectorSecret), func(context.Context, webhook.Event) error {
		if calls++; calls == 1 {
			return errors.New("database away")
		}
		return nil
	}, webhook.Logger(slog.New(slog.NewTextHandler(&log, nil))))
	for i, want := range []int{http.StatusInternalServerError, http.StatusNoContent, http.StatusNoContent} {
		if got := serve(h, signedRequest(t, "a", `{"card":"4242"}`)); got != want {
			t.Errorf("attempt %d: status %d, want %d", i+1, got, want)
		}
	}
	if calls != 2 {
		t.Errorf("handle was called %d times, want 2", calls)
	}
	if !strings.Contains(log.String(), "database away") || strings.Contains(log.String(), "4242") {
		t.Errorf("log %q: want the cause and not the body", log.String())
	}
}

func TestHandlerPanicReleases(t *testing.T) {
	calls := 0
	h := webhook.Handler(newVerifier(t, vectorSecret), func(context.Context, webhook.Event) error {
		if calls++; calls == 1 {
			panic("broken")
		}
		return nil
	})
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the panic was swallowed; net/http should see it")
			}
		}()
		serve(h, signedRequest(t, "a", "{}"))
	}()
	if got := serve(h, signedRequest(t, "a", "{}")); got != http.StatusNoContent {
		t.Errorf("after a panic: status %d, want 204", got)
	}
}

func TestHandlerConcurrentAttemptIsConflict(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	h := webhook.Handler(newVerifier(t, vectorSecret), func(context.Context, webhook.Event) error {
		close(entered)
		<-leave
		return nil
	})
	var wg sync.WaitGroup
	first := signedRequest(t, "a", "{}")
	wg.Go(func() {
		if got := serve(h, first); got != http.StatusNoContent {
			t.Errorf("first: status %d, want 204", got)
		}
	})
	<-entered
	if got := serve(h, signedRequest(t, "a", "{}")); got != http.StatusConflict {
		t.Errorf("second, meanwhile: status %d, want 409", got)
	}
	close(leave)
	wg.Wait()
}

// brokenStore fails where it is told to.
type brokenStore struct {
	claim, commit error
	released      atomic.Int32
}

func (s *brokenStore) Claim(context.Context, string) (webhook.Claim, error) {
	return webhook.ClaimNew, s.claim
}
func (s *brokenStore) Commit(context.Context, string) error { return s.commit }
func (s *brokenStore) Release(ctx context.Context, _ string) error {
	s.released.Add(1)
	return ctx.Err()
}

func TestHandlerStoreFailures(t *testing.T) {
	fine := func(context.Context, webhook.Event) error { return nil }
	v := newVerifier(t, vectorSecret)
	if got := serve(webhook.Handler(v, fine, webhook.Seen(&brokenStore{claim: errors.New("away")})), signedRequest(t, "a", "{}")); got != http.StatusInternalServerError {
		t.Errorf("claim failed: status %d, want 500", got)
	}
	store := &brokenStore{commit: errors.New("away")}
	if got := serve(webhook.Handler(v, fine, webhook.Seen(store)), signedRequest(t, "a", "{}")); got != http.StatusNoContent {
		t.Errorf("commit failed after the work was done: status %d, want 204", got)
	}
	if n := store.released.Load(); n != 0 {
		t.Errorf("released %d times after the work was done", n)
	}
}

// flakyStore is a store that cannot be told how events ended while it is away.
type flakyStore struct {
	*webhook.MemoryStore
	away atomic.Bool
}

func (s *flakyStore) Commit(ctx context.Context, id string) error {
	if s.away.Load() {
		return errors.New("away")
	}
	return s.MemoryStore.Commit(ctx, id)
}

func (s *flakyStore) Release(ctx context.Context, id string) error {
	if s.away.Load() {
		return errors.New("away")
	}
	return s.MemoryStore.Release(ctx, id)
}

// TestStoreThatCouldNotBeTold: an event that was handled is answered as such, also when its answer was lost and
// the store had not been told; one that failed is handed out again. Neither is busy for ever.
func TestStoreThatCouldNotBeTold(t *testing.T) {
	v := newVerifier(t, vectorSecret)
	calls := map[string]int{}
	fail := true
	handle := func(_ context.Context, e webhook.Event) error {
		calls[e.ID]++
		if e.ID == "failing" && fail {
			return errors.New("database away")
		}
		return nil
	}
	store := &flakyStore{MemoryStore: webhook.NewMemoryStore(0, 0)}
	own := webhook.Handler(v, handle, webhook.Seen(store))
	other := webhook.Handler(v, handle, webhook.Seen(store)) // as in another process
	expect := func(h http.Handler, id string, want int) {
		t.Helper()
		if got := serve(h, signedRequest(t, id, "{}")); got != want {
			t.Errorf("event %s: status %d, want %d", id, got, want)
		}
	}
	store.away.Store(true)
	expect(own, "fine", http.StatusNoContent)
	expect(own, "fine", http.StatusNoContent) // the answer was lost
	expect(own, "failing", http.StatusInternalServerError)
	expect(own, "failing", http.StatusInternalServerError)
	store.away.Store(false)
	fail = false
	expect(own, "failing", http.StatusNoContent)
	expect(own, "more", http.StatusNoContent) // by now the store has been told of the others
	expect(other, "fine", http.StatusNoContent)
	expect(other, "failing", http.StatusNoContent)
	if want := map[string]int{"fine": 1, "failing": 2, "more": 1}; !maps.Equal(calls, want) {
		t.Errorf("handed out %v, want %v", calls, want)
	}
}

func gzipped(t testing.TB, plain []byte) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(plain)
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestHandlerDecompresses(t *testing.T) {
	const limit = 1000
	packed := gzipped(t, []byte(`{"n":1}`))
	tests := []struct {
		name, encoding, body string
		want                 int
	}{
		{"gzip", "gzip", packed, http.StatusNoContent},
		{"x-gzip", "X-GZIP", packed, http.StatusNoContent},
		{"identity", "identity", `{"n":1}`, http.StatusNoContent},
		{"no gzip", "gzip", `{"n":1}`, http.StatusBadRequest},
		{"cut off", "gzip", packed[:len(packed)-3], http.StatusBadRequest},
		{"bomb", "gzip", gzipped(t, make([]byte, 100*limit)), http.StatusRequestEntityTooLarge},
		{"just fits", "gzip", gzipped(t, make([]byte, limit)), http.StatusNoContent},
		{"just too large", "gzip", gzipped(t, make([]byte, limit+1)), http.StatusRequestEntityTooLarge},
		{"twice", "gzip, gzip", packed, http.StatusUnsupportedMediaType},
		{"unknown", "br", packed, http.StatusUnsupportedMediaType},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got webhook.Event
			h := webhook.Handler(newVerifier(t, vectorSecret), func(_ context.Context, e webhook.Event) error {
				got = e
				return nil
			}, webhook.MaxBody(limit))
			r := signedRequest(t, "a", tt.body)
			r.Header.Set("Content-Encoding", tt.encoding)
			if status := serve(h, r); status != tt.want {
				t.Fatalf("status %d, want %d", status, tt.want)
			}
			if tt.want == http.StatusNoContent && tt.name != "just fits" && string(got.Body) != `{"n":1}` {
				t.Errorf("body %q, want what was compressed", got.Body)
			}
		})
	}
}

func TestHandlerReadsStructuredCloudEvents(t *testing.T) {
	const body = `{"specversion":"1.0","id":"order-1","source":"/shop","type":"order.created","subject":"café","tenant":"eu",` +
		`"sequence":17,"sampled":true,"dataschema":null,"datacontenttype":"application/json","data":{"type":"not this"}}`
	var got webhook.Event
	h := webhook.Handler(newVerifier(t, vectorSecret), func(_ context.Context, e webhook.Event) error {
		got = e
		return nil
	})
	r := signedRequest(t, "evt_1", body)
	r.Header.Set("Content-Type", "application/cloudevents+json; charset=utf-8")
	r.Header.Set("Ce-Type", "forged") // the headers are not signed
	if status := serve(h, r); status != http.StatusNoContent {
		t.Fatalf("status %d, want 204", status)
	}
	want := webhook.Event{
		ID: "evt_1", Timestamp: got.Timestamp, Type: "order.created", Source: "/shop", Subject: "café",
		ContentType: "application/cloudevents+json; charset=utf-8", Body: []byte(body),
		Attributes: map[string]string{"specversion": "1.0", "id": "order-1", "tenant": "eu", "sequence": "17", "sampled": "true", "datacontenttype": "application/json"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, wrong := range []string{`[]`, `null`, `{"type":{}}`, `{"type":`, ``} {
		r := signedRequest(t, "evt_2", wrong)
		r.Header.Set("Content-Type", "application/cloudevents+json")
		if status := serve(h, r); status != http.StatusBadRequest {
			t.Errorf("%s: status %d, want 400", wrong, status)
		}
	}
}

func TestHandlerBoundsWhatStrangersSend(t *testing.T) {
	h := webhook.Handler(newVerifier(t, vectorSecret), func(context.Context, webhook.Event) error { return nil })
	many := signedRequest(t, "a", "{}")
	for i := range 100 {
		many.Header.Set("Ce-X"+strconv.Itoa(i), "1")
	}
	large := signedRequest(t, "a", "{}")
	large.Header.Set("Ce-X", strings.Repeat("x", 100<<10))
	for name, r := range map[string]*http.Request{"many attributes": many, "large attributes": large} {
		if status := serve(h, r); status != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("%s: status %d, want 431", name, status)
		}
	}
	for name, change := range map[string]func(http.Header){
		"no id":     func(h http.Header) { h.Del(webhook.HeaderID) },
		"old":       func(h http.Header) { h.Set(webhook.HeaderTimestamp, "1") },
		"signature": func(h http.Header) { h.Del(webhook.HeaderSignature) },
	} {
		r := signedRequest(t, "a", "{}")
		change(r.Header)
		read := false
		r.Body = io.NopCloser(readerFunc(func([]byte) (int, error) { read = true; return 0, io.EOF }))
		if status := serve(h, r); status == http.StatusNoContent || read {
			t.Errorf("%s: status %d, body read: %v; want a refusal without reading it", name, status, read)
		}
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestMemoryStoreForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := webhook.NewMemoryStore(2, time.Hour)
		claim := func(id string, want webhook.Claim) {
			t.Helper()
			if got, err := s.Claim(t.Context(), id); err != nil || got != want {
				t.Errorf("Claim(%s) = %v, %v, want %v", id, got, err, want)
			}
		}
		handle := func(id string) {
			t.Helper()
			claim(id, webhook.ClaimNew)
			if err := s.Commit(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		handle("z")
		handle("a")
		claim("open", webhook.ClaimNew)
		claim("z", webhook.ClaimDone) // as many as the limit are remembered
		handle("b")
		claim("b", webhook.ClaimDone)
		handle("c")
		claim("open", webhook.ClaimBusy) // never forgotten while it is open
		claim("c", webhook.ClaimDone)
		handle("a") // was pushed out by the limit
		<-time.After(time.Hour)
		claim("c", webhook.ClaimNew) // too old
		claim("open", webhook.ClaimBusy)
		if err := errors.Join(s.Release(t.Context(), "open"), s.Release(t.Context(), "never claimed")); err != nil {
			t.Error(err)
		}
		claim("open", webhook.ClaimNew)
	})
}

func TestMemoryStoreRemembersAsManyAsItsLimit(t *testing.T) {
	for _, limit := range []int{1, 2, 7} {
		s := webhook.NewMemoryStore(limit, time.Hour)
		for i := range limit {
			id := strconv.Itoa(i)
			if got, err := s.Claim(t.Context(), id); err != nil || got != webhook.ClaimNew {
				t.Errorf("limit %d: Claim(%s) = %v, %v", limit, id, got, err)
			}
			if err := s.Commit(t.Context(), id); err != nil {
				t.Error(err)
			}
		}
		for i := range limit {
			if got, _ := s.Claim(t.Context(), strconv.Itoa(i)); got != webhook.ClaimDone {
				t.Errorf("limit %d: event %d is forgotten", limit, i)
			}
		}
	}
}

func TestMemoryStoreIsBounded(t *testing.T) {
	s := webhook.NewMemoryStore(100, time.Hour)
	for i := range 10_000 {
		id := strconv.Itoa(i)
		if got, err := s.Claim(t.Context(), id); err != nil || got != webhook.ClaimNew {
			t.Fatalf("Claim(%s) = %v, %v", id, got, err)
		}
		if err := s.Commit(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if got, _ := s.Claim(t.Context(), "9999"); got != webhook.ClaimDone {
		t.Errorf("the newest is forgotten")
	}
	if got, _ := s.Claim(t.Context(), "9000"); got != webhook.ClaimNew {
		t.Errorf("an old one is kept beyond the limit")
	}
}
