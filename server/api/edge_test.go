package api_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

// publicServices yields the services of this API.
func publicServices(yield func(protoreflect.ServiceDescriptor) bool) {
	protoregistry.GlobalFiles.RangeFilesByPackage("grapnel.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			if !yield(f.Services().Get(i)) {
				return false
			}
		}
		return true
	})
}

// TestEveryMethod calls each method that the protos have with an empty request: it is served, and when it
// refuses it does so in the promised form.
func TestEveryMethod(t *testing.T) {
	st := startStation(t)
	methods := 0
	for service := range publicServices {
		for i := range service.Methods().Len() {
			m := service.Methods().Get(i)
			methods++
			t.Run(string(m.FullName()), func(t *testing.T) {
				err := callEmpty(t, st.conn, m)
				if err == nil {
					return
				}
				code := status.Code(err)
				if code != codes.InvalidArgument && code != codes.NotFound {
					t.Errorf("an empty request is %v: %v", code, err)
				}
				reason := "INVALID_FIELD"
				if code == codes.NotFound {
					reason = "RESOURCE_NOT_FOUND"
				}
				r := refused(t, err, code, reason)
				if strings.Contains(r.message, "regex") || strings.Contains(r.message, "min_len") {
					t.Errorf("not in words: %q", r.message)
				}
				for field, text := range r.fields {
					if field == "" || text == "" {
						t.Errorf("violation without field or text: %v", r.fields)
					}
				}
			})
		}
	}
	if methods < 30 {
		t.Errorf("only %d methods found", methods)
	}
}

func callEmpty(t *testing.T, conn *grpc.ClientConn, m protoreflect.MethodDescriptor) error {
	t.Helper()
	path := "/" + string(m.Parent().FullName()) + "/" + string(m.Name())
	in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if !m.IsStreamingClient() {
		return conn.Invoke(t.Context(), path, in, out)
	}
	stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, path)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(in); err != nil {
		return err
	}
	return stream.RecvMsg(out)
}

func TestUnknownMethod(t *testing.T) {
	st := startStation(t)
	for _, path := range []string{"/grapnel.v1.PublishService/Unpublish", "/grapnel.v2.PublishService/Publish"} {
		err := st.conn.Invoke(t.Context(), path, &grapnelv1.PublishRequest{}, &grapnelv1.PublishResponse{})
		r := refused(t, err, codes.Unimplemented, "UNKNOWN_METHOD")
		if r.metadata["method"] != path {
			t.Errorf("metadata = %v", r.metadata)
		}
	}
}

func TestPanicIsRecoveredAndLogged(t *testing.T) {
	st := startStation(t)
	name := st.oneDelivery(t)
	st.hooks.set(func(h *hooks) { h.onRetry = func(context.Context) { panic("boom 4711") } })
	var trailer metadata.MD
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", "req-77")
	_, err := st.deliveries.RetryDelivery(ctx, &grapnelv1.RetryDeliveryRequest{Name: name}, grpc.Trailer(&trailer))
	r := refused(t, err, codes.Internal, "INTERNAL")
	if strings.Contains(r.message, "4711") {
		t.Errorf("the cause is shown: %q", r.message)
	}
	if got := requestInfo(err); got != "req-77" || trailer.Get("x-request-id")[0] != "req-77" {
		t.Errorf("request id: detail %q, trailer %v", got, trailer)
	}
	for _, want := range []string{"boom 4711", "request_id=req-77", "level=ERROR", "resource=" + name, "code=INTERNAL", "edge_test.go"} {
		if !strings.Contains(st.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
	st.hooks.set(func(h *hooks) { h.onRetry = nil })
	if _, err := st.deliveries.RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: name}); err != nil {
		t.Error("the server does not go on:", err)
	}
}

func requestInfo(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RequestInfo); ok {
			return info.GetRequestId()
		}
	}
	return ""
}

