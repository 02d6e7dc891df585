package delivery_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/delivery"
)

func TestCompanyAfterAFailedBatch(t *testing.T) {
	result := func(code int, change func(*delivery.Result)) delivery.Result {
		r := delivery.Result{Attempt: delivery.Attempt{Outcome: delivery.OutcomeRetryable, ResponseCode: code}}
		if change != nil {
			change(&r)
		}
		return r
	}
	for name, tt := range map[string]struct {
		r    delivery.Result
		n    int
		want []int // company of at most 100 after one such batch, and after another
	}{
		"400":         {result(400, nil), 100, []int{1, 1}},
		"413":         {result(413, nil), 100, []int{1, 1}},
		"422":         {result(422, nil), 100, []int{1, 1}},
		"429":         {result(429, nil), 100, []int{100, 100}},
		"408":         {result(408, nil), 100, []int{13, 1}},
		"500":         {result(500, nil), 100, []int{13, 1}},
		"503":         {result(503, nil), 100, []int{100, 100}},
		"no list":     {result(200, nil), 100, []int{13, 1}},
		"alone":       {result(400, nil), 1, []int{100, 100}},
		"timed out":   {result(0, func(r *delivery.Result) { r.Outcome = delivery.OutcomeTimedOut }), 100, []int{13, 1}},
		"reset":       {result(0, nil), 100, []int{13, 1}},
		"unreachable": {result(0, func(r *delivery.Result) { r.Outcome = delivery.OutcomeUnreachable }), 100, []int{100, 100}},
		"a panic in the plugin": {result(0, func(r *delivery.Result) {
			r.Outcome, r.Cause = delivery.OutcomePluginError, delivery.CausePlugin
		}), 100, []int{13, 1}},
		"a plugin lost": {result(0, func(r *delivery.Result) {
			r.Outcome, r.Cause, r.Indeterminate = delivery.OutcomeInterrupted, delivery.CausePlugin, true
		}), 100, []int{100, 100}},
	} {
		job := delivery.Job{}
		var got []int
		for range 2 {
			job.Parted = delivery.Part(&job, tt.r, tt.n)
			got = append(got, delivery.Company(job.Parted, 100))
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s: company of %v, want %v", name, got, tt.want)
		}
	}
}

// What each of a batch keeps of the answer is bounded in sum.
func TestResultsOfABatch(t *testing.T) {
	headers := []delivery.Header{{Name: "a", Value: strings.Repeat("x", 200)}, {Name: "b", Value: strings.Repeat("x", 200)}}
	r := delivery.Result{
		Attempt: delivery.Attempt{Outcome: delivery.OutcomeSucceeded, ResponseCode: 207, ResponseBody: make([]byte, 4096), ResponseHeaders: headers, RequestHeaders: headers},
		Refused: map[int]string{1: "no such customer"},
	}
	if got := r.Of(0, 1000); got.Outcome != delivery.OutcomeSucceeded || len(got.ResponseBody) != 256 || len(got.ResponseHeaders) != 1 || len(got.RequestHeaders) != 1 {
		t.Errorf("one that was taken: %+v", got)
	}
	if got := r.Of(1, 1000); got.Outcome != delivery.OutcomeRetryable || got.Error != "no such customer" || got.ResponseCode != 207 || got.Refused != nil {
		t.Errorf("one that was not: %+v", got)
	}
	if got := r.Of(0, 1); len(got.ResponseBody) != 4096 || len(got.ResponseHeaders) != 2 {
		t.Errorf("alone: %d bytes of body, headers %v", len(got.ResponseBody), got.ResponseHeaders)
	}
}

func TestBatchUIDFollowsFromEventsAndOrder(t *testing.T) {
	a, b := &delivery.Event{UID: "evt_a"}, &delivery.Event{UID: "evt_b"}
	uid := func(events ...*delivery.Event) string { return delivery.BatchUID(events) }
	if again := uid(&delivery.Event{UID: "evt_a"}, b); again != uid(a, b) || len(uid(a)) != 28 || !strings.HasPrefix(uid(a), "bat_") {
		t.Errorf("%s, %s", uid(a, b), uid(a))
	}
	if all := []string{uid(a), uid(b), uid(a, b), uid(b, a), uid(&delivery.Event{UID: "evt_aevt_b"})}; len(slices.Compact(slices.Sorted(slices.Values(all)))) != len(all) {
		t.Errorf("not all different: %v", all)
	}
}
