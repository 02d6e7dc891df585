package delivery

import (
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
		e := event(fmt.Sprintf("e%03d", i), "a", "b")
		if i%2 == 0 {
			e.Targets = append(e.Targets, Target{Subscription: "c", UID: testUID(3), Skip: true})
			want[Skipped]++
		}
		b.append(e)
		b.clock.add(time.Second)
	}
	for i, job := range b.jobs() {
		now := b.clock.now()
		switch i % 5 {
		case 0:
			b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, now))
			want[Succeeded]++
		case 1:
			b.Settle(job, Step{State: Exhausted, Reason: "enough"}, attemptAt(1, OutcomeRetryable, 500, now))
			want[Exhausted]++
		case 2:
			b.Settle(job, Step{State: Scheduled, Due: now.Add(time.Minute)}, attemptAt(1, OutcomeRetryable, 500, now))
			want[Scheduled]++
		default:
			want[Pending]++
		}
	}
	b.flush()
	return b, want
}

// all reads every page and checks that the order is right and nothing comes twice.
func all(t *testing.T, b *bench, q Query) []*Delivery {
	t.Helper()
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
		a, c := got[i-1].ID, got[i].ID
		older := c.Seq < a.Seq || c.Seq == a.Seq && (c.Partition < a.Partition || c.Partition == a.Partition && c.Ordinal > a.Ordinal)
		if !older {
			t.Fatalf("%v after %v", c, a)
		}
	}
	return got
}

func TestDeliveriesByFilterAndPage(t *testing.T) {
	b, want := filled(t)
	total := 0
	for _, n := range want {
		total += n
	}
	for _, limit := range []int{1, 7, 1000} {
		if got := all(t, b, Query{Namespace: "acme", Limit: limit}); len(got) != total {
			t.Errorf("limit %d: %d of %d", limit, len(got), total)
		}
		for state, n := range want {
			got := all(t, b, Query{Namespace: "acme", States: []State{state}, Limit: limit})
			if len(got) != n {
				t.Errorf("state %d, limit %d: %d of %d", state, limit, len(got), n)
			}
			for _, d := range got {
				if d.State != state {
					t.Errorf("%+v is not in state %d", d, state)
				}
			}
		}
		got := all(t, b, Query{Namespace: "acme", States: []State{Exhausted, Skipped, Scheduled}, Limit: limit})
		if n := want[Exhausted] + want[Skipped] + want[Scheduled]; len(got) != n {
			t.Errorf("three states, limit %d: %d of %d", limit, len(got), n)
		}
		if got := all(t, b, Query{Namespace: "acme", Subscription: "b", Limit: limit}); len(got) != 120 {
			t.Errorf("subscription: %d", len(got))
		}
	}
	if got := all(t, b, Query{Namespace: "acme", EventID: "e004", Limit: 1}); len(got) != 3 {
		t.Errorf("event: %d", len(got))
	}
	if got := all(t, b, Query{Namespace: "acme", EventID: "e004", Subscription: "c"}); len(got) != 1 || got[0].State != Skipped {
		t.Errorf("event and subscription: %+v", got)
	}
	start := newClock().now()
	got := all(t, b, Query{Namespace: "acme", Subscription: "a", Since: start.Add(10 * time.Second), Until: start.Add(20 * time.Second)})
	if len(got) != 10 {
		t.Errorf("time: %d", len(got))
	}
	got = all(t, b, Query{Namespace: "acme", Limit: 3, Match: func(d *Delivery) bool { return d.EventID == "e017" }})
	if len(got) != 2 {
		t.Errorf("match: %d", len(got))
	}
	if got := all(t, b, Query{Namespace: "acm"}); len(got) != 0 {
		t.Errorf("another namespace shows %d", len(got))
	}
	if _, err := b.Deliveries(Query{Namespace: "acme", After: "nonsense"}); !errors.Is(err, ErrInvalidCursor) {
		t.Errorf("cursor: %v", err)
	}
	if _, err := b.DeliveryIn("other", got0(t, b)); !errors.Is(err, ErrNotFound) {
		t.Errorf("delivery of another namespace: %v", err)
	}
}

func got0(t *testing.T, b *bench) ID {
	t.Helper()
	return all(t, b, Query{Namespace: "acme", EventID: "e000"})[0].ID
}

