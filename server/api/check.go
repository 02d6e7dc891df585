package api

import (
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// check examines a subscription before it is stored: the rules of the domain, whether its secrets exist,
// and what the plugins say of their settings. All faults come in one refusal. The warnings are about what
// works but looks wrong. p is not changed; its name may still be empty.
func (s *Server) check(ctx context.Context, name string, p *grapnelv1.Subscription) (warnings []string, err error) {
	p = proto.CloneOf(p)
	p.Name = name
	var faults []Violation
	unwritten := 0
	full, err := subscription.New(p)
	switch bad, ok := errors.AsType[*subscription.InvalidError](err); {
	case ok:
		for _, v := range bad.Violations {
			faults = append(faults, Violation{v.Field, v.Description, v.Reason})
		}
		unwritten = bad.More
	case err != nil:
		return nil, err
	default:
		p = full.Proto()
		warnings = subscription.Warnings(p)
	}
	missing := s.missingSecrets(p)
	if len(faults) == 0 && len(missing) > 0 {
		return nil, toStatus(&subscription.NotFoundError{Name: missing[0].name, Field: missing[0].Field}, name)
	}
	for _, m := range missing {
		faults = append(faults, m.Violation)
	}
	if full == nil && !s.completeBindings(p, faults) {
		return nil, invalidAnd(unwritten, faults...)
	}
	diagnostics, err := s.Plugins.Check(ctx, p)
	diagnostics = slices.DeleteFunc(diagnostics, func(d Diagnostic) bool {
		return d.Warning && d.Code == "uri.plaintext" // subscription.Warnings has said it
	})
	said, warned := sortDiagnostics(diagnostics)
	faults = append(faults, said...)
	switch {
	case len(faults) > 0:
		return nil, invalidAnd(unwritten, faults...)
	case errors.Is(err, ErrUnknownPlugin):
		return nil, pluginUnavailable(name, "a plugin that "+name+" names is not installed: "+err.Error())
	case err != nil:
		return warnings, err
	}
	warnings = append(warnings, s.foreignKeys(p)...)
	return append(warnings, warned...), nil
}

// foreignKeys warns of keys that were made for another plugin than the one that is to use them. It is no
// fault when that one can read them, which it has just been asked: Standard Webhooks and Svix, for example,
// share their keys. But what the two make of the same text may differ.
func (s *Server) foreignKeys(p *grapnelv1.Subscription) []string {
	var out []string
	for field, b := range bindings(p) {
		for _, slot := range slices.Sorted(maps.Keys(b.GetSecrets())) {
			ns, id, err := parseName("", b.GetSecrets()[slot], collectionSecrets)
			if err != nil {
				continue
			}
			found, err := s.Secrets.Get(ns, id)
			if err != nil || found.Proto.GetPlugin() == "" || found.Proto.GetPlugin() == b.GetPlugin() && found.Proto.GetSlot() == slot {
				continue
			}
			out = append(out, field+".secrets["+quote(slot)+"]: "+found.Proto.GetName()+" holds keys of "+found.Proto.GetPlugin()+
				" (slot "+quote(found.Proto.GetSlot())+"), which "+b.GetPlugin()+" reads in its own way; better give each its own secret")
		}
	}
	return out
}

// bindings goes through the plugins that a subscription names, with the paths of where it does.
func bindings(p *grapnelv1.Subscription) iter.Seq2[string, *grapnelv1.PluginBinding] {
	return func(yield func(string, *grapnelv1.PluginBinding) bool) {
		for i, b := range p.GetSigners() {
			if !yield("subscription.signers["+strconv.Itoa(i)+"]", b) {
				return
			}
		}
		if p.GetTransformer() != nil && !yield("subscription.transformer", p.GetTransformer()) {
			return
		}
		yield("subscription.transport", p.GetTransport())
	}
}

// defaultTransport names the transport where the caller left that to the URI's scheme and a plugin says
// that the scheme is its own. http and https are the domain's to default.
func (s *Server) defaultTransport(p *grapnelv1.Subscription) {
	if p.GetTransport().GetPlugin() != "" {
		return
	}
	scheme, _, ok := strings.Cut(p.GetUri(), ":")
	if scheme = strings.ToLower(scheme); !ok || scheme == "http" || scheme == "https" {
		return
	}
	for _, plugin := range s.Plugins.Plugins() {
		if slices.Contains(plugin.GetUriSchemes(), scheme) {
			if p.Transport == nil {
				p.Transport = &grapnelv1.PluginBinding{}
			}
			p.Transport.Plugin = plugin.GetName()
			return
		}
	}
}

// completeBindings prepares a subscription that breaks a rule for the plugins' opinion, so that the caller
// hears everything at once. It reports false when the faults concern what plugins would be asked about.
func (s *Server) completeBindings(p *grapnelv1.Subscription, faults []Violation) bool {
	for _, f := range faults {
		for _, part := range []string{"subscription.uri", "subscription.headers", "subscription.header_templates", "subscription.allowed_event_headers", "subscription.signers", "subscription.transport", "subscription.transformer"} {
			if strings.HasPrefix(f.Field, part) {
				return false
			}
		}
	}
	bare, err := subscription.New(&grapnelv1.Subscription{
		Name: p.GetName(), Uri: p.GetUri(), Headers: p.GetHeaders(), Signers: p.GetSigners(), Transport: p.GetTransport(),
		Transformer: p.GetTransformer(), HeaderTemplates: p.GetHeaderTemplates(), AllowedEventHeaders: p.GetAllowedEventHeaders(),
	})
	if err != nil {
		return false
	}
	completed := bare.Proto()
	p.Signers, p.Transport = completed.GetSigners(), completed.GetTransport()
	return true
}

// missingSecret is a reference to a secret that does not exist.
type missingSecret struct {
	Violation
	name string
}

// missingSecrets finds the secrets that p refers to and that do not exist. The registry checks them again
// in the transaction that writes; here it is so that they stand beside the other faults.
func (s *Server) missingSecrets(p *grapnelv1.Subscription) []missingSecret {
	owner, _, _ := parseName("", p.GetName(), collectionSubscriptions)
	var missing []missingSecret
	for field, b := range bindings(p) {
		for _, slot := range slices.Sorted(maps.Keys(b.GetSecrets())) {
			name := b.GetSecrets()[slot]
			ns, id, err := parseName(field, name, collectionSecrets)
			if err != nil || ns != owner {
				continue // a fault of its own, and nobody's business whether it exists
			}
			if _, err := s.Secrets.Get(ns, id); errors.Is(err, secret.ErrNotFound) {
				at := field + ".secrets[" + quote(slot) + "]"
				missing = append(missing, missingSecret{Violation{at, name + " does not exist", "secrets.exists"}, name})
			}
		}
	}
	return missing
}

// sameTarget reports whether two versions of a subscription look the same to plugins.
func sameTarget(a, b *grapnelv1.Subscription) bool {
	return a.GetUri() == b.GetUri() && maps.Equal(a.GetHeaders(), b.GetHeaders()) &&
		maps.Equal(a.GetHeaderTemplates(), b.GetHeaderTemplates()) && slices.Equal(a.GetAllowedEventHeaders(), b.GetAllowedEventHeaders()) &&
		slices.EqualFunc(a.GetSigners(), b.GetSigners(), equalBindings) && equalBindings(a.GetTransport(), b.GetTransport()) &&
		equalBindings(a.GetTransformer(), b.GetTransformer())
}

func equalBindings(a, b *grapnelv1.PluginBinding) bool { return proto.Equal(a, b) }
