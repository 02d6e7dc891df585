package delivery

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// nextOf waits for the next change.
func nextOf(t testing.TB, w *Watcher) *Change {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ch, err := w.Next(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

func watchOf(t testing.TB, j *Journal, q WatchQuery) *Watcher {
	t.Helper()
	w, err := j.Watch(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Close)
	return w
}

// A watch tells what happens from its beginning on, narrowed to what was asked for, and goes on where another one ended, in
// the next process too.
func TestWatcher(t *testing.T) {
	b := newBench(t)
	b.append(publication("before", 1))
	all := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	dead := watchOf(t, b.Journal, WatchQuery{Namespace: acme, Subscription: 2, States: []State{Exhausted, Rejected}})
	elsewhere := watchOf(t, b.Journal, WatchQuery{Namespace: other})
	b.append(publication("e1", 1, 2))
	var created []ID
	for range 2 {
		ch := nextOf(t, all)
		d, err := ch.Delivery()
		if err != nil || d.State != Pending || d.EventID != "e1" || d.MaxAttempts != 3 || d.Attempts != 0 {
			t.Fatalf("%+v, %v", d, err)
		}
		created = append(created, ch.ID)
	}
	if created[0].Subscription == created[1].Subscription {
		t.Errorf("created %v", created)
	}
	after := all.Position().String()
	for _, job := range b.jobs() {
		state := Succeeded
		if job.ID.Subscription == 2 {
			state = Exhausted
		}
		b.Settle(&job, Step{State: state, Reason: "so it is"}, attemptAt(1, OutcomePermanent, 400, b.clock.now()), nil)
	}
	ch := nextOf(t, dead)
	d, err := ch.Delivery()
	if err != nil || d.State != Exhausted || d.Subscription != "sub-2" || d.StateReason != "so it is" || d.Last == nil || d.Last.ResponseCode != 400 || d.CompleteTime.IsZero() {
		t.Fatalf("%+v, %v", d, err)
	}
	told := map[ID]State{}
	for range 3 { // one of them was made before
		ch := nextOf(t, all)
		told[ch.ID] = ch.State
	}
	if len(told) != 3 || told[created[0]]+told[created[1]] != Succeeded+Exhausted {
		t.Errorf("told %v", told)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if ch, err := elsewhere.Next(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("another namespace's: %+v, %v", ch, err)
	}
	position, err := ParsePosition(after)
	if err != nil {
		t.Fatal(err)
	}
	again := func() {
		t.Helper()
		w, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: position})
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		seen := map[ID]State{}
		for range 3 {
			ch := nextOf(t, w)
			seen[ch.ID] = ch.State
		}
		if fmt.Sprint(seen) != fmt.Sprint(told) {
			t.Errorf("from %s on: %v, want %v", after, seen, told)
		}
	}
	again()
	b.reopen()
	again()
	if _, err := b.Watch(t.Context(), WatchQuery{Namespace: other, After: position}); !errors.Is(err, ErrExpired) {
		t.Errorf("a position of another namespace: %v", err)
	}
	for _, bad := range []string{"x", "AAAA", after + "!", after[:12], after + "zz"} {
		if p, err := ParsePosition(bad); err == nil {
			if _, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: p}); !errors.Is(err, ErrExpired) {
				t.Errorf("position %q: %v", bad, err)
			}
		} else if !errors.Is(err, ErrPosition) {
			t.Errorf("position %q: %v", bad, err)
		}
	}
}

