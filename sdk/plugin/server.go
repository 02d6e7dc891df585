package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/internal/redact"
	"github.com/grapnel/grapnel/internal/wire"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// window is how many attempts the plugin takes at once: as many as the host has slots, so that attempts that hang
	// leave room for others.
	window = 4096
	// batchMax is the most results in one message.
	batchMax = 64
	// longBuild is how long a transformer in the making keeps others from being made.
	longBuild = 500 * time.Millisecond
	// receiveMax is far above the host's batches, so that one large body still passes.
	receiveMax = 32 << 20
)

// server is the plugin's side of the protocol. It knows nothing of processes: Serve adds that.
type server struct {
	pluginv1.UnimplementedPluginServiceServer
	pluginv1.UnimplementedSignerServiceServer
	pluginv1.UnimplementedTransportServiceServer
	pluginv1.UnimplementedTransformerServiceServer

	name      string
	version   string
	kinds     map[string]*Kind
	describe  *pluginv1.DescribeResponse
	logs      *logSink
	inFlight  atomic.Int64
	overruns  atomic.Int64  // attempts that were given up and go on all the same
	draining  chan struct{} // closed when Control says drain
	drainOnce sync.Once
	// hostSeen and hostGone are closed when Control starts and ends.
	hostSeen     chan struct{}
	hostSeenOnce sync.Once
	hostGone     chan struct{}
	hostGoneOnce sync.Once
	// stopBy is when the process has to be gone, once its host is.
	stopBy atomic.Pointer[time.Time]
	// described runs at the first Describe.
	described     func()
	describedOnce sync.Once

	mu       sync.Mutex // guards what follows, and changes of instances
	egress   *Egress
	agent    string
	newestOf map[string]generation // by instance id

	instances instances
	lives     *lives
	turns     turns
	// long is for transformations that take long, making for transformers in the making.
	long, making *gate.Gate
}

// generation is the newest of an instance id, and how many of its refs are held.
type generation struct {
	number uint64
	refs   int
}

// instance is one configured (id, generation).
type instance struct {
	id      string
	tenant  string
	built   built
	target  Target
	secrets [][]byte
	life    *life
	effort  effort // of a signer
	strain  strain // of a transformer
	// labels mark the goroutines that work for it.
	labels context.Context //nolint:containedctx // pprof keeps labels in one
	// overruns are attempts that were given up and go on all the same.
	overruns atomic.Int32
}

func newServer(name, version string, kinds []Kind) (*server, error) {
	s := &server{
		name: name, version: version, kinds: map[string]*Kind{}, newestOf: map[string]generation{},
		logs: newLogSink(), egress: NewEgress(nil),
		draining: make(chan struct{}), hostSeen: make(chan struct{}), hostGone: make(chan struct{}),
		described: func() {}, turns: newTurns(), long: gate.New(), making: gate.New(),
	}
	s.lives = newLives(func(stack []byte) { s.log().Error("panic in close", "stack", string(stack)) })
	s.describe = &pluginv1.DescribeResponse{Name: name, Version: version, ProtocolMinor: wire.ProtocolMinor}
	var errs []error
	roles := map[role]bool{}
	for _, k := range kinds {
		if k.err != nil {
			errs = append(errs, k.err)
			continue
		}
		if s.kinds[k.id] != nil {
			errs = append(errs, fmt.Errorf("kind %q is offered twice", k.id))
			continue
		}
		s.kinds[k.id] = &k
		described, err := k.describe()
		errs = append(errs, err)
		s.describe.Kinds = append(s.describe.Kinds, described)
		roles[k.role] = true
	}
	if len(kinds) == 0 {
		errs = append(errs, errors.New("a plugin offers at least one kind"))
	}
	if roles[transportRole] {
		s.describe.Capabilities = append(s.describe.Capabilities, "attempt.stream", "attempt.unary")
	}
	if slices.ContainsFunc(s.describe.Kinds, hasFormats) {
		s.describe.Capabilities = append(s.describe.Capabilities, "secret.prepare")
	}
	if roles[signerRole] {
		s.describe.Capabilities = append(s.describe.Capabilities, "sign.stream")
	}
	if roles[transformerRole] {
		s.describe.Capabilities = append(s.describe.Capabilities, "transform.stream")
	}
	return s, errors.Join(errs...)
}

