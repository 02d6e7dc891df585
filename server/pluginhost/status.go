package pluginhost

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/pluginhost/check"
)

// Plugins are all kinds that any plugin offers, in the order of their names, and how their processes
// fare. A process that never came up is listed by its name or that of its file.
func (h *Host) Plugins() []*grapnelv1.Plugin {
	all := h.kinds.all()
	procs := h.byKey()
	var out []*grapnelv1.Plugin
	for _, id := range slices.Sorted(maps.Keys(all)) {
		out = append(out, h.statusOf(all[id], procs[all[id].proc.key]))
	}
	described := map[string]bool{}
	for _, k := range all {
		described[k.proc.key] = true
	}
	for _, key := range slices.Sorted(maps.Keys(procs)) {
		if !described[key] && procs[key][0].place != departing {
			out = append(out, bare(procs[key]))
		}
	}
	for _, k := range h.kinds.off() {
		out = append(out, k.status())
	}
	slices.SortStableFunc(out, func(a, b *grapnelv1.Plugin) int { return cmp.Compare(a.GetName(), b.GetName()) })
	return out
}

// Plugin is one kind by its id.
func (h *Host) Plugin(id string) (*grapnelv1.Plugin, bool) {
	procs := h.byKey()
	if k := h.kinds.get(id); k != nil {
		return h.statusOf(k, procs[k.proc.key]), true
	}
	if k, ok := h.kinds.off()[id]; ok {
		return k.status(), true
	}
	for _, key := range slices.Sorted(maps.Keys(procs)) {
		if p := bare(procs[key]); p.GetName() == "plugins/"+id {
			return p, true
		}
	}
	return nil, false
}

// Silence is a plugin whose process runs and does not answer.
type Silence struct {
	Name    string
	Builtin bool
}

// silentAfter is how many heartbeats without an answer make a silence: one may just be on its way.
const silentAfter = 2

// Silent are the plugins that have left heartbeats unanswered and are not given up yet.
func (h *Host) Silent() []Silence {
	var out []Silence
	for _, p := range h.processes() {
		if c := p.conn.Load(); c != nil && c.unanswered.Load() >= silentAfter {
			out = append(out, Silence{Name: p.displayName(), Builtin: p.spec.Builtin})
		}
	}
	return out
}

// Short are the plugins that have found this machine short of descriptors, sockets or memory, by their names, with how many
// attempts each makes at a time because of that.
func (h *Host) Short() map[string]int {
	out := map[string]int{}
	now := time.Now()
	for _, p := range h.processes() {
		if c := p.conn.Load(); c != nil {
			if most := c.attempts.narrowed(now); most > 0 {
				out[p.displayName()] = most
			}
		}
	}
	return out
}

// Down are the builtin plugins whose processes do not serve, by their Spec's name.
func (h *Host) Down() []string {
	var out []string
	for _, p := range h.processes() {
		if p.spec.Builtin && !p.serves() {
			out = append(out, p.spec.Name)
		}
	}
	return out
}

// byKey groups the processes by plugin: the one that has the place first, then one that is to take it, then those
// that leave.
func (h *Host) byKey() map[string][]*supervisor {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := map[string][]*supervisor{}
	for _, in := range []place{holding, succeeding, departing} {
		for _, p := range h.procs {
			if p.place == in {
				out[p.key] = append(out[p.key], p)
			}
		}
	}
	return out
}

// statusOf describes the kind and the processes of its plugin.
func (h *Host) statusOf(k *kind, procs []*supervisor) *grapnelv1.Plugin {
	if len(procs) == 0 { // removed this moment
		procs = []*supervisor{k.proc}
	}
	out := bare(procs)
	describe(out, k.Kind)
	out.UriSchemes = h.kinds.schemes(k)
	return out
}

// status of a kind that a disabled plugin would offer.
func (k disabledKind) status() *grapnelv1.Plugin {
	out := &grapnelv1.Plugin{
		Provider: k.of.Name, Version: k.of.Manifest.GetVersion(), Health: grapnelv1.Plugin_HEALTH_DISABLED,
	}
	describe(out, k.Kind)
	return out
}