// TestLogHoldsNoSecret sends values that nobody may find in a log, in the places where they belong and where
// they do not, through success, refusal and an internal error.
func TestLogHoldsNoSecret(t *testing.T) {
	const canary = "whsec_Q2FuYXJ5Q2FuYXJ5Q2FuYXJ5Q2FuYXJ5"
	st := startStation(t)
	keys := st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	ctx := t.Context()
	hmac := grapnelv1.Secret_KIND_HMAC
	calls := []func() error{
		func() error {
			_, err := st.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "given", Kind: hmac, Value: canary})
			return err
		},
		func() error {
			_, err := st.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "BAD ID", Kind: hmac, Value: canary})
			return err
		},
		func() error {
			_, err := st.secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: canary, SecretId: canary, Value: canary})
			return err
		},
		func() error {
			_, err := st.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: keys["key"], Value: canary})
			return err
		},
		func() error {
			_, err := st.secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: canary, Value: canary + "!"})
			return err
		},
		func() error {
			_, err := st.subscriptions.GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/" + canary})
			return err
		},
		func() error {
			sub := plainSubscription("acme")
			sub.Headers = map[string]string{"authorization": canary}
			_, err := st.subscriptions.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", SubscriptionId: "x", Subscription: sub})
			return err
		},
		func() error {
			_, err := st.publish.Publish(ctx, publishText("acme", "e1", canary))
			return err
		},
		func() error {
			_, err := st.publish.Publish(ctx, publishText("acme", canary+"/", canary))
			return err
		},
		func() error {
			_, err := st.deliveries.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/acme", Filter: canary, PageToken: canary})
			return err
		},
	}
	for i, call := range calls {
		t.Logf("call %d: %v", i, call())
	}
	// The same once more with a server that breaks on them.
	st.host.say(fmt.Errorf("plugin broke"))
	sub := plainSubscription("acme")
	_, err := st.subscriptions.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", SubscriptionId: "y", Subscription: sub})
	refused(t, err, codes.Internal, "INTERNAL")
	log := st.log.String()
	if strings.Contains(log, "Q2FuYXJ5") {
		t.Errorf("the log holds the secret:\n%s", log)
	}
	for _, want := range []string{"method=grapnel.v1.SecretService/CreateSecret", "resource=namespaces/acme", "request_id=", "peer=127.0.0.1:", "duration=", "plugin broke"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

func publishText(ns, id, text string) *grapnelv1.PublishRequest {
	return &grapnelv1.PublishRequest{Parent: "namespaces/" + ns, Event: &grapnelv1.Event{
		Id: id, Type: "order.created", Payload: &grapnelv1.Event_Text{Text: text},
	}}
}

// oneDelivery publishes an event to one subscription and returns the name of its delivery.
func (st *station) oneDelivery(t *testing.T) string {
	t.Helper()
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "e1", "hello")); err != nil {
		t.Fatal(err)
	}
	return "namespaces/acme/deliveries/" + st.takeJobs(t, 1)[0].ID.String()
}

func TestDeadlineAndCallLimit(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.MaxCalls = 1 })
	name := st.oneDelivery(t)
	release, entered := make(chan struct{}), make(chan time.Duration, 1)
	st.hooks.set(func(h *hooks) {
		h.onRetry = func(ctx context.Context) {
			deadline, ok := ctx.Deadline()
			if !ok {
				deadline = time.Time{}
			}
			entered <- time.Until(deadline)
			<-release
		}
	})
	var held sync.WaitGroup
	held.Go(func() {
		_, _ = st.deliveries.RetryDelivery(context.Background(), &grapnelv1.RetryDeliveryRequest{Name: name})
	})
	if left := <-entered; left < 25*time.Second || left > 30*time.Second {
		t.Errorf("a call without a deadline has %v", left)
	}
	var trailer metadata.MD
	_, err := st.deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: name}, grpc.Trailer(&trailer))
	r := refused(t, err, codes.ResourceExhausted, "RATE_LIMITED")
	if pushback, _ := strconv.Atoi(trailer.Get("grpc-retry-pushback-ms")[0]); r.retry <= 0 || !r.quota || int64(pushback) != r.retry.Milliseconds() {
		t.Errorf("retry info %v, pushback %v", r.retry, trailer)
	}
	close(release)
	held.Wait()
	if _, err := st.deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: name}); err != nil {
		t.Error("the place is not free again:", err)
	}
}

func TestGivenUpCall(t *testing.T) {
	st := startStation(t)
	name := st.oneDelivery(t)
	st.hooks.set(func(h *hooks) { h.onRetry = func(ctx context.Context) { <-ctx.Done() } })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := st.deliveries.RetryDelivery(ctx, &grapnelv1.RetryDeliveryRequest{Name: name})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v", err)
	}
	eventually(t, func() bool { return strings.Contains(st.log.String(), "reason=ABANDONED") })
}