// NewGRPCServer is a server for the kinds without a process around it, for test harnesses: it serves
// whoever connects, and outlives them. stop ends it with all that is under way, and closes its instances.
func NewGRPCServer(name, version string, kinds ...Kind) (server *grpc.Server, stop func(), err error) {
	s, err := newServer(name, version, kinds)
	if err != nil {
		return nil, nil, err
	}
	server = s.grpc(nil)
	return server, func() {
		server.Stop()
		ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
		defer cancel()
		s.closeAll(ctx)
	}, nil
}

// closeAll ends all instances, and waits for that as long as ctx lasts.
func (s *server) closeAll(ctx context.Context) {
	s.mu.Lock()
	s.instances.each(func(inst *instance) { inst.life.retire() })
	s.mu.Unlock()
	s.lives.end(ctx)
}

func (s *server) grpc(opts []grpc.ServerOption) *grpc.Server {
	g := grpc.NewServer(append(opts,
		grpc.MaxRecvMsgSize(receiveMax),
		grpc.ForceServerCodecV2(wire.NewCodec()),
		grpc.ChainUnaryInterceptor(s.recoverUnary),
		grpc.ChainStreamInterceptor(s.recoverStream),
	)...)
	pluginv1.RegisterPluginServiceServer(g, s)
	pluginv1.RegisterSignerServiceServer(g, s)
	pluginv1.RegisterTransportServiceServer(g, s)
	pluginv1.RegisterTransformerServiceServer(g, s)
	return g
}

func (s *server) recoverUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
	defer s.recovered(info.FullMethod, &err)
	return next(ctx, req)
}

func (s *server) recoverStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	defer s.recovered(info.FullMethod, &err)
	return next(srv, stream)
}

func (s *server) recovered(method string, err *error) {
	if p := recover(); p != nil {
		s.log().Error("panic in call", "method", method, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "panic in %s", method)
	}
}

func (s *server) log() *slog.Logger { return slog.New(s.logs) }

// Describe tells what the plugin offers.
func (s *server) Describe(context.Context, *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	s.describedOnce.Do(func() { s.described() })
	return s.describe, nil
}

// Validate builds the instance and throws it away; without the secrets it needs, only its shape is
// checked.
func (s *server) Validate(ctx context.Context, req *pluginv1.ValidateRequest) (*pluginv1.ValidateResponse, error) {
	s.mu.Lock()
	egress, agent := s.egress, s.agent
	s.mu.Unlock()
	inst, diagnostics, err := s.buildInTurn(ctx, req.GetInstance(), egress, agent, true)
	if err != nil {
		return nil, err
	}
	out := &pluginv1.ValidateResponse{Diagnostics: diagnostics}
	if inst != nil {
		out.EmitsHeaders = inst.built.emits
		inst.life.retire()
	}
	return out, nil
}

// Configure takes instances one by one; a bad one does not keep the others out, and one that is long in the making does not
// hold up those of other calls.
func (s *server) Configure(ctx context.Context, req *pluginv1.ConfigureRequest) (*pluginv1.ConfigureResponse, error) {
	egress, agent, err := s.settings(req.GetSettings())
	if err != nil {
		return nil, err
	}
	out := &pluginv1.ConfigureResponse{}
	for _, in := range req.GetInstances() {
		st := &pluginv1.InstanceStatus{Ref: in.GetRef()}
		out.Statuses = append(out.Statuses, st)
		if st.Diagnostics = s.unwanted(in); st.Diagnostics != nil {
			continue
		}
		inst, diagnostics, err := s.buildInTurn(ctx, in, egress, agent, false)
		if err != nil {
			return nil, err
		}
		if st.Diagnostics = diagnostics; inst != nil {
			if unwanted := s.install(in, inst); unwanted != nil {
				st.Diagnostics = unwanted
			}
		}
	}
	return out, nil
}

// settings takes what the host says holds for all instances, where it says something, and returns what does.
func (s *server) settings(set *pluginv1.HostSettings) (*Egress, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set != nil {
		allow := make([]netip.Prefix, 0, len(set.GetEgressAllow()))
		for _, text := range set.GetEgressAllow() {
			p, err := netip.ParsePrefix(text)
			if err != nil {
				return nil, "", status.Errorf(codes.InvalidArgument, "settings.egress_allow: %v", err)
			}
			allow = append(allow, p)
		}
		deny := make([]EgressRule, 0, len(set.GetEgressDeny()))
		for _, text := range set.GetEgressDeny() {
			r, err := ParseEgressRule(text)
			if err != nil {
				return nil, "", status.Errorf(codes.InvalidArgument, "settings.egress_deny: %v", err)
			}
			deny = append(deny, r)
		}
		s.egress, s.agent = NewEgress(allow).Deny(deny...), set.GetUserAgent()
	}
	return s.egress, s.agent, nil
}

