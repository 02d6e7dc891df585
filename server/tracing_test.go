package server_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// collector takes traces by OTLP, over gRPC and over HTTP, and keeps them.
type collector struct {
	collectorpb.UnimplementedTraceServiceServer
	grpc, http string

	mu        sync.Mutex
	spans     []*tracepb.Span
	resources []string
	keys      map[string]bool
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{keys: map[string]bool{}}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	collectorpb.RegisterTraceServiceServer(srv, c)
	go func() { _ = srv.Serve(lis) }()
	t.Cleanup(srv.Stop)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var req collectorpb.ExportTraceServiceRequest
		if err != nil || r.URL.Path != "/v1/traces" || proto.Unmarshal(body, &req) != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		c.take(r.Header.Get("Api-Key"), &req)
		answer, _ := proto.Marshal(&collectorpb.ExportTraceServiceResponse{})
		w.Header().Set("Content-Type", "application/x-protobuf")
		_, _ = w.Write(answer)
	}))
	t.Cleanup(web.Close)
	c.grpc, c.http = "http://"+lis.Addr().String(), web.URL
	return c
}

// Export implements the collector's service.
func (c *collector) Export(ctx context.Context, req *collectorpb.ExportTraceServiceRequest) (*collectorpb.ExportTraceServiceResponse, error) {
	c.take(strings.Join(metadata.ValueFromIncomingContext(ctx, "api-key"), ","), req)
	return &collectorpb.ExportTraceServiceResponse{}, nil
}

func (c *collector) take(key string, req *collectorpb.ExportTraceServiceRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keys[key] = true
	for _, of := range req.GetResourceSpans() {
		c.resources = append(c.resources, prototext.Format(of.GetResource()))
		for _, scope := range of.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
}

// receives notes the span that a receiver makes of what it is told.
func (c *collector) receives(r servertest.Request) {
	parent := r.Header.Get("Traceparent")
	if len(parent) != 55 {
		return
	}
	trace, _ := hex.DecodeString(parent[3:35])
	span, _ := hex.DecodeString(parent[36:52])
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spans = append(c.spans, &tracepb.Span{
		TraceId: trace, ParentSpanId: span, SpanId: fmt.Appendf(nil, "recv%04d", len(c.spans)), Name: "receive", TraceState: r.Header.Get("Tracestate"),
	})
}

// of are the spans of a trace, by their names.
func (c *collector) of(trace string) map[string][]*tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	by := map[string][]*tracepb.Span{}
	for _, s := range c.spans {
		if hex.EncodeToString(s.GetTraceId()) == trace {
			by[s.GetName()] = append(by[s.GetName()], s)
		}
	}
	return by
}

func attributeOf(s *tracepb.Span, key string) string {
	for _, a := range s.GetAttributes() {
		if a.GetKey() == key {
			if n := a.GetValue().GetIntValue(); n != 0 {
				return fmt.Sprint(n)
			}
			return a.GetValue().GetStringValue()
		}
	}
	return ""
}

// traced has the servers of a test send traces of all events.
func traced(t *testing.T, endpoint, protocol string) servertest.Options {
	t.Helper()
	for name, value := range map[string]string{
		"ENDPOINT": endpoint, "PROTOCOL": protocol, "HEADERS": "api-key=geheim%201", "TIMEOUT": "2000",
	} {
		t.Setenv("OTEL_EXPORTER_OTLP_"+name, value)
	}
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
	t.Setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=trial")
	return servertest.Options{Dir: t.TempDir() + "/data", Adjust: func(o *server.Options) { o.Tracing = true }}
}

const (
	callerTrace = "0af7651916cd43dd8448eb211c80319c"
	callerSpan  = "b7ad6b7169203331"
)

// publishUnder publishes an event in a call that belongs to a trace.
func publishUnder(t *testing.T, s *servertest.Server, parent string, ev *grapnelv1.Event) {
	t.Helper()
	ctx := t.Context()
	if parent != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", parent, "tracestate", "shop=1")
	}
	ev.Type, ev.Payload = "order.created", &grapnelv1.Event_Data{Data: []byte(`{"order":1001}`)}
	if _, err := grapnelv1.NewPublishServiceClient(s.Conn).Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: ev}); err != nil {
		t.Fatal(err)
	}
}

