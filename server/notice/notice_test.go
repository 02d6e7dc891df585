package notice_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/notice"
	"github.com/grapnel/grapnel/server/subscription"
)

// tenants is a registry that stands still: acme and others of which a subscription listens, and deaf, of which none does.
type tenants struct{ snapshot *subscription.Snapshot }

func (t tenants) Snapshot() *subscription.Snapshot { return t.snapshot }

func newTenants(t *testing.T, listening ...string) tenants {
	t.Helper()
	var namespaces []*subscription.Namespace
	var subs []*subscription.Subscription
	for _, id := range append([]string{"acme", "deaf"}, listening...) {
		namespaces = append(namespaces, &subscription.Namespace{ID: id, UID: uid(id), State: grapnelv1.Namespace_STATE_ACTIVE})
		globs := []string{"grapnel.**"}
		if id == "deaf" {
			globs = []string{"**"}
		}
		sub, err := subscription.New(&grapnelv1.Subscription{
			Name: "namespaces/" + id + "/subscriptions/ops", Uri: "https://example.com", EventTypes: globs, State: grapnelv1.Subscription_STATE_ACTIVE,
		})
		if err != nil {
			t.Fatal(err)
		}
		subs = append(subs, sub)
	}
	return tenants{subscription.NewSnapshot(1, namespaces, subs)}
}

func uid(name string) [16]byte { return uuid.NewSHA1(uuid.Nil, []byte(name)) }

func key(name string) delivery.NamespaceKey { return delivery.UID(uid(name)).NamespaceKey() }

// shelf keeps what is recorded.
type shelf struct {
	mu     sync.Mutex
	events []*delivery.Event
	hold   chan struct{} // nil, or what is waited for
	err    error
}

func (s *shelf) Record(ctx context.Context, _ delivery.NamespaceKey, events []*delivery.Event) []ingest.Result {
	results := make([]ingest.Result, len(events))
	if s.hold != nil {
		select {
		case <-s.hold:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, ev := range events {
		if results[k].Err = errors.Join(s.err, context.Cause(ctx)); results[k].Err == nil {
			s.events = append(s.events, ev)
			results[k].Event = ev
		}
	}
	return results
}

// lines are the types and counts of what was recorded since the last look.
func (s *shelf) lines(t *testing.T) (out []string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ev := range s.events {
		var d struct{ Count, Deliveries any }
		if err := json.Unmarshal(ev.Payload, &d); err != nil {
			t.Fatalf("%s: %v", ev.Payload, err)
		}
		line := strings.TrimPrefix(ev.Type, "grapnel.") + " " + ev.OrderingKey
		if named, ok := d.Deliveries.([]any); ok {
			line += fmt.Sprint(" ", d.Count, ", ", len(named), " named")
		}
		out = append(out, line)
	}
	s.events = nil
	return out
}

type desk struct {
	*notice.Teller
	*shelf
	metrics *prometheus.Registry
	end     func()
}

func newDesk(t *testing.T, listening ...string) *desk {
	d := &desk{shelf: &shelf{}, metrics: prometheus.NewRegistry()}
	d.Teller = notice.New(notice.Options{Registry: newTenants(t, listening...), Recorder: d.shelf, Registerer: d.metrics})
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- d.Run(ctx) }()
	d.end = func() {
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("run: %v", err)
		}
	}
	return d
}

// disk tells System that a disk fills.
func (d *desk) disk() (heard bool) {
	return d.TellSystem(notice.Notice{Type: notice.DiskFilling, Subject: "nodes/a", Time: time.Now(), Data: &notice.Disk{Node: "nodes/a"}})
}

func (d *desk) state(id string, is notice.Type) {
	name := "namespaces/acme/subscriptions/" + id
	d.Tell(notice.Notice{Namespace: key("acme"), Type: is, Subject: name, Time: time.Now(), Data: &notice.State{Subscription: name}})
}

func (d *desk) exhausted(ns, id string, n int) {
	name := "namespaces/" + ns + "/subscriptions/" + id
	for i := range n {
		now := time.Now()
		d.Tell(notice.Notice{Namespace: key(ns), Type: notice.DeliveryExhausted, Subject: name, Time: now, Data: &notice.Exhausted{
			Subscription: name, Count: 1, FirstTime: now, LastTime: now,
			Deliveries: []notice.Ended{{ID: delivery.ID{Seq: uint64(i)}, State: "EXHAUSTED", Reason: strings.Repeat("ä", 500)}},
		}})
	}
}

