package plugin_test

import (
	"bytes"
	"context"
	"errors"
	"math"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

type transformConfig struct {
	Do string `json:"do" required:"true"`
}

// puppet does what its config says.
func puppet() plugin.Kind {
	return plugin.Transformer("puppet", func(c transformConfig, _ plugin.Target) (plugin.TransformFunc, error) {
		return func(ctx context.Context, e *plugin.Event) (*plugin.Transformed, error) {
			switch c.Do {
			case "drop":
				return nil, plugin.Drop("of no interest")
			case "throw":
				return nil, errors.New("no such field")
			case "panic":
				panic("of the author")
			case "nothing":
				return nil, nil
			case "large":
				return &plugin.Transformed{Body: make([]byte, plugin.MaxTransformed+1)}, nil
			case "loop":
				for ctx.Err() == nil {
					busy()
				}
				return nil, ctx.Err()
			}
			return &plugin.Transformed{
				Body: bytes.ToUpper(e.Data), ContentType: "text/plain", Headers: []plugin.Header{{Name: "X-Type", Value: e.Type + e.Attributes["a"]}},
			}, nil
		}, nil
	})
}

func busy() {
	n := 0
	for i := range 10000 {
		n += i
	}
	_ = n
}

// TestTransform: what a transformer makes comes back, and each way of not making anything is told by its code.
func TestTransform(t *testing.T) {
	h := plugintest.New(t, puppet())
	if h.Kind("puppet").GetTransformer() == nil {
		t.Fatal("the kind has no traits of a transformer")
	}
	do := func(what string, timeout time.Duration) (*plugin.Transformed, error) {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		return h.Configure(plugintest.Instance{Kind: "puppet", Config: transformConfig{what}}).Transform(ctx, plugin.Event{
			MessageID: "evt_1", Type: "order.created", Attributes: map[string]string{"a": "b"}, Data: []byte("abc"),
		})
	}
	made, err := do("it", time.Minute)
	if err != nil || string(made.Body) != "ABC" || made.ContentType != "text/plain" ||
		len(made.Headers) != 1 || made.Headers[0] != (plugin.Header{Name: "x-type", Value: "order.createdb"}) {
		t.Errorf("%+v, %v", made, err)
	}
	if reason, dropped := plugin.DropReason(second(do("drop", time.Minute))); !dropped || reason != "of no interest" {
		t.Errorf("dropped %v, %q", dropped, reason)
	}
	for what, code := range map[string]string{"throw": "transform", "panic": "panic", "nothing": "transform", "large": "transform"} {
		var f *plugin.Failure
		if err := second(do(what, time.Minute)); !errors.As(err, &f) || f.Code != code || f.Source != plugin.SourcePlugin || f.WireState != plugin.NotSent {
			t.Errorf("%s: %#v, want code %s", what, err, code)
		}
	}
}

func second(_ *plugin.Transformed, err error) error { return err }

// TestTransformLoops: instances that compute for as long as they may hold up no other.
func TestTransformLoops(t *testing.T) {
	h := plugintest.New(t, puppet())
	loops := h.Configure(plugintest.Instance{Kind: "puppet", Config: transformConfig{"loop"}})
	other := h.Configure(plugintest.Instance{Kind: "puppet", Config: transformConfig{"it"}})
	known, done := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer done()
	if _, err := loops.Transform(known, plugin.Event{}); err == nil {
		t.Fatal("a loop has an end")
	}
	looping, stop := context.WithCancel(t.Context())
	defer stop()
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() { _, _ = loops.Transform(looping, plugin.Event{}) })
	}
	for i := range 100 {
		if made, err := other.Transform(looping, plugin.Event{Data: []byte(strconv.Itoa(i))}); err != nil || string(made.Body) != strconv.Itoa(i) {
			t.Fatalf("%d beside loops: %v", i, err)
		}
	}
	stop()
	all.Wait()
}

// TestLargeResults: what is ready together goes in as many messages as a host can read, errors and headers of any size too.
func TestLargeResults(t *testing.T) {
	const items = 64
	var made sync.WaitGroup
	made.Add(items)
	server, stop, err := plugin.NewGRPCServer("test", "1", plugin.Transformer("large", func(transformConfig, plugin.Target) (plugin.TransformFunc, error) {
		return func(_ context.Context, e *plugin.Event) (*plugin.Transformed, error) {
			defer made.Done()
			switch e.Type {
			case "throw":
				return nil, errors.New(strings.Repeat("ü", 8<<20))
			case "drop":
				return nil, plugin.Drop(strings.Repeat("x", 8<<20))
			case "headers":
				return &plugin.Transformed{Headers: []plugin.Header{{Name: "x-a", Value: strings.Repeat("x", 8<<20)}}}, nil
			}
			return &plugin.Transformed{Body: make([]byte, plugin.MaxTransformed)}, nil
		}, nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	listener := bufconn.Listen(1 << 20)
	go func() { _ = server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:///plugin", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := pluginv1.NewPluginServiceClient(conn).Configure(t.Context(), &pluginv1.ConfigureRequest{Instances: []*pluginv1.Instance{{Id: "a", Generation: 1, Ref: 1, Kind: "large", ConfigJson: []byte(`{"do":"it"}`)}}}); err != nil {
		t.Fatal(err)
	}
	stream, err := pluginv1.NewTransformerServiceClient(conn).Transform(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	req := &pluginv1.TransformRequest{}
	for _, kind := range []string{"body", "throw", "drop", "headers"} {
		req.Events = append(req.Events, &pluginv1.Event{Type: kind})
	}
	for i := range items {
		req.Items = append(req.Items, &pluginv1.TransformItem{Seq: uint64(i), InstanceRef: 1, Event: uint32(max(0, i-items+len(req.Events)))})
	}
	if err := stream.Send(req); err != nil {
		t.Fatal(err)
	}
	made.Wait() // nothing has been read
	for got := 0; got < items; {
		resp, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if size := proto.Size(resp); size > 2<<20 {
			t.Errorf("a message with %d results has %d bytes", len(resp.GetResults()), size)
		}
		got += len(resp.GetResults())
	}
}

// TestLongBuild: an instance that is long in the making holds up no other, of its kind or not.
func TestLongBuild(t *testing.T) {
	began, end := make(chan struct{}), make(chan struct{})
	h := plugintest.New(t, plugin.Transformer("builds", func(c transformConfig, _ plugin.Target) (plugin.TransformFunc, error) {
		if c.Do == "long" {
			close(began)
			<-end
		}
		return func(context.Context, *plugin.Event) (*plugin.Transformed, error) { return nil, plugin.Drop(c.Do) }, nil
	}))
	var long sync.WaitGroup
	long.Go(func() { h.Configure(plugintest.Instance{Kind: "builds", Config: transformConfig{"long"}}) })
	<-began
	other := h.Configure(plugintest.Instance{Kind: "builds", Config: transformConfig{"short"}})
	if reason, _ := plugin.DropReason(second(other.Transform(t.Context(), plugin.Event{}))); reason != "short" {
		t.Errorf("dropped for %q", reason)
	}
	close(end)
	long.Wait()
}
