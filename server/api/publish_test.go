package api_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"google.golang.org/grpc"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestPublishStoresWhatWasSent(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	st.subscribe(t, "acme", "users", func(s *grapnelv1.Subscription) { s.EventTypes = []string{"user.*"} })
	when, later := time.Date(2026, 11, 20, 8, 0, 0, 5, time.UTC), time.Now().Add(time.Hour).Truncate(time.Microsecond)
	sent := &grapnelv1.Event{
		Id: "A.b_c~d-1", Type: "order.created", Source: "//shop/eu", Subject: "order 7",
		Time: timestamppb.New(when), DataContentType: "text/plain; charset=utf-8", DataSchema: "https://example.com/s",
		Attributes: map[string]string{"tenant": "ü 1"}, Payload: &grapnelv1.Event_Data{Data: []byte("by\x00tes")},
		Headers:     map[string]string{"x-request-id": "r 1", "x-empty": ""},
		DeliverTime: timestamppb.New(later), Ttl: durationpb.New(time.Minute),
	}
	got, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: sent})
	if err != nil {
		t.Fatal(err)
	}
	if got.GetName() != "namespaces/acme/events/A.b_c~d-1" || got.GetDuplicate() || got.GetMatchedSubscriptions() != 1 ||
		time.Since(got.GetAcceptTime().AsTime()).Abs() > time.Minute {
		t.Errorf("answer = %v", got)
	}
	read, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: got.GetName(), IncludePayload: true})
	if err != nil {
		t.Fatal(err)
	}
	uid := read.GetEvent().GetUid()
	if uid == "" || strings.Contains(uid, ".") {
		t.Errorf("uid = %q", uid)
	}
	want := proto.CloneOf(sent)
	want.Name, want.AcceptTime, want.SizeBytes, want.MatchedSubscriptions, want.Uid = got.GetName(), got.GetAcceptTime(), 6, 1, uid
	if diff := cmp.Diff(want, read.GetEvent(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	read, err = st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: got.GetName()})
	if err != nil || read.GetEvent().GetPayload() != nil || read.GetEvent().GetHeaders() != nil || read.GetEvent().GetSizeBytes() != 6 {
		t.Errorf("without include_payload: %v %v", read, err)
	}
}

func TestPublishDefaultsAndPayloads(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	object, err := structpb.NewValue(map[string]any{"b": 1001.0, "a": []any{"<&>", nil, true}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		event   *grapnelv1.Event
		content string
		body    string
	}{
		{&grapnelv1.Event{}, "application/octet-stream", ""},
		{&grapnelv1.Event{Payload: &grapnelv1.Event_Text{Text: "hi"}}, "application/octet-stream", "hi"},
		{&grapnelv1.Event{Payload: &grapnelv1.Event_Json{Json: object}}, "application/json", `{"a":["<&>",null,true],"b":1001}`},
		{&grapnelv1.Event{DataContentType: "application/cloudevents+json", Payload: &grapnelv1.Event_Json{Json: structpb.NewStringValue("x")}}, "application/cloudevents+json", `"x"`},
	} {
		c.event.Type = "a"
		got, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: c.event})
		if err != nil {
			t.Fatal(err)
		}
		read, err := st.events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: got.GetName(), IncludePayload: true})
		if err != nil {
			t.Fatal(err)
		}
		e := read.GetEvent()
		if e.GetDataContentType() != c.content || string(e.GetData()) != c.body || e.GetSource() != "//grapnel/acme" ||
			len(e.GetId()) != 36 || time.Since(e.GetTime().AsTime()).Abs() > time.Minute {
			t.Errorf("stored %v", e)
		}
	}
}

