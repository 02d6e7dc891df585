package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	receiver "github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/plugindir"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/replay"
	"github.com/grapnel/grapnel/server/subscription"
)

// newPlugins builds the host over the first-party process and what the plugin directory says.
func (s *Server) newPlugins(ctx context.Context) (*pluginhost.Host, error) {
	o := s.options
	specs := s.builtin()
	if o.PluginDir != "" {
		if _, err := os.Stat(o.PluginDir); err != nil {
			s.log.Warn("the plugin directory cannot be read; it is watched all the same", "err", err)
		}
		s.tellStrays()
		found, err := plugindir.Open(o.PluginDir).Specs()
		if err != nil {
			return nil, fmt.Errorf("read the plugin directory: %w", err)
		}
		specs = append(specs, found...)
	}
	return pluginhost.New(pluginhost.Options{
		Plugins: specs, Dir: filepath.Join(o.DataDir, "sockets"), EgressAllow: o.EgressAllow,
		EgressDeny: slices.Concat(ownListeners(s.public, s.admin), ownEtcd(ctx, o.EtcdEndpoints), o.EgressDeny), UserAgent: "grapnel/" + o.Version,
		Secrets: s.secretVersions, Tracer: s.tracer, Bodies: s.journal, MadeBytes: s.memory.window, Failed: s.tellPlugin, Logger: o.Logger, Registerer: s.metrics,
	})
}

// confinedYields is by how much the processes yield whose libraries read what strangers send: a third of the processors
// that are short is theirs.
const confinedYields = 5

// builtin are the processes of the bundled plugin.
func (s *Server) builtin() []pluginhost.Spec {
	command := s.options.BuiltinPlugin
	self, err := os.Executable()
	whole := pluginhost.Spec{
		Path: command[0], Args: command[1:], Builtin: true, Own: err == nil && self == command[0],
		SoftMemoryBytes: uint64(s.memory.plugin),
	}
	if len(s.options.BuiltinParts) == 0 {
		return []pluginhost.Spec{whole}
	}
	var specs []pluginhost.Spec
	for _, part := range s.options.BuiltinParts {
		spec := whole
		spec.Name, spec.Reserves = part.Name, part.Kinds
		spec.Args = append(slices.Clone(whole.Args), part.Name)
		spec.SoftMemoryBytes, spec.Limits = s.memory.ofPart(part.Confined)
		if part.Confined {
			spec.Yields = confinedYields
		}
		specs = append(specs, spec)
	}
	return specs
}

// tellStrays says which files in the plugin directory look like plugins and are none.
func (s *Server) tellStrays() {
	strays, err := plugindir.Open(s.options.PluginDir).Strays()
	if err == nil && len(strays) > 0 && !slices.Equal(strays, s.strays) {
		s.log.Warn("executables in the plugin directory do not run: it has a plugins.lock, which does not name them; `grapnel plugin install` puts them there",
			"dir", s.options.PluginDir, "files", strays)
	}
	s.strays = strays
}

// watchPlugins has the host follow the plugin directory until ctx ends.
func (s *Server) watchPlugins(ctx context.Context) error {
	if s.options.PluginDir == "" {
		return nil
	}
	plugindir.Open(s.options.PluginDir).Watch(ctx, time.Second, func(found []pluginhost.Spec) {
		s.plugins.Update(append(s.builtin(), found...))
		s.tellStrays()
	}, func(err error) { s.log.Error("read the plugin directory", "err", err) })
	return nil
}

func (s *Server) secretVersions(name string) ([]pluginhost.SecretVersion, bool) {
	versions, ok := s.secrets.Versions(name)
	if !ok {
		return nil, false
	}
	out := make([]pluginhost.SecretVersion, len(versions))
	for i, v := range versions {
		out[i] = pluginhost.SecretVersion{Number: v.Number, Value: v.Value, Expire: v.ExpireTime}
	}
	return out, true
}

// disable is what dispatch asks for when a receiver is gone or has failed for too long.
func (s *Server) disable(ctx context.Context, sub *subscription.Subscription, reason string) error {
	_, err := s.registry.SetState(ctx, sub.Namespace, sub.ID, sub.UID, grapnelv1.Subscription_STATE_DISABLED, reason)
	return err
}

// subscriptions is the registry as dispatch sees it: a deleted namespace has none, so that nothing is sent
// for it although its subscriptions are kept until it is erased.
type subscriptions struct{ *subscription.Registry }

func (r subscriptions) Subscription(lane delivery.LaneKey) *subscription.Subscription {
	snapshot := r.Snapshot()
	if n := snapshot.NamespaceByKey(uint64(lane.Namespace)); n == nil || n.Deleted() {
		return nil
	}
	return snapshot.SubscriptionByKey(uint64(lane.Subscription))
}

