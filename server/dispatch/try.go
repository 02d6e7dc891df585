package dispatch

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// testEvery is how often one subscription may be tested.
const testEvery = time.Second

// tests remembers who was tested within the last second.
type tests struct {
	mu   sync.Mutex
	last map[delivery.LaneKey]time.Time
}

func (t *tests) allow(key delivery.LaneKey, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, at := range t.last {
		if now.Sub(at) >= testEvery {
			delete(t.last, k)
		}
	}
	if _, ok := t.last[key]; ok {
		return false
	}
	if t.last == nil {
		t.last = make(map[delivery.LaneKey]time.Time)
	}
	t.last[key] = now
	return true
}

// trial is the sink of one test.
type trial chan delivery.Result

func (t trial) Complete(_ *delivery.Job, r delivery.Result) {
	select {
	case t <- r:
	default:
	}
}

// Test makes one attempt outside the lanes and returns how it ended; nothing was attempted when it was dropped. Nothing is
// stored, repeated or counted. An event without a UID gets one. It returns ErrTestLimit for a second test of a subscription within a
// second, ErrUnspent when the plugin is not ready, ErrStopped, and ctx's cause when it ends first; the
// attempt may then still be made.
func (e *Engine) Test(ctx context.Context, sub *subscription.Subscription, event *delivery.Event) (delivery.Result, error) {
	if e.stopping.Load() {
		return delivery.Result{}, ErrStopped
	}
	now := e.now()
	key := laneOf(sub)
	if !e.tests.allow(key, now) {
		return delivery.Result{}, fmt.Errorf("test %s/%s: %w", sub.Namespace, sub.ID, ErrTestLimit)
	}
	sample := *event
	sample.Namespace = key.Namespace
	if sample.UID == "" {
		sample.UID = "test_" + strings.ToLower(rand.Text())
	}
	if sample.AcceptTime.IsZero() {
		sample.AcceptTime = now
	}
	job := &delivery.Job{
		ID: delivery.ID{Subscription: key.Subscription}, Event: &sample, MaxAttempts: 1,
		Expire: now.Add(time.Hour), Manual: true,
	}
	sink := make(trial, 1)
	e.attempter.Attempt(sub, job, sink)
	select {
	case <-ctx.Done():
		return delivery.Result{}, fmt.Errorf("test %s/%s: %w", sub.Namespace, sub.ID, context.Cause(ctx))
	case <-e.work.Done():
		return delivery.Result{}, ErrStopped
	case r := <-sink:
		return tested(r, now, e.now())
	}
}

func tested(r delivery.Result, started, ended time.Time) (delivery.Result, error) {
	if r.Cause == delivery.CauseUnspent {
		if r.Error == "" {
			return delivery.Result{}, ErrUnspent
		}
		return delivery.Result{}, fmt.Errorf("%w: %s", ErrUnspent, r.Error)
	}
	one := r.Of(0, 1)
	a := &one.Attempt
	a.Number, a.Manual = 1, true
	if a.Start.IsZero() {
		a.Start = started
	}
	if a.Duration == 0 {
		a.Duration = ended.Sub(started)
	}
	return one, nil
}
