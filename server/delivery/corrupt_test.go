package delivery

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// spoil overwrites a record while the journal is closed, and opens it again.
func (b *bench) spoil(key []byte) {
	b.t.Helper()
	b.close()
	put(b.t, b.fs, key, []byte{recordVersion + 1, 8, 1})
	b.open()
}

func targetsApartKey(e *Event) []byte { return appendTargetsKey(nil, 0, dayOf(e.Seq), acme, e.Seq) }

// publicationApart is one whose targets take a record of their own.
func publicationApart(id string, subs ...int) Publication {
	pub := publication(id, subs...)
	pub.Targets[0].Subscription = strings.Repeat("long", maxWithin/4)
	return pub
}

// A record that cannot be read is named where something touches it, and nowhere else: what lies beside it goes on.
func TestCorruptRecordIsNamedAndPassedOver(t *testing.T) {
	for name, spoil := range map[string]struct {
		key func(*Event) []byte
		// read says whether jobs need it, others whether the event's other deliveries do.
		read, delivery bool
	}{
		"row":      {key: func(e *Event) []byte { return appendRow(nil, 0, lane(1), Row{Seq: e.Seq}) }, read: true, delivery: true},
		"event":    {key: func(e *Event) []byte { return appendEventKey(nil, 0, dayOf(e.Seq), acme, e.Seq) }, read: true, delivery: true},
		"targets":  {key: targetsApartKey, delivery: true},
		"standing": {key: func(e *Event) []byte { return appendDeliveryKey(nil, 0, dayOf(e.Seq), lane(1), e.Seq) }, delivery: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, onePartition)
			for i := range 5 {
				b.append(publicationApart(fmt.Sprint("e", i), 1))
				b.clock.add(time.Second)
			}
			b.append(publication("beside", 2))
			e := b.jobs()[2].Event
			b.spoil(spoil.key(e))
			if n := len(b.lanes()); n != 2 {
				t.Errorf("%d lanes are found", n)
			}
			r, err := b.Read(lane(1), 0, FIFO, Pos{Some: true}, 0, 100, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			if spoil.read {
				var corrupt *CorruptError
				if len(r.Jobs) != 4 || len(r.Aside) != 1 || !errors.As(r.Aside[0], &corrupt) || !strings.Contains(r.Aside[0].Error(), idOf(e, 1).String()) || !strings.Contains(r.Aside[0].Error(), "version 3") {
					t.Errorf("%v, aside %v", ids(r.Jobs), r.Aside)
				}
			} else if len(r.Jobs) != 5 {
				t.Errorf("%v, aside %v", ids(r.Jobs), r.Aside)
			}
			for _, job := range r.Jobs {
				b.Release(job.Event)
			}
			_, err = b.Delivery(acme, idOf(e, 1))
			var corrupt *CorruptError
			if errors.As(err, &corrupt) != spoil.delivery || corrupt != nil && corrupt.Dir != "journal" {
				t.Errorf("delivery: %v", err)
			}
			if _, err := b.Cancel(t.Context(), lane(1), idOf(e, 1), "x"); !errors.As(err, &corrupt) {
				t.Errorf("cancel: %v", err)
			}
			if _, err := b.Deliveries(Query{Namespace: acme, Subscription: 1}); !errors.As(err, &corrupt) {
				t.Errorf("a list that touches it: %v", err)
			}
			if got := all(t, b, Query{Subscription: 2}); len(got) != 1 {
				t.Errorf("a list that does not: %v", got)
			}
			if got := all(t, b, Query{EventID: "e1"}); len(got) != 1 {
				t.Errorf("another event: %v", got)
			}
			b.append(publication("more", 1, 2))
			for _, job := range append(r.Jobs, b.jobs()...) {
				b.succeed(job)
			}
			b.flush()
			if d := b.delivery(idOf(r.Jobs[0].Event, 1)); d.State != Succeeded {
				t.Errorf("%+v", d)
			}
		})
	}
}

