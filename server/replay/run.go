package replay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
)

// run makes the steps of a replay until it has ended, or ctx.
func (r *Runner) run(ctx context.Context, j *job) {
	steps := r.steps
	if j.Spec.Erase {
		steps = r.erase
	}
	state, reason := steps(ctx, j)
	for state != 0 {
		// Also when it has been cancelled in this very moment: it had come to its end.
		ended, err := r.end(context.WithoutCancel(ctx), j, state, reason)
		if err == nil || errors.Is(err, delivery.ErrNotFound) {
			r.log.Info("replay ended", "replay_id", j.ID, "failed", state == delivery.ReplayFailed, "reason", reason)
			if err == nil {
				r.ended(ended)
			}
			return
		}
		r.log.Error("end of a replay not noted yet", "replay_id", j.ID, "err", err)
		j.waits("its end cannot be noted")
		if !sleep(ctx, lookLatest) {
			return
		}
	}
}

func (r *Runner) end(ctx context.Context, j *job, state delivery.ReplayState, reason string) (*delivery.Replay, error) {
	if j.Spec.Erase && state == delivery.ReplaySucceeded {
		return r.journal.EndErasure(ctx, j.Namespace, j.Key, j.proof)
	}
	return r.journal.EndReplay(ctx, j.Namespace, j.Key, state, reason)
}

// steps goes on until the replay has ended, with how; 0 says that ctx has.
func (r *Runner) steps(ctx context.Context, j *job) (delivery.ReplayState, string) {
	left := make([]uint16, r.journal.Partitions())
	for i := range left {
		left[i] = uint16(i)
	}
	pace, wait := pace{rate: j.Spec.MaxRate}, waiting{j: j}
	for at := 0; len(left) > 0; {
		pick, held := r.picker(j.Replay)
		switch {
		case ctx.Err() != nil:
			return 0, ""
		case held.ends:
			return delivery.ReplayFailed, held.reason
		case pick == nil && held.reason == "": // nothing can be selected
			return delivery.ReplaySucceeded, ""
		}
		limit := pace.step()
		if held.reason == "" {
			limit, held.reason = r.room(j, limit)
		}
		if held.reason != "" {
			if !wait.on(ctx, held.reason, lookLatest) {
				return 0, ""
			}
			continue
		}
		at %= len(left)
		began := time.Now()
		made, err := r.advance(ctx, j, left[at], pick, limit)
		if err != nil {
			if state, reason, ok := r.again(ctx, &wait, err, lookLatest); !ok {
				return state, reason
			}
			continue
		}
		wait.over()
		if made.Done {
			left = append(left[:at], left[at+1:]...)
		} else {
			at++
		}
		r.metrics.created.Add(float64(made.Created))
		rest := max(min(restFor*time.Since(began), restMost), pace.made(int(made.Created), time.Now()))
		if len(left) > 0 && !sleep(ctx, rest) {
			return 0, ""
		}
	}
	return delivery.ReplaySucceeded, ""
}

// advance makes one step, when it is this replay's turn.
func (r *Runner) advance(ctx context.Context, j *job, partition uint16, pick *delivery.Picker, limit int) (delivery.Advance, error) {
	select {
	case r.step <- struct{}{}:
		defer func() { <-r.step }()
	case <-ctx.Done():
		return delivery.Advance{}, context.Cause(ctx)
	}
	// Whoever cancels, or stops, waits for a step that has begun.
	ctx = context.WithoutCancel(ctx)
	if err := r.note(ctx, j); err != nil {
		return delivery.Advance{}, err
	}
	return r.journal.AdvanceReplay(ctx, j.Replay, partition, pick, limit)
}

// note notes that a replay runs.
func (r *Runner) note(ctx context.Context, j *job) error {
	if j.begun {
		return nil
	}
	err := r.journal.StartReplay(ctx, j.Namespace, j.Key)
	j.begun = err == nil
	return err
}

