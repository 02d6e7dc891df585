//go:build linux

package pluginhost

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
)

func batched(sub *subscription.Subscription) *subscription.Subscription {
	sub.Proto().Batching = &grapnelv1.Batching{MaxEvents: 100}
	sub.Batching = &subscription.Batching{MaxEvents: 100, MaxBytes: 1 << 20}
	return sub
}

// together makes one attempt with several jobs.
func (f *fixture) together(t testing.TB, sub *subscription.Subscription, jobs ...*delivery.Job) delivery.Result {
	t.Helper()
	s := newSink()
	f.AttemptBatch(sub, jobs, s)
	s.wait(t, 1)
	return s.of(jobs[0])
}

// A plugin that dies of a batch may have died of any event in it, even if nothing else was in flight: each is tried apart then,
// the one that it dies of is quarantined, and the others are delivered.
func TestABatchThatAPluginDiesOf(t *testing.T) {
	for _, kind := range []string{"exit", "fault"} {
		t.Run(kind, func(t *testing.T) {
			f := mortal(t)
			sub := batched(newSub(t, 1, nil))
			if got := f.together(t, sub, newJob(99, "harmless")); got.Outcome != delivery.OutcomeSucceeded || got.BatchSize != 1 {
				t.Fatalf("one that is harmless: %+v", got)
			}
			jobs := make([]*delivery.Job, 10)
			for n := range jobs {
				if jobs[n] = newJob(n, "harmless"); n == 6 {
					jobs[n] = newJob(n, kind)
				}
				jobs[n].Expire = time.Now().Add(time.Hour)
			}
			got := f.together(t, sub, jobs...)
			if !got.Indeterminate || got.Guilt != delivery.GuiltShared || got.BatchSize != 10 {
				t.Fatalf("the batch: %+v", got)
			}
			for _, job := range jobs {
				job.Suspicion = delivery.Watch(job, got)
			}
			for _, job := range jobs {
				var step delivery.Step
				eventually(t, "an end", func() bool {
					r := f.together(t, sub, job)
					if r.Cause == delivery.CauseUnspent {
						return false
					}
					step = delivery.Next(delivery.Policy{}, job, r, time.Now(), 0.5)
					job.Suspicion = delivery.Watch(job, r)
					job.Attempts++
					return step.State.Final()
				})
				switch {
				case job.Event.Type == "harmless" && step.State != delivery.Succeeded:
					t.Errorf("%s: %+v", job.Event.ID, step)
				case job.Event.Type == kind && (step.State != delivery.Rejected || !strings.Contains(step.Reason, "quarantined")):
					t.Errorf("what it dies of: %+v", step)
				}
			}
		})
	}
}

// What cannot be sent together is given back, and no attempt is spent.
func TestBatchesThatAreTooLarge(t *testing.T) {
	f := platform(t)
	sub := batched(newSub(t, 1, nil))
	sub.Proto().Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/beta"}}
	large := func(n int) *delivery.Job {
		job := newJob(n, "x")
		job.Event.Payload = []byte(`"` + strings.Repeat("x", platformMaxBody*2/3) + `"`)
		return job
	}
	if got := f.together(t, sub, large(1), large(2)); got.Cause != delivery.CauseCrowded {
		t.Errorf("two: %+v", got)
	}
	if got := f.together(t, sub, large(1)); got.ResponseCode != 400 || !strings.HasPrefix(got.Batch, "bat_") {
		t.Errorf("one: %+v", got)
	}
	// What receivers bound is the body when it is decompressed.
	quoted := func(n int) *delivery.Job {
		job := newJob(n, "x")
		job.Event.Attributes = map[string]string{"a": strings.Repeat(`"`, 280<<10)}
		return job
	}
	zipped := batched(newSub(t, 2, nil))
	zipped.Proto().Signers = sub.Proto().Signers
	zipped.Proto().PayloadShape = &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}
	if got := f.together(t, zipped, quoted(1), quoted(2)); got.Cause != delivery.CauseCrowded {
		t.Errorf("two that are small when compressed: %+v", got)
	}
	if got := f.together(t, zipped, quoted(1)); got.Cause == delivery.CauseCrowded {
		t.Errorf("one that is small when compressed: %+v", got)
	}
	huge := newJob(3, "x")
	huge.Event.Payload = make([]byte, platformMaxBody)
	if got := f.together(t, sub, huge); got.Cause != delivery.CausePolicy {
		t.Errorf("one that is larger than the transport: %+v", got)
	}
}

