package api_test

import (
	"context"
	"crypto/tls"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

// dial opens another connection.
func (st *station) dial(t *testing.T, o ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(st.conn.Target(), append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry()}, o...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// watch opens a stream of health and waits for its first answer.
func watch(t *testing.T, conn *grpc.ClientConn) error {
	t.Helper()
	w, err := healthpb.NewHealthClient(conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = w.Recv()
	}
	return err
}

// TestWatchesTakeNoRoomOfCalls: what keeps clients alive and what clients do have each a bound of their own.
func TestWatchesTakeNoRoomOfCalls(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.MaxCalls, o.MaxWatches = 1, 20 })
	st.namespace(t, "acme")
	for range 16 {
		if err := watch(t, st.conn); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, watch(t, st.conn), codes.ResourceExhausted, "RATE_LIMITED") // one connection
	p := st.open(t, "acme")
	p.window() // the one stream that there is room for
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "x")); err != nil {
		t.Error(err)
	}
	other := st.dial(t)
	for range 4 {
		if err := watch(t, other); err != nil {
			t.Fatal(err)
		}
	}
	refused(t, watch(t, other), codes.ResourceExhausted, "RATE_LIMITED") // all of them
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "x")); err != nil {
		t.Error(err)
	}
}

// TestStreamWithoutFirstFrame: who opens a publish stream and says nothing does not keep its place.
func TestStreamWithoutFirstFrame(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.FirstFrame, o.MaxCalls = 20*time.Millisecond, 1 })
	st.namespace(t, "acme")
	silent, err := st.publish.PublishStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = silent.Recv()
	refused(t, err, codes.DeadlineExceeded, "ABANDONED")
	p := st.open(t, "acme")
	p.window()
	p.close()
	if err := p.end(); err != nil {
		t.Error(err)
	}
}

// TestRoomPerNamespaceAndConnection: one namespace, or one connection, does not take what there is for all.
func TestRoomPerNamespaceAndConnection(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.MaxCallsPerNamespace, o.MaxStreamsPerConnection = 2, 3 })
	st.namespace(t, "acme")
	st.namespace(t, "other")
	for range 2 {
		st.open(t, "acme").window()
	}
	third := st.open(t, "acme")
	_, err := third.stream.Recv()
	r := refused(t, err, codes.ResourceExhausted, "RATE_LIMITED")
	if r.metadata["subject"] != "namespaces/acme" || r.retry <= 0 {
		t.Errorf("refusal = %+v", r)
	}
	st.open(t, "other").window()
	fourth := st.open(t, "other")
	_, err = fourth.stream.Recv()
	if r := refused(t, err, codes.ResourceExhausted, "RATE_LIMITED"); r.metadata["subject"] != "connection" {
		t.Errorf("refusal = %+v", r)
	}
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "", "x")); err != nil {
		t.Error("unary calls have room of their own:", err)
	}
}

// TestRoomPerConnectionOverTLS: the connection is known behind TLS, too.
func TestRoomPerConnectionOverTLS(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.MaxStreamsPerConnection = 1 })
	st.namespace(t, "acme")
	pair := httptest.NewUnstartedServer(nil)
	pair.StartTLS()
	defer pair.Close()
	secure := grpc.NewServer(append(st.server.ServerOptions(), grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: pair.TLS.Certificates})))...)
	st.server.Register(secure)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = secure.Serve(st.server.Listen(l)) }()
	t.Cleanup(func() { secure.Stop(); <-done })
	for range 2 { // connections
		conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})), grpc.WithDisableRetry())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		client := grapnelv1.NewPublishServiceClient(conn)
		open := func() error {
			stream, err := client.PublishStream(t.Context())
			if err != nil {
				return err
			}
			// Of a stream that is refused before it is sent, Recv says why.
			_ = stream.Send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{Open: &grapnelv1.PublishStreamRequest_Open{Parent: "namespaces/acme"}}})
			_, err = stream.Recv()
			return err
		}
		if err := open(); err != nil {
			t.Error(err)
		}
		refused(t, open(), codes.ResourceExhausted, "RATE_LIMITED")
	}
}

// TestCallsPerNamespace: the calls of one namespace leave room for another's.
func TestCallsPerNamespace(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.MaxCallsPerNamespace = 1 })
	name := st.oneDelivery(t)
	st.namespace(t, "other")
	release, entered := make(chan struct{}), make(chan struct{})
	st.hooks.set(func(h *hooks) {
		h.onRetry = func(context.Context) { close(entered); <-release }
	})
	done := make(chan error, 1)
	go func() {
		_, err := st.deliveries.RetryDelivery(context.Background(), &grapnelv1.RetryDeliveryRequest{Name: name})
		done <- err
	}()
	<-entered
	_, err := st.deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: name})
	refused(t, err, codes.ResourceExhausted, "RATE_LIMITED")
	if _, err := st.publish.Publish(t.Context(), publishText("other", "", "x")); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := st.deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: name}); err != nil {
		t.Error("the place is not free again:", err)
	}
}