// room bounds a step by how many deliveries of the replay are open.
func (r *Runner) room(j *job, limit int) (int, string) {
	if !r.journal.Counted() {
		return 0, "what is open is still being counted"
	}
	open := r.journal.ReplayOpen(j.Namespace, j.Key)
	if open >= openAhead {
		return 0, fmt.Sprintf("%d of its deliveries are open", open)
	}
	// Publishing is refused at the quota, and is to go on beside it.
	if ns := r.registry.Snapshot().NamespaceByKey(uint64(j.Namespace)); ns != nil {
		if most := int64(ns.Quota().MaxOpenDeliveries); most > 0 {
			left := most/2 - r.journal.OpenIn(j.Namespace)
			if left <= 0 {
				return 0, fmt.Sprintf("half of max_open_deliveries, %d, are open in its namespace", most)
			}
			limit = int(min(int64(limit), left))
		}
	}
	return int(min(int64(limit), openAhead-open)), ""
}

// again tells a fault that ends a job, with the state, from one that may pass, after which it waits, up to most where it is
// known how it passes, before the next try. The state 0 says that ctx has ended.
func (r *Runner) again(ctx context.Context, wait *waiting, err error, most time.Duration) (state delivery.ReplayState, reason string, ok bool) {
	if ctx.Err() != nil {
		return 0, "", false
	}
	if reason := r.without(wait.j.Namespace); reason != "" {
		return delivery.ReplayFailed, reason, false
	}
	switch {
	case errors.Is(err, delivery.ErrNotFound):
		return delivery.ReplayFailed, "it was erased", false
	case delivery.Damaged(err):
		r.log.Error("replay failed", "replay_id", wait.j.ID, "err", err)
		return delivery.ReplayFailed, "the journal is damaged; the server's log says where", false
	case errors.Is(err, delivery.ErrDiskFull):
		reason = "the journal's disk is full"
	case errors.Is(err, delivery.ErrRefused), errors.Is(err, delivery.ErrClosed):
		reason = "the journal refuses"
	case errors.Is(err, delivery.ErrStale):
		reason = "files that hold what it has purged are still in use"
	default:
		r.log.Warn("replay waits, and tries again", "replay_id", wait.j.ID, "err", err)
		reason, most = "the journal could not be read or written, and is tried again; the server's log says why", faultLatest
	}
	return 0, "", wait.on(ctx, reason, most)
}

// waiting is how long a job waits that cannot go on: each time twice as long.
type waiting struct {
	j    *job
	next time.Duration
}

// on reports false when ctx ends first.
func (w *waiting) on(ctx context.Context, reason string, most time.Duration) bool {
	w.next = min(max(2*w.next, lookAgain), most)
	w.j.waits(reason)
	return sleep(ctx, w.next)
}

// over notes that the job goes on.
func (w *waiting) over() {
	w.next = 0
	w.j.waits("")
}

func (j *job) waits(reason string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.waiting = reason
}

// pace spreads what a replay makes over time.
type pace struct {
	rate float64
	next time.Time
}

// step is how many are made at once.
func (p *pace) step() int {
	if p.rate <= 0 {
		p.rate = DefaultRate
	}
	return min(max(int(p.rate/stepsPerSecond), 1), stepMost)
}

// made says how long to wait after n more have been made.
func (p *pace) made(n int, now time.Time) time.Duration {
	if late := now.Add(-behindMost); p.next.IsZero() {
		p.next = now
	} else if p.next.Before(late) {
		p.next = late
	}
	p.next = p.next.Add(time.Duration(min(float64(n)/p.rate*float64(time.Second), float64(longest))))
	return p.next.Sub(now)
}

// longest bounds a pace for which no time is long enough.
const longest = 1000 * 24 * time.Hour

// sleep reports false when ctx ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

type metrics struct{ created prometheus.Counter }

func newMetrics(r *Runner, to prometheus.Registerer) *metrics {
	m := &metrics{created: prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_replay_deliveries_total", Help: "Deliveries that replays have made or retried.",
	})}
	if to != nil {
		to.MustRegister(m.created, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_replays", Help: "Replays that have not ended.",
		}, func() float64 {
			r.mu.Lock()
			defer r.mu.Unlock()
			return float64(len(r.jobs))
		}))
	}
	return m
}
