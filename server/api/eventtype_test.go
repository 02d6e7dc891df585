package api_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/eventtype"
)

const orderSchema = `{"type":"object","required":["id"],"properties":{"id":{"type":"string"},"items":{"type":"array","items":{"type":"object","required":["sku"]}}}}`

func (st *station) register(t *testing.T, id string, e grapnelv1.EventType_Enforcement, schemas ...string) *grapnelv1.EventType {
	t.Helper()
	content := &grapnelv1.EventType{Enforcement: e}
	for i, text := range schemas {
		content.Schemas = append(content.Schemas, &grapnelv1.EventTypeSchema{Version: fmt.Sprint(i + 1), JsonSchema: text})
	}
	made, err := st.types.CreateEventType(t.Context(), &grapnelv1.CreateEventTypeRequest{Parent: "namespaces/acme", EventTypeId: id, EventType: content})
	if err != nil {
		t.Fatal(err)
	}
	return made.GetEventType()
}

func typed(kind, payload string) *grapnelv1.Event {
	return &grapnelv1.Event{Type: kind, Payload: &grapnelv1.Event_Text{Text: payload}}
}

func TestEventTypesAreEnforced(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	made := st.register(t, "order.created", grapnelv1.EventType_ENFORCEMENT_REJECT, orderSchema)
	st.register(t, "order.paid", grapnelv1.EventType_ENFORCEMENT_WARN, orderSchema)
	st.register(t, "order.sent", grapnelv1.EventType_ENFORCEMENT_OFF, orderSchema)
	publish := func(e *grapnelv1.Event) error {
		_, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: e})
		return err
	}
	for _, good := range []*grapnelv1.Event{
		typed("order.created", `{"id":"1","items":[{"sku":"a"}]}`), typed("order.paid", `{}`), typed("order.sent", `text`), typed("user.left", `{}`),
	} {
		if err := publish(good); err != nil {
			t.Error(err)
		}
	}
	secret := "4111111111111111"
	r := refused(t, publish(typed("order.created", `{"id":`+secret+`,"items":[{"sku":"a"},{"note":"`+secret+`"}]}`)), codes.InvalidArgument, "SCHEMA_MISMATCH")
	r.names(t, "event.payload/id", "event.payload/items/1")
	if r.fields["event.payload/id"] != "must be a string, not a number" || r.metadata["eventType"] != "order.created" || r.metadata["schemaVersion"] != "1" {
		t.Errorf("%+v", r)
	}
	if strings.Contains(fmt.Sprint(r), secret) {
		t.Error("the refusal shows what is in the payload")
	}
	refused(t, publish(&grapnelv1.Event{Type: "order.created", DataContentType: "text/plain", Payload: &grapnelv1.Event_Text{Text: "{}"}}),
		codes.InvalidArgument, "SCHEMA_MISMATCH").names(t, "event.data_content_type")
	refused(t, publish(&grapnelv1.Event{Type: "order.created", DataSchema: "7", Payload: &grapnelv1.Event_Text{Text: "{}"}}),
		codes.InvalidArgument, "SCHEMA_MISMATCH").names(t, "event.data_schema")

	// A great many faults fit into a refusal.
	many := `{"id":"1","items":[` + strings.TrimSuffix(strings.Repeat(`{},`, 500), ",") + `]}`
	r = refused(t, publish(typed("order.created", many)), codes.InvalidArgument, "SCHEMA_MISMATCH")
	if n := len(r.fields); n == 0 || n > 32 || !strings.Contains(r.message, "more") {
		t.Errorf("%d fields, %s", n, r.message)
	}

	// In a batch only the event that is wrong is refused.
	answer, err := st.publish.BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: []*grapnelv1.Event{
		typed("order.created", `{"id":"2"}`), typed("order.created", `{}`), typed("user.left", ``),
	}})
	if err != nil || answer.GetFailedCount() != 1 {
		t.Fatal(answer, err)
	}
	if bad := answer.GetResults()[1].GetError(); bad.GetReason() != "SCHEMA_MISMATCH" || bad.GetField() != "payload" || bad.GetRetryable() || !strings.Contains(bad.GetMessage(), `lacks "id"`) {
		t.Error(bad)
	}

	got, err := st.types.GetEventType(t.Context(), &grapnelv1.GetEventTypeRequest{Name: made.GetName()})
	if err != nil || got.GetStatus().GetMismatches() != 5 || got.GetStatus().GetLastMismatchTime() == nil {
		t.Error(got.GetStatus(), err)
	}
	if got, _ := st.types.GetEventType(t.Context(), &grapnelv1.GetEventTypeRequest{Name: "namespaces/acme/eventTypes/order.paid"}); got.GetStatus().GetMismatches() != 1 {
		t.Error("an event that was let through is not counted:", got.GetStatus())
	}

	if _, err := st.namespaces.UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{Namespace: &grapnelv1.Namespace{Name: "namespaces/acme", RequireEventTypes: true}}); err != nil {
		t.Fatal(err)
	}
	refused(t, publish(typed("user.left", `{}`)), codes.InvalidArgument, "EVENT_TYPE_NOT_REGISTERED").names(t, "event.type")
	if err := publish(typed("order.sent", `x`)); err != nil {
		t.Error("a type that is registered is refused:", err)
	}
	st.namespace(t, "free")
	if _, err := st.publish.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/free", Event: typed("order.created", `{}`)}); err != nil {
		t.Error("another namespace's types are enforced:", err)
	}
}

