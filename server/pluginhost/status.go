package pluginhost

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Plugins are all kinds that any plugin offers, in the order of their names, and how their processes
// fare. A process that never came up is listed by the name of its file.
func (h *Host) Plugins() []*grapnelv1.Plugin {
	all := h.kinds.all()
	var out []*grapnelv1.Plugin
	described := map[*process]bool{}
	for _, id := range slices.Sorted(maps.Keys(all)) {
		out = append(out, h.status(all[id]))
		described[all[id].proc] = true
	}
	for _, p := range h.procs {
		if !described[p] {
			out = append(out, p.bare())
		}
	}
	return out
}

// Plugin is one kind by its id.
func (h *Host) Plugin(id string) (*grapnelv1.Plugin, bool) {
	if k := h.kinds.get(id); k != nil {
		return h.status(k), true
	}
	for _, p := range h.procs {
		if bare := p.bare(); bare.GetName() == "plugins/"+id {
			return bare, true
		}
	}
	return nil, false
}

func (h *Host) status(k *kind) *grapnelv1.Plugin {
	out := k.proc.bare()
	out.Name, out.Description = "plugins/"+k.id, k.proto.GetDescription()
	out.Roles = []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_TRANSPORT}
	if k.signer() {
		out.Roles = []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_SIGNER}
	}
	out.UriSchemes = k.proto.GetTransport().GetUriSchemes()
	out.ConfigSchema = structOf(k.proto.GetConfigSchema())
	out.ConfigExample = structOf(k.proto.GetConfigExample())
	for _, s := range k.proto.GetSecretSlots() {
		out.SecretSlots = append(out.SecretSlots, &grapnelv1.SecretSlot{
			Slot: s.GetName(), Description: s.GetDescription(), Required: s.GetRequired(), Kinds: s.GetKinds(),
		})
	}
	return out
}

// bare is what there is to say of a process, whatever it offers.
func (p *process) bare() *grapnelv1.Plugin {
	p.mu.Lock()
	defer p.mu.Unlock()
	inst := &grapnelv1.PluginInstance{
		Checksum: p.checksum, RestartCount: int32(p.restarts), LastError: p.lastErr, Health: p.state.health(),
	}
	out := &grapnelv1.Plugin{
		Name: "plugins/" + p.name, Builtin: p.spec.Builtin, Version: p.version, ProtocolVersion: p.protocol,
		Health: inst.Health, Instances: []*grapnelv1.PluginInstance{inst},
	}
	if !p.started.IsZero() {
		inst.StartTime = timestamppb.New(p.started)
	}
	if c := p.conn.Load(); c != nil {
		inst.InFlight = int32(c.attempts.outstanding() + c.signs.outstanding())
		if p99 := c.overhead.p99(time.Now()); p99 > 0 {
			inst.P99Latency = durationpb.New(p99)
		}
	}
	return out
}

func (s state) health() grapnelv1.Plugin_Health {
	switch s {
	case serving:
		return grapnelv1.Plugin_HEALTH_SERVING
	case starting:
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
