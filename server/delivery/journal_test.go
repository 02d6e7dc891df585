package delivery

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// uid makes a UID whose key is n.
func uid(n int) (u UID) {
	binary.BigEndian.PutUint64(u[8:], uint64(n))
	u[0] = 0xaa
	return u
}

const acme = NamespaceKey(7)

// follower keeps what it is told.
type follower struct {
	mu     sync.Mutex
	jobs   []Job
	timed  []Row
	edited []uint64
	wake   chan struct{}
}

func newFollower() *follower { return &follower{wake: make(chan struct{}, 1)} }

func (f *follower) told() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *follower) Offer(_ Commit, jobs []Job) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.jobs = append(f.jobs, jobs...)
	f.told()
}

func (f *follower) Timed(_ Commit, _ LaneKey, _ uint16, row Row) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.timed = append(f.timed, row)
	f.told()
}

func (f *follower) Edited(_ Commit, _ LaneKey, _ uint16, seq uint64, _ uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.edited = append(f.edited, seq)
	f.told()
}

func (f *follower) take() []Job {
	f.mu.Lock()
	defer f.mu.Unlock()
	jobs := f.jobs
	f.jobs = nil
	return jobs
}

// settledOnce waits for a settle.
type settledOnce chan Commit

func (s settledOnce) Settled(c Commit) { s <- c }

func settleNow(j *Journal, job *Job, step Step, a *Attempt) {
	done := make(settledOnce, 1)
	j.Settle(job, step, a, done)
	<-done
}

func publication(id string, subs ...int) Publication {
	p := Publication{Event: &Event{Namespace: acme, ID: id, Source: "/test", Type: "order.created", Payload: []byte(`{"id":"` + id + `"}`)}}
	for _, s := range subs {
		p.Targets = append(p.Targets, Target{Subscription: fmt.Sprint("sub-", s), UID: uid(s), MaxAttempts: 3, MaxAge: time.Hour})
	}
	return p
}

func open(t *testing.T, dir string, o Options) (*Journal, *follower) {
	t.Helper()
	o.Dir, o.MinFreeBytes = dir, -1
	j, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.Close() })
	f := newFollower()
	j.Start(f)
	return j, f
}

func mustAppend(t *testing.T, j *Journal, pubs ...Publication) []AppendResult {
	t.Helper()
	results := j.Append(t.Context(), pubs)
	for _, r := range results {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	return results
}

func states(t *testing.T, j *Journal, q Query) (out []State) {
	t.Helper()
	q.Namespace = acme
	for {
		page, err := j.Deliveries(q)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range page.Deliveries {
			out = append(out, d.State)
		}
		if q.After = page.Next; q.After == "" {
			return out
		}
	}
}

func TestSmoke(t *testing.T) {
	dir := t.TempDir()
	j, f := open(t, dir, Options{Partitions: 2})
	mustAppend(t, j, publication("e1", 1, 2), publication("e2", 1))
	r := mustAppend(t, j, publication("e1", 1, 2))
	if !r[0].Duplicate || r[0].Event.Matched != 2 {
		t.Fatalf("duplicate: %+v", r[0])
	}
	jobs := f.take()
	if len(jobs) != 3 {
		t.Fatalf("%d jobs", len(jobs))
	}
	if got := states(t, j, Query{}); !slices.Equal(got, []State{Pending, Pending, Pending}) {
		t.Fatal(got)
	}
	settleNow(j, &jobs[0], Step{State: Succeeded}, &Attempt{Number: 1, Start: time.Now(), Outcome: OutcomeSucceeded})
	settleNow(j, &jobs[1], Step{State: Scheduled, Due: time.Now().Add(time.Minute)}, &Attempt{Number: 1, Start: time.Now(), Outcome: OutcomeRetryable, ResponseBody: []byte("no")})
	for _, q := range []Query{{}, {Subscription: 1}, {Subscription: 2}, {EventID: "e1"}, {States: []State{Scheduled}}} {
		t.Log(q, states(t, j, q))
	}
	d, err := j.Retry(t.Context(), jobs[1].Lane(), jobs[1].ID, -1)
	if err != nil || d.State != Scheduled || d.Subscription == "" {
		t.Fatal(d, err)
	}
	d, err = j.Cancel(t.Context(), jobs[1].Lane(), jobs[1].ID, "why not")
	if err != nil || d.State != Cancelled {
		t.Fatal(d, err)
	}
	attempts, err := j.Attempts(acme, jobs[1].ID)
	if err != nil || len(attempts) != 1 || string(attempts[0].ResponseBody) != "no" {
		t.Fatal(attempts, err)
	}
	if got := states(t, j, Query{States: []State{Cancelled}}); len(got) != 1 {
		t.Fatal(got)
	}
	e, err := j.Event(acme, "e1")
	if err != nil || e.Type != "order.created" || e.Source != "/test" {
		t.Fatal(e, err)
	}
	if again, err := j.EventByUID(acme, e.UID); err != nil || again.ID != "e1" {
		t.Fatal(again, err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, _ = open(t, dir, Options{})
	n := 0
	for state, err := range j.Lanes() {
		if err != nil {
			t.Fatal(err)
		}
		read, err := j.Read(state.Lane, state.Partition, FIFO, state.FIFO, 0, 10, 1<<20)
		if err != nil || len(read.Jobs) != 1 {
			t.Fatal(read, err)
		}
		n++
	}
	if n != 1 {
		t.Fatal(n, "lanes")
	}
}
