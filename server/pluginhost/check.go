package pluginhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/pluginhost/check"
)

// Diagnostic is one complaint about a subscription's bindings.
type Diagnostic = check.Diagnostic

// Prepared is a secret's value as it is to be stored, and what its scheme says about it.
type Prepared = check.Prepared

// Check looks at a subscription as a caller means to store it: do its plugins exist, do the configs have
// the right shape, are the secret slots filled, and does each plugin agree. An ErrUnavailable says that a
// plugin that would have to be asked is not running.
func (h *Host) Check(ctx context.Context, sub *grapnelv1.Subscription) ([]Diagnostic, error) {
	bound, ds := h.kinds.described().Bindings(sub, transportID(&h.kinds, sub))
	var errs []error
	for i := range bound {
		b := &bound[i]
		if b.Kind == nil || slices.ContainsFunc(ds, func(d Diagnostic) bool {
			return !d.Warning && strings.HasPrefix(d.Field, b.Field)
		}) {
			continue // the plugin could only say the same, less clearly
		}
		found, emits, err := h.ask(ctx, b.Kind.ID, h.instanceOf(sub, b.Kind, b.Binding), b.Field)
		ds = append(ds, found...)
		errs = append(errs, err)
		if len(emits) > 0 {
			b.Emits = emits
		}
	}
	ds = append(ds, check.Batching(sub, bound)...)
	return append(ds, check.HeaderConflicts(sub, bound)...), errors.Join(errs...)
}

// CheckConfig looks at a config alone. Fields of diagnostics begin with "config".
func (h *Host) CheckConfig(ctx context.Context, kindID string, configJSON []byte) ([]Diagnostic, error) {
	k := h.kinds.get(kindID)
	if k == nil {
		return nil, h.missing(kindID)
	}
	if len(configJSON) == 0 {
		configJSON = []byte("{}")
	}
	var config any
	if err := json.Unmarshal(configJSON, &config); err != nil {
		return []Diagnostic{{Field: "config", Code: "config.syntax", Summary: "the config is not JSON: " + err.Error()}}, nil
	}
	ds := check.Config(k.Kind, config, "config")
	if len(ds) > 0 {
		return ds, nil
	}
	ds, _, err := h.ask(ctx, k.ID, &pluginv1.Instance{Id: "check", Kind: k.ID, ConfigJson: configJSON}, "")
	// Target and secrets belong to a subscription, and here there is none: what a plugin misses there is
	// no fault of the config.
	return slices.DeleteFunc(ds, func(d Diagnostic) bool { return d.Field != "config" && !strings.HasPrefix(d.Field, "config.") }), err
}

// PrepareSecret checks a value for a secret slot of a kind, or has the kind's plugin make one when value is
// empty. kind may be written with or without "plugins/". An empty slot means the kind's only one, or the
// only one that it requires. algorithm, one of the slot's, counts only for a new value; empty means the
// first. A slot without a format of its own takes any value of 1 byte to 64 KiB as it is.
//
// Diagnostics, whose fields are "plugin", "slot", "value" and "algorithm", say why there is no value; with
// one that is no warning among them Prepared is empty. ErrUnknownPlugin and ErrUnavailable say that there
// is nobody to ask. No value shows up in a diagnostic or an error.
func (h *Host) PrepareSecret(ctx context.Context, kind, slot string, value []byte, algorithm string) (Prepared, []Diagnostic, error) {
	id := strings.TrimPrefix(kind, "plugins/")
	k := h.kinds.get(id)
	if k == nil {
		return Prepared{}, nil, h.missing(id)
	}
	s, ds := check.Slot(k.Kind, slot)
	if s == nil {
		return Prepared{}, ds, nil
	}
	var plugin check.Plugin
	if c := k.proc.conn.Load(); c != nil {
		plugin = c.plugin
	}
	ctx, cancel := context.WithTimeout(ctx, h.timing.call)
	defer cancel()
	made, ds, err := check.Secret(ctx, plugin, k.Kind, s, value, algorithm)
	if err != nil {
		err = fmt.Errorf("plugins/%s: %w", id, err)
	}
	return made, ds, err
}

// missing tells a plugin that is not there from one that may still come.
func (h *Host) missing(id string) error {
	if _, off := h.kinds.off()[id]; off {
		return fmt.Errorf("%w: plugins/%s is disabled", ErrUnavailable, id)
	}
	for _, p := range h.processes() {
		p.mu.Lock()
		never := p.version == "" && p.protocol == ""
		p.mu.Unlock()
		if never {
			return fmt.Errorf("%w: plugins/%s (plugin %s has not come up yet)", ErrUnavailable, id, p.displayName())
		}
	}
	return fmt.Errorf("%w: plugins/%s", ErrUnknownPlugin, id)
}

func (h *Host) instanceOf(sub *grapnelv1.Subscription, k *check.Kind, pb *grapnelv1.PluginBinding) *pluginv1.Instance {
	in := &pluginv1.Instance{
		Id: "check", Kind: k.ID, Tenant: check.NamespaceOf(sub.GetName()), Target: targetOf(sub),
		MaxInFlight: uint32(max(0, sub.GetMaxInFlight())), Secrets: map[string]*pluginv1.SecretVersions{},
	}
	for _, name := range eventHeadersOf(sub).names() { // plugins have a say in names; what follows them depends on the event
		in.Target.Headers = append(in.Target.Headers, &pluginv1.Header{Name: name, Value: "-"})
	}
	if pb.GetConfig() != nil {
		in.ConfigJson, _ = pb.GetConfig().MarshalJSON() // was valid a moment ago
	}
	for slot, name := range pb.GetSecrets() {
		if versions, ok := h.opts.Secrets(name); ok {
			in.Secrets[slot] = secretVersions(versions)
		}
	}
	return in
}

// ask has the plugin itself look at the instance. It also returns the headers that the config has it set, where the
// config decides.
func (h *Host) ask(ctx context.Context, id string, in *pluginv1.Instance, field string) ([]Diagnostic, []string, error) {
	var c *conn
	if k := h.kinds.get(id); k != nil {
		c = k.proc.conn.Load()
	}
	if c == nil {
		return nil, nil, fmt.Errorf("%w: plugins/%s", ErrUnavailable, id)
	}
	// What it writes about this must be clean as well, wherever that turns up.
	defer c.secrets.hold(in)()
	ctx, cancel := context.WithTimeout(ctx, h.timing.call)
	defer cancel()
	ds, emits, err := check.Ask(ctx, c.plugin, in, field)
	if err != nil {
		err = fmt.Errorf("plugins/%s: %w", id, err)
	}
	return ds, emits, err
}

// held are the secrets that a process has been given: those of its instances, for as long as it holds them.
type held struct{ redact.Set }

// hold adds an instance's secrets, and returns what takes them out again.
func (h *held) hold(in *pluginv1.Instance) (release func()) {
	var values []string
	for _, versions := range in.GetSecrets() {
		for _, v := range versions.GetVersions() {
			values = append(values, string(v.GetValue()))
		}
	}
	if len(values) == 0 {
		return func() {}
	}
	for _, v := range values {
		h.Add(v)
	}
	return func() {
		for _, v := range values {
			h.Remove(v)
		}
	}
}
