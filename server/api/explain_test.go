package api_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestExplainPages: whatever the size of the pages, each subscription is accounted for once, those with a delivery first.
func TestExplainPages(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.namespace(t, "other")
	var want []string
	for i := range 25 {
		id := fmt.Sprintf("s-%02d", i)
		want = append(want, id)
		st.subscribe(t, "acme", id, func(s *grapnelv1.Subscription) {
			if i%3 == 0 {
				s.EventTypes = []string{"nothing"}
			}
		})
	}
	st.subscribe(t, "other", "theirs", nil)
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "one", "one")); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int32{0, 1, 2, 16, 17, 1000} {
		r := &grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/one", PageSize: size}
		var got []string
		others := 0
		for pages := 0; ; pages++ {
			page, err := st.events.ExplainEvent(t.Context(), r)
			if err != nil || page.GetEvent().GetId() != "one" || pages > 60 {
				t.Fatalf("size %d, page %d: %v, %v", size, pages, page.GetEvent(), err)
			}
			if size > 0 && len(page.GetAccounts()) > int(size) {
				t.Errorf("%d accounts on a page of %d", len(page.GetAccounts()), size)
			}
			for _, a := range page.GetAccounts() {
				got = append(got, strings.TrimPrefix(a.GetSubscription(), "namespaces/acme/subscriptions/"))
				switch {
				case a.GetCause() == "", (a.GetDelivery() == nil) == (a.GetMatch() == nil):
					t.Errorf("size %d: %v", size, a)
				case a.GetDelivery() == nil:
					others++
				case others > 0:
					t.Errorf("size %d: a delivery behind what has none: %v", size, a)
				}
			}
			if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
				break
			}
		}
		slices.Sort(got)
		if !slices.Equal(got, want) || others != 9 {
			t.Errorf("size %d: %d without a delivery, of %v", size, others, got)
		}
	}
	for _, bad := range []struct {
		request *grapnelv1.ExplainEventRequest
		code    codes.Code
	}{
		{&grapnelv1.ExplainEventRequest{Name: "namespaces/other/events/one"}, codes.NotFound},
		{&grapnelv1.ExplainEventRequest{Name: "one"}, codes.InvalidArgument},
		{&grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/one", PageSize: -1}, codes.InvalidArgument},
		{&grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/one", PageToken: "x"}, codes.InvalidArgument},
		{&grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/one", Subscription: "namespaces/other/subscriptions/theirs"}, codes.InvalidArgument},
		{&grapnelv1.ExplainEventRequest{Name: "namespaces/acme/events/one", Subscription: "namespaces/acme/subscriptions/nobody"}, codes.NotFound},
	} {
		if _, err := st.events.ExplainEvent(t.Context(), bad.request); status.Code(err) != bad.code {
			t.Errorf("%v: %v", bad.request, err)
		}
	}
}

// TestMatchPages: a dry run goes through all subscriptions, stores nothing, counts no error of a condition, and judges an
// event as Publish does.
func TestMatchPages(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for i := range 10 {
		st.subscribe(t, "acme", fmt.Sprintf("s-%02d", i), func(s *grapnelv1.Subscription) {
			if i%2 == 0 {
				s.Condition = "event.data.absent == 1"
			}
		})
	}
	event := &grapnelv1.Event{Type: "order.created", DataContentType: "application/json", Payload: &grapnelv1.Event_Text{Text: "{}"}}
	for _, only := range []bool{false, true} {
		r := &grapnelv1.MatchSubscriptionsRequest{Parent: "namespaces/acme", Event: event, PageSize: 3, MatchingOnly: only}
		verdicts := map[grapnelv1.SubscriptionMatch_Verdict]int{}
		for {
			page, err := st.subscriptions.MatchSubscriptions(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range page.GetMatches() {
				verdicts[m.GetVerdict()]++
			}
			if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
				break
			}
		}
		failing := 5
		if only {
			failing = 0
		}
		if verdicts[grapnelv1.SubscriptionMatch_VERDICT_MATCHED] != 5 || verdicts[grapnelv1.SubscriptionMatch_VERDICT_CONDITION_ERROR] != failing {
			t.Errorf("matching only %v: %v", only, verdicts)
		}
	}
	page, err := st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme"})
	if err != nil || len(page.GetEvents()) > 0 {
		t.Errorf("stored: %v, %v", page, err)
	}
	got, err := st.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/s-00"})
	if err != nil || got.GetStatus().GetConditionErrors() != 0 {
		t.Errorf("counted: %v, %v", got.GetStatus(), err)
	}
	_, err = st.subscriptions.MatchSubscriptions(t.Context(), &grapnelv1.MatchSubscriptionsRequest{
		Parent: "namespaces/acme", Event: &grapnelv1.Event{Attributes: map[string]string{"UPPER": "x"}},
	})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "event.type") {
		t.Errorf("a bad event: %v", err)
	}
}