// Changes are kept for ten minutes, also when nobody watches, and are recorded no longer then.
func TestWatchedChangesGo(t *testing.T) {
	b := newBench(t)
	w, err := b.Watch(t.Context(), WatchQuery{Namespace: acme})
	if err != nil {
		t.Fatal(err)
	}
	old := w.Position()
	b.append(publication("e1", 1))
	nextOf(t, w)
	late := func(d time.Duration) {
		t.Helper()
		if err := b.watches.trim(t.Context(), time.Now().Add(d)); err != nil {
			t.Fatal(err)
		}
	}
	late(time.Minute) // notes where it stands
	if v, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: old}); err != nil {
		t.Error(err)
	} else {
		v.Close()
	}
	late(13 * time.Minute)
	if _, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: old}); !errors.Is(err, ErrExpired) {
		t.Errorf("after a position of 13 minutes ago: %v", err)
	}
	b.append(publication("e2", 1))
	if d, err := nextOf(t, w).Delivery(); err != nil || d.EventID != "e2" {
		t.Errorf("%+v, %v", d, err)
	}
	last := w.Position()
	w.Close()
	late(9 * time.Minute)
	b.append(publication("e3", 1))
	v, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: last})
	if err != nil {
		t.Fatal(err)
	}
	if d, err := nextOf(t, v).Delivery(); err != nil || d.EventID != "e3" {
		t.Errorf("%+v, %v", d, err)
	}
	v.Close()
	late(11 * time.Minute)
	if b.watches.watched(acme) {
		t.Error("changes are recorded that nobody is to see")
	}
	b.append(publication("e4", 1))
	for _, p := range b.partitions {
		for _, tag := range []byte{tagNews, tagWatched} {
			if err := b.scan(b.db, appendTag(nil, p.number, tag), prefixEnd(appendTag(nil, p.number, tag)), func(key, _ []byte) error {
				t.Errorf("%s is left", keyText(key))
				return nil
			}); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: last}); !errors.Is(err, ErrExpired) {
		t.Errorf("after the end of the record: %v", err)
	}
}

// Those who watch see every change once and in order, however slow they are and however often they come back.
func TestWatchUnderLoad(t *testing.T) {
	b := newBench(t)
	const events, watchers = 3000, 6
	done := make(chan struct{})
	var watching sync.WaitGroup
	begun := make(chan struct{}, watchers)
	for i := range watchers {
		watching.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			q := WatchQuery{Namespace: acme}
			if i%2 == 1 {
				q.Subscription = SubscriptionKey(1 + i%3)
			}
			want := events * 3 * 2
			if q.Subscription != 0 {
				want = events * 2
			}
			seen := map[string]int{}
			total, returns := 0, 0
			last := map[uint16]changeAt{}
			for total < want {
				w, err := b.Watch(context.Background(), q)
				if err != nil {
					t.Errorf("watch: %v", err)
					return
				}
				if returns++; returns == 1 {
					begun <- struct{}{}
				}
				stay := 1 + rng.IntN(4000)
				if i < 2 { // all the time
					stay = want
				}
				for range stay {
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					ch, err := w.Next(ctx)
					cancel()
					if err != nil {
						t.Errorf("watcher %d after %d changes: %v", i, total, err)
						w.Close()
						return
					}
					if at := last[ch.ID.Partition]; at.commit > ch.at.commit || at.commit == ch.at.commit && at.n >= ch.at.n && at.commit != 0 {
						t.Errorf("change %+v after %+v", ch.at, at)
					}
					last[ch.ID.Partition] = ch.at
					seen[fmt.Sprint(ch.ID, ch.State)]++
					if total++; total == want {
						break
					}
				}
				q.After = w.Position()
				w.Close()
				if i == 4 {
					<-done // it comes back when all is over
				}
			}
			for what, n := range seen {
				if n != 1 {
					t.Errorf("watcher %d saw %s %d times", i, what, n)
				}
			}
		})
	}
	for range watchers {
		<-begun
	}
	var publishing sync.WaitGroup
	for g := range 3 {
		publishing.Go(func() {
			for i := range events / 3 / 10 {
				var pubs []Publication
				for k := range 10 {
					pubs = append(pubs, publication(fmt.Sprintf("e%d-%d", g, i*10+k), 1, 2, 3))
				}
				for _, r := range b.Append(context.Background(), pubs) {
					if r.Err != nil {
						t.Error(r.Err)
					}
				}
				for _, job := range b.jobs() {
					b.Settle(&job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()), nil)
				}
			}
		})
	}
	publishing.Wait()
	for _, job := range b.jobs() {
		b.Settle(&job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()), nil)
	}
	if err := b.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	close(done)
	watching.Wait()
}
