package api_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// settled publishes one event per state in namespace acme and brings its delivery there. It returns the
// deliveries' names by event id.
func settled(t *testing.T, st *station) map[string]string {
	t.Helper()
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	for _, id := range []string{"pending", "flying", "scheduled", "succeeded", "exhausted", "rejected"} {
		if _, err := st.publish.Publish(t.Context(), publishText("acme", id, id)); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now().Add(-time.Second)
	attempt := func(outcome delivery.Outcome, code int) *delivery.Attempt {
		return &delivery.Attempt{
			Number: 1, Start: start, Duration: 30 * time.Millisecond, Outcome: outcome, ResponseCode: code, Peer: "127.0.0.1:1",
			Error: "text", RetryAfter: 2 * time.Second, ResponseBody: []byte("body"),
			ResponseHeaders: []delivery.Header{{Name: "x", Value: "1"}, {Name: "x", Value: "2"}},
			RequestHeaders:  []delivery.Header{{Name: "webhook-id", Value: "id"}},
		}
	}
	names := map[string]string{}
	for _, job := range st.takeJobs(t, 6) {
		job := &job
		names[job.Event.ID] = "namespaces/acme/deliveries/" + job.ID.String()
		switch job.Event.ID {
		case "flying":
			st.hooks.set(func(h *hooks) { h.inFlight[job.ID] = true })
		case "scheduled":
			st.journal.Settle(job, delivery.Step{State: delivery.Scheduled, Due: time.Now().Add(time.Hour)}, attempt(delivery.OutcomeRetryable, 503), nil)
		case "succeeded":
			st.journal.Settle(job, delivery.Step{State: delivery.Succeeded}, attempt(delivery.OutcomeSucceeded, 204), nil)
		case "exhausted":
			st.journal.Settle(job, delivery.Step{State: delivery.Exhausted, Reason: "attempts used up"}, attempt(delivery.OutcomeTimedOut, 0), nil)
		case "rejected":
			st.journal.Settle(job, delivery.Step{State: delivery.Rejected, Reason: "410"}, attempt(delivery.OutcomePermanent, 410), nil)
		}
	}
	if err := st.journal.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	return names
}

// list collects the events of all pages, and checks each page against the size.
func (st *station) list(t *testing.T, filter string, size int32) []string {
	t.Helper()
	var ids []string
	r := &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: filter, PageSize: size}
	for {
		page, err := st.deliveries.ListDeliveries(t.Context(), r)
		if err != nil {
			t.Fatalf("%q: %v", filter, err)
		}
		if size > 0 && len(page.GetDeliveries()) > int(size) {
			t.Errorf("%d deliveries on a page of %d", len(page.GetDeliveries()), size)
		}
		for _, d := range page.GetDeliveries() {
			ids = append(ids, strings.TrimPrefix(d.GetEvent(), "namespaces/acme/events/"))
		}
		if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
			return ids
		}
	}
}

func TestListDeliveries(t *testing.T) {
	st := startStation(t)
	settled(t, st)
	now := time.Now().UTC()
	past, future := now.Add(-time.Hour).Format(time.RFC3339), now.Add(time.Hour).Format(time.RFC3339)
	all := "exhausted flying pending rejected scheduled succeeded"
	for filter, want := range map[string]string{
		"":                                      all,
		"state = PENDING":                       "pending",
		"state = STATE_IN_FLIGHT":               "flying",
		"state = SCHEDULED":                     "scheduled",
		"state != SUCCEEDED":                    "exhausted flying pending rejected scheduled",
		"state = EXHAUSTED OR state = REJECTED": "exhausted rejected",
		"state = PENDING AND state = REJECTED":  "",
		"subscription = orders":                 all,
		"subscription = namespaces/acme/subscriptions/orders AND state = PENDING": "pending",
		"subscription = ord*":                                         all,
		"subscription = other":                                        "",
		"event = pending":                                             "pending",
		"event = namespaces/acme/events/rejected":                     "rejected",
		"event = pending OR event = flying":                           "flying pending",
		"event_type = order.*":                                        all,
		"event_type = user.*":                                         "",
		"trigger = PUBLISH":                                           all,
		"create_time > " + past:                                       all,
		"create_time > " + future:                                     "",
		"create_time < " + future:                                     all,
		"create_time >= " + future + " AND state = PENDING":           "",
		"attempt_count = 0":                                           "flying pending",
		"attempt_count >= 1 AND NOT last_attempt.outcome = SUCCEEDED": "exhausted rejected scheduled",
		"last_attempt.response_code >= 400":                           "rejected scheduled",
		"(state = SUCCEEDED OR attempt_count = 0)":                    "flying pending succeeded",
	} {
		for _, size := range []int32{0, 1} {
			got := st.list(t, filter, size)
			slices.Sort(got)
			if diff := cmp.Diff(strings.Fields(want), got); diff != "" && want+strings.Join(got, "") != "" {
				t.Errorf("%q, page size %d: %s", filter, size, diff)
			}
		}
	}
	for filter, offset := range map[string]string{
		"colour = red":  "0",
		"state = GREEN": "8",
		"subscription = namespaces/other/subscriptions/orders": "15",
	} {
		_, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: filter})
		r := refused(t, err, codes.InvalidArgument, "INVALID_FILTER")
		if r.metadata["offset"] != offset || !strings.Contains(r.metadata["fields"], "last_attempt.response_code") || !strings.Contains(r.message, "event_type") {
			t.Errorf("%q: %q %v", filter, r.message, r.metadata)
		}
	}
}

