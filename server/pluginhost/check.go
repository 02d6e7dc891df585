package pluginhost

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Diagnostic is one complaint about a subscription's bindings.
type Diagnostic struct {
	// Field is a path as in protos: subscription.transport.config.method.
	Field string
	// Code is stable and for machines: config.unknown_field.
	Code string
	// Summary says what was given and what would be right. Never a secret's value.
	Summary string
	// Warning marks what works but looks wrong.
	Warning bool
}

// Check looks at a subscription as a caller means to store it: do its plugins exist, do the configs have
// the right shape, are the secret slots filled, and does each plugin agree. An ErrUnavailable says that a
// plugin that would have to be asked is not running.
func (h *Host) Check(ctx context.Context, sub *grapnelv1.Subscription) ([]Diagnostic, error) {
	bound, ds := h.boundKinds(sub)
	var errs []error
	for i := range bound {
		b := &bound[i]
		if b.kind == nil || slices.ContainsFunc(ds, func(d Diagnostic) bool {
			return !d.Warning && strings.HasPrefix(d.Field, b.field)
		}) {
			continue // the plugin could only say the same, less clearly
		}
		found, emits, err := h.ask(ctx, b.kind, h.instanceOf(sub, b.kind, b.pb), b.field, b.pb)
		ds = append(ds, found...)
		errs = append(errs, err)
		if len(emits) > 0 {
			b.emits = emits
		}
	}
	return append(ds, headerConflicts(sub, bound)...), errors.Join(errs...)
}

// boundKind is a plugin binding of a subscription as it is checked; kind is nil when there is no such plugin.
type boundKind struct {
	field string
	kind  *kind
	pb    *grapnelv1.PluginBinding
	// emits are the headers that it sets, lower case.
	emits []string
}

// boundKinds looks up what a subscription's bindings name: signers in order, the transport last.
func (h *Host) boundKinds(sub *grapnelv1.Subscription) ([]boundKind, []Diagnostic) {
	var bound []boundKind
	var ds []Diagnostic
	add := func(field, role, id string, pb *grapnelv1.PluginBinding) {
		k, found := h.checkBinding(sub, field, role, id, pb)
		bound, ds = append(bound, boundKind{field, k, pb, k.emits()}), append(ds, found...)
	}
	for i, pb := range signers(sub) {
		add(fmt.Sprintf("subscription.signers[%d]", i), "signer", signerID(pb), pb)
	}
	add("subscription.transport", "transport", transportID(&h.kinds, sub), sub.GetTransport())
	return bound, ds
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
	ds := checkShape(k, config, "config")
	if len(ds) > 0 {
		return ds, nil
	}
	ds, _, err := h.ask(ctx, k, &pluginv1.Instance{Id: "check", Kind: k.id, ConfigJson: configJSON}, "", nil)
	// Target and secrets belong to a subscription, and here there is none: what a plugin misses there is
	// no fault of the config.
	return slices.DeleteFunc(ds, func(d Diagnostic) bool { return d.Field != "config" && !strings.HasPrefix(d.Field, "config.") }), err
}

