package api_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestContentTypeOfJSON: JSON is JSON, however it is given, unless the publisher says otherwise; so conditions see it.
func TestContentTypeOfJSON(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "large", func(s *grapnelv1.Subscription) { s.EventTypes, s.Condition = nil, "event.data.total > 5" })
	for _, c := range []struct {
		name    string
		event   *grapnelv1.Event
		want    string
		matched int32
	}{
		{"text", &grapnelv1.Event{Payload: &grapnelv1.Event_Text{Text: ` {"total":9}`}}, "application/json", 1},
		{"data", &grapnelv1.Event{Payload: &grapnelv1.Event_Data{Data: []byte(`{"total":9}`)}}, "application/json", 1},
		{"said", &grapnelv1.Event{DataContentType: "text/plain", Payload: &grapnelv1.Event_Text{Text: `{"total":9}`}}, "text/plain", 0},
		{"not JSON", &grapnelv1.Event{Payload: &grapnelv1.Event_Text{Text: `{"total":9`}}, "application/octet-stream", 0},
		{"not UTF-8", &grapnelv1.Event{Payload: &grapnelv1.Event_Data{Data: []byte("{\"total\":9,\"a\":\"\xff\"}")}}, "application/octet-stream", 0},
		{"nothing", &grapnelv1.Event{}, "application/octet-stream", 0},
	} {
		c.event.Type = "order.created"
		made, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: c.event})
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: made.GetName()})
		if err != nil || got.GetEvent().GetDataContentType() != c.want || made.GetMatchedSubscriptions() != c.matched {
			t.Errorf("%s: %q, matched %d, %v", c.name, got.GetEvent().GetDataContentType(), made.GetMatchedSubscriptions(), err)
		}
	}
}

// TestConditionErrorsAreTold: a condition that cannot be evaluated leaves a trace on the event, in its answer, at the
// subscription, in the statistics and in the metrics.
func TestConditionErrorsAreTold(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	sub := st.subscribe(t, "acme", "typo", func(s *grapnelv1.Subscription) { s.Condition = "event.data.totl > 5" })
	st.subscribe(t, "acme", "right", func(s *grapnelv1.Subscription) { s.Condition = "event.data.total > 5" })
	made, err := st.publish.Publish(t.Context(), publishText("acme", "e1", `{"total":9}`))
	if err != nil || made.GetMatchedSubscriptions() != 1 || made.GetConditionErrorCount() != 1 {
		t.Fatal(made, err)
	}
	got, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: made.GetName()})
	if err != nil {
		t.Fatal(err)
	}
	if e := got.GetEvent().GetConditionErrors(); len(e) != 1 || e[0].GetSubscription() != sub.GetName() || !strings.Contains(e[0].GetError(), "totl") {
		t.Errorf("event = %v", got)
	}
	list, err := st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", Filter: "condition_error_count > 0"})
	if err != nil || len(list.GetEvents()) != 1 {
		t.Errorf("listed: %v %v", list, err)
	}
	read, err := st.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: sub.GetName()})
	if err != nil || read.GetStatus().GetConditionErrors() != 1 || !strings.Contains(read.GetStatus().GetLastConditionError(), "totl") || read.GetStatus().GetLastConditionErrorTime() == nil {
		t.Errorf("status = %v %v", read.GetStatus(), err)
	}
	if read.GetStatus().GetWaitReason() == "" {
		t.Errorf("status = %v", read.GetStatus())
	}
	stats, err := st.admin.GetStats(t.Context(), &grapnelv1.GetStatsRequest{Parent: "namespaces/acme"})
	if err != nil || stats.GetTotal().GetConditionErrors() != 1 {
		t.Errorf("stats = %v %v", stats, err)
	}
	families, err := st.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "grapnel_condition_errors_total" && f.GetMetric()[0].GetCounter().GetValue() == 1 {
			return
		}
	}
	t.Error("no metric")
}

// TestImpossibleConditionsAreRefused: what can never hold is told when it is saved.
func TestImpossibleConditionsAreRefused(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for condition, want := range map[string]string{
		"event.attributes.tenantId == 'a'":                  `no event has the attribute "tenantId"`,
		"event.attributes['x-y'] == 'a'":                    `no event has the attribute "x-y"`,
		"event.attributes.source == 'a'":                    "it is event.source",
		"'A' in event.attributes":                           `no event has the attribute "A"`,
		"event.time.getHours('Europe/Berln') > 8":           `no time zone "Europe/Berln"`,
		"event.time.getHours('25:00') > 8":                  `no time zone "25:00"`,
		"event.typ == 'a'":                                  "typ",
		"event.time > timestamp('yesterday')":               "",
		"event.type.matches('(')":                           "",
		"event.data.total > 5 && event.time.getHours() > 8": "ok",
		"event.time.getHours('Europe/Berlin') > 8":          "ok",
		"event.time.getHours('-02:30') > 8":                 "ok",
		"has(event.attributes.tenant)":                      "ok",
	} {
		sub := plainSubscription("acme")
		sub.Condition = condition
		_, err := st.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", Subscription: sub, ValidateOnly: true})
		if want == "ok" {
			if err != nil {
				t.Errorf("%s: %v", condition, err)
			}
			continue
		}
		if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.fields["subscription.condition"], want) {
			t.Errorf("%s: %v", condition, r.fields)
		}
	}
}
