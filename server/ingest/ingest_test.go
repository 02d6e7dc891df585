package ingest_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

// tenants is a registry that stands still.
type tenants struct{ snapshot *subscription.Snapshot }

func (t tenants) Snapshot() *subscription.Snapshot { return t.snapshot }

func newNamespace(t *testing.T, uid byte, p *grapnelv1.Namespace) *subscription.Namespace {
	t.Helper()
	p.Uid = uuid.UUID{15: uid}.String()
	n, err := subscription.NewNamespace(p)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func newTenants(t *testing.T, quota *grapnelv1.Quota, subs ...*grapnelv1.Subscription) tenants {
	t.Helper()
	namespaces := []*subscription.Namespace{
		newNamespace(t, 1, &grapnelv1.Namespace{Name: "namespaces/acme", Quota: quota}),
		newNamespace(t, 2, &grapnelv1.Namespace{Name: "namespaces/gone", State: grapnelv1.Namespace_STATE_DELETED}),
	}
	var all []*subscription.Subscription
	for i, p := range subs {
		p.Uid = uuid.NewSHA1(uuid.Nil, []byte(p.GetName())).String()
		if p.GetUri() == "" {
			p.Uri = "https://example.com"
		}
		if p.GetState() == 0 {
			p.State = grapnelv1.Subscription_STATE_ACTIVE
		}
		sub, err := subscription.New(p)
		if err != nil {
			t.Fatalf("subscription %d: %v", i, err)
		}
		all = append(all, sub)
	}
	return tenants{subscription.NewSnapshot(1, namespaces, all)}
}

// shelf is a journal in memory.
type shelf struct {
	mu     sync.Mutex
	events map[string]delivery.Publication
	calls  int
	open   int64
	err    error
}

func (s *shelf) Append(_ context.Context, events []delivery.Publication) []delivery.AppendResult {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	results := make([]delivery.AppendResult, len(events))
	for i, pub := range events {
		e := pub.Event
		if s.err != nil {
			results[i].Err = s.err
			continue
		}
		if old, ok := s.events[e.ID]; ok {
			results[i] = delivery.AppendResult{Event: old.Event, Duplicate: true}
			continue
		}
		if s.events == nil {
			s.events = map[string]delivery.Publication{}
		}
		s.events[e.ID] = pub
		results[i].Event = e
	}
	return results
}

func (s *shelf) OpenIn(delivery.NamespaceKey) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open
}

func events(n int, change func(int, *delivery.Event)) []*delivery.Event {
	out := make([]*delivery.Event, n)
	for i := range out {
		out[i] = &delivery.Event{ID: fmt.Sprint("e", i), Type: "order.created", Time: time.Now(), Payload: []byte("{}")}
		if change != nil {
			change(i, out[i])
		}
	}
	return out
}

func TestTargetsAreThoseThatMatch(t *testing.T) {
	const prefix = "namespaces/acme/subscriptions/"
	registry := newTenants(t, nil,
		&grapnelv1.Subscription{Name: prefix + "all"},
		&grapnelv1.Subscription{Name: prefix + "disabled", EventTypes: []string{"order.*"}, State: grapnelv1.Subscription_STATE_DISABLED},
		&grapnelv1.Subscription{Name: prefix + "paused", EventTypes: []string{"order.created"}, State: grapnelv1.Subscription_STATE_PAUSED,
			RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 3, MaxAge: durationpb.New(time.Hour)}},
		&grapnelv1.Subscription{Name: prefix + "payload", Condition: `event.data.amount > 10.0 && event.subject == "s"`},
		&grapnelv1.Subscription{Name: prefix + "users", EventTypes: []string{"user.*"}},
		&grapnelv1.Subscription{Name: "namespaces/gone/subscriptions/foreign"},
	)
	journal := &shelf{}
	in := ingest.New(ingest.Options{Registry: registry, Journal: journal})
	got := in.Publish(t.Context(), "acme", events(1, func(_ int, e *delivery.Event) {
		e.ContentType, e.Payload, e.Subject = "application/json", []byte(`{"amount": 11}`), "s"
	}))
	if got[0].Err != nil || got[0].Duplicate {
		t.Fatal(got[0])
	}
	snap := registry.Snapshot()
	target := func(id string, attempts int, age time.Duration, skip bool) delivery.Target {
		return delivery.Target{Subscription: id, UID: snap.Subscription("acme", id).UID, MaxAttempts: attempts, MaxAge: age, Skip: skip}
	}
	const fourDays = 96 * time.Hour
	want := []delivery.Target{
		target("all", 10, fourDays, false), target("disabled", 10, fourDays, true),
		target("paused", 3, time.Hour, false), target("payload", 10, fourDays, false),
	}
	if diff := cmp.Diff(want, journal.events[got[0].Event.ID].Targets); diff != "" {
		t.Error(diff)
	}
	if got[0].Event.Namespace != delivery.UID(snap.Namespace("acme").UID).NamespaceKey() {
		t.Error("no namespace")
	}
	in.Publish(t.Context(), "acme", events(1, func(_ int, e *delivery.Event) { e.ID, e.Type = "none", "user.left" }))
	if n := len(journal.events["none"].Targets); n != 2 { // all, users
		t.Errorf("%d targets", n)
	}
}