// One trace of one event, from its publisher over server and plugins to the receiver, is complete over a retry and a restart of
// the server between attempts.
func TestOneTraceOfOneEvent(t *testing.T) {
	for _, protocol := range []string{"grpc", "http/protobuf"} {
		t.Run(protocol, func(t *testing.T) {
			c := newCollector(t)
			endpoint := c.http
			if protocol == "grpc" {
				endpoint = c.grpc
			}
			o := traced(t, endpoint, protocol)
			s := servertest.Start(t, o)
			var well atomic.Bool
			receiver := servertest.NewReceiver(t, func(r servertest.Request) int {
				c.receives(r)
				if well.Load() {
					return http.StatusNoContent
				}
				return http.StatusServiceUnavailable
			})
			s.Namespace("acme")
			by := transformedBy(t, "jq", map[string]any{"program": "."})
			s.Subscribe("acme", "shop", receiver.URL+"/hooks?token=geheim", func(sub *grapnelv1.Subscription) {
				by(sub)
				sub.RetryPolicy = fastRetries()
			})
			publishUnder(t, s, "00-"+callerTrace+"-"+callerSpan+"-01", &grapnelv1.Event{Id: "o-1"})
			servertest.Await(t, "the first attempt", func() bool { return len(c.of(callerTrace)["attempt"]) > 0 })
			s.Stop()
			well.Store(true)
			s = servertest.Start(t, o)
			servertest.Await(t, "the delivery", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 1 })
			exported := openMetrics(t, s)
			s.Stop() // sends the last spans

			assertTree(t, c.of(callerTrace), len(receiver.Requests()))
			if !strings.Contains(exported, `trace_id="`+callerTrace+`"`) {
				t.Error("the histogram of latencies has no example of the trace")
			}
			for _, r := range receiver.Requests() {
				if r.Header.Get("Tracestate") != "shop=1" {
					t.Errorf("tracestate %q was sent", r.Header.Get("Tracestate"))
				}
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if !c.keys["geheim 1"] || len(c.keys) != 1 {
				t.Errorf("the collector was shown the keys %v", c.keys)
			}
			if r := c.resources[0]; !strings.Contains(r, `"grapnel"`) || !strings.Contains(r, "trial") {
				t.Errorf("the resource is %s", r)
			}
			for _, span := range c.spans {
				if text := prototext.Format(span); strings.Contains(text, "geheim") || strings.Contains(text, "/hooks") || strings.Contains(text, "whsec") {
					t.Errorf("a span tells what it should not: %s", text)
				}
			}
		})
	}
}

// assertTree holds a trace of an event that was attempted n times, and accepted at the last.
func assertTree(t *testing.T, by map[string][]*tracepb.Span, n int) {
	t.Helper()
	for name, want := range map[string]int{"publish": 1, "append": 1, "transform": 1, "deliver": n, "queue": n, "attempt": n, "sign": n, "first_byte": n, "receive": n} {
		if len(by[name]) != want {
			t.Errorf("%d spans %s, want %d", len(by[name]), name, want)
		}
	}
	if len(by["connect"]) == 0 || n < 2 {
		t.Errorf("%d spans connect, %d attempts", len(by["connect"]), n)
	}
	ids := map[string]string{callerSpan: "caller"}
	for name, spans := range by {
		for _, s := range spans {
			if id := hex.EncodeToString(s.GetSpanId()); ids[id] != "" {
				t.Errorf("the id of a span %s is that of a span %s", name, ids[id])
			} else {
				ids[id] = name
			}
		}
	}
	parents := map[string]string{
		"publish": "caller", "append": "publish", "deliver": "publish", "queue": "deliver", "transform": "deliver", "attempt": "deliver",
		"sign": "attempt", "connect": "attempt", "first_byte": "attempt", "body": "attempt", "receive": "attempt",
	}
	var attempts, outcomes []string
	for name, spans := range by {
		for _, s := range spans {
			if parent := ids[hex.EncodeToString(s.GetParentSpanId())]; parent != parents[name] {
				t.Errorf("a span %s is within %q, want %q", name, parent, parents[name])
			}
			if name != "receive" && s.GetEndTimeUnixNano() < s.GetStartTimeUnixNano() {
				t.Errorf("a span %s ends before it starts", name)
			}
			switch name {
			case "deliver":
				attempts = append(attempts, attributeOf(s, "grapnel.attempt"))
				outcomes = append(outcomes, attributeOf(s, "grapnel.outcome"))
			case "attempt":
				if s.GetKind() != tracepb.Span_SPAN_KIND_CLIENT {
					t.Errorf("an attempt is of the kind %v", s.GetKind())
				}
			}
		}
	}
	slices.Sort(attempts)
	if len(slices.Compact(attempts)) != n || !slices.Contains(outcomes, "retryable") || !slices.Contains(outcomes, "succeeded") {
		t.Errorf("attempts %v with the outcomes %v", attempts, outcomes)
	}
}