func (d *desk) counter(t *testing.T, name, label string) (sum float64) {
	t.Helper()
	families, err := d.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// However many deliveries end, a subscription is told of at most once in an interval, with their number and the first of
// them, in a few kilobytes.
func TestExhaustionIsCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		defer d.end()
		d.exhausted("acme", "orders", 1)
		time.Sleep(time.Second)
		d.shelf.mu.Lock()
		ev := d.events[0]
		d.shelf.mu.Unlock()
		if ev.Source != "//grapnel/namespaces/acme" || ev.Subject != "namespaces/acme/subscriptions/orders" || ev.ContentType != "application/json" || ev.Time.IsZero() {
			t.Errorf("the event is %+v", ev)
		}
		if got := d.lines(t); len(got) != 1 {
			t.Errorf("soon after the first: %q", got)
		}
		for range 30 {
			d.exhausted("acme", "orders", 1000)
			d.exhausted("acme", "users", 3)
			d.exhausted("deaf", "orders", 1000)
			time.Sleep(time.Second)
		}
		d.shelf.mu.Lock()
		for _, ev := range d.events {
			if len(ev.Payload) > 8<<10 {
				t.Errorf("an event of %d bytes", len(ev.Payload))
			}
		}
		d.shelf.mu.Unlock()
		want := map[string]int{
			"delivery.exhausted subscriptions/orders 10000, 10 named": 3,
			"delivery.exhausted subscriptions/users 3, 3 named":       1, "delivery.exhausted subscriptions/users 30, 10 named": 2,
		}
		got := map[string]int{}
		for _, line := range d.lines(t) {
			got[line]++
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("a storm of half a minute (-want +got):\n%s", diff)
		}
		time.Sleep(time.Minute)
		if got := d.lines(t); len(got) != 1 || got[0] != "delivery.exhausted subscriptions/users 27, 10 named" {
			t.Errorf("what was left after it: %q", got)
		}
	})
}

// Of a subscription that fails and recovers by turns the last state is what was told last.
func TestStatesThatFlapAreToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		defer d.end()
		states := []notice.Type{notice.SubscriptionFailing, notice.SubscriptionRecovered}
		for i := range 201 {
			d.state("orders", states[i%2])
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(time.Minute)
		got := d.lines(t)
		if len(got) == 0 || len(got) > 4 || got[len(got)-1] != "subscription.failing subscriptions/orders" {
			t.Errorf("told %q", got)
		}
		d.state("orders", notice.SubscriptionFailing)
		d.state("orders", notice.SubscriptionDisabled)
		time.Sleep(time.Minute)
		if got := d.lines(t); len(got) != 1 || !strings.HasPrefix(got[0], "subscription.disabled") {
			t.Errorf("told %q", got)
		}
	})
}

// What is held is bounded, and one namespace does not take all; those who tell never wait, and a stop tells what waits.
func TestNoticesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		others := make([]string, 30)
		for i := range others {
			others[i] = fmt.Sprint("ns", i)
		}
		d := newDesk(t, others...)
		defer d.end()
		d.hold = make(chan struct{})
		for i := range 300 {
			d.exhausted("acme", fmt.Sprint("s", i), 1)
		}
		time.Sleep(time.Second) // the recorder has been asked, and answers nothing
		if n := d.counter(t, "grapnel_operational_events_dropped_total", "crowded"); n != 44 {
			t.Errorf("%v of one namespace found no room, want 300 - 256", n)
		}
		for _, ns := range others {
			for i := range 256 {
				d.exhausted(ns, fmt.Sprint("s", i), 1)
			}
		}
		if n := d.counter(t, "grapnel_operational_events_dropped_total", "crowded"); n != 44+30*256-(4096-256) {
			t.Errorf("%v of all found no room", n)
		}
		close(d.hold)
		if err := d.Stop(t.Context()); err != nil {
			t.Errorf("stop: %v", err)
		}
		if n := len(d.lines(t)); n != 4096 {
			t.Errorf("%d told, want the 4096 there was room for", n)
		}
		d.exhausted("acme", "late", 1)
		if n := d.counter(t, "grapnel_operational_events_dropped_total", "stopping"); n != 1 {
			t.Errorf("%v dropped after the stop, want 1", n)
		}
		if n := d.counter(t, "grapnel_operational_events_total", string(notice.DeliveryExhausted)); n != 4096 {
			t.Errorf("%v counted", n)
		}
	})
}

// A journal that does not answer holds up a stop for as long as that says, and what is refused is counted.
func TestNoticesThatAreNotStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		defer d.end()
		d.err = delivery.ErrDiskFull
		d.exhausted("acme", "orders", 1)
		time.Sleep(time.Second)
		if n := d.counter(t, "grapnel_operational_events_dropped_total", "refused"); n != 1 {
			t.Errorf("%v counted, want the one that was refused", n)
		}
		d.hold = make(chan struct{})
		d.exhausted("acme", "users", 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		if err := d.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > time.Second {
			t.Errorf("stopped with %v after %v", err, time.Since(began))
		}
	})
}

