package api

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/secret"
)

// pluginPatience is what a caller is told to wait when a plugin is not serving.
const pluginPatience = 2 * time.Second

// withoutPlugin refuses what means something to plugins only.
func withoutPlugin(slot, algorithm string) []Violation {
	var faults []Violation
	if slot != "" {
		faults = append(faults, Violation{"slot", "goes with plugin; name the plugin that the key is for, or leave slot out", "secret.plugin"})
	}
	if algorithm != "" {
		faults = append(faults, Violation{"algorithm", "goes with plugin; without one, kind says what is made", "secret.plugin"})
	}
	return faults
}

// slotFor finds the secret slot that a caller means: an empty one is the plugin's only slot, or the only one
// that it requires. A plugin that is not known yet is left for prepare to explain.
func (s *Server) slotFor(plugin, slot string) (string, error) {
	id, err := parsePlugin("plugin", plugin)
	if err != nil {
		return "", err
	}
	p, ok := s.Plugins.Plugin(id)
	if !ok {
		return slot, nil
	}
	var names, required []string
	for _, sl := range p.GetSecretSlots() {
		names = append(names, sl.GetSlot())
		if sl.GetRequired() {
			required = append(required, sl.GetSlot())
		}
	}
	switch {
	case len(names) == 0:
		return "", invalid(Violation{"plugin", plugin + " takes no secrets", "secret.no_slot"})
	case slices.Contains(names, slot):
		return slot, nil
	case slot != "":
		return "", invalid(Violation{"slot", plugin + " has no secret slot " + quote(slot) + "; it has " + strings.Join(names, ", "), "secret.unknown_slot"})
	case len(names) == 1:
		return names[0], nil
	case len(required) == 1:
		return required[0], nil
	}
	return "", invalid(Violation{"slot", "is required: " + plugin + " has several secret slots, " + strings.Join(names, ", "), "secret.slot_required"})
}

// prepare has a plugin check the value of a secret, or make one when there is none. Faults are about the
// fields of CreateSecretRequest.
func (s *Server) prepare(ctx context.Context, plugin, slot, value, algorithm string) (secret.Material, error) {
	id, err := parsePlugin("plugin", plugin)
	if err != nil {
		return secret.Material{}, err
	}
	made, diagnostics, err := s.Plugins.PrepareSecret(ctx, id, slot, []byte(value), algorithm)
	switch {
	case errors.Is(err, ErrUnknownPlugin):
		return secret.Material{}, invalid(Violation{"plugin", "there is no plugin " + quote(plugin) + "; those that take secrets are " + s.takeSecrets(), "plugin.unknown"})
	case errors.Is(err, ErrPluginUnavailable):
		return secret.Material{}, unavailable(grapnelv1.ErrorReason_ERROR_REASON_PLUGIN_UNAVAILABLE,
			plugin+", which makes and checks these keys, is not serving just now", pluginPatience)
	case err != nil:
		return secret.Material{}, err
	}
	if faults, _ := sortDiagnostics(diagnostics); len(faults) > 0 {
		return secret.Material{}, invalid(faults...)
	}
	if value == "" {
		made.Algorithm = s.madeAs(plugin, slot, algorithm, made.Algorithm)
	}
	return secret.Material{
		Kind: grapnelv1.Secret_KIND_OPAQUE, Plugin: plugin, Slot: slot,
		Value: made.Value, Algorithm: made.Algorithm, PublicKey: made.PublicKey, JWK: made.JWK, KeyID: made.KeyID,
		Made: value == "",
	}, nil
}

// madeAs is the word for the algorithm of a key that was made: the plugin's, unless it says less than what was
// asked for, as rsa does of rsa-pss-sha512. It has to be one of the slot's, so that a rotation can ask for the
// same.
func (s *Server) madeAs(plugin, slot, asked, said string) string {
	can, known := s.slotOf(plugin, slot)
	if !known || len(can.GetAlgorithms()) == 0 || slices.Contains(can.GetAlgorithms(), said) {
		return said
	}
	if asked == "" {
		return can.GetAlgorithms()[0]
	}
	return asked
}

