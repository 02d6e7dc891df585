package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
)

// balance waits until everything that was published has arrived, and holds the two ledgers against each other.
// It returns how many deliveries are lost.
func balance(t *testing.T, published *publisherLedger, rcv *receiverLedger) int {
	t.Helper()
	want := published.all()
	rcv.await(len(rcv.paths) * len(want))
	missing := rcv.missing(want)
	for _, m := range missing[:min(len(missing), 10)] {
		t.Errorf("lost: %s", m)
	}
	for _, f := range rcv.faults(want) {
		t.Error(f)
	}
	return len(missing)
}

// publisherLedger is what the publisher knows: every event it sent, and those it has no answer for.
type publisherLedger struct {
	// lead is how many deliveries it keeps ahead of the receivers, 0 for any number, and pace the least time between
	// batches of one caller of publish.
	lead int
	pace time.Duration

	mu      sync.Mutex
	next    int
	bodies  map[string][32]byte
	unknown []*grapnelv1.Event
	// first is when an event was first sent, acked when it was acknowledged.
	first, acked map[string]time.Time
}

func newPublisherLedger(lead int) *publisherLedger {
	return &publisherLedger{
		lead: lead, bodies: map[string][32]byte{}, first: map[string]time.Time{}, acked: map[string]time.Time{},
	}
}

// publish sends batches until the server dies under it or ctx ends; it begins with what has no answer yet. It
// keeps some deliveries ahead of the receivers, so that each kill hits all parts at work and the backlog of
// hundreds of kills need not be waited for at the end.
func (l *publisherLedger) publish(ctx context.Context, conn *grpc.ClientConn, rcv *receiverLedger) {
	client := grapnelv1.NewPublishServiceClient(conn)
	for ctx.Err() == nil {
		if l.lead > 0 && l.sent()*len(rcv.paths)-rcv.distinct() > l.lead {
			pause := time.NewTimer(time.Millisecond)
			<-pause.C
			continue
		}
		pace := time.NewTimer(l.pace)
		events := l.take(20)
		resp, err := client.BatchPublish(ctx, &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + namespace, Events: events})
		l.mu.Lock()
		for i, e := range events {
			if err != nil || resp.GetResults()[i].GetError() != nil {
				l.unknown = append(l.unknown, e)
			} else {
				l.acked[e.GetId()] = time.Now()
			}
		}
		l.mu.Unlock()
		if err != nil {
			return
		}
		<-pace.C
	}
}

func (l *publisherLedger) sent() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// take returns n events: first those without an answer, then new ones.
func (l *publisherLedger) take(n int) []*grapnelv1.Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := min(n, len(l.unknown))
	events := append([]*grapnelv1.Event(nil), l.unknown[:k]...)
	l.unknown = l.unknown[k:]
	for len(events) < n {
		l.next++
		body := payload(200, int64(l.next), time.Now())
		e := event(int64(l.next), body)
		l.bodies[e.GetId()] = sha256.Sum256(body)
		l.first[e.GetId()] = time.Now()
		events = append(events, e)
	}
	return events
}

// settle resends what has no answer until all of it has one.
func (l *publisherLedger) settle(t *testing.T, conn *grpc.ClientConn) {
	t.Helper()
	client := grapnelv1.NewPublishServiceClient(conn)
	for len(l.unknown) > 0 {
		k := min(100, len(l.unknown))
		resp, err := client.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{
			Parent: "namespaces/" + namespace, Events: l.unknown[:k],
		})
		if err != nil {
			t.Fatalf("resend: %v", err)
		}
		for i, r := range resp.GetResults() {
			if r.GetError() != nil {
				t.Fatalf("resend: %v", r.GetError())
			}
			l.acked[l.unknown[i].GetId()] = time.Now()
		}
		l.unknown = l.unknown[k:]
	}
}

// times are when an event was first sent, and when it was acknowledged.
func (l *publisherLedger) times(id string) (first, acked time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first[id], l.acked[id]
}

func (l *publisherLedger) all() map[string][32]byte { return l.bodies }

// receiverLedger is what receivers saw, one for each path; every event goes to all of them.
type receiverLedger struct {
	paths []string
	// verify says what is wrong with a request's signature; it is called by many at a time.
	verify func(r *http.Request, body []byte) error
	// linger is how long a receiver takes for its n-th answer; nil means no time.
	linger func(n int) time.Duration

	mu    sync.Mutex
	seen  map[string]arrival // by path and event ID
	count int
	wrong []string
	// refused are events that a receiver of batches has named as failed once, together counts requests with several.
	refused  map[string]bool
	together int
}

