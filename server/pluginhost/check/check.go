// Package check holds what subscriptions, configs and secrets say against what plugins have described, and asks the
// plugins themselves. It starts no process and sends no attempt. Whatever a plugin says comes in through one door, bounded
// and without secrets.
package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/internal/header"
	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ErrUnavailable means that the plugin a caller asked about cannot be asked just now.
var ErrUnavailable = errors.New("plugin is not available")

const (
	defaultSigner = "standard-webhooks"
	// maxDiagnostics and maxSummary, in bytes, bound what is taken of a plugin's complaints.
	maxDiagnostics = 32
	maxSummary     = 512
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

// Kinds are the kinds that there are, by their ids.
type Kinds map[string]*Kind

// Bound is a plugin binding of a subscription as it is checked; Kind is nil when there is no such plugin.
type Bound struct {
	Field   string
	Kind    *Kind
	Binding *grapnelv1.PluginBinding
	// Emits are the headers that it sets, lower case.
	Emits []string
}

// Bindings looks up what a subscription's bindings name, the transformer first, signers in order and the transport last, and holds them against
// what their kinds say. transport is the id of the subscription's.
func (ks Kinds) Bindings(sub *grapnelv1.Subscription, transport string) ([]Bound, []Diagnostic) {
	var bound []Bound
	var ds []Diagnostic
	add := func(field, role, id string, pb *grapnelv1.PluginBinding) {
		k, found := ks.checkBinding(sub, field, role, id, pb)
		bound, ds = append(bound, Bound{field, k, pb, k.Emits()}), append(ds, found...)
	}
	if pb := sub.GetTransformer(); pb != nil {
		add("subscription.transformer", "transformer", TransformerID(pb), pb)
	}
	for i, pb := range Signers(sub) {
		add(fmt.Sprintf("subscription.signers[%d]", i), "signer", SignerID(pb), pb)
	}
	add("subscription.transport", "transport", transport, sub.GetTransport())
	return bound, ds
}

func (ks Kinds) checkBinding(sub *grapnelv1.Subscription, field, role, id string, pb *grapnelv1.PluginBinding) (*Kind, []Diagnostic) {
	k := ks[id]
	if k == nil {
		return nil, []Diagnostic{ks.noSuchPlugin(sub, field, role, id, pb)}
	}
	if is := k.Role(); is != role {
		return nil, []Diagnostic{{Field: field + ".plugin", Code: "plugin.wrong_role", Summary: fmt.Sprintf(
			"plugins/%s is a %s, want a %s, such as %s", id, is, role, ks.named(role))}}
	}
	var config any = map[string]any{}
	if pb.GetConfig() != nil {
		config = pb.GetConfig().AsMap()
	}
	ds := Config(k, config, field+".config")
	return k, append(ds, checkSlots(sub, k, field+".secrets", pb.GetSecrets())...)
}

func (ks Kinds) noSuchPlugin(sub *grapnelv1.Subscription, field, role, id string, pb *grapnelv1.PluginBinding) Diagnostic {
	if role == "transport" && pb.GetPlugin() == "" {
		scheme := ""
		if u, err := url.Parse(sub.GetUri()); err == nil {
			scheme = u.Scheme
		}
		return Diagnostic{Field: "subscription.uri", Code: "plugin.no_transport", Summary: fmt.Sprintf(
			"no plugin carries the scheme %q; there are transports for %s", scheme, cmp.Or(strings.Join(ks.schemes(), ", "), "none"))}
	}
	return Diagnostic{Field: field + ".plugin", Code: "plugin.unknown", Summary: fmt.Sprintf(
		"there is no plugin plugins/%s; there are %s", id, ks.named(role))}
}

// named lists the plugins of a role.
func (ks Kinds) named(role string) string {
	var names []string
	for id, k := range ks {
		if k.Role() == role {
			names = append(names, "plugins/"+id)
		}
	}
	slices.Sort(names)
	return cmp.Or(strings.Join(names, ", "), "none")
}

func (ks Kinds) schemes() []string {
	var schemes []string
	for _, k := range ks {
		schemes = append(schemes, k.Proto.GetTransport().GetUriSchemes()...)
	}
	slices.Sort(schemes)
	return slices.Compact(schemes)
}

// checkSlots holds the binding's secrets against the kind's slots.
func checkSlots(sub *grapnelv1.Subscription, k *Kind, field string, given map[string]string) []Diagnostic {
	var ds []Diagnostic
	slots := map[string]*pluginv1.SecretSlot{}
	for _, s := range k.Proto.GetSecretSlots() {
		slots[s.GetName()] = s
		if s.GetRequired() && given[s.GetName()] == "" {
			ds = append(ds, Diagnostic{Field: field + "." + s.GetName(), Code: "secret.missing", Summary: fmt.Sprintf(
				"plugins/%s needs the name of a secret in slot %q (%s)", k.ID, s.GetName(), cmp.Or(s.GetDescription(), "no description"))})
		}
	}
	namespace := NamespaceOf(sub.GetName())
	for _, slot := range keysOf(given) {
		at := field + "." + slot
		if slots[slot] == nil {
			ds = append(ds, Diagnostic{Field: at, Code: "secret.unknown_slot", Summary: fmt.Sprintf(
				"plugins/%s has no secret slot %q; it has %s", k.ID, slot,
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

// NamespaceOf is the namespace in a resource name, or "".
func NamespaceOf(name string) string {
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

// HeaderConflicts finds headers that two of a request's sources would both set.
func HeaderConflicts(sub *grapnelv1.Subscription, bound []Bound) []Diagnostic {
	var ds []Diagnostic
	setBy := map[string]Bound{}
	for _, b := range bound {
		for _, name := range b.Emits {
			other, taken := setBy[header.Key(name)]
			if !taken {
				setBy[header.Key(name)] = b
				continue
			}
			ds = append(ds, Diagnostic{Field: b.Field + ".plugin", Code: "plugin.header_conflict", Summary: fmt.Sprintf(
				"plugins/%s sets the header %s, and so does plugins/%s in %s; remove one of the two", b.Kind.ID, name, other.Kind.ID, other.Field)})
			break
		}
	}
	own := func(field, place, name string) {
		// What a transport adds, a subscription may have otherwise.
		if b, taken := setBy[header.Key(name)]; taken && b.Kind.Signer() {
			ds = append(ds, Diagnostic{Field: field, Code: "plugin.header_conflict", Summary: fmt.Sprintf(
				"the header %s is set by plugins/%s; take it out of %s", strings.ToLower(name), b.Kind.ID, place)})
		}
	}
	for _, name := range keysOf(sub.GetHeaders()) {
		own("subscription.headers."+name, "headers", name)
	}
	for _, name := range keysOf(sub.GetHeaderTemplates()) {
		own("subscription.header_templates."+name, "header_templates", name)
	}
	for i, name := range sub.GetAllowedEventHeaders() {
		own(fmt.Sprintf("subscription.allowed_event_headers[%d]", i), "allowed_event_headers", name)
	}
	return ds
}

// Batching finds a transport that is to carry several events at once and does not.
func Batching(sub *grapnelv1.Subscription, bound []Bound) []Diagnostic {
	transport := bound[len(bound)-1].Kind
	if sub.GetBatching() == nil || transport == nil || transport.Proto.GetTransport().GetBatches() {
		return nil
	}
	return []Diagnostic{{Field: "subscription.batching", Code: "plugin.no_batches", Summary: NoBatches(transport)}}
}

// NoBatches says that a transport does not take what batching asks for.
func NoBatches(transport *Kind) string {
	return fmt.Sprintf("plugins/%s carries one event in a request; leave batching out, or name a transport that carries several, such as plugins/http", transport.ID)
}

// Plugin is what is asked of a plugin here.
type Plugin interface {
	Validate(context.Context, *pluginv1.ValidateRequest, ...grpc.CallOption) (*pluginv1.ValidateResponse, error)
	PrepareSecret(context.Context, *pluginv1.PrepareSecretRequest, ...grpc.CallOption) (*pluginv1.PrepareSecretResponse, error)
}

// Ask has the plugin itself look at the instance. It also returns the headers that the config has it set, where the
// config decides. field is what pointers begin at. Neither the diagnostics nor the error hold a secret of the instance.
func Ask(ctx context.Context, plugin Plugin, in *pluginv1.Instance, field string) ([]Diagnostic, []string, error) {
	var secrets redact.Set
	for _, versions := range in.GetSecrets() {
		for _, v := range versions.GetVersions() {
			secrets.Add(string(v.GetValue()))
		}
	}
	resp, err := plugin.Validate(ctx, &pluginv1.ValidateRequest{Instance: in})
	if err != nil {
		return nil, nil, fmt.Errorf("%w: validate: %s", ErrUnavailable, said(&secrets, err.Error()))
	}
	ds := diagnostics(&secrets, resp.GetDiagnostics(), func(pointer string) string { return fieldOf(field, pointer) })
	var emits []string
	for _, name := range resp.GetEmitsHeaders()[:min(len(resp.GetEmitsHeaders()), maxNames)] {
		emits = append(emits, redact.Line(&secrets, name, maxName))
	}
	return ds, emits, nil
}

// said is the one door through which a plugin's text comes in here.
func said(secrets *redact.Set, text string) string { return redact.Line(secrets, text, maxSummary) }

// diagnostics takes over what a plugin complains of: not more than so many, each no longer than so much, and no secrets.
func diagnostics(secrets *redact.Set, in []*pluginv1.Diagnostic, field func(pointer string) string) []Diagnostic {
	var ds []Diagnostic
	for _, d := range in[:min(len(in), maxDiagnostics)] {
		ds = append(ds, Diagnostic{
			Field: said(secrets, field(d.GetPointer())), Code: said(secrets, d.GetCode()), Summary: said(secrets, d.GetSummary()),
			Warning: d.GetSeverity() == pluginv1.Diagnostic_SEVERITY_WARNING,
		})
	}
	return ds
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

// Signers are the subscription's, or a nil binding for the default one.
func Signers(sub *grapnelv1.Subscription) []*grapnelv1.PluginBinding {
	if len(sub.GetSigners()) == 0 {
		return []*grapnelv1.PluginBinding{nil}
	}
	return sub.GetSigners()
}

// SignerID is the kind that a signer's binding names, or the default one.
func SignerID(pb *grapnelv1.PluginBinding) string {
	if id := strings.TrimPrefix(pb.GetPlugin(), "plugins/"); id != "" {
		return id
	}
	return defaultSigner
}

// TransformerID is the kind that a transformer's binding names.
func TransformerID(pb *grapnelv1.PluginBinding) string {
	return strings.TrimPrefix(pb.GetPlugin(), "plugins/")
}

func keysOf(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
