package ingest_test

import (
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/tracing"
)

// The span of an event that is refused is an error that says why, and has no append where the journal was not asked.
func TestSpansOfRefusedEvents(t *testing.T) {
	var mu sync.Mutex
	spans := map[string][]*tracepb.Span{} // by trace
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var req collectorpb.ExportTraceServiceRequest
		if err != nil || proto.Unmarshal(body, &req) != nil {
			t.Errorf("unreadable: %v", err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, span := range req.GetResourceSpans()[0].GetScopeSpans()[0].GetSpans() {
			spans[string(span.GetTraceId())] = append(spans[string(span.GetTraceId())], span)
		}
	}))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	tracer, err := tracing.Open(t.Context(), tracing.Options{})
	if err != nil {
		t.Fatal(err)
	}
	journal := &shelf{}
	in := ingest.New(ingest.Options{Registry: newTenants(t, &grapnelv1.Quota{MaxEventBytes: 64}), Journal: journal, Tracer: tracer})
	all := events(3, func(i int, e *delivery.Event) {
		if i == 1 {
			e.Payload = make([]byte, 65)
		}
	})
	in.Publish(t.Context(), "acme", all)
	journal.err = delivery.ErrEventConflict
	all = append(all, events(1, nil)...)
	in.Publish(t.Context(), "acme", all[3:])
	if err := tracer.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"", "too_large", "", "conflict"} {
		got := map[string]string{}
		for _, span := range spans[string(all[i].Trace.ID[:])] {
			failed := span.GetStatus().GetMessage()
			if (span.GetStatus().GetCode() == tracepb.Status_STATUS_CODE_ERROR) != (failed != "") {
				t.Errorf("event %d: the status of %s is %v", i, span.GetName(), span.GetStatus())
			}
			at := slices.IndexFunc(span.GetAttributes(), func(a *commonpb.KeyValue) bool { return a.GetKey() == "error.type" })
			if said := at >= 0 && span.GetAttributes()[at].GetValue().GetStringValue() == failed; said != (failed != "") {
				t.Errorf("event %d: the attributes of %s are %v", i, span.GetName(), span.GetAttributes())
			}
			got[span.GetName()] = failed
		}
		expected := map[string]string{"publish": want, "append": ""}
		if i == 1 {
			delete(expected, "append")
		}
		if !maps.Equal(got, expected) {
			t.Errorf("event %d has the spans %v, want %v", i, got, expected)
		}
	}
}