func TestEventTypesAreListed(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for _, id := range []string{"order.created", "order.paid", "s3:Object/Put", "user.left"} {
		st.register(t, id, grapnelv1.EventType_ENFORCEMENT_WARN, orderSchema)
	}
	list := func(r *grapnelv1.ListEventTypesRequest) (types []string, schemas int) {
		t.Helper()
		r.Parent = "namespaces/acme"
		for {
			page, err := st.types.ListEventTypes(t.Context(), r)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range page.GetEventTypes() {
				types = append(types, e.GetType())
				if e.GetSchemas()[0].GetJsonSchema() != "" {
					schemas++
				}
			}
			if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
				return types, schemas
			}
		}
	}
	all, schemas := list(&grapnelv1.ListEventTypesRequest{PageSize: 3})
	if diff := cmp.Diff([]string{"order.created", "order.paid", "s3:Object/Put", "user.left"}, all); diff != "" || schemas != 0 {
		t.Error(diff, schemas)
	}
	if some, schemas := list(&grapnelv1.ListEventTypesRequest{Filter: "type = order.* AND enforcement = WARN AND deprecated = false AND version = 1", IncludeSchemas: true}); len(some) != 2 || schemas != 2 {
		t.Error(some, schemas)
	}
	_, err := st.types.ListEventTypes(t.Context(), &grapnelv1.ListEventTypesRequest{Parent: "namespaces/acme", Filter: "colour = red"})
	refused(t, err, codes.InvalidArgument, "INVALID_FILTER")
	_, err = st.types.ListEventTypes(t.Context(), &grapnelv1.ListEventTypesRequest{Parent: "namespaces/none"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}

func TestEventTypesAreChanged(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	made := st.register(t, "a/b", grapnelv1.EventType_ENFORCEMENT_REJECT, orderSchema)
	if made.GetName() != "namespaces/acme/eventTypes/a%2Fb" || made.GetType() != "a/b" {
		t.Error(made)
	}
	_, err := st.types.CreateEventType(t.Context(), &grapnelv1.CreateEventTypeRequest{Parent: "namespaces/acme", EventTypeId: "a/b"})
	if r := refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS"); !strings.HasPrefix(r.message, "event type namespaces/acme/eventTypes/a%2Fb exists") {
		t.Error(r.message)
	}
	update := func(content *grapnelv1.EventType, paths ...string) (*grapnelv1.EventType, error) {
		answer, err := st.types.UpdateEventType(t.Context(), &grapnelv1.UpdateEventTypeRequest{EventType: content, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
		return answer.GetEventType(), err
	}
	got, err := update(&grapnelv1.EventType{Name: made.GetName(), Deprecated: true, DeprecationReason: "use a.b", Type: "other"}, "deprecated", "deprecation_reason", "type")
	if err != nil || !got.GetDeprecated() || got.GetType() != "a/b" || len(got.GetSchemas()) != 1 {
		t.Error(got, err)
	}
	_, err = update(&grapnelv1.EventType{Name: made.GetName(), Etag: made.GetEtag(), Description: "x"})
	if r := refused(t, err, codes.Aborted, "ETAG_MISMATCH"); r.metadata["currentEtag"] != got.GetEtag() {
		t.Error(r)
	}
	_, err = update(&grapnelv1.EventType{Name: made.GetName(), Schemas: []*grapnelv1.EventTypeSchema{{Version: "2", JsonSchema: `{"properties":{"a":{"type":"text"}}}`}}})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event_type.schemas[0].json_schema/properties/a/type")
	_, err = update(&grapnelv1.EventType{Name: "namespaces/acme/eventTypes/none", Description: "x"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	_, err = update(&grapnelv1.EventType{Name: "namespaces/acme/eventTypes/a b"})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event_type.name")

	sample, err := st.types.SampleEventType(t.Context(), &grapnelv1.SampleEventTypeRequest{Name: made.GetName()})
	if err != nil || sample.GetPayload() != `{"id":"string","items":[{"sku":"string"}]}` || sample.GetVersion() != "1" {
		t.Error(sample, err)
	}
	st.register(t, "empty", 0)
	_, err = st.types.SampleEventType(t.Context(), &grapnelv1.SampleEventTypeRequest{Name: "namespaces/acme/eventTypes/empty"})
	refused(t, err, codes.FailedPrecondition, "INVALID_STATE")

	for _, r := range []*grapnelv1.DeleteEventTypeRequest{{Name: made.GetName()}, {Name: made.GetName(), AllowMissing: true}} {
		if _, err := st.types.DeleteEventType(t.Context(), r); err != nil {
			t.Error(err)
		}
	}
	_, err = st.types.DeleteEventType(t.Context(), &grapnelv1.DeleteEventTypeRequest{Name: made.GetName()})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
}

func TestTestsSendSamples(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	sub := st.subscribe(t, "acme", "orders", nil).GetName()
	st.register(t, "order.created", grapnelv1.EventType_ENFORCEMENT_REJECT, orderSchema)
	st.register(t, "order.none", grapnelv1.EventType_ENFORCEMENT_OFF, "false")
	test := func(e *grapnelv1.Event) error {
		_, err := st.subscriptions.TestSubscription(t.Context(), &grapnelv1.TestSubscriptionRequest{Name: sub, Event: e})
		return err
	}
	for _, e := range []*grapnelv1.Event{{Type: "order.created"}, {Type: "order.created", DataContentType: "application/vnd.order+json"}, {Type: "user.left"}, typed("order.created", "")} {
		if err := test(e); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for _, e := range st.engine.tested {
		got = append(got, e.ContentType+" "+string(e.Payload))
	}
	const sample = ` {"id":"string","items":[{"sku":"string"}]}`
	if diff := cmp.Diff([]string{"application/json" + sample, "application/vnd.order+json" + sample, "application/octet-stream ", "application/octet-stream "}, got); diff != "" {
		t.Error(diff)
	}
	if r := refused(t, test(&grapnelv1.Event{Type: "order.none"}), codes.FailedPrecondition, "INVALID_STATE"); !strings.Contains(r.message, "no sample of namespaces/acme/eventTypes/order.none") {
		t.Error(slices.Collect(maps.Keys(r.fields)), r.message)
	}
}

// What is registered and cannot be read is not said to be absent: a read says so, a list names it, and it can be created again.
func TestDamagedEventTypeIsNotAbsent(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.register(t, "order.paid", grapnelv1.EventType_ENFORCEMENT_OFF, orderSchema)
	name := eventtype.Name("acme", "order.created")
	if _, err := st.etcd.Put(t.Context(), "/grapnel/v1/eventtypes/"+name, "\xff\xff no message"); err != nil {
		t.Fatal(err)
	}
	get := func() error {
		_, err := st.types.GetEventType(t.Context(), &grapnelv1.GetEventTypeRequest{Name: name})
		return err
	}
	eventually(t, func() bool { return status.Code(get()) == codes.DataLoss })
	if r := refused(t, get(), codes.DataLoss, "DATA_DAMAGED"); r.resource != name || !strings.Contains(r.message, "create it again") {
		t.Errorf("%+v", r)
	}
	_, err := st.types.UpdateEventType(t.Context(), &grapnelv1.UpdateEventTypeRequest{EventType: &grapnelv1.EventType{Name: name, Deprecated: true}})
	refused(t, err, codes.DataLoss, "DATA_DAMAGED")
	list := func(parent string) *grapnelv1.ListEventTypesResponse {
		page, err := st.types.ListEventTypes(t.Context(), &grapnelv1.ListEventTypesRequest{Parent: parent})
		if err != nil {
			t.Fatal(err)
		}
		return page
	}
	for _, parent := range []string{"namespaces/acme", "namespaces/-"} {
		if page := list(parent); !slices.Equal(page.GetUnreachable(), []string{name}) || len(page.GetEventTypes()) != 1 {
			t.Errorf("%s: %v", parent, page)
		}
	}
	st.namespace(t, "other")
	if page := list("namespaces/other"); len(page.GetUnreachable()) > 0 {
		t.Errorf("another's: %v", page)
	}
	st.register(t, "order.created", grapnelv1.EventType_ENFORCEMENT_OFF, orderSchema)
	if err := get(); err != nil || len(list("namespaces/acme").GetUnreachable()) > 0 {
		t.Errorf("created again: %v", err)
	}
}
