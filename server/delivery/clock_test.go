package delivery

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// One publish while the clock was years ahead poisons nothing (A8): what it left is delivered and goes by its age,
// what comes after it lives in the present.
func TestClockThatWasAheadIsLeftBehind(t *testing.T) {
	b := newBench(t, onePartition)
	const years = 5 * 365 * 24 * time.Hour
	b.append(publication("before", 1))
	b.clock.add(years)
	ahead := publication("ahead", 1)
	b.append(ahead)
	b.clock.add(-years)
	b.reopen()
	present := publication("present", 1)
	b.append(present)
	if at := idOf(present.Event, 1).Time(); at.Sub(b.clock.now()).Abs() > time.Minute {
		t.Errorf("an event of now has the time %v", at)
	}
	if r := b.append(publication("ahead", 1))[0]; !r.Duplicate || r.Event.Seq != ahead.Event.Seq {
		t.Errorf("the id given a moment ago: %+v", r)
	}
	page, err := b.Deliveries(Query{Namespace: acme, Since: b.clock.now().Add(-time.Hour), Until: b.clock.now().Add(time.Hour)})
	if err != nil || len(page.Deliveries) != 2 {
		t.Errorf("list by time: %+v, %v", page, err)
	}
	jobs := b.backlog(1)
	if fmt.Sprint(ids(jobs)) != "[ahead before present]" {
		t.Fatalf("backlog %v", ids(jobs))
	}
	for _, job := range jobs {
		b.succeed(job)
	}
	b.flush()
	if d := b.delivery(idOf(ahead.Event, 1)); d.State != Succeeded {
		t.Errorf("%+v", d)
	}
	b.clock.add(3 * 24 * time.Hour)
	again := publication("ahead", 1)
	if r := b.append(again)[0]; r.Duplicate {
		t.Errorf("the id three days later: %+v", r)
	}
	b.succeed(b.jobs()[1])
	b.flush()
	b.clock.add(24 * time.Hour)
	b.retain(72 * time.Hour)
	if _, err := b.Delivery(acme, idOf(ahead.Event, 1)); !errors.Is(err, ErrNotFound) {
		t.Errorf("four days later it is still there: %v", err)
	}
	if d := b.delivery(idOf(again.Event, 1)); d.State != Succeeded {
		t.Errorf("%+v", d)
	}
	b.clock.add(5 * 24 * time.Hour)
	b.retain(72 * time.Hour)
	if n := b.records(); n != 0 {
		t.Errorf("%d records are left", n)
	}
}

// What was accepted while the clock was ahead, and is still open when its retention ends, stays whole while the
// present passes by it.
func TestOpenDeliveryOfAClockThatWasAheadStays(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("before", 9))
	b.clock.add(4 * 24 * time.Hour)
	pub := publication("ahead", 1, 2)
	b.append(pub)
	b.clock.add(-4 * 24 * time.Hour)
	b.reopen()
	b.append(publication("present", 9))
	id := idOf(pub.Event, 1)
	for day := range 12 {
		b.clock.add(25 * time.Hour)
		b.retain(time.Hour)
		if day%3 == 0 {
			b.reopen()
		}
		if got := b.backlog(1); len(got) != 1 || got[0].Event.ID != "ahead" {
			t.Fatalf("after %d days: %v", day, got)
		}
		if d := b.delivery(id); d.State != Pending || d.EventID != "ahead" || d.Subscription != "sub-1" {
			t.Fatalf("after %d days: %+v", day, d)
		}
		b.append(publication(fmt.Sprint("day", day), 9))
	}
	for _, job := range append(b.backlog(1), b.backlog(2)...) {
		b.succeed(job)
	}
	b.flush()
	if d := b.delivery(id); d.State != Succeeded {
		t.Errorf("%+v", d)
	}
	b.clock.add(7 * time.Hour)
	b.retain(time.Hour)
	if _, err := b.Delivery(acme, id); !errors.Is(err, ErrNotFound) {
		t.Error(err)
	}
}

