package api_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
)

func TestTestSubscription(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	name := w.subscribe(t, "acme", "orders", nil).GetName()
	test := func(e *grapnelv1.Event) (*grapnelv1.Attempt, error) {
		answer, err := w.subscriptions.TestSubscription(t.Context(), &grapnelv1.TestSubscriptionRequest{Name: name, Event: e})
		return answer.GetAttempt(), err
	}
	w.engine.attempt = delivery.Attempt{
		Number: 1, Manual: true, Start: time.Now(), Duration: time.Second, Outcome: delivery.OutcomeRetryable, ResponseCode: 503,
		Error: "the target answered 503", ResponseBody: []byte("busy"),
	}
	got, err := test(nil)
	if err != nil {
		t.Fatal("a target that fails is no error:", err)
	}
	if got.GetOutcome() != grapnelv1.Attempt_OUTCOME_RETRYABLE || got.GetResponseCode() != 503 || !got.GetManual() || string(got.GetResponseBody()) != "busy" {
		t.Errorf("attempt = %v", got)
	}
	sample := w.engine.tested[0]
	if sample.Type != "grapnel.test" || sample.ContentType != "application/json" || len(sample.Payload) == 0 ||
		sample.ID == "" || sample.Source != "//grapnel/acme" {
		t.Errorf("sample event = %+v", sample)
	}

	if _, err := test(&grapnelv1.Event{Id: "mine", Type: "order.created", Payload: &grapnelv1.Event_Text{Text: "x"}}); err != nil {
		t.Fatal(err)
	}
	if own := w.engine.tested[1]; own.ID != "mine" || own.Type != "order.created" || string(own.Payload) != "x" {
		t.Errorf("own event = %+v", own)
	}
	if p := w.engine.patience; p < time.Minute || p > 75*time.Second {
		t.Errorf("without a deadline a test has %v; the longest attempt_timeout is a minute", p)
	}
	if _, err := test(&grapnelv1.Event{Type: "grapnel.disk.filling", Source: "//grapnel/namespaces/grapnel-system"}); err != nil {
		t.Error("who receives operational events cannot be tried with one:", err)
	} else if own := w.engine.tested[2]; own.Type != "grapnel.disk.filling" || own.Source != "//grapnel/namespaces/grapnel-system" {
		t.Errorf("operational event = %+v", own)
	}
	_, err = test(&grapnelv1.Event{Id: "not\tan id", Type: "order.created"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event.id")

	w.engine.testErr = api.ErrTestLimited
	_, err = test(nil)
	if r := refused(t, err, codes.ResourceExhausted, "RATE_LIMITED"); r.retry != time.Second || !r.quota {
		t.Errorf("refusal = %+v, want RetryInfo of 1s and a QuotaFailure", r)
	}
	w.engine.testErr = api.ErrPluginUnavailable
	_, err = test(nil)
	refused(t, err, codes.FailedPrecondition, "PLUGIN_UNAVAILABLE")
	w.engine.testErr = api.ErrStopping
	_, err = test(nil)
	if r := refused(t, err, codes.Unavailable, "DRAINING"); r.retry == 0 {
		t.Error("no RetryInfo")
	}
	w.engine.testErr = errors.New("whsec_leak")
	_, err = test(nil)
	if r := refused(t, err, codes.Internal, "INTERNAL"); strings.Contains(r.message, "whsec_leak") {
		t.Errorf("message = %q shows the cause", r.message)
	}
	name = "namespaces/acme/subscriptions/nothing"
	_, err = test(nil)
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}