func TestGetDeliveryShowsItWhole(t *testing.T) {
	st := startStation(t)
	names := settled(t, st)
	get := func(event string) *grapnelv1.Delivery {
		got, err := st.deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: names[event]})
		if err != nil {
			t.Fatal(err)
		}
		return got.GetDelivery()
	}
	d := get("scheduled")
	a := d.GetLastAttempt()
	if d.GetName() != names["scheduled"] || d.GetEvent() != "namespaces/acme/events/scheduled" || d.GetEventType() != "order.created" ||
		d.GetSubscription() != "namespaces/acme/subscriptions/orders" || d.GetState() != grapnelv1.Delivery_STATE_SCHEDULED ||
		d.GetTrigger() != grapnelv1.Delivery_TRIGGER_PUBLISH || d.GetAttemptCount() != 1 || d.GetMaxAttempts() != 10 ||
		time.Until(d.GetNextAttemptTime().AsTime()) < 50*time.Minute || d.GetExpireTime() == nil || d.GetCompleteTime() != nil {
		t.Errorf("got %v", d)
	}
	if a.GetNumber() != 1 || a.GetOutcome() != grapnelv1.Attempt_OUTCOME_RETRYABLE || a.GetResponseCode() != 503 || a.GetNode() != "nodes/one" ||
		a.GetRetryAfter().AsDuration() != 2*time.Second || a.GetPeer() != "127.0.0.1:1" || a.GetResponseBody() != nil || a.GetResponseHeaders() != nil {
		t.Errorf("last attempt = %v", a)
	}
	if d := get("flying"); d.GetState() != grapnelv1.Delivery_STATE_IN_FLIGHT {
		t.Errorf("in flight, state = %v", d.GetState())
	}
	if d := get("exhausted"); d.GetCompleteTime() == nil || d.GetStateReason() != "attempts used up" || d.GetNextAttemptTime() != nil {
		t.Errorf("got %v", d)
	}
	// The subscription goes; its deliveries stay as they are.
	if _, err := st.subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: "namespaces/acme/subscriptions/orders"}); err != nil {
		t.Fatal(err)
	}
	if d := get("succeeded"); d.GetSubscription() != "namespaces/acme/subscriptions/orders" || d.GetState() != grapnelv1.Delivery_STATE_SUCCEEDED {
		t.Errorf("after the subscription was deleted: %v", d)
	}
}

func TestListAttempts(t *testing.T) {
	st := startStation(t)
	names := settled(t, st)
	got, err := st.deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: names["rejected"], IncludeBodies: true})
	if err != nil || len(got.GetAttempts()) != 1 || got.GetNextPageToken() != "" {
		t.Fatalf("got %v %v", got, err)
	}
	a := got.GetAttempts()[0]
	if string(a.GetResponseBody()) != "body" || a.GetResponseHeaders()["x"] != "1, 2" || a.GetRequestHeaders()["webhook-id"] != "id" {
		t.Errorf("bodies: %v", a)
	}
	got, err = st.deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: names["rejected"]})
	if a := got.GetAttempts()[0]; err != nil || a.GetResponseBody() != nil || a.GetResponseHeaders() != nil || a.GetRequestHeaders() != nil {
		t.Errorf("bodies unasked: %v %v", got, err)
	}
	got, err = st.deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: names["pending"]})
	if err != nil || len(got.GetAttempts()) != 0 {
		t.Errorf("got %v %v", got, err)
	}
}

