package dispatch_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// oracle is an Attempter that remembers what was accepted.
type oracle struct {
	mu       sync.Mutex
	accepted map[delivery.ID]int
	calls    sync.WaitGroup
}

func (o *oracle) Attempt(_ *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	o.calls.Go(func() {
		switch n := rand.IntN(200); {
		case n == 0:
			sink.Complete(job, *unspent())
		case n < 40:
			sink.Complete(job, *refused(500))
		default:
			o.mu.Lock()
			o.accepted[job.ID]++
			o.mu.Unlock()
			sink.Complete(job, *ok())
		}
	})
}

func (o *oracle) AttemptBatch(_ *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink) {
	o.calls.Go(func() {
		switch n := rand.IntN(200); {
		case n == 0:
			sink.Complete(jobs[0], *unspent())
			return
		case n < 20:
			sink.Complete(jobs[0], *refused(500))
			return
		}
		r := ok()
		r.Refused = make(map[int]string)
		o.mu.Lock()
		for i, job := range jobs {
			if rand.IntN(5) == 0 {
				r.Refused[i] = "not yet"
			} else {
				o.accepted[job.ID]++
			}
		}
		o.mu.Unlock()
		sink.Complete(jobs[0], *r)
	})
}

// TestEngineOnRealJournal publishes to the real journal from several goroutines, with a window that is far
// too small and a restart in the middle, and expects each delivery to be accepted exactly once.
func TestEngineOnRealJournal(t *testing.T) {
	const events, publishers = 600, 4
	dir := t.TempDir()
	quick := func(s *subscription.Subscription) {
		s.Schedule = []time.Duration{time.Millisecond}
		s.MaxAttempts, s.MaxInFlight, s.DisableAfter = 100, 8, 0
	}
	w := &world{t: t, registry: newRegistry(), journal: newJournal(t)}
	w.engine = dispatch.New(dispatch.Options{Journal: w.journal, Subscriptions: w.registry})
	subs := []*subscription.Subscription{w.sub("a", quick), w.sub("b", quick, batching(7, 5*time.Millisecond)), w.sub("c", quick)}
	o := &oracle{accepted: make(map[delivery.ID]int)}
	for life := range 2 {
		j, err := delivery.Open(delivery.Options{Dir: dir, Partitions: 4, MinFreeBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		e := dispatch.New(dispatch.Options{Journal: j, Subscriptions: w.registry, Attempter: o, WindowBytes: 256 << 10})
		j.Start(e)
		ran := make(chan error, 1)
		go func() { ran <- e.Run(context.Background()) }()
		var publishing sync.WaitGroup
		for p := range publishers {
			publishing.Go(func() { publishTo(t, j, subs, fmt.Sprintf("%d-%d", life, p), events/publishers) })
		}
		publishing.Wait()
		if life == 1 {
			waitForNone(t, j, subs)
		}
		if err := e.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		if err := <-ran; err != nil {
			t.Error(err)
		}
		o.calls.Wait()
		if bytes := j.EventBytes(); life == 1 && bytes != 0 {
			t.Errorf("%d bytes of events are still held", bytes)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}
	if want := 2 * events * len(subs); len(o.accepted) != want {
		t.Errorf("%d deliveries accepted, want %d", len(o.accepted), want)
	}
	for name, n := range o.accepted {
		if n != 1 {
			t.Errorf("%v accepted %d times", name, n)
		}
	}
}

func publishTo(t *testing.T, j *delivery.Journal, subs []*subscription.Subscription, name string, n int) {
	for i := range n {
		e := &delivery.Event{Namespace: acme(), ID: fmt.Sprint(name, "-", i), Type: "t", Payload: make([]byte, 1000)}
		if i%20 == 0 {
			e.DeliverTime = time.Now().Add(time.Duration(rand.IntN(5)) * time.Millisecond)
		}
		p := delivery.Publication{Event: e}
		for _, s := range subs {
			p.Targets = append(p.Targets, delivery.Target{Subscription: s.ID, UID: s.UID, MaxAttempts: 100, MaxAge: time.Hour})
		}
		if r := j.Append(t.Context(), []delivery.Publication{p}); r[0].Err != nil {
			t.Error(r[0].Err)
		}
	}
}

func waitForNone(t *testing.T, j *delivery.Journal, subs []*subscription.Subscription) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(60 * time.Second)
	for {
		open := int64(0)
		if err := j.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, s := range subs {
			open += j.OpenOf(laneOf(s))
		}
		if open == 0 {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%d deliveries are still open", open)
		case <-tick.C:
		}
	}
}

// TestEditsOnRealJournal changes deliveries at random while they are made, over restarts: all must come to an end.
func TestEditsOnRealJournal(t *testing.T) {
	dir := t.TempDir()
	quick := func(s *subscription.Subscription) {
		s.Schedule = []time.Duration{time.Millisecond, 20 * time.Millisecond}
		s.MaxAttempts, s.MaxInFlight, s.DisableAfter = 100, 8, 0
	}
	w := &world{t: t, registry: newRegistry(), journal: newJournal(t)}
	w.engine = dispatch.New(dispatch.Options{Journal: w.journal, Subscriptions: w.registry})
	names := []string{"a", "b", "c", "d"}
	var subs []*subscription.Subscription
	for _, n := range names {
		subs = append(subs, w.sub(n, quick))
	}
	o := &oracle{accepted: make(map[delivery.ID]int)}
	const lives = 3
	for life := range lives {
		j, err := delivery.Open(delivery.Options{Dir: dir, Partitions: 3, MinFreeBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		e := dispatch.New(dispatch.Options{Journal: j, Subscriptions: w.registry, Attempter: o, WindowBytes: 128 << 10})
		w.engine = e
		j.Start(e)
		ran := make(chan error, 1)
		go func() { ran <- e.Run(context.Background()) }()
		var publishing sync.WaitGroup
		publishing.Go(func() { publishTo(t, j, subs, fmt.Sprint(life), 300) })
		ctx, cancel := context.WithCancel(t.Context())
		var editing sync.WaitGroup
		for range 2 {
			editing.Go(func() { w.editAtRandom(ctx, j, subs, names, quick) })
		}
		publishing.Wait()
		cancel()
		editing.Wait()
		for _, n := range names {
			w.sub(n, quick)
		}
		if life == lives-1 {
			waitForNone(t, j, subs)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		_ = e.Stop(ctx) // or abandons what is in flight
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		o.calls.Wait()
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	}
}

func (w *world) editAtRandom(ctx context.Context, j *delivery.Journal, subs []*subscription.Subscription, names []string, quick func(*subscription.Subscription)) {
	for ctx.Err() == nil {
		sub := subs[rand.IntN(len(subs))]
		key := laneOf(sub)
		page, err := j.Deliveries(delivery.Query{Namespace: key.Namespace, Subscription: key.Subscription, Limit: 20})
		if err != nil {
			w.t.Error(err)
			return
		}
		for _, d := range page.Deliveries {
			call, leave := context.WithCancel(ctx)
			switch rand.IntN(8) {
			case 0:
				leave()
				_, _ = w.engine.Cancel(call, d.ID, key)
			case 1:
				_, _ = w.engine.Cancel(call, d.ID, key)
			case 2, 3:
				_, _ = w.engine.Retry(call, d.ID, key, -1)
			}
			leave()
		}
		switch name := names[rand.IntN(len(names))]; rand.IntN(12) {
		case 0:
			_, _ = w.engine.CancelLane(ctx, key, "asked for", nil)
		case 1, 2:
			w.sub(name, quick, inState(grapnelv1.Subscription_STATE_PAUSED))
		case 3:
			w.remove(name, false)
		case 4:
			w.remove(name, true)
		default:
			w.sub(name, quick)
		}
	}
}