// A record that cannot be read holds up neither the end of its lane nor retention: both go on with the rest and
// name it.
func TestCorruptRecordHoldsNothingUp(t *testing.T) {
	for name, key := range map[string]func(*Event) []byte{
		"row":      func(e *Event) []byte { return appendRow(nil, 0, lane(1), Row{Seq: e.Seq}) },
		"event":    func(e *Event) []byte { return appendEventKey(nil, 0, dayOf(e.Seq), acme, e.Seq) },
		"targets":  targetsApartKey,
		"standing": func(e *Event) []byte { return appendDeliveryKey(nil, 0, dayOf(e.Seq), lane(1), e.Seq) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, onePartition)
			for i := range 5 {
				b.append(publicationApart(fmt.Sprint("e", i), 1))
			}
			b.append(publication("ended", 2))
			jobs := b.jobs()
			b.succeed(jobs[5])
			b.flush()
			e := jobs[2].Event
			b.spoil(key(e))
			b.clock.add(100 * time.Hour)
			for range 3 {
				b.retain(72 * time.Hour)
				b.clock.add(7 * time.Hour)
			}
			if _, err := b.Event(acme, "ended"); !errors.Is(err, ErrNotFound) {
				t.Errorf("what has ended stays: %v", err)
			}
			for _, i := range []int{0, 1, 3, 4} {
				if d := b.delivery(jobs[i].ID); d.State != Pending {
					t.Errorf("%+v", d)
				}
			}
			n, err := b.CancelLane(t.Context(), lane(1), "deleted", nil)
			var corrupt *CorruptError
			if n < 4 || n == 4 && !errors.As(err, &corrupt) {
				t.Errorf("%d cancelled, %v", n, err)
			}
			for range 3 {
				b.clock.add(100 * time.Hour)
				b.retain(72 * time.Hour)
			}
			for _, i := range []int{0, 1, 3, 4} {
				if _, err := b.Delivery(acme, jobs[i].ID); !errors.Is(err, ErrNotFound) {
					t.Errorf("what was cancelled stays: %v", err)
				}
			}
			// Its namespace goes with all that is in it.
			if err := b.DropNamespace(t.Context(), acme); err != nil || b.records() != 0 || len(b.lanes()) != 0 {
				t.Errorf("%d records, %v", b.records(), err)
			}
		})
	}
}

// A damaged block of a table costs the rows that lie in it, by name; the lane's others are read.
func TestDamagedBlockIsPassedOver(t *testing.T) {
	b := newBench(t, onePartition, func(o *Options) { o.CacheBytes = 1 })
	const n = 200
	for i := range n {
		pub := publication(fmt.Sprintf("%03d", i), 1)
		pub.Event.Payload = []byte(strings.Repeat(fmt.Sprint(i*7919), 300))
		b.append(pub)
	}
	b.jobs()
	if err := b.db.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := b.db.Compact(context.Background(), []byte{0}, []byte{0xff, 0xff}, false); err != nil {
		t.Fatal(err)
	}
	b.close()
	var path string
	var size int64
	names, err := b.fs.List("journal")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if info, err := b.fs.Stat("journal/" + name); err == nil && strings.HasSuffix(name, ".sst") && info.Size() > size {
			path, size = "journal/"+name, info.Size()
		}
	}
	flip(t, b.fs, path, size/2) // events take the most of it
	b.open()
	if got := b.lanes(); len(got) != 1 {
		t.Fatalf("%d lanes", len(got))
	}
	for _, limit := range []int{n, 20} {
		var found []string
		aside := 0
		for from := (Pos{Some: true}); from.Some; {
			r, err := b.Read(lane(1), 0, FIFO, from, 0, limit, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			for i := range r.Jobs {
				found = append(found, r.Jobs[i].Event.ID)
				b.Release(r.Jobs[i].Event)
			}
			for _, err := range r.Aside {
				if !pebble.IsCorruptionError(err) {
					t.Errorf("aside: %v", err)
				}
			}
			aside += len(r.Aside)
			from = r.Next
		}
		if !slices.IsSorted(found) || aside == 0 || len(found)+aside != n || len(found) < n/2 {
			t.Errorf("in pieces of %d: %d are read and %d are passed over, of %d", limit, len(found), aside, n)
		}
	}
	b.append(publication("more", 2))
	if got := b.backlog(2); len(got) != 1 {
		t.Errorf("%v", ids(got))
	}
}