func openMetrics(t *testing.T, s *servertest.Server) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.AdminAddr+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// What is not sampled leaves no span, and the publisher's trace goes on as it came. Whoever asks for a trace has it.
func TestSamplingIsDecidedAtPublish(t *testing.T) {
	c := newCollector(t)
	o := traced(t, c.http, "http/protobuf")
	t.Setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
	s := servertest.Start(t, o)
	receiver := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	s.Subscribe("acme", "shop", receiver.URL, nil)
	const own = "00-11111111111111111111111111111111-2222222222222222-0"
	publishUnder(t, s, "", &grapnelv1.Event{Id: "alone"})
	publishUnder(t, s, "", &grapnelv1.Event{Id: "unsampled", Attributes: map[string]string{"traceparent": own + "0", "tracestate": "a=b"}})
	publishUnder(t, s, "00-"+callerTrace+"-"+callerSpan+"-00", &grapnelv1.Event{Id: "sampled", Attributes: map[string]string{"traceparent": own + "1"}})
	servertest.Await(t, "the deliveries", func() bool { return receiver.Accepted() == 3 })
	s.Stop()
	for _, r := range receiver.Requests() {
		parent, state := r.Header.Get("Traceparent"), r.Header.Get("Tracestate")
		switch id := r.Header.Get("Ce-Id"); {
		case id == "alone" && !strings.HasSuffix(parent, "-00"),
			id == "unsampled" && (parent != own+"0" || state != "a=b" || r.Header.Get("Ce-Tracestate") != ""),
			id == "sampled" && (parent[:35] != own[:35] || parent[35:53] == own[35:53] || !strings.HasSuffix(parent, "-01")):
			t.Errorf("%s was sent with traceparent %q and tracestate %q", id, parent, state)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, span := range c.spans {
		if hex.EncodeToString(span.GetTraceId()) != strings.Repeat("1", 32) {
			t.Errorf("a span of what was not sampled: %v", span)
		}
	}
	if len(c.spans) == 0 {
		t.Error("no span of what was")
	}
}

// A request with several events belongs to the trace of the first, and those of the others lead there. Each delivery has its
// own outcome.
func TestTracesOfABatch(t *testing.T) {
	c := newCollector(t)
	s := servertest.Start(t, traced(t, c.grpc, "grpc"))
	var requests, together atomic.Int32
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var events []struct{ ID string }
		if err := json.NewDecoder(r.Body).Decode(&events); err != nil {
			t.Error(err)
		}
		if requests.Add(1); len(events) == 2 && together.Add(1) == 1 { // the second is to come again
			w.Header().Set("Webhook-Failed-Ids", events[1].ID)
		}
	}))
	t.Cleanup(receiver.Close)
	s.Namespace("acme")
	s.Subscribe("acme", "shop", receiver.URL, func(sub *grapnelv1.Subscription) {
		batchesOf(2, grapnelv1.Batching_FORMAT_JSON_ARRAY)(sub)
		sub.Batching.MaxWait = durationpb.New(time.Second)
	})
	traces := []string{strings.Repeat("1", 32), strings.Repeat("2", 32)}
	var events []*grapnelv1.Event
	for i, trace := range traces {
		events = append(events, &grapnelv1.Event{
			Id: fmt.Sprint("o-", i), Type: "order.created", Payload: &grapnelv1.Event_Data{Data: []byte(`{}`)},
			Attributes: map[string]string{"traceparent": "00-" + trace + "-" + callerSpan + "-01"},
		})
	}
	if _, err := grapnelv1.NewPublishServiceClient(s.Conn).BatchPublish(t.Context(), &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: events}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the deliveries", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 2 })
	s.Stop()
	if together.Load() != 1 || requests.Load() != 2 {
		t.Fatalf("%d requests, and %d with both", requests.Load(), together.Load())
	}
	var attempt, linked []byte
	outcomes := map[string]int{}
	for _, trace := range traces {
		by := c.of(trace)
		if len(by["publish"]) != 1 {
			t.Errorf("trace %s has the spans %v", trace, by)
		}
		for _, of := range by["attempt"] {
			if len(by["deliver"]) == 1 {
				attempt = of.GetSpanId()
			}
		}
		for _, of := range by["deliver"] {
			if links := of.GetLinks(); len(links) == 1 {
				linked = links[0].GetSpanId()
			}
			outcomes[attributeOf(of, "grapnel.outcome")+" "+attributeOf(of, "error.type")+" "+of.GetStatus().GetCode().String()]++
		}
	}
	if attempt == nil || string(attempt) != string(linked) {
		t.Errorf("the request is %x, and what leads there %x", attempt, linked)
	}
	if want := map[string]int{"succeeded  STATUS_CODE_UNSET": 2, "retryable retryable STATUS_CODE_ERROR": 1}; !maps.Equal(outcomes, want) {
		t.Errorf("the deliveries ended as %v, want %v", outcomes, want)
	}
}

// A collector that is away, or does not answer, costs no delivery, and holds up no stop.
func TestCollectorThatTakesNothing(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0") // the kernel takes connections, and nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	for protocol, endpoint := range map[string]string{"http/protobuf": "http://" + freeAddr(t), "grpc": "http://" + lis.Addr().String()} {
		t.Run(protocol, func(t *testing.T) {
			o := traced(t, endpoint, protocol)
			t.Setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
			t.Setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
			s := servertest.Start(t, o)
			receiver := servertest.NewReceiver(t, nil)
			s.Namespace("acme")
			s.Subscribe("acme", "shop", receiver.URL, nil)
			const n = 100
			for i := range n {
				s.Publish("acme", fmt.Sprint("o-", i), "order.created", []byte(`{}`))
			}
			servertest.Await(t, "the deliveries", func() bool { return receiver.Accepted() == n })
			s.Stop() // complains where it was not in time
		})
	}
}