// DeadLetter is the subscription that is named, unless it is gone or disabled: then what ends stays where it is.
func (r subscriptions) DeadLetter(sub *subscription.Subscription) *delivery.DeadLetter {
	name := sub.DeadLetter
	if name == "" {
		return nil
	}
	to := r.Snapshot().Subscription(sub.Namespace, name[strings.LastIndexByte(name, '/')+1:])
	if to == nil || to.UID == sub.UID || to.NamespaceUID != sub.NamespaceUID || to.State == grapnelv1.Subscription_STATE_DISABLED {
		return nil
	}
	return &delivery.DeadLetter{From: sub.ID, To: delivery.Target{
		Subscription: to.ID, UID: to.UID, MaxAttempts: to.MaxAttempts, MaxAge: to.MaxAge, Ordered: to.Ordered,
	}}
}

// Deleted goes by what was seen: a tombstone of the subscription or of its namespace, or a namespace that says so
// itself.
func (r subscriptions) Deleted(lane delivery.LaneKey) bool {
	snapshot := r.Snapshot()
	if _, gone := snapshot.Deleted(uint64(lane.Subscription)); gone {
		return true
	}
	if _, gone := snapshot.Deleted(uint64(lane.Namespace)); gone {
		return true
	}
	n := snapshot.NamespaceByKey(uint64(lane.Namespace))
	return n != nil && n.Deleted()
}

// EndReason tells a namespace's deletion from a subscription's, which may come back with UndeleteNamespace.
func (r subscriptions) EndReason(lane delivery.LaneKey) string {
	if _, gone := r.Snapshot().Deleted(uint64(lane.Subscription)); gone {
		return api.SubscriptionDeleted
	}
	return api.NamespaceDeleted
}

// Weight of a namespace that is not there is that of one which does not say.
func (r subscriptions) Weight(ns delivery.NamespaceKey) int {
	return r.Snapshot().NamespaceByKey(uint64(ns)).Weight()
}

// Closed goes from the widest to the narrowest.
func (r subscriptions) Closed(lane delivery.LaneKey) string {
	snapshot := r.Snapshot()
	if snapshot.Dispatch().Paused {
		return "all dispatch is paused"
	}
	if n := snapshot.NamespaceByKey(uint64(lane.Namespace)); n != nil {
		switch n.State {
		case grapnelv1.Namespace_STATE_PAUSED:
			return "its namespace is paused"
		case grapnelv1.Namespace_STATE_DISABLED:
			return "its namespace is disabled"
		}
	}
	return ""
}

// plugins is the host as the API sees it.
type plugins struct{ *pluginhost.Host }

func (p plugins) Check(ctx context.Context, sub *grapnelv1.Subscription) ([]api.Diagnostic, error) {
	ds, err := p.Host.Check(ctx, sub)
	return diagnostics(ds, err)
}

func (p plugins) CheckConfig(ctx context.Context, id string, config []byte) ([]api.Diagnostic, error) {
	ds, err := p.Host.CheckConfig(ctx, id, config)
	return diagnostics(ds, err)
}

func (p plugins) PrepareSecret(ctx context.Context, id, slot string, value []byte, algorithm string) (api.Prepared, []api.Diagnostic, error) {
	made, ds, err := p.Host.PrepareSecret(ctx, id, slot, value, algorithm)
	out, err := diagnostics(ds, err)
	return api.Prepared(made), out, err
}

func (p plugins) CheckOwnership(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error) {
	attempt, err := p.Host.CheckOwnership(ctx, sub)
	_, err = diagnostics(nil, err)
	return attempt, err
}

// diagnostics puts the host's complaints and errors into the words of the API.
func diagnostics(ds []pluginhost.Diagnostic, err error) ([]api.Diagnostic, error) {
	switch {
	case errors.Is(err, pluginhost.ErrUnavailable):
		err = fmt.Errorf("%w: %w", api.ErrPluginUnavailable, err)
	case errors.Is(err, pluginhost.ErrUnknownPlugin):
		err = fmt.Errorf("%w: %w", api.ErrUnknownPlugin, err)
	}
	out := make([]api.Diagnostic, len(ds))
	for i, d := range ds {
		out[i] = api.Diagnostic(d)
	}
	return out, err
}

// replays is their runner as the API sees it.
type replays struct{ *replay.Runner }

func (r replays) Create(ctx context.Context, job *delivery.Replay) (*delivery.Replay, error) {
	made, err := r.Runner.Create(ctx, job)
	if errors.Is(err, replay.ErrStopped) {
		err = fmt.Errorf("%w: %w", api.ErrStopping, err)
	}
	return made, err
}