func TestMetrics(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for range 2 {
		if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "x")); err != nil {
			t.Fatal(err)
		}
	}
	_, _ = st.publish.Publish(t.Context(), publishText("none", "", "x"))
	_ = st.conn.Invoke(t.Context(), "/x.Y/Z", &grapnelv1.PublishRequest{}, &grapnelv1.PublishResponse{})
	families, err := st.metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			key := f.GetName()
			for _, k := range slices.Sorted(maps.Keys(labels)) {
				key += " " + labels[k]
			}
			got[key] = m.GetCounter().GetValue()
		}
	}
	for key, want := range map[string]float64{
		"grapnel_api_calls_total OK grapnel.v1.PublishService/Publish ":                          2,
		"grapnel_api_calls_total NOT_FOUND grapnel.v1.PublishService/Publish RESOURCE_NOT_FOUND": 1,
		"grapnel_api_calls_total UNIMPLEMENTED unknown UNKNOWN_METHOD":                           1,
		"grapnel_ingest_events_total accepted":                                                   2,
		"grapnel_ingest_events_total refused":                                                    1,
	} {
		if got[key] != want {
			t.Errorf("%s = %v, want %v", key, got[key], want)
		}
	}
}

func TestHealth(t *testing.T) {
	st := startStation(t)
	client := healthpb.NewHealthClient(st.conn)
	serving := func(service string) healthpb.HealthCheckResponse_ServingStatus {
		answer, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatalf("%q: %v", service, err)
		}
		return answer.GetStatus()
	}
	names := []string{"", "liveness"}
	for service := range publicServices {
		names = append(names, string(service.FullName()))
	}
	for _, name := range names {
		if got := serving(name); got != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%q is %v", name, got)
		}
	}
	_, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "nobody"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	st.server.Drain()
	st.server.Drain()
	for name, want := range map[string]healthpb.HealthCheckResponse_ServingStatus{
		"":                          healthpb.HealthCheckResponse_NOT_SERVING,
		"grapnel.v1.PublishService": healthpb.HealthCheckResponse_NOT_SERVING,
		"grapnel.v1.EventService":   healthpb.HealthCheckResponse_SERVING,
		"liveness":                  healthpb.HealthCheckResponse_SERVING,
	} {
		if got := serving(name); got != want {
			t.Errorf("draining, %q is %v", name, got)
		}
	}
}

// TestReflectionHasComments asks over the wire, as grpcurl does.
func TestReflectionHasComments(t *testing.T) {
	st := startStation(t)
	stream, err := reflectionpb.NewServerReflectionClient(st.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	list := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	served := map[string]bool{}
	for _, s := range list.GetListServicesResponse().GetService() {
		served[s.GetName()] = true
	}
	for service := range publicServices {
		if !served[string(service.FullName())] {
			t.Errorf("%s is not listed", service.FullName())
		}
	}
	for _, symbol := range []string{"grapnel.v1.PublishService", "grapnel.v1.Subscription", "grapnel.v1.ErrorReason"} {
		answer := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: symbol}})
		comments := 0
		for _, raw := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
			file := &descriptorpb.FileDescriptorProto{}
			if err := proto.Unmarshal(raw, file); err != nil {
				t.Fatal(err)
			}
			for _, l := range file.GetSourceCodeInfo().GetLocation() {
				if l.GetLeadingComments() != "" {
					comments++
				}
			}
		}
		if comments == 0 {
			t.Errorf("%s has no comments: %v", symbol, answer.GetErrorResponse())
		}
	}
	details := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "google.rpc.BadRequest"}})
	if details.GetErrorResponse() != nil {
		t.Error("error details cannot be decoded by callers:", details.GetErrorResponse())
	}
}

// TestEmbeddedDescriptorsAreCurrent compares the embedded set with the linked code. When it fails, run
// `make generate`.
func TestEmbeddedDescriptorsAreCurrent(t *testing.T) {
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(grapnelv1.Descriptors(), set); err != nil {
		t.Fatal(err)
	}
	embedded := map[string]*descriptorpb.FileDescriptorProto{}
	for _, f := range set.GetFile() {
		f.SourceCodeInfo = nil
		f.ProtoReflect().SetUnknown(nil) // buf's own notes
		embedded[f.GetName()] = f
	}
	files := 0
	protoregistry.GlobalFiles.RangeFilesByPackage("grapnel.v1", func(f protoreflect.FileDescriptor) bool {
		files++
		linked := protodesc.ToFileDescriptorProto(f)
		// Both through the wire, so that options compare alike.
		want, err := proto.MarshalOptions{Deterministic: true}.Marshal(linked)
		if err != nil {
			t.Fatal(err)
		}
		got, err := proto.MarshalOptions{Deterministic: true}.Marshal(embedded[f.Path()])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the embedded descriptors; run make generate", f.Path())
		}
		return true
	})
	if files == 0 {
		t.Error("nothing compared")
	}
}
