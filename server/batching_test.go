package server_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
	"github.com/grapnel/grapnel/server/servertest"
)

func batchesOf(n int32, format grapnelv1.Batching_Format) func(*grapnelv1.Subscription) {
	return func(sub *grapnelv1.Subscription) {
		sub.Batching = &grapnelv1.Batching{MaxEvents: n, Format: format, MaxWait: durationpb.New(200 * time.Millisecond)}
		sub.RetryPolicy = fastRetries()
	}
}

// batchReceiver takes batches with the SDK, and fails what fails says.
type batchReceiver struct {
	http.Handler
	mu      sync.Mutex
	sizes   []int // of requests, by what was handed out
	handled map[string]int
	events  map[string]webhook.Event // by their publisher's id
	ids     []string                 // webhook-ids of requests
	protos  map[string]bool
	size    int
}

func newBatchReceiver(t *testing.T, key string, fails func(e webhook.Event, nth int) error) *batchReceiver {
	t.Helper()
	verifier, err := webhook.NewVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	r := &batchReceiver{handled: map[string]int{}, events: map[string]webhook.Event{}, protos: map[string]bool{}}
	h := webhook.BatchHandler(verifier, func(_ context.Context, e webhook.Event) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.size++
		r.handled[e.ID]++
		r.events[e.Attributes["id"]] = e
		return fails(e, r.handled[e.ID])
	})
	var one sync.Mutex // requests, so that what was handed out is one's
	r.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		one.Lock()
		defer one.Unlock()
		h.ServeHTTP(w, req)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.sizes = append(r.sizes, r.size)
		r.ids = append(r.ids, req.Header.Get("Webhook-Id"))
		r.protos[req.Proto] = true
		r.size = 0
	})
	return r
}

func allWell(webhook.Event, int) error { return nil }

// batchesOnEveryStack delivers in every form over HTTP/1.1, TLS and HTTP/2. What the receiver names, and no other, comes again.
func batchesOnEveryStack(t *testing.T, s *stand) {
	ca := newAuthority(t)
	forms := map[string]grapnelv1.Batching_Format{
		"array": grapnelv1.Batching_FORMAT_JSON_ARRAY, "lines": grapnelv1.Batching_FORMAT_NDJSON, "cloud": grapnelv1.Batching_FORMAT_CLOUDEVENTS,
	}
	for _, stack := range []string{"plain", "tls", "h2"} {
		for form, format := range forms {
			for _, gzip := range []bool{false, true} {
				id := fmt.Sprintf("%s-%s-%v", stack, form, gzip)
				rcv := newBatchReceiver(t, s.key, func(e webhook.Event, nth int) error {
					if strings.HasSuffix(e.Attributes["id"], "3") && nth == 1 {
						return errors.New("not that one")
					}
					return nil
				})
				var uri string
				var way route
				if stack == "plain" {
					srv := httptest.NewServer(rcv)
					t.Cleanup(srv.Close)
					uri = srv.URL
				} else {
					uri = serveSecurely(t, ca.serverConfig(tls.NoClientCert), stack == "h2", rcv).url
					way.secrets = map[string]string{"ca": ca.pem}
				}
				s.over(id, uri, way, func(sub *grapnelv1.Subscription) {
					batchesOf(10, format)(sub)
					if gzip {
						sub.PayloadShape = &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}
					}
				})
				first := s.made
				s.send(id, 30)
				rcv.check(t, s, id, first, 30)
				want := "HTTP/1.1"
				if stack == "h2" {
					want = "HTTP/2.0"
				}
				if !rcv.protos[want] || len(rcv.protos) != 1 {
					t.Errorf("%s: came over %v", id, rcv.protos)
				}
			}
		}
	}
}

func (r *batchReceiver) check(t *testing.T, s *stand, id string, first, n int) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.events) != n || slices.Max(r.sizes) > 10 || len(r.sizes) > n/2 {
		t.Errorf("%s: %d events in requests of %v", id, len(r.events), r.sizes)
	}
	for i := first + 1; i <= first+n; i++ {
		name := fmt.Sprintf("e%d", i)
		e, times := r.events[name], 1
		if strings.HasSuffix(name, "3") {
			times = 2
		}
		if e.Type != id || e.Source == "" || string(e.Body) != fmt.Sprintf(`{"n": %d}`, i) || !strings.HasPrefix(e.ID, "evt_") || r.handled[e.ID] != times {
			t.Errorf("%s: %s came %d times, want %d: %+v", id, name, r.handled[e.ID], times, e)
		}
	}
	for _, d := range s.of(id, "state = SUCCEEDED") {
		a := d.GetLastAttempt()
		want := int32(1)
		if strings.HasSuffix(d.GetEvent(), "3") {
			want = 2
		}
		if d.GetAttemptCount() != want || !slices.Contains(r.ids, a.GetBatchId()) || a.GetBatchSize() < 1 || a.GetBatchSize() > 10 {
			t.Errorf("%s: %s after %d attempts, the last %v", id, d.GetEvent(), d.GetAttemptCount(), a)
		}
	}
}