func TestRefusals(t *testing.T) {
	registry := newTenants(t, &grapnelv1.Quota{MaxEventBytes: 4, MaxOpenDeliveries: 7})
	journal := &shelf{}
	in := ingest.New(ingest.Options{Registry: registry, Journal: journal})
	for namespace, want := range map[string]error{"none": ingest.ErrNamespaceNotFound, "gone": ingest.ErrNamespaceDeleted} {
		for _, r := range in.Publish(t.Context(), namespace, events(2, nil)) {
			if !errors.Is(r.Err, want) {
				t.Errorf("%s: %v", namespace, r.Err)
			}
		}
		if err := in.Refusal(namespace); !errors.Is(err, want) {
			t.Errorf("%s: %v", namespace, err)
		}
	}
	got := in.Publish(t.Context(), "acme", events(3, func(i int, e *delivery.Event) { e.Payload = make([]byte, 3+i) }))
	large, ok := errors.AsType[*ingest.FieldError](got[2].Err)
	if got[0].Err != nil || got[1].Err != nil || !ok || large.Field != "payload" {
		t.Errorf("got %v", got)
	}
	if len(journal.events) != 2 || journal.calls != 1 {
		t.Errorf("%d events in %d calls", len(journal.events), journal.calls)
	}
	journal.open = 7
	full, ok := errors.AsType[*ingest.QuotaError](in.Publish(t.Context(), "acme", events(1, nil))[0].Err)
	if !ok || full.Name != "max_open_deliveries" || full.Limit != 7 {
		t.Errorf("got %v", full)
	}
	journal.open, journal.err = 0, delivery.ErrDiskFull
	if r := in.Publish(t.Context(), "acme", events(1, nil))[0]; !errors.Is(r.Err, delivery.ErrDiskFull) || r.Event != nil {
		t.Errorf("got %v", r)
	}
	calls := journal.calls
	in.Drain()
	if err := in.Publish(t.Context(), "acme", events(1, nil))[0].Err; !errors.Is(err, ingest.ErrDraining) || journal.calls != calls {
		t.Errorf("got %v", err)
	}
	if len(in.Publish(t.Context(), "acme", nil)) != 0 {
		t.Error("results out of nothing")
	}
}

func TestEmptyIDsAreMade(t *testing.T) {
	journal := &shelf{}
	in := ingest.New(ingest.Options{Registry: newTenants(t, nil), Journal: journal})
	got := in.Publish(t.Context(), "acme", events(50, func(_ int, e *delivery.Event) { e.ID = "" }))
	for _, r := range got {
		if id, err := uuid.Parse(r.Event.ID); err != nil || id.Version() != 7 {
			t.Errorf("id %q", r.Event.ID)
		}
	}
	if len(journal.events) != 50 {
		t.Errorf("%d different ids", len(journal.events))
	}
}

func TestRateIsAveragedOverTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		in := ingest.New(ingest.Options{Registry: newTenants(t, &grapnelv1.Quota{MaxPublishRate: 2}), Journal: &shelf{}})
		n := 0
		publish := func(count int) (accepted int, last *ingest.RateError) {
			for _, r := range in.Publish(t.Context(), "acme", events(count, func(_ int, e *delivery.Event) { e.ID = fmt.Sprint("n", n); n++ })) {
				if r.Err == nil {
					if last != nil {
						t.Error("accepted after one that was refused")
					}
					accepted++
				} else if last, _ = errors.AsType[*ingest.RateError](r.Err); last == nil {
					t.Error(r.Err)
				}
			}
			return accepted, last
		}
		if got, err := publish(25); got != 20 || err == nil || err.Limit != 2 || err.RetryAfter != 500*time.Millisecond {
			t.Errorf("first burst: %d, %+v", got, err)
		}
		time.Sleep(500 * time.Millisecond) // as told
		if got, _ := publish(1); got != 1 {
			t.Error("refused after the wait it was told")
		}
		time.Sleep(3 * time.Second)
		if got, _ := publish(10); got != 6 {
			t.Errorf("after 3 s: %d", got)
		}
		if got := in.Rate("acme"); got != 27.0/60 {
			t.Errorf("rate = %v", got)
		}
		time.Sleep(time.Hour)
		if got, _ := publish(30); got != 20 {
			t.Errorf("after an hour: %d", got)
		}
		if got := in.Rate("acme"); got != 20.0/60 {
			t.Errorf("rate = %v", got)
		}
		if in.Rate("none") != 0 {
			t.Error("a namespace that never published has a rate")
		}
	})
}

func TestQuotasDefaultToNone(t *testing.T) {
	in := ingest.New(ingest.Options{Registry: newTenants(t, nil), Journal: &shelf{open: 1 << 40}})
	for k, r := range in.Publish(t.Context(), "acme", events(50_000, nil)) {
		if r.Err != nil {
			t.Fatalf("event %d: %v", k, r.Err)
		}
	}
}

// The same name again has nothing of its predecessor's.
func TestRateBelongsToTheNamespaceNotItsName(t *testing.T) {
	named := func(uid byte) *subscription.Snapshot {
		return subscription.NewSnapshot(1, []*subscription.Namespace{
			newNamespace(t, uid, &grapnelv1.Namespace{Name: "namespaces/acme", Quota: &grapnelv1.Quota{MaxPublishRate: 1}}),
		}, nil)
	}
	current := named(1)
	in := ingest.New(ingest.Options{Registry: latest(func() *subscription.Snapshot { return current }), Journal: &shelf{}})
	accepted := func(id string) (n int) {
		for _, r := range in.Publish(t.Context(), "acme", events(10, func(k int, e *delivery.Event) { e.ID = fmt.Sprint(id, k) })) {
			if r.Err == nil {
				n++
			}
		}
		return n
	}
	if first, second := accepted("a"), accepted("b"); first != 10 || second != 0 {
		t.Errorf("%d and %d accepted, want a full bucket once", first, second)
	}
	current = named(2)
	if in.Rate("acme") != 0 {
		t.Error("it has its predecessor's rate")
	}
	if n := accepted("c"); n != 10 {
		t.Errorf("%d accepted in the new one", n)
	}
}

// latest is a registry that changes.
type latest func() *subscription.Snapshot

func (l latest) Snapshot() *subscription.Snapshot { return l() }

func TestManyPublishersShareTheRate(t *testing.T) {
	journal := &shelf{}
	in := ingest.New(ingest.Options{Registry: newTenants(t, &grapnelv1.Quota{MaxPublishRate: 10}), Journal: journal})
	var publishers sync.WaitGroup
	start := time.Now()
	for p := range 20 {
		publishers.Go(func() {
			for i := range 20 {
				in.Publish(context.Background(), "acme", events(1, func(_ int, e *delivery.Event) { e.ID = fmt.Sprint(p, "-", i) }))
			}
		})
	}
	publishers.Wait()
	most := 100 + int(10*time.Since(start).Seconds()) + 1
	if n := len(journal.events); n < 100 || n > most {
		t.Errorf("%d accepted, at most %d were allowed", n, most)
	}
}

func BenchmarkPublish(b *testing.B) {
	t := &testing.T{}
	in := ingest.New(ingest.Options{
		Registry: newTenants(t, &grapnelv1.Quota{MaxPublishRate: 1 << 30}, &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/a"}),
		Journal:  sink{},
	})
	batch := events(1, nil)
	b.ReportAllocs()
	for b.Loop() {
		in.Publish(context.Background(), "acme", batch)
	}
}

type sink struct{}

func (sink) Append(_ context.Context, events []delivery.Publication) []delivery.AppendResult {
	out := make([]delivery.AppendResult, len(events))
	for i := range out {
		out[i].Event = events[i].Event
	}
	return out
}

func (sink) OpenIn(delivery.NamespaceKey) int64 { return 0 }
