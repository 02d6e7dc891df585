package delivery

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/google/go-cmp/cmp"
)

func madeAs(text string) *Made {
	return &Made{Body: []byte(text), ContentType: "text/plain", Headers: []Header{{"x-a", "b"}}}
}

func (b *bench) keepMade(job *Job, text string) *Made {
	b.t.Helper()
	made, err := b.KeepMade(context.Background(), job, madeAs(text))
	if err != nil {
		b.t.Fatal(err)
	}
	return made
}

func (b *bench) made(job *Job) *Made {
	b.t.Helper()
	made, err := b.Made(job)
	if err != nil {
		b.t.Fatal(err)
	}
	return made
}

// What was kept first is what is sent, whoever else makes it once more, over a loss of power right after it was kept; and a
// replay to the same subscription has it too, one to another has not.
func TestMadeIsKept(t *testing.T) {
	fs := vfs.NewCrashableMem()
	b := newBench(t, func(o *Options) { o.fs = fs })
	b.append(publication("e", 1, 2))
	jobs := b.jobs()
	job, other := &jobs[0], &jobs[1]
	if made := b.made(job); made != nil {
		t.Fatalf("%+v before anything was made", made)
	}
	var kept [8]*Made
	var all sync.WaitGroup
	for i := range kept {
		all.Go(func() { kept[i] = b.keepMade(job, string(rune('a'+i))) })
	}
	all.Wait()
	after := newBench(t, func(o *Options) { o.fs = fs.CrashClone(vfs.CrashCloneCfg{}) })
	for i := range kept {
		if diff := cmp.Diff(kept[0], kept[i]); diff != "" {
			t.Errorf("%d: %s", i, diff)
		}
	}
	if diff := cmp.Diff(kept[0], after.made(job)); diff != "" {
		t.Errorf("after a loss of power (-kept +read): %s", diff)
	}
	if made := after.made(other); made != nil {
		t.Errorf("another subscription has %+v", made)
	}
	again, err := after.Resend(t.Context(), job.Lane(), job.ID, Target{Subscription: "sub-1", UID: uid(1), MaxAttempts: 1, MaxAge: time.Hour}, -1)
	if err != nil {
		t.Fatal(err)
	}
	replayed := *job
	replayed.ID = again.ID
	if diff := cmp.Diff(kept[0], after.made(&replayed)); diff != "" {
		t.Errorf("a replay (-kept +read): %s", diff)
	}
	letter := replayed
	letter.Letter = &Letter{From: "sub-2"}
	if made := after.made(&letter); made != nil {
		t.Errorf("a dead letter has what was made of its event alone: %+v", made)
	}
}

// What was made goes with its event, and stays with one that outlives its day.
func TestMadeGoesWithItsEvent(t *testing.T) {
	for _, keep := range []time.Duration{72 * time.Hour, 30 * time.Hour} {
		t.Run(keep.String(), func(t *testing.T) {
			b := newBench(t, onePartition)
			b.append(publication("ends", 1), publication("stays", 1))
			jobs := b.jobs()
			for i := range jobs {
				b.keepMade(&jobs[i], jobs[i].Event.ID)
			}
			b.succeed(jobs[0])
			b.settle(jobs[1], Step{State: Scheduled, Due: b.clock.now().Add(200 * time.Hour)}, attemptAt(1, OutcomeRetryable, 500, b.clock.now()))
			b.flush()
			b.clock.add(keep + 30*time.Hour)
			b.append(publication("new", 1))
			b.retain(keep)
			b.reopen()
			if made := b.made(&jobs[0]); made != nil {
				t.Errorf("%s is there after its event", made.Body)
			}
			if made := b.made(&jobs[1]); made == nil || string(made.Body) != "stays" {
				t.Errorf("%v is left of what an open delivery sends", made)
			}
			if _, err := b.KeepMade(t.Context(), &jobs[0], madeAs("late")); !errors.Is(err, ErrNotFound) {
				t.Errorf("kept for an event that is gone: %v", err)
			}
			open := b.read(lane(1), Timer, b.clock.now().Add(1000*time.Hour), 10)
			for i := range open {
				if open[i].Event.ID == "stays" {
					b.succeed(open[i])
				}
			}
			b.flush()
			b.clock.add(keep + 60*time.Hour)
			b.retain(keep)
			b.reopen()
			if made := b.made(&jobs[1]); made != nil {
				t.Errorf("%s is there after its event", made.Body)
			}
		})
	}
}

// A delivery that is dropped ends without an attempt, and leaves no gap in its order.
func TestDropped(t *testing.T) {
	b := newBench(t)
	b.append(keyed("a1", "a", 1), keyed("a2", "a", 1))
	job := b.wantTurn("a", "a1")
	step := Next(Policy{}, &job, Result{Cause: CauseDropped, Attempt: Attempt{Error: "of no interest"}}, b.clock.now(), 0)
	b.settle(job, step, nil)
	b.flush()
	d := b.delivery(job.ID)
	if d.State != Skipped || d.StateReason != "dropped by the transformer: of no interest" || d.Attempts != 0 || d.Last != nil {
		t.Errorf("%+v", d)
	}
	if next := b.wantTurn("a", "a2"); next.Gap != 0 {
		t.Errorf("a gap of %d", next.Gap)
	}
}