func TestEventsByPage(t *testing.T) {
	b, _ := filled(t)
	var got []string
	q := EventQuery{Namespace: "acme", Limit: 7, Match: func(e *Event) bool { return e.ID != "e050" }}
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
}

func TestRetainKeepsWhatIsOpen(t *testing.T) {
	b := newBench(t)
	states := map[string]Step{
		"succeeded": {State: Succeeded}, "exhausted": {State: Exhausted, Reason: "x"},
		"scheduled": {State: Scheduled, Due: b.clock.now().Add(200 * time.Hour)},
	}
	for _, id := range []string{"succeeded", "pending", "exhausted", "scheduled", "deferred", "half"} {
		e := event(id, "s")
		switch id {
		case "deferred":
			e.DeliverTime = b.clock.now().Add(150 * time.Hour)
		case "half": // one target done, one open
			e = event(id, "s", "t")
		}
		b.append(e)
		b.clock.add(time.Millisecond)
	}
	jobs := map[string]ID{}
	for _, job := range b.jobs() {
		jobs[job.Event.ID+job.Subscription] = job.ID
		if step, ok := states[job.Event.ID]; ok {
			b.Settle(job, step, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
		} else if job.Event.ID == "half" && job.Subscription == "s" {
			b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
		}
	}
	b.flush()
	b.clock.add(100 * time.Hour)
	b.append(event("new", "s"))
	retention := func(string) time.Duration { return 72 * time.Hour }
	for range 2 { // twice: a sweep must not depend on what another one left
		if err := b.Retain(t.Context(), retention); err != nil {
			t.Fatal(err)
		}
	}
	b.reopen()
	for id, there := range map[string]bool{
		"succeeded": false, "exhausted": false, "pending": true, "scheduled": true, "deferred": true, "half": true, "new": true,
	} {
		_, err := b.Event("acme", id)
		if there != (err == nil) || err != nil && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", id, err)
		}
	}
	if attempts, err := b.Attempts(jobs["scheduleds"]); err != nil || len(attempts) != 1 {
		t.Errorf("history of an open delivery: %v, %v", attempts, err)
	}
	if _, err := b.Delivery(jobs["succeededs"]); !errors.Is(err, ErrNotFound) {
		t.Errorf("succeeded: %v", err)
	}
	if got := all(t, b, Query{Namespace: "acme", States: []State{Exhausted}}); len(got) != 0 {
		t.Errorf("index of what is gone: %+v", got)
	}
	if got := ids(b.backlog(lane("s"), 2)); fmt.Sprint(got) != "[new pending]" {
		t.Errorf("backlog %v", got)
	}
	if got := ids(b.timers(lane("s"), b.clock.now().Add(1000*time.Hour))); fmt.Sprint(got) != "[deferred scheduled]" {
		t.Errorf("timers %v", got)
	}
	waitFor(t, b.Counted)
	if n := b.OpenIn("acme"); n != 5 {
		t.Errorf("%d open", n)
	}
}

func TestRetainErasesIDsOfPastDays(t *testing.T) {
	b := newBench(t)
	first := event("e", "s")
	b.append(first)
	b.Settle(b.jobs()[0], Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
	b.flush()
	b.clock.add(20 * time.Hour)
	if err := b.Retain(t.Context(), func(string) time.Duration { return time.Hour }); err != nil {
		t.Fatal(err)
	}
	// The event is gone, its id is not.
	r := b.append(event("e", "s"))[0]
	if !r.Duplicate || r.Event.Seq != first.Seq || r.Event.UID != first.UID || len(r.Event.Targets) != 1 {
		t.Errorf("%+v", r)
	}
	b.clock.add(80 * time.Hour)
	if err := b.Retain(t.Context(), func(string) time.Duration { return time.Hour }); err != nil {
		t.Fatal(err)
	}
	for _, p := range b.partitions {
		if days, err := b.days(p.index); err != nil || len(days) != 0 {
			t.Errorf("days %v, %v", days, err)
		}
	}
	// Nothing is left, and still no sequence is given twice, even if the clock goes back.
	b.clock.add(-200 * time.Hour)
	b.reopen()
	e := event("e", "s")
	b.append(e)
	if e.Partition == first.Partition && e.Seq <= first.Seq {
		t.Error("sequence was given twice")
	}
}