func TestListAttemptsPages(t *testing.T) {
	st := startStation(t)
	name := st.oneDelivery(t)
	id, err := delivery.ParseID(strings.TrimPrefix(name, "namespaces/acme/deliveries/"))
	if err != nil {
		t.Fatal(err)
	}
	event, err := st.journal.Event(st.key("acme"), "e1")
	if err != nil {
		t.Fatal(err)
	}
	due := time.Now().Add(time.Hour)
	job := &delivery.Job{ID: id, Event: event, Epoch: 1, MaxAttempts: 10, Expire: time.Now().Add(time.Hour)}
	for n := 1; n <= 5; n++ {
		st.journal.Settle(job, delivery.Step{State: delivery.Scheduled, Due: due},
			&delivery.Attempt{Number: n, Start: time.Now(), Outcome: delivery.OutcomeRetryable, ResponseCode: 500 + n}, nil)
		if err := st.journal.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		job.Attempts, job.Kind, job.Due, job.Epoch = n, delivery.Timer, delivery.InstantOf(due), uint32(n+1)
		due = due.Add(time.Second)
	}
	var numbers []int32
	r := &grapnelv1.ListAttemptsRequest{Parent: name, PageSize: 2}
	for pages := 1; ; pages++ {
		page, err := st.deliveries.ListAttempts(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range page.GetAttempts() {
			numbers = append(numbers, a.GetNumber())
		}
		if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
			if pages != 3 {
				t.Errorf("%d pages", pages)
			}
			break
		}
	}
	if diff := cmp.Diff([]int32{1, 2, 3, 4, 5}, numbers); diff != "" {
		t.Error(diff)
	}
}

func TestRetryAndCancel(t *testing.T) {
	st := startStation(t)
	names := settled(t, st)
	retry := func(event string, attempts *int32) (*grapnelv1.Delivery, error) {
		got, err := st.deliveries.RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: names[event], IfAttemptCount: attempts})
		return got.GetDelivery(), err
	}
	cancel := func(event string) (*grapnelv1.Delivery, error) {
		got, err := st.deliveries.CancelDelivery(t.Context(), &grapnelv1.CancelDeliveryRequest{Name: names[event]})
		return got.GetDelivery(), err
	}
	state := func(d *grapnelv1.Delivery, err error) grapnelv1.Delivery_State {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return d.GetState()
	}
	_, err := retry("exhausted", proto.Int32(3))
	if r := refused(t, err, codes.FailedPrecondition, "INVALID_STATE"); !strings.Contains(r.message, "ended 1 attempts, not 3") || !slices.Equal(r.blockers, []string{names["exhausted"]}) {
		t.Errorf("got %+v", r)
	}
	if got := state(retry("exhausted", proto.Int32(1))); got != grapnelv1.Delivery_STATE_SCHEDULED {
		t.Errorf("retried, state = %v", got)
	}
	_, err = retry("succeeded", nil)
	if r := refused(t, err, codes.FailedPrecondition, "INVALID_STATE"); !strings.Contains(r.message, "SUCCEEDED and cannot be retried") {
		t.Errorf("message = %q", r.message)
	}
	_, err = retry("flying", nil)
	if r := refused(t, err, codes.FailedPrecondition, "INVALID_STATE"); !strings.Contains(r.message, "IN_FLIGHT") {
		t.Errorf("message = %q", r.message)
	}
	for range 2 { // the second changes nothing
		if got := state(cancel("pending")); got != grapnelv1.Delivery_STATE_CANCELLED {
			t.Errorf("cancelled, state = %v", got)
		}
	}
	_, err = cancel("succeeded")
	if r := refused(t, err, codes.FailedPrecondition, "INVALID_STATE"); !strings.Contains(r.message, "SUCCEEDED and cannot be cancelled") {
		t.Errorf("message = %q", r.message)
	}
	_, err = retry("nothing", proto.Int32(-1))
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "name", "if_attempt_count")
}

