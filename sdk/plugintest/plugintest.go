// Package plugintest runs plugin kinds inside a test, behind the very gRPC services that the host talks
// to, and hands back typed results.
//
//	h := plugintest.New(t, kinds...)
//	inst := h.Configure(plugintest.Instance{Kind: "acme-v2", Secrets: map[string][]string{"key": {"s3cret"}}})
//	got, err := inst.Sign(plugin.Request{MessageID: "msg_1", Created: when, Body: body})
package plugintest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// MaxResponseBody is what the harness keeps of a response unless the request says otherwise.
	MaxResponseBody = 4096
	// callTimeout bounds every call that has no context of its own.
	callTimeout = 30 * time.Second
	// attemptTimeout is the attempt's timeout when the context has no deadline.
	attemptTimeout = 15 * time.Second
)

// Harness serves kinds until the test ends. It is safe for concurrent use.
type Harness struct {
	t       testing.TB
	conn    *grpc.ClientConn
	plugin  pluginv1.PluginServiceClient
	stream  attempts
	signers signing
	kinds   map[string]*pluginv1.Kind
	refs    atomic.Uint32
}

// Instance is one configured use of a kind. Config is marshalled to JSON; nil means no settings. Of
// Target's Egress the allow list counts: a nil one opens public addresses only, as for a host without
// --egress-allow, so a test with a receiver on loopback sets
// plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}).
type Instance struct {
	Kind    string
	Config  any
	Secrets map[string][]string
	Target  plugin.Target
}

// Configured is an instance that the plugin has taken.
type Configured struct {
	h   *Harness
	ref uint32
}

// New serves the kinds for the length of the test. Instances that are left at its end are closed, and that is
// waited for.
func New(t testing.TB, kinds ...plugin.Kind) *Harness {
	t.Helper()
	server, stop, err := plugin.NewGRPCServer("plugintest", "0.0.0", kinds...)
	if err != nil {
		t.Fatalf("offer kinds: %v", err)
	}
	lis := bufconn.Listen(1 << 20)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:plugin",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(32<<20)))
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	h := &Harness{t: t, conn: conn, plugin: pluginv1.NewPluginServiceClient(conn), kinds: map[string]*pluginv1.Kind{}}
	h.stream.init(ctx, pluginv1.NewTransportServiceClient(conn))
	h.signers.init(ctx, pluginv1.NewSignerServiceClient(conn))
	t.Cleanup(func() {
		cancel()
		stop()
		_ = conn.Close()
		serving.Wait()
		h.stream.readers.Wait()
	})
	desc, err := h.plugin.Describe(ctx, &pluginv1.DescribeRequest{HostVersion: "plugintest", HostProtocolMinor: wire.ProtocolMinor})
	if err != nil {
		t.Fatalf("describe: %v", err)
	}
	for _, k := range desc.GetKinds() {
		h.kinds[k.GetId()] = k
	}
	return h
}

// Kind is what the plugin says about one of its kinds; nil when it offers none of that id.
func (h *Harness) Kind(id string) *pluginv1.Kind { return h.kinds[id] }

// Configure has the plugin take an instance, and fails the test when it does not.
func (h *Harness) Configure(in Instance) *Configured {
	h.t.Helper()
	c, problems := h.TryConfigure(in)
	if c == nil {
		h.t.Fatalf("configure %s: %v", in.Kind, problems)
	}
	return c
}

// TryConfigure has the plugin take an instance; it returns nil and what is wrong when it does not.
func (h *Harness) TryConfigure(in Instance) (*Configured, []plugin.Problem) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	msg := h.message(in)
	resp, err := h.plugin.Configure(ctx, &pluginv1.ConfigureRequest{
		Instances: []*pluginv1.Instance{msg}, Settings: settings(in.Target),
	})
	if err != nil {
		h.t.Fatalf("configure %s: %v", in.Kind, err)
	}
	if n := len(resp.GetStatuses()); n != 1 || resp.GetStatuses()[0].GetRef() != msg.GetRef() {
		h.t.Fatalf("configure %s: %d statuses for one instance", in.Kind, n)
	}
	problems := problemsOf(resp.GetStatuses()[0].GetDiagnostics())
	if slices.ContainsFunc(problems, func(p plugin.Problem) bool { return !p.Warning }) {
		return nil, problems
	}
	return &Configured{h: h, ref: msg.GetRef()}, problems
}