// takeSecrets lists the plugins that a secret can be made for.
func (s *Server) takeSecrets() string {
	var names []string
	for _, p := range s.Plugins.Plugins() {
		if len(p.GetSecretSlots()) > 0 {
			names = append(names, p.GetName())
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// nextMaterial checks or makes the new value of a secret that there is, and has every plugin that uses the
// secret look at it, so that a key which does not fit is refused now and not at the first delivery.
func (s *Server) nextMaterial(ctx context.Context, ns, id string, r *grapnelv1.RotateSecretRequest) (secret.Material, error) {
	old, err := s.Secrets.Get(ns, id)
	if err != nil {
		return secret.Material{}, err
	}
	var m secret.Material
	if plugin := old.Proto.GetPlugin(); plugin == "" {
		if faults := withoutPlugin("", r.GetAlgorithm()); len(faults) > 0 {
			return secret.Material{}, invalid(faults...)
		}
		m, err = secret.Make(old.Proto.GetKind(), r.GetValue())
	} else {
		m, err = s.prepareNext(ctx, old.Proto, r)
	}
	if err != nil {
		return secret.Material{}, err
	}
	return m, s.askUsers(ctx, ns, old.Proto, m.Value)
}

// prepareNext is prepare for a rotation, whose request has no field for plugin and slot.
func (s *Server) prepareNext(ctx context.Context, old *grapnelv1.Secret, r *grapnelv1.RotateSecretRequest) (secret.Material, error) {
	algorithm := r.GetAlgorithm()
	if algorithm == "" && r.GetValue() == "" {
		var err error
		if algorithm, err = s.sameAlgorithm(old); err != nil {
			return secret.Material{}, err
		}
	}
	m, err := s.prepare(ctx, old.GetPlugin(), old.GetSlot(), r.GetValue(), algorithm)
	refusal, ok := errors.AsType[*Error](err)
	if !ok || refusal.reason != grapnelv1.ErrorReason_ERROR_REASON_INVALID_FIELD {
		return m, err
	}
	if refusal.field == "plugin" || refusal.field == "slot" {
		// The caller named neither: the plugin that the secret was made for is gone, or another by now.
		return secret.Material{}, pluginUnavailable(r.GetName(), r.GetName()+" holds keys of "+old.GetPlugin()+", which cannot make another: "+refusal.message)
	}
	return secret.Material{}, refusal
}

// sameAlgorithm is the algorithm of the newest version, when its plugin can make such a key again. Anything
// else in its place would be a change that nobody asked for.
func (s *Server) sameAlgorithm(old *grapnelv1.Secret) (string, error) {
	newest := ""
	if versions := old.GetVersions(); len(versions) > 0 {
		newest = versions[0].GetAlgorithm()
	}
	can, known := s.slotOf(old.GetPlugin(), old.GetSlot())
	if newest == "" || !known || slices.Contains(can.GetAlgorithms(), newest) {
		return newest, nil
	}
	if len(can.GetAlgorithms()) <= 1 {
		return "", nil // nothing to choose: the plugin says itself whether it makes values
	}
	return "", invalid(Violation{"algorithm", "is required: the newest version is " + quote(newest) + ", which " + old.GetPlugin() +
		" does not make; want one of " + strings.Join(can.GetAlgorithms(), ", "), "secret.algorithm"})
}

// slotOf looks up a secret slot of a plugin.
func (s *Server) slotOf(plugin, slot string) (*grapnelv1.SecretSlot, bool) {
	id, err := parsePlugin("", plugin)
	if err != nil {
		return nil, false
	}
	p, ok := s.Plugins.Plugin(id)
	if !ok {
		return nil, false
	}
	i := slices.IndexFunc(p.GetSecretSlots(), func(sl *grapnelv1.SecretSlot) bool { return sl.GetSlot() == slot })
	if i < 0 {
		return nil, false
	}
	return p.GetSecretSlots()[i], true
}

// use is one way in which a subscription uses a secret.
type use struct{ plugin, slot string }

// askUsers has a new value checked for every slot that subscriptions of the namespace use the secret in. A
// plugin that is not serving is passed over: it must not stand in the way of replacing a key that has leaked.
func (s *Server) askUsers(ctx context.Context, ns string, old *grapnelv1.Secret, value []byte) error {
	uses := s.usesOf(ns, old.GetName())
	delete(uses, use{old.GetPlugin(), old.GetSlot()}) // it made or checked the value itself
	var faults []Violation
	for _, u := range slices.SortedFunc(maps.Keys(uses), func(a, b use) int { return strings.Compare(a.plugin+" "+a.slot, b.plugin+" "+b.slot) }) {
		if sl, known := s.slotOf(u.plugin, u.slot); !known || sl.GetFormat() == "" {
			continue // any text will do
		}
		id, err := parsePlugin("", u.plugin)
		if err != nil {
			continue
		}
		_, diagnostics, err := s.Plugins.PrepareSecret(ctx, id, u.slot, value, "")
		switch {
		case errors.Is(err, ErrPluginUnavailable), errors.Is(err, ErrUnknownPlugin):
			s.log.WarnContext(ctx, "new value of a secret not checked by a plugin that uses it", "secret", old.GetName(), "plugin", u.plugin, "err", err)
			continue
		case err != nil:
			return err
		}
		refused, _ := sortDiagnostics(diagnostics)
		for _, f := range refused {
			faults = append(faults, Violation{"value", "does not fit " + u.plugin + ", which " + uses[u] + " uses it with in slot " + quote(u.slot) + ": " + f.Description, f.Reason})
		}
	}
	if len(faults) > 0 {
		return invalid(faults...)
	}
	return nil
}

// usesOf maps the slots that a secret fills to one of the subscriptions that say so.
func (s *Server) usesOf(ns, name string) map[use]string {
	uses := map[use]string{}
	for sub := range s.Registry.Snapshot().Subscriptions(ns, "") {
		if !sub.Mentions(name) {
			continue
		}
		for _, b := range bindings(sub.Proto()) {
			for slot, of := range b.GetSecrets() {
				if of == name {
					uses[use{b.GetPlugin(), slot}] = sub.Name()
				}
			}
		}
	}
	return uses
}