// TestNamespacesAreApart: ids of one namespace lead nowhere under the name of another.
func TestNamespacesAreApart(t *testing.T) {
	st := startStation(t)
	names := settled(t, st)
	st.namespace(t, "other")
	foreign := strings.Replace(names["pending"], "acme", "other", 1)
	ctx := t.Context()
	for what, call := range map[string]func() error{
		"get": func() error {
			_, err := st.deliveries.GetDelivery(ctx, &grapnelv1.GetDeliveryRequest{Name: foreign})
			return err
		},
		"attempts": func() error {
			_, err := st.deliveries.ListAttempts(ctx, &grapnelv1.ListAttemptsRequest{Parent: foreign})
			return err
		},
		"retry": func() error {
			_, err := st.deliveries.RetryDelivery(ctx, &grapnelv1.RetryDeliveryRequest{Name: foreign})
			return err
		},
		"cancel": func() error {
			_, err := st.deliveries.CancelDelivery(ctx, &grapnelv1.CancelDeliveryRequest{Name: foreign})
			return err
		},
		"event": func() error {
			_, err := st.events.GetEvent(ctx, &grapnelv1.GetEventRequest{Name: "namespaces/other/events/pending", IncludePayload: true})
			return err
		},
	} {
		r := refused(t, call(), codes.NotFound, "RESOURCE_NOT_FOUND")
		if !strings.HasPrefix(r.resource, "namespaces/other/") {
			t.Errorf("%s: resource = %q", what, r.resource)
		}
	}
	for _, parent := range []string{"namespaces/other", "namespaces/none"} {
		deliveries, err := st.deliveries.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{Parent: parent})
		events, err2 := st.events.ListEvents(ctx, &grapnelv1.ListEventsRequest{Parent: parent})
		if parent == "namespaces/none" {
			refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
			refused(t, err2, codes.NotFound, "RESOURCE_NOT_FOUND")
		} else if err != nil || err2 != nil || len(deliveries.GetDeliveries())+len(events.GetEvents()) > 0 {
			t.Errorf("%v %v %v %v", deliveries, events, err, err2)
		}
	}
	// A token of one namespace is no use in another.
	page, err := st.deliveries.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", PageSize: 1})
	if err != nil || page.GetNextPageToken() == "" {
		t.Fatal(page, err)
	}
	_, err = st.deliveries.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/other", PageToken: page.GetNextPageToken()})
	refused(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")
}

func TestListEvents(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for i := range 7 {
		r := publishText("acme", fmt.Sprint("e", i), "payload")
		r.Event.Attributes = map[string]string{"tenant": fmt.Sprint("t", i%2)}
		if i == 3 {
			r.Event.Type, r.Event.Subject, r.Event.Source = "user.left", "bob", "//crm"
		}
		if _, err := st.publish.Publish(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	list := func(filter string, size int32) []string {
		var ids []string
		r := &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", Filter: filter, PageSize: size}
		for {
			page, err := st.events.ListEvents(t.Context(), r)
			if err != nil {
				t.Fatalf("%q: %v", filter, err)
			}
			for _, e := range page.GetEvents() {
				if e.GetPayload() != nil || e.GetSizeBytes() != 7 {
					t.Errorf("listed %v", e)
				}
				ids = append(ids, e.GetId())
			}
			if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
				slices.Sort(ids)
				return ids
			}
		}
	}
	hour := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	for filter, want := range map[string]string{
		"":                                 "e0 e1 e2 e3 e4 e5 e6",
		"type = user.*":                    "e3",
		"type = order.created":             "e0 e1 e2 e4 e5 e6",
		"subject = bob AND source = //crm": "e3",
		"attributes.tenant = t1":           "e1 e3 e5",
		"attributes:none":                  "",
		"accept_time > " + hour:            "",
		"accept_time < " + hour:            "e0 e1 e2 e3 e4 e5 e6",
	} {
		for _, size := range []int32{0, 2, 5000} {
			if got := strings.Join(list(filter, size), " "); got != want {
				t.Errorf("%q by %d: got %s", filter, size, got)
			}
		}
	}
	_, err := st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", PageSize: -1})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "page_size")
	_, err = st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", Filter: "payload : x"})
	refused(t, err, codes.InvalidArgument, "INVALID_FILTER")
	_, err = st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: "namespaces/acme/events/none"})
	if r := refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND"); r.resource != "namespaces/acme/events/none" {
		t.Errorf("resource = %q", r.resource)
	}
}