// TestOldConnectionIsTold: a stream on a connection that has grown old hears draining, has time to end, and the next one
// is on another connection.
func TestOldConnectionIsTold(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.ConnectionAge = time.Second })
	st.namespace(t, "acme")
	p := st.open(t, "acme")
	p.window()
	p.item(1, "e1", "x")
	for !p.draining {
		if err := p.read(len(p.acks) + 1); err != nil {
			t.Fatal(err)
		}
		if !p.draining {
			frame, err := p.stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			p.draining = frame.GetDraining()
		}
	}
	p.item(2, "e2", "x") // was on its way
	p.close()
	if err := p.end(); err != nil || p.acks[2].GetName() == "" {
		t.Errorf("the rest of the stream: %v %v", p.acks, err)
	}
	again := st.open(t, "acme")
	again.window()
	again.close()
	if err := again.end(); err != nil || again.draining {
		t.Errorf("the next stream: draining %v, %v", again.draining, err)
	}
}

// TestRepeatWithoutID: a call that the client's library repeats may have been heard before, so that an event without an
// id would be stored twice.
func TestRepeatWithoutID(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	repeated := metadata.AppendToOutgoingContext(t.Context(), "grpc-previous-rpc-attempts", "1")
	_, err := st.publish.Publish(repeated, publishText("acme", "", "x"))
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "event.id")
	if _, err := st.publish.Publish(repeated, publishText("acme", "e1", "x")); err != nil {
		t.Error(err)
	}
	batch, err := st.publish.BatchPublish(repeated, &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme", Events: []*grapnelv1.Event{
		publishText("acme", "", "x").Event, publishText("acme", "e2", "x").Event,
	}})
	if err != nil {
		t.Fatal(err)
	}
	if e := batch.GetResults()[0].GetError(); e.GetField() != "id" || e.GetRetryable() || batch.GetResults()[1].GetName() == "" {
		t.Errorf("results = %v", batch)
	}
	list, err := st.events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme"})
	if err != nil || len(list.GetEvents()) != 2 {
		t.Errorf("stored: %v %v", list, err)
	}
	// What the server itself refuses is not repeated without an id either: the repeat would hide why.
	st.ingest.Drain()
	for id, want := range map[string]string{"": "-1", "e3": "1000"} {
		var trailer metadata.MD
		_, err = st.publish.Publish(t.Context(), publishText("acme", id, "x"), grpc.Trailer(&trailer))
		refused(t, err, codes.Unavailable, "DRAINING")
		if got := trailer.Get("grpc-retry-pushback-ms"); len(got) != 1 || got[0] != want {
			t.Errorf("id %q: pushback %q, want %s", id, got, want)
		}
	}
}

// TestReflectionOfOlderClients: v1alpha, whose messages are those of v1, is answered like v1, and what is stored is
// nobody's business in either.
func TestReflectionOfOlderClients(t *testing.T) {
	st := startStation(t)
	for _, version := range []string{"v1", "v1alpha"} {
		stream, err := st.conn.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
			"/grpc.reflection."+version+".ServerReflection/ServerReflectionInfo")
		if err != nil {
			t.Fatal(err)
		}
		ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
			t.Helper()
			if err := stream.SendMsg(r); err != nil {
				t.Fatal(err)
			}
			answer := &reflectionpb.ServerReflectionResponse{}
			if err := stream.RecvMsg(answer); err != nil {
				t.Fatal(err)
			}
			return answer
		}
		symbol := func(name string) *reflectionpb.ServerReflectionRequest {
			return &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: name}}
		}
		if len(ask(symbol("grapnel.v1.Event")).GetFileDescriptorResponse().GetFileDescriptorProto()) == 0 {
			t.Errorf("%s does not know grapnel.v1.Event", version)
		}
		if ask(symbol("grapnel.store.v1.SecretRecord")).GetErrorResponse() == nil {
			t.Errorf("%s shows what is stored", version)
		}
		file := &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileByFilename{FileByFilename: "grapnel/store/v1/store.proto"}}
		if ask(file).GetErrorResponse() == nil {
			t.Errorf("%s shows the file of what is stored", version)
		}
	}
}