// System is told of what is no tenant's, while it exists and listens; nobody else is.
func TestSystemIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, listening := range [][]string{nil, {notice.System}} {
			d := newDesk(t, listening...)
			heard := d.disk()
			time.Sleep(time.Minute)
			if got := d.lines(t); len(got) != len(listening) || heard != (len(got) > 0) {
				t.Errorf("with namespaces %v it told %q; heard: %v", listening, got, heard)
			}
			d.end()
		}
	})
}

// Heard means that a subscription covers this type, not some other of the prefix: who comes later is told, then.
func TestWhoWantsSomethingElseHearsNothing(t *testing.T) {
	sub, err := subscription.New(&grapnelv1.Subscription{
		Name: "namespaces/" + notice.System + "/subscriptions/quotas", Uri: "https://example.com", EventTypes: []string{"grapnel.quota.near"},
		State: grapnelv1.Subscription_STATE_ACTIVE,
	})
	if err != nil {
		t.Fatal(err)
	}
	ns := &subscription.Namespace{ID: notice.System, UID: uid(notice.System), State: grapnelv1.Namespace_STATE_ACTIVE}
	d := desk{Teller: notice.New(notice.Options{
		Registry: tenants{subscription.NewSnapshot(1, []*subscription.Namespace{ns}, []*subscription.Subscription{sub})}, Recorder: &shelf{},
	})}
	if d.disk() {
		t.Error("grapnel.disk.filling was heard, which nobody covers")
	}
	if !d.TellSystem(notice.Notice{Type: notice.QuotaNear, Subject: "nodes/a", Time: time.Now(), Data: &notice.Quota{Resource: "nodes/a"}}) {
		t.Error("grapnel.quota.near was not heard")
	}
}

// Tenants, and the operator's own subscriptions, leave room for what the server tells of itself; who finds none is not told
// that it was taken.
func TestTenantsDoNotCrowdOutTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		others := []string{notice.System}
		for i := range 16 {
			others = append(others, fmt.Sprint("ns", i))
		}
		d := newDesk(t, others...)
		defer d.end()
		for _, ns := range others {
			for i := range 256 {
				d.exhausted(ns, fmt.Sprint("s", i), 1)
			}
		}
		time.Sleep(time.Second) // all of it is told, and its places are still taken
		d.lines(t)
		late := notice.Notice{Namespace: key("acme"), Type: notice.DeliveryExhausted, Subject: "namespaces/acme/subscriptions/late", Time: time.Now(), Data: &notice.Exhausted{}}
		if d.Tell(late) {
			t.Error("a notice was taken for which there is no room")
		}
		heard := d.disk()
		for i := range 300 {
			name := fmt.Sprint("plugins/p", i)
			if taken := d.TellSystem(notice.Notice{Type: notice.PluginFailed, Subject: name, Time: time.Now(), Data: &notice.Plugin{Plugin: name}}); taken != (i < 255) {
				t.Fatalf("the %dth plugin: heard is %v", i+1, taken)
			}
		}
		time.Sleep(time.Second)
		if got := d.lines(t); !heard || len(got) != 256 || !slices.Contains(got, "disk.filling nodes/a") {
			t.Errorf("heard: %v; %d told, want the disk and 255 plugins", heard, len(got))
		}
		time.Sleep(notice.Interval)
		late.Time = time.Now()
		if !d.Tell(late) {
			t.Error("there is no room again after the interval")
		}
		late.Namespace = key("deaf")
		if d.Tell(late) {
			t.Error("what nobody listens to was taken")
		}
		if err := d.Stop(t.Context()); err != nil || d.disk() {
			t.Errorf("stopped: %v; or heard after that", err)
		}
	})
}

// A notice with an ID of its own is the same event each time.
func TestNoticesWithAnID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDesk(t)
		defer d.end()
		for range 2 {
			d.Tell(notice.Notice{Namespace: key("acme"), Type: notice.ReplayDone, Subject: "namespaces/acme/replayJobs/r", ID: "replay-1", Time: time.Now(),
				Data: &notice.Replay{ReplayJob: "namespaces/acme/replayJobs/r"}})
			time.Sleep(time.Minute)
		}
		d.shelf.mu.Lock()
		defer d.shelf.mu.Unlock()
		if len(d.events) != 2 || d.events[0].ID != d.events[1].ID || d.events[0].ContentHash != d.events[1].ContentHash || d.events[0].ContentHash == [16]byte{} {
			t.Errorf("%+v", d.events)
		}
	})
}
