package plugin

import (
	"context"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// SecretFormat says how the values of a secret slot are made and read. It is the scheme that knows: the
// same whsec_… is base64 to Standard Webhooks and plain text to Stripe.
type SecretFormat struct {
	// Doc says in a few words how a value is written: "whsec_ and base64 of 24 to 64 bytes".
	Doc string
	// Algorithms are what Generate can make, the default first; none when values must be given.
	Algorithms []string
	// Generate makes a value. It is called with one of Algorithms.
	Generate func(algorithm string) ([]byte, error)
	// Read checks a value and says what is in it. Its error goes to people: it says what is wrong and what
	// would be right, and shows nothing of the value. Every value that a subscription is to be configured
	// with is read first, so the kind's own code meets only values that Read has taken. Required.
	Read func(value []byte) (SecretInfo, error)
}

// SecretInfo is what a scheme reads in a value. All of it may be empty.
type SecretInfo struct {
	// Value is the canonical form, to be stored instead of what was given; nil keeps that.
	Value []byte
	// Algorithm is what the key is for, in the scheme's own word.
	Algorithm string
	// PublicKey is the public half in the form that receivers of the scheme take.
	PublicKey string
	// JWK is the public half as JSON Web Key (RFC 7517).
	JWK string
	// KeyID is what signatures call the key.
	KeyID string
}

// Format says how the values of a secret slot are made and read.
func Format(slot string, f SecretFormat) Option {
	return func(o *kindOptions) {
		if o.formats == nil {
			o.formats = map[string]SecretFormat{}
		}
		o.formats[slot] = f
	}
}

// readAll complains about values that the slot's format does not take.
func (s *slot) readAll(values [][]byte) []Problem {
	if s.format.Read == nil {
		return nil
	}
	var problems []Problem
	for i, value := range values {
		_, err := s.format.Read(value)
		if err == nil {
			continue
		}
		which := ""
		if len(values) > 1 {
			which = "live version " + strconv.Itoa(i+1) + " of " + strconv.Itoa(len(values)) + ", newest first: "
		}
		problems = append(problems, Problem{
			Pointer: "/secrets/" + escape(s.name), Code: "secret.malformed", Summary: which + err.Error(),
		})
	}
	return problems
}

func hasFormats(k *pluginv1.Kind) bool {
	return slices.ContainsFunc(k.GetSecretSlots(), func(s *pluginv1.SecretSlot) bool { return s.GetFormat() != "" })
}

// PrepareSecret checks a value, or makes one.
func (s *server) PrepareSecret(_ context.Context, req *pluginv1.PrepareSecretRequest) (resp *pluginv1.PrepareSecretResponse, err error) {
	refuse := func(code, pointer, format string, args ...any) (*pluginv1.PrepareSecretResponse, error) {
		d := Problem{Code: code, Pointer: pointer, Summary: fmt.Sprintf(format, args...)}.wire([][]byte{req.GetValue()})
		return &pluginv1.PrepareSecretResponse{Diagnostics: []*pluginv1.Diagnostic{d}}, nil
	}
	k := s.kinds[req.GetKind()]
	if k == nil {
		return refuse("secret.unknown_kind", "", "%s offers no kind %q", s.name, req.GetKind())
	}
	i := slices.IndexFunc(k.slots, func(sl slot) bool { return sl.name == req.GetSlot() })
	if i < 0 {
		return refuse("secret.unknown_slot", "", "%s has no secret slot %q; there %s", k.id, req.GetSlot(), oneOf(slotNames(k.slots)))
	}
	f, value := k.slots[i].format, req.GetValue()
	defer func() {
		if p := recover(); p != nil {
			s.log().Error("panic in secret format", "kind", k.id, "slot", req.GetSlot(), "stack", string(debug.Stack()))
			resp, err = refuse(CodePanic, "", "the plugin panicked on this value")
		}
	}()
	if len(value) == 0 {
		algorithm := req.GetAlgorithm()
		switch {
		case f.Generate == nil || len(f.Algorithms) == 0:
			return refuse("secret.required", "/value", "a value must be given: %s cannot make one", k.id)
		case algorithm == "":
			algorithm = f.Algorithms[0]
		case !slices.Contains(f.Algorithms, algorithm):
			return refuse("secret.algorithm", "/algorithm", "given %q, want one of %s", algorithm, strings.Join(f.Algorithms, ", "))
		}
		if value, err = f.Generate(algorithm); err != nil {
			return refuse("secret.generate", "", "no value could be made: %v", err)
		}
	}
	if f.Read == nil {
		return &pluginv1.PrepareSecretResponse{Value: value}, nil
	}
	info, err := f.Read(value)
	if err != nil {
		return refuse("secret.malformed", "/value", "%v", err)
	}
	if info.Value != nil {
		value = info.Value
	}
	return &pluginv1.PrepareSecretResponse{
		Value: value, Algorithm: info.Algorithm, PublicKey: info.PublicKey, Jwk: info.JWK, KeyId: info.KeyID,
	}, nil
}