// describe adds what a kind's description says.
func describe(out *grapnelv1.Plugin, k *check.Kind) {
	out.Name, out.Description = "plugins/"+k.ID, k.Proto.GetDescription()
	role := grapnelv1.Plugin_ROLE_TRANSPORT
	switch k.Role() {
	case "signer":
		role = grapnelv1.Plugin_ROLE_SIGNER
	case "transformer":
		role = grapnelv1.Plugin_ROLE_TRANSFORMER
	}
	out.Roles = []grapnelv1.Plugin_Role{role}
	out.Headers = k.Emits()
	out.ConfigSchema = structOf(k.Proto.GetConfigSchema())
	out.ConfigExample = structOf(k.Proto.GetConfigExample())
	for _, s := range k.Proto.GetSecretSlots() {
		out.SecretSlots = append(out.SecretSlots, &grapnelv1.SecretSlot{
			Slot: s.GetName(), Description: s.GetDescription(), Required: s.GetRequired(), Kinds: s.GetKinds(),
			Algorithms: s.GetAlgorithms(), Format: s.GetFormat(),
		})
	}
}

// bare is what there is to say of a plugin's processes, whatever they offer. The first speaks for the plugin.
func bare(procs []*supervisor) *grapnelv1.Plugin {
	now := time.Now()
	out := &grapnelv1.Plugin{}
	for i, p := range procs {
		inst := p.instance(now)
		if i == 0 {
			p.mu.Lock()
			out.Name, out.Provider = "plugins/"+p.name, p.name
			out.Builtin, out.Version, out.ProtocolVersion, out.Health = p.spec.Builtin, p.version, p.protocol, inst.GetHealth()
			p.mu.Unlock()
		}
		out.Instances = append(out.Instances, inst)
	}
	return out
}

func (p *supervisor) instance(now time.Time) *grapnelv1.PluginInstance {
	p.mu.Lock()
	defer p.mu.Unlock()
	inst := &grapnelv1.PluginInstance{
		Checksum: p.image.SHA256, RestartCount: int32(p.restarts), LastError: p.lastErr, Health: p.health(now),
		Version: p.version, LastOutput: slices.Clone(p.last),
	}
	if p.refusal != nil {
		inst.LastError = p.refusal.Error()
	}
	if !p.started.IsZero() {
		inst.StartTime = timestamppb.New(p.started)
	}
	if !p.crashed.IsZero() {
		inst.LastCrashTime = timestamppb.New(p.crashed)
	}
	c := p.conn.Load()
	if c == nil {
		c = p.leaving.Load()
	}
	if c == nil {
		return inst
	}
	inst.Pid = int32(c.child.Pid())
	inst.InFlight = int32(c.attempts.outstanding() + c.signs.outstanding() + c.transforms.outstanding())
	if p50, p99 := c.overhead.quantile(0.5, now), c.overhead.quantile(0.99, now); p99 > 0 {
		inst.P50Latency, inst.P99Latency = durationpb.New(p50), durationpb.New(p99)
	}
	return inst
}

// health is called under the lock.
func (p *supervisor) health(now time.Time) grapnelv1.Plugin_Health {
	shaky := len(p.recent(now)) > 0 || p.refusal != nil
	switch {
	case p.state == serving && shaky:
		return grapnelv1.Plugin_HEALTH_DEGRADED
	case p.state == serving:
		return grapnelv1.Plugin_HEALTH_SERVING
	case p.state == starting && !shaky:
		return grapnelv1.Plugin_HEALTH_UNSPECIFIED
	default:
		return grapnelv1.Plugin_HEALTH_NOT_SERVING
	}
}

// structOf is nil for what is not a JSON object.
func structOf(text string) *structpb.Struct {
	if text == "" {
		return nil
	}
	s := &structpb.Struct{}
	if protojson.Unmarshal([]byte(text), s) != nil {
		return nil
	}
	return s
}