// selectDeliveries reads the filter of a replay as the API does.
func (s *Server) selectDeliveries(ns string, spec *delivery.ReplaySpec) (*replay.Selection, error) {
	found, err := api.SelectDeliveries(s.registry, ns, spec)
	if err != nil {
		return nil, err
	}
	q := &found.Query
	return &replay.Selection{None: found.None, States: q.States, Subscription: q.Subscription, Since: q.Since, Until: q.Until, Match: found.Match}, nil
}

// selectErased reads what an erasure selects as the API does.
func (s *Server) selectErased(spec *delivery.ReplaySpec) (delivery.Selects, error) {
	return api.SelectErased(s.registry, spec)
}

// engine is dispatch as the API sees it.
type engine struct {
	*dispatch.Engine
	registry *subscription.Registry
}

// space is what dispatch knows a namespace by; 0, which is all of them, for "". It reports false for one that does not
// exist.
func (e engine) space(ns string) (delivery.NamespaceKey, bool) {
	if ns == "" {
		return 0, true
	}
	n := e.registry.Snapshot().Namespace(ns)
	if n == nil {
		return 0, false
	}
	return delivery.UID(n.UID).NamespaceKey(), true
}

func (e engine) Stats(ns string, window time.Duration, top int) (*grapnelv1.Stats, []*grapnelv1.Stats) {
	space, ok := e.space(ns)
	if !ok {
		return &grapnelv1.Stats{}, nil
	}
	total, rows := e.Engine.Stats(space, window, top)
	snapshot := e.registry.Snapshot()
	var per []*grapnelv1.Stats
	for _, r := range rows {
		// Those of deleted subscriptions count in the total.
		if sub := snapshot.SubscriptionByKey(uint64(r.Lane.Subscription)); sub != nil {
			row := stats(r)
			row.Subscription = sub.Name()
			per = append(per, row)
		}
	}
	return stats(total), per
}

func (e engine) Status(lane delivery.LaneKey) *grapnelv1.SubscriptionStatus {
	s := e.Engine.Status(lane)
	out := &grapnelv1.SubscriptionStatus{
		Open: s.Open, WaitReason: s.Reason, WaitUntil: stamp(s.Until), FailingSince: stamp(s.FailingSince),
		LastSuccessTime: stamp(s.LastSuccess), Slow: s.Slow,
		InFlightLimit: int32(s.Limit), LimitReason: s.LimitReason, //nolint:gosec // at most 1000
		Breaker: grapnelv1.SubscriptionStatus_BREAKER_CLOSED, BreakerSince: stamp(s.BreakerSince), NextProbeTime: stamp(s.NextProbe),
		DisableTime:   stamp(s.Disable),
		HostDownSince: stamp(s.HostDown), HostProbeTime: stamp(s.HostProbe),
		InFlight: int32(min(s.InFlight, math.MaxInt32)), OldestDueAge: durationpb.New(s.OldestDue), //nolint:gosec // bounded by the line itself
	}
	switch s.Breaker {
	case receiver.BreakerOpen:
		out.Breaker = grapnelv1.SubscriptionStatus_BREAKER_OPEN
	case receiver.BreakerHalfOpen:
		out.Breaker = grapnelv1.SubscriptionStatus_BREAKER_HALF_OPEN
	}
	if s.Latency > 0 {
		out.Latency = durationpb.New(s.Latency)
	}
	return out
}

// stamp is t for the wire; nil for the zero time.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func (e engine) OldestDue(ns string) time.Duration {
	space, ok := e.space(ns)
	if !ok {
		return 0
	}
	return e.Engine.OldestDue(space)
}

func (e engine) Test(ctx context.Context, sub *subscription.Subscription, event *delivery.Event) (delivery.Result, error) {
	r, err := e.Engine.Test(ctx, sub, event)
	switch {
	case errors.Is(err, dispatch.ErrTestLimit):
		err = fmt.Errorf("%w: %w", api.ErrTestLimited, err)
	case errors.Is(err, dispatch.ErrStopped):
		err = fmt.Errorf("%w: %w", api.ErrStopping, err)
	case errors.Is(err, dispatch.ErrUnspent):
		err = fmt.Errorf("%w: %w", api.ErrPluginUnavailable, err)
	}
	return r, err
}

func (e engine) Running() int {
	return e.Engine.InFlightNow()
}

func stats(s dispatch.Stats) *grapnelv1.Stats {
	return &grapnelv1.Stats{
		Attempts: s.Attempts, FailedAttempts: s.FailedAttempts,
		Succeeded: s.Succeeded, Failed: s.Failed, Open: s.Open,
		P50Latency: durationpb.New(s.P50), P99Latency: durationpb.New(s.P99), OldestDueAge: durationpb.New(s.OldestDue),
		OpenBreakers: s.Breakers, HostsDown: s.HostsDown,
	}
}
