package tracing

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/server/delivery"
)

// sparing is a collector that takes some spans.
type sparing struct {
	collectorpb.UnimplementedTraceServiceServer
	answer *collectorpb.ExportTraceServiceResponse
}

// Export implements the collector's service.
func (c *sparing) Export(context.Context, *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	return c.answer, nil
}

// ServeHTTP is Export by HTTP.
func (c *sparing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	w.Header().Set("Content-Type", "application/x-protobuf")
	answer, _ := proto.Marshal(c.answer)
	_, _ = w.Write(answer)
}

func (c *sparing) url(t *testing.T, protocol string) string {
	t.Helper()
	if protocol != "grpc" {
		web := httptest.NewServer(c)
		t.Cleanup(web.Close)
		return web.URL
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(srv, c)
	go func() { _ = srv.Serve(lis) }()
	t.Cleanup(srv.Stop)
	return "http://" + lis.Addr().String()
}

// spansOf are the values of grapnel_trace_spans_total.
func spansOf(t *testing.T, r prometheus.Gatherer) map[string]int {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	by := map[string]int{}
	for _, family := range families {
		if family.GetName() != "grapnel_trace_spans_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			by[m.GetLabel()[0].GetValue()] = int(m.GetCounter().GetValue())
		}
	}
	return by
}

// A collector that takes some of the spans is believed: those that it has rejected are lost, and no others.
func TestPartialSuccessIsCounted(t *testing.T) {
	const spans = 5
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		for _, tt := range []struct {
			rejected int64
			message  string
			lost     int
		}{{0, "", 0}, {2, "", 2}, {3, "too old (1 spans rejected)\nor so", 3}, {0, "speak slower", 0}, {7, "more than there were", spans}} {
			t.Run(fmt.Sprintf("%s rejects %d", protocol, tt.rejected), func(t *testing.T) {
				c := &sparing{answer: &collectorpb.ExportTraceServiceResponse{PartialSuccess: &collectorpb.ExportTracePartialSuccess{
					RejectedSpans: tt.rejected, ErrorMessage: tt.message,
				}}}
				t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", c.url(t, protocol))
				t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
				registry := prometheus.NewRegistry()
				tracer, err := Open(t.Context(), Options{Registerer: registry})
				if err != nil {
					t.Fatal(err)
				}
				events := make([]*delivery.Event, spans)
				for i := range events {
					events[i] = &delivery.Event{Type: "order.created"}
				}
				tracer.Publish(t.Context(), "acme", events).End(func(int) Published { return Published{UID: "evt_1"} })
				if err := tracer.Close(t.Context()); err != nil {
					t.Fatal(err)
				}
				if by := spansOf(t, registry); by["recorded"] != spans || by["failed"] != tt.lost || by["exported"] != spans-tt.lost {
					t.Errorf("counted %v, want %d of %d failed", by, tt.lost, spans)
				}
			})
		}
	}
}
