package delivery

import (
	"cmp"
	"errors"
	"fmt"
	"testing"
	"time"
)

// filled is a journal with events over four partitions, three subscriptions and all states.
func filled(t *testing.T) (*bench, map[State]int) {
	t.Helper()
	b := newBench(t)
	want := map[State]int{}
	for i := range 120 {
		pub := publication(fmt.Sprintf("e%03d", i), 1, 2)
		if i%2 == 0 {
			pub.Targets = append(pub.Targets, Target{Subscription: "sub-3", UID: uid(3), Skip: true})
			want[Skipped]++
		}
		if i%10 == 3 {
			pub.Event.DeliverTime = b.clock.now().Add(24 * time.Hour)
			want[Pending] += 2
		}
		b.append(pub)
		b.clock.add(time.Second)
	}
	for i, job := range b.jobs() {
		switch i % 5 {
		case 0:
			b.succeed(job)
			want[Succeeded]++
		case 1:
			b.exhaust(job)
			want[Exhausted]++
		case 2:
			b.failed(job, time.Minute)
			want[Scheduled]++
		default:
			want[Pending]++
		}
	}
	b.flush()
	return b, want
}

// all reads every page and checks that the order is right and nothing comes twice.
func all(t testing.TB, b *bench, q Query) []*Delivery {
	t.Helper()
	q.Namespace = cmp.Or(q.Namespace, acme)
	var got []*Delivery
	for {
		page, err := b.Deliveries(q)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, page.Deliveries...)
		if page.Next == "" {
			break
		}
		q.After = page.Next
	}
	for i := 1; i < len(got); i++ {
		if !comesBefore(got[i-1].ID, got[i].ID) {
			t.Fatalf("%v after %v", got[i].ID, got[i-1].ID)
		}
	}
	return got
}

// comesBefore is the order of lists.
func comesBefore(a, b ID) bool {
	return cmp.Or(cmp.Compare(b.Seq, a.Seq), cmp.Compare(b.Partition, a.Partition), cmp.Compare(a.Subscription, b.Subscription)) < 0
}

func TestDeliveriesByFilterAndPage(t *testing.T) {
	b, want := filled(t)
	total := 0
	for _, n := range want {
		total += n
	}
	for _, limit := range []int{1, 7, 1000} {
		if got := all(t, b, Query{Limit: limit}); len(got) != total {
			t.Errorf("limit %d: %d of %d", limit, len(got), total)
		}
		for state, n := range want {
			got := all(t, b, Query{States: []State{state}, Limit: limit})
			if len(got) != n {
				t.Errorf("state %d, limit %d: %d of %d", state, limit, len(got), n)
			}
			for _, d := range got {
				if d.State != state {
					t.Errorf("%+v is not in state %d", d, state)
				}
			}
			bySub := 0
			for sub := range SubscriptionKey(3) {
				bySub += len(all(t, b, Query{States: []State{state}, Subscription: sub + 1, Limit: limit}))
			}
			if bySub != n {
				t.Errorf("state %d by subscription, limit %d: %d of %d", state, limit, bySub, n)
			}
		}
		got := all(t, b, Query{States: []State{Exhausted, Skipped, Scheduled}, Limit: limit})
		if n := want[Exhausted] + want[Skipped] + want[Scheduled]; len(got) != n {
			t.Errorf("three states, limit %d: %d of %d", limit, len(got), n)
		}
		if got := all(t, b, Query{Subscription: 2, Limit: limit}); len(got) != 120 {
			t.Errorf("subscription: %d", len(got))
		}
	}
	if got := all(t, b, Query{EventID: "e004", Limit: 1}); len(got) != 3 {
		t.Errorf("event: %d", len(got))
	}
	if got := all(t, b, Query{EventID: "e004", Subscription: 3}); len(got) != 1 || got[0].State != Skipped {
		t.Errorf("event and subscription: %+v", got)
	}
	uid := all(t, b, Query{EventID: "e017"})[0].EventUID
	if got := all(t, b, Query{EventUID: uid, Limit: 1}); len(got) != 2 || got[0].EventID != "e017" {
		t.Errorf("webhook-id: %+v", got)
	}
	if got := all(t, b, Query{EventUID: "evt_nonsense"}); len(got) != 0 {
		t.Errorf("unknown webhook-id: %+v", got)
	}
	start := newClock().now()
	for _, sub := range []SubscriptionKey{0, 1} {
		got := all(t, b, Query{Subscription: sub, Since: start.Add(10 * time.Second), Until: start.Add(20 * time.Second), Match: func(d *Delivery) bool { return d.SubscriptionUID.SubscriptionKey() == 1 }})
		if len(got) != 10 {
			t.Errorf("time: %d", len(got))
		}
	}
	got := all(t, b, Query{Limit: 3, Match: func(d *Delivery) bool { return d.EventID == "e017" }})
	if len(got) != 2 {
		t.Errorf("match: %d", len(got))
	}
	if got := all(t, b, Query{Namespace: other}); len(got) != 0 {
		t.Errorf("another namespace shows %d", len(got))
	}
	if _, err := b.Deliveries(Query{Namespace: acme, After: "nonsense"}); !errors.Is(err, ErrInvalidCursor) {
		t.Errorf("cursor: %v", err)
	}
	id := all(t, b, Query{EventID: "e000"})[0].ID
	if _, err := b.Delivery(other, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("delivery of another namespace: %v", err)
	}
	if _, err := b.Attempts(other, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("attempts of another namespace: %v", err)
	}
	if _, err := b.EventByUID(other, uid); !errors.Is(err, ErrNotFound) {
		t.Errorf("event of another namespace: %v", err)
	}
}

// A call looks at a bounded number of deliveries, also when one event has more than that.
func TestDeliveriesOfLargeFanOutComeInPages(t *testing.T) {
	b := newBench(t)
	subs := make([]int, scanLimit+2000)
	for i := range subs {
		subs[i] = i + 1
	}
	b.append(publication("e", subs...))
	q := Query{Namespace: acme, Match: func(d *Delivery) bool { return d.ID.Subscription == SubscriptionKey(len(subs)) }}
	page, err := b.Deliveries(q)
	if err != nil || len(page.Deliveries) != 0 || page.Next == "" {
		t.Fatalf("%d deliveries, next %q, %v", len(page.Deliveries), page.Next, err)
	}
	q.After = page.Next
	if page, err = b.Deliveries(q); err != nil || len(page.Deliveries) != 1 || page.Next != "" {
		t.Errorf("%d deliveries, next %q, %v", len(page.Deliveries), page.Next, err)
	}
}

func TestEventsByPage(t *testing.T) {
	b, _ := filled(t)
	var got []string
	q := EventQuery{Namespace: acme, Limit: 7, Match: func(e *Event) bool { return e.ID != "e050" }}
	for {
		page, err := b.Events(q)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page.Events {
			got = append(got, e.ID)
		}
		if page.Next == "" {
			break
		}
		q.After = page.Next
	}
	if len(got) != 119 || got[0] != "e119" || got[118] != "e000" {
		t.Errorf("%d events, %v", len(got), got)
	}
	start := newClock().now()
	page, err := b.Events(EventQuery{Namespace: acme, Since: start.Add(10 * time.Second), Until: start.Add(20 * time.Second)})
	if err != nil || len(page.Events) != 10 {
		t.Errorf("%d events by time, %v", len(page.Events), err)
	}
}