func TestPublishTellsEveryFault(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	bad := &grapnelv1.Event{
		Id: "has\tcontrols", Type: "a\x7f", Source: "a b", Subject: "line\nbreak", DataSchema: strings.Repeat("s", 257),
		DataContentType: "json", Time: &timestamppb.Timestamp{Nanos: -1},
		Attributes:  map[string]string{"Upper": "x", "id": "x", "ok": "bell\a"},
		OrderingKey: strings.Repeat("ö", 65),
		Headers:     map[string]string{"Host": "h", "x-a": "1\r\nx-b: 2", "X-C": "1", "x-c": "2", "x d": "", "x-e": "é", "x-f": strings.Repeat("f", 4096)},
		DeliverTime: timestamppb.New(time.Now().Add(8 * 24 * time.Hour)), Ttl: durationpb.New(time.Millisecond),
		Payload: &grapnelv1.Event_Json{Json: structpb.NewNumberValue(0)},
	}
	bad.GetJson().Kind.(*structpb.Value_NumberValue).NumberValue = nan()
	_, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: bad})
	r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	r.names(t, "event.id", "event.type", "event.source", "event.subject", "event.data_schema", "event.data_content_type",
		"event.time", `event.attributes["Upper"]`, `event.attributes["id"]`, `event.attributes["ok"]`, "event.ordering_key",
		`event.headers["Host"]`, `event.headers["x d"]`, `event.headers["x-a"]`, `event.headers["x-c"]`, `event.headers["x-e"]`, "event.headers",
		"event.deliver_time", "event.ttl", "event.json")
	if r.metadata["field"] != "event.id" || !strings.Contains(r.fields["event.deliver_time"], "7 days") {
		t.Errorf("metadata %v, %v", r.metadata, r.fields)
	}

	_, err = st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event")
	_, err = st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: &grapnelv1.Event{}})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event.type")
	for _, parent := range []string{"", "acme", "namespaces/-", "namespaces/Acme", "namespaces/acme/", "namespaces/acme/events/x"} {
		_, err = st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: parent, Event: &grapnelv1.Event{Type: "a"}})
		refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "parent")
	}
	_, err = st.publish.Publish(t.Context(), publishText("nobody", "", ""))
	if r := refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND"); r.resource != "namespaces/nobody" {
		t.Errorf("resource = %q", r.resource)
	}
}

func nan() float64 { zero := 0.0; return zero / zero }