// partialAnswers are read from bodies and headers, with what they get wrong.
func partialAnswers(t *testing.T, s *stand) {
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, ids []string)
		failed int    // of ten
		says   string // of one that failed, or of one that did not
	}{
		"objects": {func(w http.ResponseWriter, ids []string) {
			_, _ = fmt.Fprintf(w, `{"ok": 8, "failed": [{"id": %q, "reason": "no\u0000such customer"}, {"id": %q}]}`, ids[0], ids[9])
		}, 2, "named it as failed: no"},
		"texts": {func(w http.ResponseWriter, ids []string) {
			w.WriteHeader(http.StatusMultiStatus)
			_, _ = fmt.Fprintf(w, `{"failed": [%q]}`, ids[4])
		}, 1, "207 and named it"},
		"header": {func(w http.ResponseWriter, ids []string) {
			w.Header().Add("Webhook-Failed-Ids", ids[0]+", "+ids[1])
			w.Header().Add("Webhook-Failed-Ids", ids[2])
			w.WriteHeader(http.StatusNoContent)
		}, 3, "204 and named it"},
		"strangers": {func(w http.ResponseWriter, _ []string) { _, _ = fmt.Fprint(w, `{"failed": ["evt_nobody", 7, {}]}`) }, 0, `names 3 as failed that are not in the batch, such as "evt_nobody"`},
		"all of them": {func(w http.ResponseWriter, ids []string) {
			_, _ = fmt.Fprintf(w, `{"failed": ["%s"]}`, strings.Join(ids, `","`))
		}, 10, "named it"},
		"none":     {func(w http.ResponseWriter, _ []string) { _, _ = fmt.Fprint(w, `{"failed": []}`) }, 0, ""},
		"no list":  {func(w http.ResponseWriter, _ []string) { _, _ = fmt.Fprint(w, `{"failed": 3}`) }, 10, `"failed" is no list`},
		"no json":  {func(w http.ResponseWriter, _ []string) { _, _ = fmt.Fprint(w, `{it's all right}`) }, 0, ""},
		"a number": {func(w http.ResponseWriter, _ []string) { _, _ = fmt.Fprint(w, `{"failed": 0}`) }, 0, ""},
		"without end": {func(w http.ResponseWriter, ids []string) {
			_, _ = fmt.Fprintf(w, `{"failed": [%q, `, ids[0])
			_, _ = fmt.Fprint(w, strings.Repeat(`"evt_somebody", `, 10_000), `""]}`)
		}, 10, "not to be read to its end"},
		"an essay": {func(w http.ResponseWriter, _ []string) {
			_, _ = fmt.Fprint(w, `{"thanks": "`, strings.Repeat("a lot ", 100_000), `"}`)
		}, 0, "longer than 64 KiB"},
		"broken off": {func(w http.ResponseWriter, _ []string) {
			_, _ = fmt.Fprint(w, `{"taken": 7, `)
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, 10, "broke off"},
		"too many headers": {func(w http.ResponseWriter, ids []string) {
			for range 3000 {
				w.Header().Add("Webhook-Failed-Ids", ids[0])
			}
		}, 10, "broke off"},
		"marked": {func(w http.ResponseWriter, ids []string) {
			_, _ = fmt.Fprintf(w, "\uFEFF"+`{"failed": [%q]}`, ids[0])
		}, 1, "named it"},
		"a slow one": {func(w http.ResponseWriter, ids []string) {
			_, _ = fmt.Fprint(w, `{"failed": `)
			_ = http.NewResponseController(w).Flush()
			time.Sleep(1500 * time.Millisecond) // longer than other answers that say yes may take
			_, _ = fmt.Fprintf(w, `[%q]}`, ids[0])
		}, 1, "named it"},
		"a refusal": {func(w http.ResponseWriter, ids []string) {
			w.WriteHeader(http.StatusBadGateway)
			_, _ = fmt.Fprintf(w, `{"failed": [%q]}`, ids[0])
		}, 10, "502"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := &stand{Server: s.In(t), t: t, lab: s.lab, ns: s.ns, key: s.key}
			id := "p-" + strings.ReplaceAll(name, " ", "-")
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				events, err := webhook.ReadBatch(r.Header.Get("Content-Type"), body)
				if err != nil || len(events) != 10 {
					t.Errorf("%d events, %v", len(events), err)
					return
				}
				ids := make([]string, len(events))
				for i := range events {
					ids[i] = events[i].ID
				}
				tt.answer(w, ids)
			}))
			t.Cleanup(srv.Close)
			s.over(id, srv.URL, route{}, func(sub *grapnelv1.Subscription) {
				batchesOf(10, 0)(sub)
				sub.Batching.MaxWait = durationpb.New(5 * time.Second)
				sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 1}
			})
			for i := range 10 {
				s.Publish(s.ns, fmt.Sprint(id, i), id, []byte(`{}`))
			}
			servertest.Await(t, "all to end", func() bool {
				return len(s.of(id, "state = SUCCEEDED OR state = EXHAUSTED")) == 10
			})
			said := ""
			for _, d := range s.of(id, "state = SUCCEEDED OR state = EXHAUSTED") {
				for _, a := range s.attempts(d.GetName()) {
					said += a.GetError() + "\n"
					if n := len(a.GetResponseBody()); n > 4096/2 {
						t.Errorf("%d bytes of the answer are kept with each of ten", n)
					}
				}
			}
			if n := len(s.of(id, "state = EXHAUSTED")); n != tt.failed || !strings.Contains(said, tt.says) || strings.Contains(said, "\x00") {
				t.Errorf("%d failed, want %d; said %q, want %q", n, tt.failed, said, tt.says)
			}
		})
	}
}