// A subscription may lose its batching while its deliveries are on their way through the host: none of them may be taken for
// another.
func TestBatchOfASubscriptionThatHasNoneAnyMore(t *testing.T) {
	f := platform(t)
	sub := newSub(t, 1, nil)
	sub.Proto().Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/beta"}}
	if got := f.together(t, sub, newJob(1, "x"), newJob(2, "x")); got.Cause != delivery.CauseCrowded {
		t.Errorf("%+v", got)
	}
	if n := f.metrics.open.Load(); n != 0 {
		t.Errorf("%d attempts are open", n)
	}
}

// A transport without the trait is refused when a subscription is checked, and gets nothing when it is asked all the same.
func TestTransportsWithoutBatches(t *testing.T) {
	f := platform(t)
	sub := batched(newSub(t, 1, nil))
	sub.Proto().Uri, sub.Proto().Transport = "mute://receiver", nil
	sub.Proto().Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/beta"}}
	ds, err := f.Check(t.Context(), sub.Proto())
	if err != nil || len(ds) != 1 || ds[0].Field != "subscription.batching" || !strings.Contains(ds[0].Summary, "plugins/mute carries one event") {
		t.Errorf("%+v, %v", ds, err)
	}
	if got := f.together(t, sub, newJob(1, "x"), newJob(2, "x")); got.Cause != delivery.CausePlugin || !strings.Contains(got.Error, "plugins/mute carries one event") {
		t.Errorf("%+v", got)
	}
}

// Nobody counts as taken by an answer that broke off where it might have named him.
func TestWhoWasTakenByAnAnswer(t *testing.T) {
	jobs := []*delivery.Job{newJob(1, "x"), newJob(2, "x"), newJob(3, "x")}
	for i, uid := range []string{"evt_1", "evt_2", "evt_1"} { // the third is the first one, sent again
		jobs[i].Event.UID = uid
	}
	ids := func(value string) []delivery.Header { return []delivery.Header{{Name: wire.FailedIDs, Value: value}} }
	all := []int{0, 1, 2}
	for name, tt := range map[string]struct {
		r    wire.Result
		want []int // who was not taken
	}{
		"nothing":                        {wire.Result{}, nil},
		"one":                            {wire.Result{Body: []byte(`{"failed": ["evt_2"]}`)}, []int{1}},
		"one that is there twice":        {wire.Result{Body: []byte(`{"failed": ["evt_1"]}`)}, []int{0, 2}},
		"one again and again":            {wire.Result{Headers: ids(strings.Repeat("evt_2,", 10_000))}, []int{1}},
		"prefixes and other cases":       {wire.Result{Body: []byte(`{"failed": ["evt_", "EVT_2", "evt_11", " evt_2"]}`)}, nil},
		"cut by its length":              {wire.Result{Body: []byte(`{"a": "` + strings.Repeat("x", wire.MaxAnswer-7)), Truncated: true}, nil},
		"broken off in its head":         {wire.Result{Truncated: true, Note: "reset"}, all},
		"broken off in blanks":           {wire.Result{Body: []byte(" \n"), Truncated: true}, all},
		"broken off before a list":       {wire.Result{Body: []byte(`{"taken": 2, `), Truncated: true}, all},
		"broken off behind a list":       {wire.Result{Body: []byte(`{"failed": ["evt_2"], "tak`), Truncated: true}, []int{1}},
		"broken off, and no JSON":        {wire.Result{Body: []byte("thank y"), Truncated: true}, nil},
		"broken off, with a name beside": {wire.Result{Body: []byte(`{"taken"`), Headers: ids("evt_2"), Truncated: true}, all},
	} {
		a := delivery.Attempt{Outcome: delivery.OutcomeSucceeded}
		tt.r.Status = 200
		refused := (&pending{plan: &plan{}, jobs: jobs}).readAnswer(&tt.r, &a, time.Now())
		got := slices.Sorted(maps.Keys(refused))
		if a.Outcome != delivery.OutcomeSucceeded {
			got = all
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v were not taken, want %v; %s", name, got, tt.want, a.Error)
		}
	}
}