// missing tells a plugin that is not there from one that may still come.
func (h *Host) missing(id string) error {
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

func (h *Host) checkBinding(sub *grapnelv1.Subscription, field, role, id string, pb *grapnelv1.PluginBinding) (*kind, []Diagnostic) {
	k := h.kinds.get(id)
	if k == nil {
		return nil, []Diagnostic{h.noSuchPlugin(sub, field, role, id, pb)}
	}
	if k.signer() != (role == "signer") {
		is := "transport"
		if k.signer() {
			is = "signer"
		}
		return nil, []Diagnostic{{Field: field + ".plugin", Code: "plugin.wrong_role", Summary: fmt.Sprintf(
			"plugins/%s is a %s, want a %s, such as %s", id, is, role, h.named(role))}}
	}
	var config any = map[string]any{}
	if pb.GetConfig() != nil {
		config = pb.GetConfig().AsMap()
	}
	ds := checkShape(k, config, field+".config")
	return k, append(ds, checkSlots(sub, k, field+".secrets", pb.GetSecrets())...)
}

func (h *Host) noSuchPlugin(sub *grapnelv1.Subscription, field, role, id string, pb *grapnelv1.PluginBinding) Diagnostic {
	if role == "transport" && pb.GetPlugin() == "" {
		scheme := ""
		if u, err := url.Parse(sub.GetUri()); err == nil {
			scheme = u.Scheme
		}
		return Diagnostic{Field: "subscription.uri", Code: "plugin.no_transport", Summary: fmt.Sprintf(
			"no plugin carries the scheme %q; there are transports for %s", scheme, cmp.Or(strings.Join(h.schemes(), ", "), "none"))}
	}
	return Diagnostic{Field: field + ".plugin", Code: "plugin.unknown", Summary: fmt.Sprintf(
		"there is no plugin plugins/%s; there are %s", id, h.named(role))}
}

// named lists the plugins of a role.
func (h *Host) named(role string) string {
	var names []string
	for id, k := range h.kinds.all() {
		if k.signer() == (role == "signer") {
			names = append(names, "plugins/"+id)
		}
	}
	slices.Sort(names)
	return cmp.Or(strings.Join(names, ", "), "none")
}

func (h *Host) schemes() []string {
	var schemes []string
	for _, k := range h.kinds.all() {
		schemes = append(schemes, k.proto.GetTransport().GetUriSchemes()...)
	}
	slices.Sort(schemes)
	return slices.Compact(schemes)
}

// checkSlots holds the binding's secrets against the kind's slots.
func checkSlots(sub *grapnelv1.Subscription, k *kind, field string, given map[string]string) []Diagnostic {
	var ds []Diagnostic
	slots := map[string]*pluginv1.SecretSlot{}
	for _, s := range k.proto.GetSecretSlots() {
		slots[s.GetName()] = s
		if s.GetRequired() && given[s.GetName()] == "" {
			ds = append(ds, Diagnostic{Field: field + "." + s.GetName(), Code: "secret.missing", Summary: fmt.Sprintf(
				"plugins/%s needs the name of a secret in slot %q (%s)", k.id, s.GetName(), cmp.Or(s.GetDescription(), "no description"))})
		}
	}
	namespace := namespaceOf(sub.GetName())
	for _, slot := range sortedKeys(given) {
		at := field + "." + slot
		if slots[slot] == nil {
			ds = append(ds, Diagnostic{Field: at, Code: "secret.unknown_slot", Summary: fmt.Sprintf(
				"plugins/%s has no secret slot %q; it has %s", k.id, slot,
				cmp.Or(strings.Join(slices.Sorted(maps.Keys(slots)), ", "), "none"))})
			continue
		}
		ns, ok := secretNamespace(given[slot])
		switch {
		case !ok && given[slot] != "":
			// What was given is not repeated: it may be the secret itself.
			ds = append(ds, Diagnostic{Field: at, Code: "secret.name", Summary: "want the name of a secret, namespaces/{namespace}/secrets/{secret}, not a value"})
		case ok && namespace != "" && ns != namespace:
			ds = append(ds, Diagnostic{Field: at, Code: "secret.namespace", Summary: fmt.Sprintf(
				"the secret is in namespace %q, want one of the subscription's own, %q", ns, namespace)})
		}
	}
	return ds
}

func namespaceOf(name string) string {
	parts := strings.Split(name, "/")
	if len(parts) < 2 || parts[0] != "namespaces" {
		return ""
	}
	return parts[1]
}

func secretNamespace(name string) (string, bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != "namespaces" || parts[2] != "secrets" || parts[1] == "" || parts[3] == "" {
		return "", false
	}
	return parts[1], true
}

// headerConflicts finds headers that two of a request's sources would both set.
func headerConflicts(sub *grapnelv1.Subscription, bound []boundKind) []Diagnostic {
	var ds []Diagnostic
	setBy := map[string]boundKind{}
	for _, b := range bound {
		for _, name := range b.emits {
			other, taken := setBy[name]
			if !taken {
				setBy[name] = b
				continue
			}
			ds = append(ds, Diagnostic{Field: b.field + ".plugin", Code: "plugin.header_conflict", Summary: fmt.Sprintf(
				"plugins/%s sets the header %s, and so does plugins/%s in %s; remove one of the two", b.kind.id, name, other.kind.id, other.field)})
			break
		}
	}
	for _, name := range sortedKeys(sub.GetHeaders()) {
		// What a transport adds, a subscription may have otherwise.
		if b, taken := setBy[strings.ToLower(name)]; taken && b.kind.signer() {
			ds = append(ds, Diagnostic{Field: "subscription.headers." + name, Code: "plugin.header_conflict", Summary: fmt.Sprintf(
				"the header %s is set by plugins/%s; take it out of headers", strings.ToLower(name), b.kind.id)})
		}
	}
	return ds
}

func (h *Host) instanceOf(sub *grapnelv1.Subscription, k *kind, pb *grapnelv1.PluginBinding) *pluginv1.Instance {
	in := &pluginv1.Instance{
		Id: "check", Kind: k.id, Tenant: namespaceOf(sub.GetName()), Target: targetOf(sub),
		MaxInFlight: uint32(max(0, sub.GetMaxInFlight())), Secrets: map[string]*pluginv1.SecretVersions{},
	}
	if pb.GetConfig() != nil {
		in.ConfigJson, _ = pb.GetConfig().MarshalJSON() // was valid a moment ago
	}
	var r redactor
	for slot, name := range pb.GetSecrets() {
		if versions, ok := h.opts.Secrets(name); ok {
			in.Secrets[slot] = r.add(versions)
		}
	}
	return in
}

// ask has the plugin itself look at the instance. It also returns the headers that the config has it set, where the
// config decides.
func (h *Host) ask(ctx context.Context, k *kind, in *pluginv1.Instance, field string, pb *grapnelv1.PluginBinding) ([]Diagnostic, []string, error) {
	c := k.proc.conn.Load()
	if c == nil {
		return nil, nil, fmt.Errorf("%w: plugins/%s", ErrUnavailable, k.id)
	}
	var secrets redactor
	for _, versions := range in.GetSecrets() {
		for _, v := range versions.GetVersions() {
			secrets.remember(string(v.GetValue()))
		}
	}
	ctx, cancel := context.WithTimeout(ctx, h.timing.call)
	defer cancel()
	resp, err := c.plugin.Validate(ctx, &pluginv1.ValidateRequest{Instance: in})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: plugins/%s: validate: %w", ErrUnavailable, k.id, err)
	}
	var ds []Diagnostic
	for _, d := range resp.GetDiagnostics() {
		ds = append(ds, Diagnostic{
			Field: fieldOf(field, d.GetPointer()), Code: d.GetCode(), Summary: secrets.clean(d.GetSummary()),
			Warning: d.GetSeverity() == pluginv1.Diagnostic_SEVERITY_WARNING,
		})
	}
	return ds, resp.GetEmitsHeaders(), nil
}

// fieldOf turns a plugin's RFC 6901 pointer into a proto path.
func fieldOf(field, pointer string) string {
	switch {
	case strings.HasPrefix(pointer, "/target/uri"):
		return "subscription.uri"
	case strings.HasPrefix(pointer, "/target/headers"):
		return "subscription.headers"
	case pointer == "" || pointer == "/":
		return cmp.Or(field, "config")
	}
	var segments []string
	for _, s := range strings.Split(strings.TrimPrefix(pointer, "/"), "/") {
		segments = append(segments, strings.NewReplacer("~1", "/", "~0", "~").Replace(s))
	}
	return strings.TrimPrefix(joinPath(field, segments), ".")
}

// joinPath appends segments; numbers become indexes.
func joinPath(field string, segments []string) string {
	for _, s := range segments {
		if s != "" && strings.Trim(s, "0123456789") == "" {
			field += "[" + s + "]"
		} else {
			field += "." + s
		}
	}
	return field
}
