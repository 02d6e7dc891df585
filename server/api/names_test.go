package api_test

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestEventsAsSendersNameThem: ids, types and sources are what CloudEvents allows; names of resources are for URLs.
func TestEventsAsSendersNameThem(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for id, name := range map[string]string{
		"partition:1/offset:24": "partition%3A1%2Foffset%3A24",
		"a b%2F*":               "a%20b%252F%2A",
		"ü/..":                  "%C3%BC%2F..",
		"plain_1.~-":            "plain_1.~-",
		"namespaces/acme/x":     "namespaces%2Facme%2Fx",
	} {
		event := &grapnelv1.Event{Id: id, Type: "orders/create", Source: "kafka://c/topic?p=1", Payload: &grapnelv1.Event_Text{Text: "x"}}
		made, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: event})
		if err != nil {
			t.Errorf("%q: %v", id, err)
			continue
		}
		if made.GetName() != "namespaces/acme/events/"+name {
			t.Errorf("%q is named %s", id, made.GetName())
		}
		got, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: made.GetName()})
		if err != nil || got.GetEvent().GetId() != id || got.GetEvent().GetName() != made.GetName() {
			t.Errorf("%q: read %v, %v", id, got, err)
		}
		if id == "a b%2F*" {
			continue // a star ends a prefix in filters
		}
		list, err := st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", Filter: `id = "` + id + `"`})
		if err != nil || len(list.GetEvents()) != 1 {
			t.Errorf("%q: listed %v, %v", id, list, err)
		}
		again, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: event})
		if err != nil || !again.GetDuplicate() || again.GetName() != made.GetName() {
			t.Errorf("%q: repeated %v, %v", id, again, err)
		}
	}
	for _, bad := range []string{"", "\x00", "a\nb", "\u0085", strings.Repeat("ü", 129)} {
		event := publishText("acme", bad, "x")
		event.Event.Type = bad
		_, err := st.publish.Publish(t.Context(), event)
		refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
	for _, bad := range []string{"a%", "a%0", "a%zz", "a%00", "a%FF", "a b", "a:b"} {
		_, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: "namespaces/acme/events/" + bad})
		refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	}
}

// TestGlobsOfTypes: globs cover what types may be, and deliveries are found by the event's id and name.
func TestGlobsOfTypes(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "s3", func(s *grapnelv1.Subscription) { s.EventTypes = []string{"s3:ObjectCreated:*"} })
	st.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) { s.EventTypes = []string{"orders/*"} })
	for eventType, matched := range map[string]int32{"s3:ObjectCreated:Put": 1, "orders/create": 1, "orders.create": 0} {
		r := publishText("acme", "id:"+eventType, "x")
		r.Event.Type = eventType
		made, err := st.publish.Publish(t.Context(), r)
		if err != nil || made.GetMatchedSubscriptions() != matched {
			t.Errorf("%s: %v, %v", eventType, made, err)
		}
	}
	for _, filter := range []string{
		"event = id:orders/create", `event = "namespaces/acme/events/id%3Aorders%2Fcreate"`, "event_type = orders/create", "event_type = orders/*",
	} {
		list, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: filter})
		if err != nil || len(list.GetDeliveries()) != 1 || list.GetDeliveries()[0].GetEvent() != "namespaces/acme/events/id%3Aorders%2Fcreate" {
			t.Errorf("%s: %v, %v", filter, list, err)
		}
	}
	_, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: "event = namespaces/other/events/x"})
	refused(t, err, codes.InvalidArgument, "INVALID_FILTER")
}

// TestHeaderBlockIsBounded: attributes that each are within bounds may together be more than receivers take.
func TestHeaderBlockIsBounded(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for value, ok := range map[string]bool{strings.Repeat("v", 256): true, strings.Repeat("語", 256): false} {
		r := publishText("acme", "", "x")
		r.Event.Attributes = map[string]string{}
		for k := range 32 {
			r.Event.Attributes["abcdefghijklmnopqr"+string(rune('a'+k%26))+string(rune('a'+k/26))] = value
		}
		_, err := st.publish.Publish(t.Context(), r)
		if ok && err != nil {
			t.Error(err)
		}
		if !ok {
			refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event.attributes")
		}
	}
}