// unwanted says why an instance is not taken, whatever it is; nil when it is.
func (s *server) unwanted(in *pluginv1.Instance) []*pluginv1.Diagnostic {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refused(in)
}

// refused is unwanted, under the lock.
func (s *server) refused(in *pluginv1.Instance) []*pluginv1.Diagnostic {
	switch newest := s.newestOf[in.GetId()]; {
	case in.GetGeneration() < newest.number:
		return []*pluginv1.Diagnostic{refusal("config.stale", fmt.Sprintf("generation %d is older than %d", in.GetGeneration(), newest.number))}
	case in.GetRef() >= maxRef:
		return []*pluginv1.Diagnostic{refusal("config.ref", fmt.Sprintf("ref %d is not below %d", in.GetRef(), maxRef))}
	}
	return nil
}

// install has attempts find an instance, unless a newer one has come while it was made.
func (s *server) install(in *pluginv1.Instance, inst *instance) []*pluginv1.Diagnostic {
	s.mu.Lock()
	defer s.mu.Unlock()
	if unwanted := s.refused(in); unwanted != nil {
		inst.life.retire()
		return unwanted
	}
	newest := s.newestOf[in.GetId()]
	if before := s.instances.put(in.GetRef(), inst); before != nil {
		before.life.retire()
	} else {
		newest.refs++
	}
	s.newestOf[in.GetId()] = generation{number: in.GetGeneration(), refs: newest.refs}
	return nil
}

// Remove forgets instances. Attempts at work keep theirs, and the last of them closes it.
func (s *server) Remove(_ context.Context, req *pluginv1.RemoveRequest) (*pluginv1.RemoveResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ref := range req.GetRefs() {
		inst := s.instances.remove(ref)
		if inst == nil {
			continue
		}
		inst.life.retire()
		g := s.newestOf[inst.id]
		if g.refs--; g.refs > 0 {
			s.newestOf[inst.id] = g
		} else {
			delete(s.newestOf, inst.id)
		}
	}
	return &pluginv1.RemoveResponse{}, nil
}

func refusal(code, summary string) *pluginv1.Diagnostic {
	return &pluginv1.Diagnostic{Severity: pluginv1.Diagnostic_SEVERITY_ERROR, Code: code, Summary: summary}
}

// buildInTurn is build. What makes an instance of what a tenant has written may take long, and its turn comes as that of
// transformations that do; the error says that it did not.
func (s *server) buildInTurn(ctx context.Context, in *pluginv1.Instance, egress *Egress, agent string, validate bool) (inst *instance, diagnostics []*pluginv1.Diagnostic, err error) {
	if k := s.kinds[in.GetKind()]; k != nil && k.role == transformerRole {
		leave, entered := s.making.Enter(ctx.Done(), longBuild, in.GetTenant())
		if !entered {
			return nil, nil, status.FromContextError(ctx.Err()).Err()
		}
		defer leave()
	}
	if inst, diagnostics = s.build(in, egress, agent, validate); inst != nil && ctx.Err() != nil { // nobody would remove it
		inst.life.retire()
		return nil, nil, status.FromContextError(ctx.Err()).Err()
	}
	return inst, diagnostics, nil
}