// poisonedBatch: an event that the receiver refuses with everything that is in its request is soon alone.
func poisonedBatch(t *testing.T, s *stand) {
	rcv := newBatchReceiver(t, s.key, allWell)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rec := &peek{}
		r.Body = rec.over(r)
		if strings.Contains(string(rec.body), `"poison"`) {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		rcv.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	s.over("poisoned", srv.URL, route{}, func(sub *grapnelv1.Subscription) {
		batchesOf(50, 0)(sub)
		sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3, Schedule: seconds(0, 0)}
	})
	for i := range 50 {
		data := `{}`
		if i == 20 {
			data = `"poison"`
		}
		s.Publish(s.ns, fmt.Sprint("poisoned", i), "poisoned", []byte(data))
	}
	servertest.Await(t, "all to end", func() bool { return len(s.of("poisoned", "state = SUCCEEDED OR state = EXHAUSTED")) == 50 })
	failed := s.of("poisoned", "state = EXHAUSTED")
	if len(failed) != 1 || !strings.HasSuffix(failed[0].GetEvent(), "poisoned20") || failed[0].GetLastAttempt().GetBatchSize() != 1 {
		t.Errorf("failed: %v", failed)
	}
	for _, d := range s.of("poisoned", "state = SUCCEEDED") {
		if d.GetAttemptCount() > 2 {
			t.Errorf("%s took %d attempts", d.GetEvent(), d.GetAttemptCount())
		}
	}
}

// contradictions are refused in words when a subscription is saved.
func batchContradictions(t *testing.T, s *stand) {
	for id, tt := range map[string]struct {
		uri    string
		route  route
		change func(*grapnelv1.Subscription)
		words  []string
	}{
		"nats": {"nats://127.0.0.1:4222", route{plugin: "nats", config: map[string]any{"subject": "orders"}}, batchesOf(10, 0),
			[]string{"subscription.batching", "plugins/nats carries one event in a request", "plugins/http"}},
		"grpc": {"grpcs://127.0.0.1:443", route{plugin: "grpc"}, batchesOf(10, 0), []string{"subscription.batching", "plugins/grpc carries one event"}},
		"shaped": {"http://127.0.0.1:1", route{}, func(sub *grapnelv1.Subscription) {
			batchesOf(10, 0)(sub)
			sub.PayloadShape = &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS}
		}, []string{"payload_shape.format", "batching.format"}},
		"typed": {"http://127.0.0.1:1", route{}, func(sub *grapnelv1.Subscription) {
			batchesOf(10, 0)(sub)
			sub.PayloadShape = &grapnelv1.PayloadShape{ContentType: "text/csv"}
		}, []string{"payload_shape.content_type", "text/csv"}},
		"few":  {"http://127.0.0.1:1", route{}, batchesOf(1, 0), []string{"batching.max_events", "1 is out of range; want 2 to 1000"}},
		"many": {"http://127.0.0.1:1", route{}, batchesOf(1001, 0), []string{"batching.max_events", "1000"}},
		"wait": {"http://127.0.0.1:1", route{}, func(sub *grapnelv1.Subscription) {
			sub.Batching = &grapnelv1.Batching{MaxWait: durationpb.New(time.Minute)}
		}, []string{"batching.max_wait", "10s"}},
		"bytes": {"http://127.0.0.1:1", route{}, func(sub *grapnelv1.Subscription) {
			sub.Batching = &grapnelv1.Batching{MaxBytes: 100}
		}, []string{"batching.max_bytes", "100 is out of range; want 1024 to 524288"}},
		"other": {"http://127.0.0.1:1", route{}, batchesOf(10, 9), []string{"batching.format"}},
	} {
		wantWords(t, s.refuses(id, tt.uri, tt.route, tt.change), tt.words...)
	}
}

// peek reads a request's body and gives it back.
type peek struct{ body []byte }

func (p *peek) over(r *http.Request) io.ReadCloser {
	p.body, _ = io.ReadAll(r.Body)
	return io.NopCloser(bytes.NewReader(p.body))
}