type arrival struct {
	webhookID string
	body      [32]byte
}

// newReceiverLedger makes receivers that want Standard Webhooks signatures.
func newReceiverLedger(t *testing.T, paths ...string) *receiverLedger {
	t.Helper()
	v, err := webhook.NewVerifier(benchKey)
	if err != nil {
		t.Fatal(err)
	}
	return &receiverLedger{
		paths:  paths,
		verify: func(r *http.Request, body []byte) error { return v.Verify(r.Header, body) },
		seen:   map[string]arrival{}, refused: map[string]bool{},
	}
}

func (l *receiverLedger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // cut off by the kill; not an arrival
	}
	n, failed := l.note(r, body)
	if l.linger != nil {
		pause := time.NewTimer(l.linger(n))
		<-pause.C
	}
	webhook.AnswerBatch(w, failed)
}

// batchPath is of receivers that take batches, and each tenth event at its second coming.
const batchPath = "/batch"

// arrivalsOf are what a request brings, by event ID.
func arrivalsOf(r *http.Request, body []byte) (map[string]arrival, error) {
	if r.URL.Path != batchPath {
		return map[string]arrival{r.Header.Get("Ce-Id"): {r.Header.Get("Webhook-Id"), sha256.Sum256(body)}}, nil
	}
	events, err := webhook.ReadBatch(r.Header.Get("Content-Type"), body)
	got := map[string]arrival{}
	for _, e := range events {
		got[e.Attributes["id"]] = arrival{e.ID, sha256.Sum256(e.Body)}
	}
	return got, err
}

// note enters a request, and returns how many there have been, and what of it is not taken.
func (l *receiverLedger) note(r *http.Request, body []byte) (n int, failed []webhook.Failed) {
	bad := l.verify(r, body)
	all, err := arrivalsOf(r, body)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count++
	if bad != nil || err != nil {
		l.wrong = append(l.wrong, fmt.Sprintf("%s %s: bad signature: %v, or bad batch: %v", r.URL.Path, r.Header.Get("Webhook-Id"), bad, err))
	}
	if len(all) > 1 {
		l.together++
	}
	for id, got := range all {
		key := r.URL.Path + " " + id
		if r.URL.Path == batchPath && strings.HasSuffix(id, "7") && !l.refused[id] {
			l.refused[id] = true
			failed = append(failed, webhook.Failed{ID: got.webhookID, Reason: "not yet"})
			continue
		}
		if before, ok := l.seen[key]; ok && before != got {
			l.wrong = append(l.wrong, fmt.Sprintf("%s: came again as %s, before as %s", key, got.webhookID, before.webhookID))
		}
		l.seen[key] = got
	}
	return l.count, failed
}

// distinct counts the deliveries that have arrived, each once.
func (l *receiverLedger) distinct() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.seen)
}

// await waits until n deliveries have arrived, or none has for a minute.
func (l *receiverLedger) await(n int) {
	last, since := 0, time.Now()
	for have := l.distinct(); have < n && time.Since(since) < time.Minute; have = l.distinct() {
		if have != last {
			last, since = have, time.Now()
		}
		pause := time.NewTimer(20 * time.Millisecond)
		<-pause.C
	}
}

func (l *receiverLedger) missing(want map[string][32]byte) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []string
	for id := range want {
		for _, path := range l.paths {
			if _, ok := l.seen[path+" "+id]; !ok {
				out = append(out, path+" "+id)
			}
		}
	}
	return out
}

// faults are arrivals that should not have been, or not like that.
func (l *receiverLedger) faults(want map[string][32]byte) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := slices.Clone(l.wrong)
	for key, got := range l.seen {
		_, id, _ := strings.Cut(key, " ")
		body, ok := want[id]
		switch {
		case !ok:
			out = append(out, key+": was never published")
		case body != got.body:
			out = append(out, key+": arrived with other bytes")
		}
	}
	return out
}

func (l *receiverLedger) arrivals() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.count
}

// has reports whether an event has arrived at a path.
func (l *receiverLedger) has(path, event string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.seen[path+" "+event]
	return ok
}

// lingering receivers answer soon, and now and then so late that a plugin starts meanwhile: there is always something
// in flight.
func lingering(n int) time.Duration {
	if n%100 == 0 {
		return time.Second
	}
	return 5 * time.Millisecond
}