// A clock that was ahead hides nothing from a replay that was there before, also when it is kept only because it is open.
func TestReplayAfterAClockThatWasAhead(t *testing.T) {
	b := newBench(t, onePartition)
	b.append(publication("before", 1))
	b.clock.add(4 * 24 * time.Hour)
	b.append(publication("ahead", 1))
	b.retain(time.Hour)
	b.clock.add(-2 * 24 * time.Hour)
	b.reopen()
	r := b.replay("backfill", ReplaySpec{Subscription: "sub-2", UID: uid(2), Missing: true})
	b.flush()
	if got := b.advance(r, missing(2), 10); got.Created != 1 {
		t.Errorf("%+v, want what was there before", got)
	}
}

// A clock that goes back again and again gives no sequence twice.
func TestNoSequenceIsGivenTwice(t *testing.T) {
	b := newBench(t, onePartition)
	seen := map[uint64]string{}
	for life, back := range []time.Duration{0, 3, 3, 2, 7, 1, 5} {
		b.clock.add(-back * 24 * time.Hour)
		b.reopen()
		for hour := range 4 * 24 {
			pub := publication(fmt.Sprintf("%d-%d", life, hour), 1)
			b.append(pub)
			if first, twice := seen[pub.Event.Seq]; twice {
				t.Fatalf("%s and %s", first, pub.Event.ID)
			}
			seen[pub.Event.Seq] = pub.Event.ID
			b.clock.add(time.Hour)
		}
	}
	for _, d := range all(t, b, Query{Limit: 1000}) {
		if seen[d.ID.Seq] != d.EventID {
			t.Errorf("%s became %s", seen[d.ID.Seq], d.EventID)
		}
	}
}

// The journal's own clock knows no steps while the process lives.
func TestClockGoesOnByItself(t *testing.T) {
	b := newBench(t, func(o *Options) { o.now = nil })
	first := b.Now()
	if time.Until(first).Abs() > time.Minute || b.Now().Before(first) {
		t.Errorf("%v", first)
	}
}

// A small step back is waited for: sequences go on from the last one, also over a restart.
func TestSequencesGoOnAfterASmallStepBack(t *testing.T) {
	b := newBench(t, onePartition)
	last := uint64(0)
	for i := range 20 {
		pub := publication(fmt.Sprint(i), 1)
		b.append(pub)
		if pub.Event.Seq <= last {
			t.Fatalf("%d after %d", pub.Event.Seq, last)
		}
		last = pub.Event.Seq
		b.clock.add(-time.Hour)
		b.reopen()
	}
}

// Nor when the clock comes back to the very millisecond in which the newest was given.
func TestNoSequenceIsGivenTwiceInItsMillisecond(t *testing.T) {
	b := newBench(t, onePartition)
	seen := map[uint64]bool{}
	for i, step := range []time.Duration{0, -48, 48, -48, 48, 0} {
		b.clock.add(step * time.Hour)
		b.reopen()
		for k := range 2 {
			pub := publication(fmt.Sprintf("%d-%d", i, k), 1)
			if b.append(pub); seen[pub.Event.Seq] {
				t.Errorf("%s has the sequence of another event", pub.Event.ID)
			}
			seen[pub.Event.Seq] = true
		}
	}
}

// Nor when nothing was given in the meantime while the present came by, and the clock goes back a little from there.
func TestNoSequenceIsGivenTwiceByAStepBackAfterwards(t *testing.T) {
	b := newBench(t, onePartition)
	seen := map[uint64]bool{}
	for i, life := range []struct {
		step   time.Duration
		events int
	}{{0, 2}, {-48, 2}, {50, 0}, {-1, 0}, {-1, 2}} {
		b.clock.add(life.step * time.Hour)
		b.reopen()
		for k := range life.events {
			pub := publication(fmt.Sprintf("%d-%d", i, k), 1)
			if b.append(pub); seen[pub.Event.Seq] {
				t.Errorf("%s has the sequence of another event", pub.Event.ID)
			}
			seen[pub.Event.Seq] = true
		}
	}
}
