package check

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grapnel/grapnel/internal/redact"
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

// Secret checks a value for a slot, or has the plugin make one when it is empty; see Host.PrepareSecret. plugin is nil
// when it does not run, which matters only for slots that have a format. The error says that there is nobody to ask, or
// what came of it, without secrets.
func Secret(ctx context.Context, plugin Plugin, k *Kind, s *pluginv1.SecretSlot, value []byte, algorithm string) (Prepared, []Diagnostic, error) {
	if len(value) > maxSecret {
		return Prepared{}, oneFault("value", "secret.too_long", "given %d bytes, want %d at most", len(value), maxSecret), nil
	}
	if s.GetFormat() != "" {
		return askForSecret(ctx, plugin, k, s, value, algorithm)
	}
	switch {
	case len(value) == 0:
		return Prepared{}, oneFault("value", "secret.required", "a value must be given: plugins/%s cannot make one for slot %q", k.ID, s.GetName()), nil
	case !utf8.Valid(value):
		return Prepared{}, oneFault("value", "secret.encoding", "the value is not UTF-8 text"), nil
	}
	return Prepared{Value: slices.Clone(value)}, nil, nil
}

func oneFault(field, code, format string, args ...any) []Diagnostic {
	return []Diagnostic{{Field: field, Code: code, Summary: fmt.Sprintf(format, args...)}}
}

// Slot finds the secret slot of a kind that a caller means: the only one, or the only one that is required, when name
// is empty. Otherwise it says what is wrong.
func Slot(k *Kind, name string) (*pluginv1.SecretSlot, []Diagnostic) {
	slots := k.Proto.GetSecretSlots()
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
		return nil, oneFault("plugin", "secret.no_slot", "plugins/%s takes no secret", k.ID)
	case name != "":
		return nil, oneFault("slot", "secret.unknown_slot", "plugins/%s has no secret slot %q; it has %s", k.ID, name, has)
	case len(slots) == 1:
		return slots[0], nil
	case len(required) == 1:
		return required[0], nil
	}
	return nil, oneFault("slot", "secret.slot_required", "say which secret slot of plugins/%s the value is for; it has %s", k.ID, has)
}

// askForSecret has the plugin read the value, or make one.
func askForSecret(ctx context.Context, plugin Plugin, k *Kind, s *pluginv1.SecretSlot, value []byte, algorithm string) (Prepared, []Diagnostic, error) {
	if len(value) == 0 {
		switch {
		case len(s.GetAlgorithms()) == 0:
			return Prepared{}, oneFault("value", "secret.required", "a value must be given: plugins/%s cannot make one for slot %q (%s)",
				k.ID, s.GetName(), s.GetFormat()), nil
		case algorithm != "" && !slices.Contains(s.GetAlgorithms(), algorithm):
			return Prepared{}, oneFault("algorithm", "secret.algorithm", "given %q, want one of %s",
				algorithm, strings.Join(s.GetAlgorithms(), ", ")), nil
		}
	}
	if plugin == nil {
		return Prepared{}, nil, ErrUnavailable
	}
	var secrets redact.Set
	secrets.Add(string(value))
	resp, err := plugin.PrepareSecret(ctx, &pluginv1.PrepareSecretRequest{
		Kind: k.ID, Slot: s.GetName(), Value: value, Algorithm: algorithm,
	})
	if err != nil {
		why := err.Error()
		if status.Code(err) == codes.Unimplemented {
			why = "it says how values are written, but does not read them (capability secret.prepare)"
		}
		return Prepared{}, nil, fmt.Errorf("%w: prepare secret: %s", ErrUnavailable, said(&secrets, why))
	}
	ds, refused := secretFaults(resp, &secrets)
	if refused {
		return Prepared{}, ds, nil
	}
	return preparedOf(k, resp, ds)
}

func secretFaults(resp *pluginv1.PrepareSecretResponse, secrets *redact.Set) (ds []Diagnostic, refused bool) {
	secrets.Add(string(resp.GetValue()))
	ds = diagnostics(secrets, resp.GetDiagnostics(), func(pointer string) string {
		switch pointer {
		case "/value", "/slot", "/algorithm":
			return pointer[1:]
		}
		return "plugin"
	})
	for _, d := range ds {
		refused = refused || !d.Warning
	}
	return ds, refused
}

// preparedOf holds what a plugin made to what can be stored and published.
func preparedOf(k *Kind, resp *pluginv1.PrepareSecretResponse, ds []Diagnostic) (Prepared, []Diagnostic, error) {
	out := Prepared{
		Value: resp.GetValue(), Algorithm: resp.GetAlgorithm(), PublicKey: resp.GetPublicKey(), JWK: resp.GetJwk(), KeyID: resp.GetKeyId(),
	}
	var own redact.Set
	own.Add(string(out.Value))
	public := out.Algorithm + "\n" + out.PublicKey + "\n" + out.JWK + "\n" + out.KeyID
	fault := ""
	switch {
	case len(out.Value) == 0:
		fault = "it answered without a value"
	case len(out.Value) > maxSecret:
		fault = fmt.Sprintf("its value has %d bytes, and %d is the most", len(out.Value), maxSecret)
	case !utf8.Valid(out.Value):
		fault = "its value is not UTF-8 text"
	case own.Clean(public) != public:
		fault = "it shows the value in what is public"
	default:
		return out, ds, nil
	}
	return Prepared{}, append(ds, oneFault("plugin", "secret.plugin_fault", "plugins/%s is at fault: %s", k.ID, fault)...), nil
}
