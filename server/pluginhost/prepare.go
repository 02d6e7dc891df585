package pluginhost

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// maxSecret is the longest value of a secret, in bytes.
const maxSecret = 64 << 10

// Prepared is a secret's value as it is to be stored, and what its scheme says about it. All but Value may
// be empty.
type Prepared struct {
	// Value is the canonical form: valid UTF-8, 64 KiB at most.
	Value []byte
	// Algorithm is what the key is for, in the scheme's own word.
	Algorithm string
	// PublicKey is the public half as receivers of the scheme take it, JWK the same as RFC 7517 has it.
	PublicKey string
	JWK       string
	// KeyID is what signatures call the key.
	KeyID string
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
	s, ds := slotOf(k, slot)
	if s == nil {
		return Prepared{}, ds, nil
	}
	if len(value) > maxSecret {
		return Prepared{}, oneFault("value", "secret.too_long", "given %d bytes, want %d at most", len(value), maxSecret), nil
	}
	if s.GetFormat() != "" {
		return h.askForSecret(ctx, k, s, value, algorithm)
	}
	switch {
	case len(value) == 0:
		return Prepared{}, oneFault("value", "secret.required", "a value must be given: plugins/%s cannot make one for slot %q", id, s.GetName()), nil
	case !utf8.Valid(value):
		return Prepared{}, oneFault("value", "secret.encoding", "the value is not UTF-8 text"), nil
	}
	return Prepared{Value: slices.Clone(value)}, nil, nil
}

func oneFault(field, code, format string, args ...any) []Diagnostic {
	return []Diagnostic{{Field: field, Code: code, Summary: fmt.Sprintf(format, args...)}}
}

// slotOf finds the slot that a caller means.
func slotOf(k *kind, name string) (*pluginv1.SecretSlot, []Diagnostic) {
	slots := k.proto.GetSecretSlots()
	var names []string
	var required []*pluginv1.SecretSlot
	for _, s := range slots {
		if s.GetName() == name && name != "" {
			return s, nil
		}
		names = append(names, fmt.Sprintf("%q", s.GetName()))
		if s.GetRequired() {
			required = append(required, s)
		}
	}
	has := cmp.Or(strings.Join(names, ", "), "none")
	switch {
	case len(slots) == 0:
		return nil, oneFault("plugin", "secret.no_slot", "plugins/%s takes no secret", k.id)
	case name != "":
		return nil, oneFault("slot", "secret.unknown_slot", "plugins/%s has no secret slot %q; it has %s", k.id, name, has)
	case len(slots) == 1:
		return slots[0], nil
	case len(required) == 1:
		return required[0], nil
	}
	return nil, oneFault("slot", "secret.slot_required", "say which secret slot of plugins/%s the value is for; it has %s", k.id, has)
}

// askForSecret has the plugin read the value, or make one.
func (h *Host) askForSecret(ctx context.Context, k *kind, s *pluginv1.SecretSlot, value []byte, algorithm string) (Prepared, []Diagnostic, error) {
	if len(value) == 0 {
		switch {
		case len(s.GetAlgorithms()) == 0:
			return Prepared{}, oneFault("value", "secret.required", "a value must be given: plugins/%s cannot make one for slot %q (%s)",
				k.id, s.GetName(), s.GetFormat()), nil
		case algorithm != "" && !slices.Contains(s.GetAlgorithms(), algorithm):
			return Prepared{}, oneFault("algorithm", "secret.algorithm", "given %q, want one of %s",
				algorithm, strings.Join(s.GetAlgorithms(), ", ")), nil
		}
	}
	c := k.proc.conn.Load()
	if c == nil {
		return Prepared{}, nil, fmt.Errorf("%w: plugins/%s", ErrUnavailable, k.id)
	}
	var secrets redactor
	if len(value) > 0 {
		secrets.remember(string(value))
	}
	ctx, cancel := context.WithTimeout(ctx, h.timing.call)
	defer cancel()
	resp, err := c.plugin.PrepareSecret(ctx, &pluginv1.PrepareSecretRequest{
		Kind: k.id, Slot: s.GetName(), Value: value, Algorithm: algorithm,
	})
	if err != nil {
		why := err.Error()
		if status.Code(err) == codes.Unimplemented {
			why = "it says how values are written, but does not read them (capability secret.prepare)"
		}
		return Prepared{}, nil, fmt.Errorf("%w: plugins/%s: prepare secret: %s", ErrUnavailable, k.id, secrets.clean(why))
	}
	ds, refused := secretFaults(resp, &secrets)
	if refused {
		return Prepared{}, ds, nil
	}
	return preparedOf(k, resp, ds)
}

func secretFaults(resp *pluginv1.PrepareSecretResponse, secrets *redactor) (ds []Diagnostic, refused bool) {
	if len(resp.GetValue()) > 0 {
		secrets.remember(string(resp.GetValue()))
	}
	for _, d := range resp.GetDiagnostics() {
		field := "plugin"
		switch d.GetPointer() {
		case "/value", "/slot", "/algorithm":
			field = d.GetPointer()[1:]
		}
		warning := d.GetSeverity() == pluginv1.Diagnostic_SEVERITY_WARNING
		refused = refused || !warning
		ds = append(ds, Diagnostic{Field: field, Code: d.GetCode(), Summary: secrets.clean(d.GetSummary()), Warning: warning})
	}
	return ds, refused
}

// preparedOf holds what a plugin made to what can be stored and published.
func preparedOf(k *kind, resp *pluginv1.PrepareSecretResponse, ds []Diagnostic) (Prepared, []Diagnostic, error) {
	out := Prepared{
		Value: resp.GetValue(), Algorithm: resp.GetAlgorithm(), PublicKey: resp.GetPublicKey(), JWK: resp.GetJwk(), KeyID: resp.GetKeyId(),
	}
	var own redactor
	own.remember(string(out.Value))
	public := out.Algorithm + "\n" + out.PublicKey + "\n" + out.JWK + "\n" + out.KeyID
	fault := ""
	switch {
	case len(out.Value) == 0:
		fault = "it answered without a value"
	case len(out.Value) > maxSecret:
		fault = fmt.Sprintf("its value has %d bytes, and %d is the most", len(out.Value), maxSecret)
	case !utf8.Valid(out.Value):
		fault = "its value is not UTF-8 text"
	case own.clean(public) != public:
		fault = "it shows the value in what is public"
	default:
		return out, ds, nil
	}
	return Prepared{}, append(ds, oneFault("plugin", "secret.plugin_fault", "plugins/%s is at fault: %s", k.id, fault)...), nil
}