// build makes an instance, or nil when a diagnostic is an error.
func (s *server) build(in *pluginv1.Instance, egress *Egress, agent string, validate bool) (inst *instance, diagnostics []*pluginv1.Diagnostic) {
	k := s.kinds[in.GetKind()]
	if k == nil {
		return nil, []*pluginv1.Diagnostic{refusal("config.unknown_kind", fmt.Sprintf("%s offers no kind %q", s.name, in.GetKind()))}
	}
	sp := specOf(in, egress, agent)
	life := s.lives.begin()
	sp.target.life = life
	defer func() {
		if inst == nil {
			life.retire()
		}
	}()
	var values [][]byte
	for _, v := range sp.secrets {
		values = append(values, v...)
	}
	for _, sl := range k.slots {
		sp.shapeOnly = sp.shapeOnly || validate && sl.required && len(sp.secrets[sl.name]) == 0
	}
	defer func() {
		if p := recover(); p != nil {
			s.log().Error("panic in build", "kind", k.id, "panic", redact.Text(fmt.Sprint(p), values), "stack", string(debug.Stack()))
			inst, diagnostics = nil, []*pluginv1.Diagnostic{refusal(CodePanic, "the plugin panicked on this config")}
		}
	}()
	labels := pprof.WithLabels(context.Background(), pprof.Labels(InstanceLabel, in.GetId()))
	pprof.SetGoroutineLabels(labels)
	defer pprof.SetGoroutineLabels(context.Background())
	b, problems := k.assemble(sp)
	for _, p := range problems {
		diagnostics = append(diagnostics, p.wire(values))
	}
	if hasErrors(problems) {
		return nil, diagnostics
	}
	return &instance{id: in.GetId(), tenant: in.GetTenant(), built: b, target: sp.target, secrets: values, labels: labels, life: life}, diagnostics
}

func (p Problem) wire(secrets [][]byte) *pluginv1.Diagnostic {
	d := &pluginv1.Diagnostic{
		Severity: pluginv1.Diagnostic_SEVERITY_ERROR, Code: p.Code,
		Summary: redact.Text(p.Summary, secrets), Pointer: p.Pointer,
	}
	if p.Warning {
		d.Severity = pluginv1.Diagnostic_SEVERITY_WARNING
	}
	if d.Code == "" {
		d.Code = "config.invalid"
	}
	return d
}

func specOf(in *pluginv1.Instance, egress *Egress, agent string) spec {
	sp := spec{config: in.GetConfigJson(), secrets: map[string][][]byte{}}
	now := time.Now()
	for name, versions := range in.GetSecrets() {
		var values [][]byte
		for _, v := range versions.GetVersions() {
			if v.GetExpireTime() == nil || v.GetExpireTime().AsTime().After(now) {
				values = append(values, slices.Clone(v.GetValue()))
			}
		}
		sp.secrets[name] = values
	}
	sp.target = Target{
		Method: in.GetTarget().GetMethod(), URL: in.GetTarget().GetUri(),
		MaxInFlight: int(in.GetMaxInFlight()), Egress: egress, UserAgent: agent,
	}
	for _, h := range in.GetTarget().GetHeaders() {
		sp.target.Headers = append(sp.target.Headers, Header{Name: lower(h.GetName()), Value: h.GetValue()})
	}
	return sp
}

// Control lives as long as the host is there.
func (s *server) Control(stream grpc.BidiStreamingServer[pluginv1.ControlRequest, pluginv1.ControlResponse]) error {
	s.hostSeenOnce.Do(func() { close(s.hostSeen) })
	defer s.hostGoneOnce.Do(func() { close(s.hostGone) })
	beats := make(chan uint64, 16)
	ctx, cancel := context.WithCancel(stream.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.controlSender(ctx, stream, beats) })
	defer wg.Wait()
	defer cancel()
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch f := req.GetFrame().(type) {
		case *pluginv1.ControlRequest_Heartbeat:
			select {
			case beats <- f.Heartbeat.GetNumber():
			default: // the host asks faster than it reads; the next one answers
			}
		case *pluginv1.ControlRequest_Drain:
			s.drainOnce.Do(func() { close(s.draining) })
		case *pluginv1.ControlRequest_SetLogLevel:
			s.logs.setLevel(f.SetLogLevel.GetLevel())
		}
	}
}

func (s *server) isDraining() bool {
	select {
	case <-s.draining:
		return true
	default:
		return false
	}
}

func (s *server) controlSender(ctx context.Context, stream grpc.BidiStreamingServer[pluginv1.ControlRequest, pluginv1.ControlResponse], beats <-chan uint64) {
	s.logs.attach()
	defer s.logs.detach()
	for {
		out := &pluginv1.ControlResponse{}
		select {
		case <-ctx.Done():
			return
		case n := <-beats:
			out.Frame = &pluginv1.ControlResponse_Heartbeat{Heartbeat: &pluginv1.Heartbeat{
				Number: n, InFlight: uint32(max(0, s.inFlight.Load())),
			}}
		case first := <-s.logs.records:
			out.Frame = &pluginv1.ControlResponse_Logs{Logs: s.logs.batch(first)}
		}
		if err := stream.Send(out); err != nil {
			return
		}
	}
}