// Validate returns what the plugin says about an instance. Without secrets only the shape is checked.
func (h *Harness) Validate(in Instance) []plugin.Problem {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	resp, err := h.plugin.Validate(ctx, &pluginv1.ValidateRequest{Instance: h.message(in)})
	if err != nil {
		h.t.Fatalf("validate %s: %v", in.Kind, err)
	}
	return problemsOf(resp.GetDiagnostics())
}

// Remove has the plugin forget the instance. What build gave to Target.OnClose is called soon after, when no
// attempt is under way.
func (c *Configured) Remove() {
	c.h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := c.h.plugin.Remove(ctx, &pluginv1.RemoveRequest{Refs: []uint32{c.ref}}); err != nil {
		c.h.t.Fatalf("remove: %v", err)
	}
}

func (h *Harness) message(in Instance) *pluginv1.Instance {
	h.t.Helper()
	ref := h.refs.Add(1)
	msg := &pluginv1.Instance{
		Id: fmt.Sprintf("test/%d", ref), Generation: 1, Ref: ref, Kind: in.Kind, Tenant: "test",
		Secrets: map[string]*pluginv1.SecretVersions{}, MaxInFlight: uint32(cmp.Or(in.Target.MaxInFlight, 16)),
		Target: &pluginv1.Target{
			Method: cmp.Or(in.Target.Method, "POST"), Uri: in.Target.URL, Headers: wireHeaders(in.Target.Headers),
		},
	}
	if in.Config != nil {
		config, err := json.Marshal(in.Config)
		if err != nil {
			h.t.Fatalf("marshal config: %v", err)
		}
		msg.ConfigJson = config
	}
	for slot, values := range in.Secrets {
		versions := &pluginv1.SecretVersions{}
		for i, v := range values {
			versions.Versions = append(versions.Versions, &pluginv1.SecretVersion{
				Version: int32(len(values) - i), Value: []byte(v),
			})
			if i > 0 { // an older one in its overlap
				versions.Versions[i].ExpireTime = timestamppb.New(time.Now().Add(time.Hour))
			}
		}
		msg.Secrets[slot] = versions
	}
	return msg
}

func settings(t plugin.Target) *pluginv1.HostSettings {
	s := &pluginv1.HostSettings{UserAgent: cmp.Or(t.UserAgent, "grapnel/test")}
	for _, text := range strings.FieldsFunc(t.Egress.String(), func(r rune) bool { return r == ',' }) {
		if rule, deny := strings.CutPrefix(text, "!"); deny {
			s.EgressDeny = append(s.EgressDeny, rule)
		} else {
			s.EgressAllow = append(s.EgressAllow, text)
		}
	}
	return s
}

func problemsOf(diagnostics []*pluginv1.Diagnostic) []plugin.Problem {
	var out []plugin.Problem
	for _, d := range diagnostics {
		out = append(out, plugin.Problem{
			Pointer: d.GetPointer(), Code: d.GetCode(), Summary: d.GetSummary(),
			Warning: d.GetSeverity() == pluginv1.Diagnostic_SEVERITY_WARNING,
		})
	}
	return out
}

func wireHeaders(headers []plugin.Header) []*pluginv1.Header {
	out := make([]*pluginv1.Header, len(headers))
	for i, h := range headers {
		out[i] = &pluginv1.Header{Name: strings.ToLower(h.Name), Value: h.Value}
	}
	return out
}

func headersOf(headers []*pluginv1.Header) []plugin.Header {
	var out []plugin.Header
	for _, h := range headers {
		out = append(out, plugin.Header{Name: h.GetName(), Value: h.GetValue()})
	}
	return out
}

func failureOf(f *pluginv1.Failure, peer string) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.Source(f.GetSource()), Code: f.GetCode(), Message: f.GetMessage(),
		WireState: plugin.WireState(f.GetWireState()), Peer: peer,
	}
}