func TestPublishIsIdempotent(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.namespace(t, "other")
	st.subscribe(t, "acme", "orders", nil)
	first, err := st.publish.Publish(t.Context(), publishText("acme", "e1", "one"))
	if err != nil {
		t.Fatal(err)
	}
	// The same at the same time from many sides.
	var callers sync.WaitGroup
	for range 20 {
		callers.Go(func() {
			again, err := st.publish.Publish(t.Context(), publishText("acme", "e1", "one"))
			if err != nil {
				t.Error(err)
				return
			}
			want := proto.CloneOf(first)
			want.Duplicate = true
			if diff := cmp.Diff(want, again, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
	callers.Wait()
	for _, change := range []func(*grapnelv1.Event){
		func(e *grapnelv1.Event) { e.Payload = &grapnelv1.Event_Text{Text: "two"} },
		func(e *grapnelv1.Event) { e.Type = "order.paid" },
		func(e *grapnelv1.Event) { e.Subject = "x" },
		func(e *grapnelv1.Event) { e.Attributes = map[string]string{"a": "b"} },
		func(e *grapnelv1.Event) { e.Ttl = durationpb.New(time.Hour) },
		func(e *grapnelv1.Event) { e.Time = timestamppb.Now() },
	} {
		r := publishText("acme", "e1", "one")
		change(r.Event)
		_, err := st.publish.Publish(t.Context(), r)
		if got := refused(t, err, codes.AlreadyExists, "EVENT_ID_CONFLICT"); got.resource != "namespaces/acme/events/e1" {
			t.Errorf("resource = %q", got.resource)
		}
	}
	// The payload counts, not the field it came in.
	asData := publishText("acme", "e1", "")
	asData.Event.Payload = &grapnelv1.Event_Data{Data: []byte("one")}
	if again, err := st.publish.Publish(t.Context(), asData); err != nil || !again.GetDuplicate() {
		t.Errorf("got %v %v", again, err)
	}
	if again, err := st.publish.Publish(t.Context(), publishText("other", "e1", "two")); err != nil || again.GetDuplicate() {
		t.Errorf("an id of another namespace counts: %v %v", again, err)
	}
	if jobs := st.takeJobs(t, 1); len(jobs) != 1 {
		t.Errorf("%d deliveries queued", len(jobs))
	}
}

func TestPublishWithinLimits(t *testing.T) {
	st := startStation(t)
	_, err := st.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{NamespaceId: "small", Namespace: &grapnelv1.Namespace{
		Quota: &grapnelv1.Quota{MaxEventBytes: 10, MaxPublishRate: 1, MaxOpenDeliveries: 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = st.publish.Publish(t.Context(), publishText("small", "", "eleven byte"))
	r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	r.names(t, "event.payload")
	if !strings.Contains(r.message, "11 bytes") || !strings.Contains(r.message, "at most 10") {
		t.Errorf("message = %q", r.message)
	}
	// A burst of ten seconds, then the rate.
	limited := false
	for range 12 {
		var trailer metadata.MD
		_, err := st.publish.Publish(t.Context(), publishText("small", "", "ten bytes!"), grpc.Trailer(&trailer))
		if err == nil {
			continue
		}
		limited = true
		r := refused(t, err, codes.ResourceExhausted, "RATE_LIMITED")
		if r.retry <= 0 || r.retry > time.Second || !r.quota || len(trailer.Get("grpc-retry-pushback-ms")) != 1 {
			t.Errorf("retry = %v, trailer = %v", r.retry, trailer)
		}
	}
	if !limited {
		t.Error("the rate is not limited")
	}
	if _, err := st.namespaces.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/small"}); err != nil {
		t.Fatal(err)
	}
	_, err = st.publish.Publish(t.Context(), publishText("small", "", ""))
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")
	st.namespace(t, "acme")
	st.ingest.Drain()
	_, err = st.publish.Publish(t.Context(), publishText("acme", "", ""))
	if r := refused(t, err, codes.Unavailable, "DRAINING"); r.retry <= 0 {
		t.Error("no RetryInfo")
	}
}

func TestPublishIntoFullNamespace(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	_, err := st.namespaces.UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{
		Name: "namespaces/acme", Quota: &grapnelv1.Quota{MaxOpenDeliveries: 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, st.journal.Counted)
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "")); err != nil {
		t.Fatal(err)
	}
	var trailer metadata.MD
	_, err = st.publish.Publish(t.Context(), publishText("acme", "", ""), grpc.Trailer(&trailer))
	if got := trailer.Get("grpc-retry-pushback-ms"); len(got) != 1 || got[0] != "-1" {
		t.Errorf("pushback %q, want -1: clients must not repeat what a quota refuses", got)
	}
	r := refused(t, err, codes.ResourceExhausted, "QUOTA_EXCEEDED")
	if r.retry != 0 || !r.quota || !strings.Contains(r.message, "max_open_deliveries") {
		t.Errorf("got %+v", r)
	}
	_, err = st.publish.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: []*grapnelv1.Event{{Type: "a"}}})
	refused(t, err, codes.ResourceExhausted, "QUOTA_EXCEEDED")
}

func TestDisabledSubscriptionIsSkipped(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	st.disable(t, "acme", "orders")
	got, err := st.publish.Publish(t.Context(), publishText("acme", "e1", ""))
	if err != nil || got.GetMatchedSubscriptions() != 1 || got.GetSkippedSubscriptions() != 1 || !strings.HasPrefix(got.GetUid(), "evt_") {
		t.Fatalf("got %v %v", got, err)
	}
	list, err := st.deliveries.ListDeliveries(t.Context(), &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: "state = SKIPPED"})
	if err != nil || len(list.GetDeliveries()) != 1 || list.GetDeliveries()[0].GetState() != grapnelv1.Delivery_STATE_SKIPPED {
		t.Errorf("got %v %v", list, err)
	}
}

func TestBatchPublishAnswersInOrder(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "old", "1")); err != nil {
		t.Fatal(err)
	}
	event := func(id, text string) *grapnelv1.Event { return publishText("acme", id, text).Event }
	got, err := st.publish.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: []*grapnelv1.Event{
		event("new", "1"),
		{Type: ""},
		event("old", "1"),
		event("old", "2"),
		event("", strings.Repeat("x", 262145)),
		event("new2", "1"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, r := range got.GetResults() {
		lines = append(lines, fmt.Sprintf("%s %v %s %s %s %v", strings.TrimPrefix(r.GetName(), "namespaces/acme/events/"), r.GetDuplicate(),
			r.GetError().GetCode(), r.GetError().GetReason(), r.GetError().GetField(), r.GetError().GetRetryable()))
	}
	want := []string{
		"new false    false",
		" false INVALID_ARGUMENT INVALID_FIELD type false",
		"old true    false",
		" false ALREADY_EXISTS EVENT_ID_CONFLICT id false",
		" false INVALID_ARGUMENT INVALID_FIELD payload false",
		"new2 false    false",
	}
	if diff := cmp.Diff(want, lines); diff != "" || got.GetFailedCount() != 3 {
		t.Errorf("%d failed\n%s", got.GetFailedCount(), diff)
	}
}

func TestBatchPublishFailsWhole(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	batch := func(parent string, n, size int) error {
		r := &grapnelv1.BatchPublishRequest{Parent: parent}
		for range n {
			r.Events = append(r.Events, publishText("acme", "", strings.Repeat("x", size)).Event)
		}
		_, err := st.publish.BatchPublish(t.Context(), r, grpc.MaxCallSendMsgSize(16<<20))
		return err
	}
	refused(t, batch("namespaces/acme", 0, 0), codes.InvalidArgument, "INVALID_FIELD").names(t, "events")
	refused(t, batch("namespaces/acme", 501, 0), codes.InvalidArgument, "INVALID_FIELD").names(t, "events")
	if r := refused(t, batch("namespaces/acme", 17, 250_000), codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.message, "4194304") {
		t.Errorf("message = %q", r.message)
	}
	refused(t, batch("namespaces/none", 2, 1), codes.NotFound, "RESOURCE_NOT_FOUND")
	refused(t, batch("acme", 2, 1), codes.InvalidArgument, "INVALID_FIELD").names(t, "parent")
	if err := batch("namespaces/acme", 500, 1); err != nil {
		t.Error(err)
	}
	st.ingest.Drain()
	refused(t, batch("namespaces/acme", 2, 1), codes.Unavailable, "DRAINING")
}

// The types and the source of operational events are the server's: nobody publishes them, and all may ask who would get them.
func TestPublishRefusesWhatTheServerSaysItself(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "all", nil)
	st.subscribe(t, "acme", "ops", func(s *grapnelv1.Subscription) { s.EventTypes = []string{"grapnel.**"} })
	event := func(id, eventType string) *grapnelv1.Event { return &grapnelv1.Event{Id: id, Type: eventType} }
	const says = `must not begin with grapnel., as "grapnel.delivery.exhausted" does`
	_, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: event("a", "grapnel.delivery.exhausted")})
	if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.fields["event.type"], says) {
		t.Errorf("publish: %v", r.fields)
	}
	batch, err := st.publish.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{
		Parent: "namespaces/acme", Events: []*grapnelv1.Event{event("b", "grapnel.delivery.exhausted"), event("c", "grapnel"), event("d", "grapnels.x")},
	})
	if err != nil || batch.GetFailedCount() != 1 || !strings.Contains(batch.GetResults()[0].GetError().GetMessage(), says) {
		t.Errorf("batch: %v, %v", batch, err)
	}
	const from = `must not begin with //grapnel/namespaces/, as "//grapnel/namespaces/acme" does`
	sourced := func(id, source string) *grapnelv1.Event {
		return &grapnelv1.Event{Id: id, Type: "order.created", Source: source}
	}
	_, err = st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: sourced("secret-expiring-key-1-1", "//grapnel/namespaces/acme")})
	if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.fields["event.source"], from) {
		t.Errorf("publish: %v", r.fields)
	}
	batch, err = st.publish.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{
		Parent: "namespaces/acme", Events: []*grapnelv1.Event{
			sourced("e", "//grapnel/namespaces/acme"), sourced("f", "//grapnel/acme"), sourced("g", "//grapnel/namespaces"), sourced("h", "//grapnel/other"),
		},
	})
	if err != nil || batch.GetFailedCount() != 1 || !strings.Contains(batch.GetResults()[0].GetError().GetMessage(), from) {
		t.Errorf("batch: %v, %v", batch, err)
	}
	letter := event("i", "order.created")
	letter.Attributes = map[string]string{"deadletterfrom": "orders", "deadletterx": "1", "xdeadletter": "1"}
	_, err = st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: letter})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, `event.attributes["deadletterfrom"]`, `event.attributes["deadletterx"]`)
	found, err := grapnelv1.NewSubscriptionServiceClient(st.conn).MatchSubscriptions(t.Context(), &grapnelv1.MatchSubscriptionsRequest{
		Parent: "namespaces/acme", Event: event("", "grapnel.delivery.exhausted"),
	})
	if err != nil {
		t.Fatal(err)
	}
	verdicts := map[string]grapnelv1.SubscriptionMatch_Verdict{}
	for _, m := range found.GetMatches() {
		verdicts[m.GetSubscription()] = m.GetVerdict()
	}
	want := map[string]grapnelv1.SubscriptionMatch_Verdict{
		"namespaces/acme/subscriptions/all": grapnelv1.SubscriptionMatch_VERDICT_TYPE_DIFFERS,
		"namespaces/acme/subscriptions/ops": grapnelv1.SubscriptionMatch_VERDICT_MATCHED,
	}
	if diff := cmp.Diff(want, verdicts); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
