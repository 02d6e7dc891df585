package dispatch_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// incidents is who is told.
type incidents struct {
	mu   sync.Mutex
	told []dispatch.Incident
}

func (i *incidents) tell(in dispatch.Incident) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.told = append(i.told, in)
}

// lines are what was told since the last look, in short, each run of equal ones once.
func (i *incidents) lines() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []string
	for _, in := range i.told {
		line := fmt.Sprint(map[dispatch.IncidentKind]string{
			dispatch.Failing: "failing", dispatch.Recovered: "recovered", dispatch.Disabled: "disabled", dispatch.GivenUp: "given up",
		}[in.Kind], " ", in.Subscription.ID, ": ", in.Reason)
		if len(out) == 0 || out[len(out)-1] != line {
			out = append(out, line)
		}
	}
	i.told = nil
	return out
}

// Operators are told of what happens to a receiver and to its deliveries, and not of what happens to those of operational
// events.
func TestIncidentsAreTold(t *testing.T) {
	for _, batched := range []bool{false, true} {
		t.Run(fmt.Sprint("batched=", batched), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var told incidents
				w := newWorld(t, func(o *dispatch.Options) { o.Tell = told.tell })
				defer w.stop()
				w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
				sub := w.sub("orders", func(s *subscription.Subscription) {
					s.MaxAttempts, s.DisableAfter = 1, 4*time.Hour
					if batched {
						s.Batching = &subscription.Batching{MaxEvents: 10, MaxBytes: 1 << 20}
					}
				})
				round := func(eventType string, n int) {
					w.journal.eventType = eventType
					for range n {
						w.publish(sub, 0)
						time.Sleep(10 * time.Minute)
					}
				}
				round("grapnel.delivery.exhausted", 15)
				if got := told.lines(); got != nil {
					t.Errorf("of operational events was told %q", got)
				}
				w.receiver.set(always(time.Millisecond, ok))
				round("order.created", 3)
				if got := told.lines(); got != nil {
					t.Errorf("when it is well after that was told %q", got)
				}
				w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
				round("order.created", 15)
				want := []string{
					"given up orders: all 1 attempts failed", "failing orders: no success for some minutes", "given up orders: all 1 attempts failed",
					"failing orders: no success for half of the time after which the subscription is disabled", "given up orders: all 1 attempts failed",
				}
				if diff := cmp.Diff(want, told.lines()); diff != "" {
					t.Errorf("while it fails (-want +got):\n%s", diff)
				}
				w.receiver.set(always(time.Millisecond, ok))
				round("order.created", 3)
				if diff := cmp.Diff([]string{"recovered orders: "}, told.lines()); diff != "" {
					t.Errorf("when it is well (-want +got):\n%s", diff)
				}
				w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(410) }))
				round("order.created", 1)
				gone := "the target answered 410 Gone"
				got := told.lines()
				if len(got) != 2 || got[0] != "given up orders: "+gone || got[1] != "disabled orders: "+gone {
					t.Errorf("when it is gone: %q", got)
				}
			})
		})
	}
}

// The warning that a quiet attempt comes upon is told by the next other one, and what disables a subscription is told whatever
// the last attempt carried, unless all that failed was operational events.
func TestIncidentsThatQuietAttemptsFind(t *testing.T) {
	const (
		order, quiet = "order.created", "grapnel.delivery.exhausted"
		warned       = "failing orders: no success for half of the time after which the subscription is disabled"
		disabled     = "disabled orders: failing without a success for 4h0m0s"
	)
	for _, tt := range []struct {
		name string
		run  []string // the types of what fails, ten rounds of ten minutes each
		want []string
	}{
		{"the first hours are others'", []string{order, quiet, order}, []string{"failing orders: no success for some minutes", warned, disabled}},
		{"the last hours are quiet", []string{order, quiet, quiet}, []string{"failing orders: no success for some minutes", disabled}},
		{"all is quiet", []string{quiet, quiet, quiet}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var told incidents
				w := newWorld(t, func(o *dispatch.Options) { o.Tell = told.tell })
				defer w.stop()
				w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(500) }))
				sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxAttempts, s.DisableAfter = 1, 4*time.Hour })
				for _, eventType := range tt.run {
					w.journal.eventType = eventType
					for range 10 {
						w.publish(sub, 0)
						time.Sleep(10 * time.Minute)
					}
				}
				got := slices.DeleteFunc(told.lines(), func(line string) bool { return strings.HasPrefix(line, "given up") })
				if !slices.Equal(got, tt.want) {
					t.Errorf("told %q, want %q", got, tt.want)
				}
				if len(w.wasDisabled()) != 1 {
					t.Errorf("disabled %q", w.wasDisabled())
				}
			})
		})
	}
}

// What disables a subscription on account of an operational event is not told, either; nor what expires of those.
func TestIncidentsOfOperationalEventsAreNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told incidents
		w := newWorld(t, func(o *dispatch.Options) { o.Tell = told.tell })
		defer w.stop()
		w.receiver.set(always(time.Millisecond, func() *delivery.Result { return refused(410) }))
		sub := w.sub("orders", func(s *subscription.Subscription) { s.MaxAge = time.Minute })
		w.journal.eventType = "grapnel.replay.done"
		w.publishN(sub, 0, 3)
		time.Sleep(3 * time.Hour)
		wantStates(t, w, map[delivery.State]int{delivery.Rejected: 1, delivery.Exhausted: 2})
		if got := told.lines(); got != nil || len(w.wasDisabled()) != 1 {
			t.Errorf("told %q; disabled %q", got, w.wasDisabled())
		}
	})
}
