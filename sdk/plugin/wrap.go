package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Wrap offers a transport that does its work by another one, base, such as the first-party http with its mTLS, OAuth
// and proxies: for receivers that ask to be challenged in a way of their own, for instance, or answer in a form of
// their own. Its settings and secret slots are base's and those of C, which must not have the same names; the rest
// of what it declares is base's where opts say nothing, but for Batches, which it must be ready for itself, and URI schemes, which
// are never taken over: offer, for example, acme+https, and base sees https. A subscription that names the wrapper as its transport needs no such scheme.
//
// build is called as by Transport, and send makes an attempt as base does, with the request it is given: the one of the
// attempt, changed or not, or another with more in Request.MaxResponseBody. What it returns may be changed. A request
// with OwnershipCheck set is base's to answer unless that is taken away.
func Wrap[C any](id string, base Kind, build func(c C, t Target, send AttemptFunc) (AttemptFunc, error), opts ...Option) Kind {
	k := newKind[C](id, transportRole, opts)
	own, ownSlots := *k.schema, k.slots
	k.err = errors.Join(k.err, base.err)
	if base.role != transportRole {
		k.err = errors.Join(k.err, fmt.Errorf("kind %q: Wrap takes a transport, and %q is a %s", id, base.id, base.role))
	}
	check, err := checkOf[C](k.options.check)
	k.err = errors.Join(k.err, err)
	merged, err := k.merge(base)
	if k.err = errors.Join(k.err, err); k.err != nil {
		return k
	}
	k.schema = merged
	k.assemble = func(in spec) (built, []Problem) {
		mine, theirs, problems := split(in, &own, ownSlots, merged)
		config, found := decode[C](&own, ownSlots, mine, check)
		if mine.config == nil { // what there is is no object, as base will say
			found = nil
		}
		problems = append(problems, found...)
		theirs.target.URL = k.below(base, in.target.URL)
		below, found := base.assemble(theirs)
		problems = append(problems, found...)
		if in.shapeOnly || hasErrors(problems) {
			return built{}, problems
		}
		send := func(ctx context.Context, r *Request) (*Response, error) {
			whole := r.URL
			r.URL = k.below(base, whole)
			resp, err := below.attempt(ctx, r)
			r.URL = whole
			return resp, err
		}
		attempt, err := build(config, in.target, send)
		return built{attempt: attempt}, append(problems, buildProblem(err, attempt == nil)...)
	}
	return k
}

// below is the URI as base takes it.
func (k *Kind) below(base Kind, uri string) string {
	scheme, rest, _ := strings.Cut(uri, ":")
	if i := strings.LastIndexByte(scheme, '+'); i >= 0 && slices.Contains(k.options.schemes, scheme) && slices.Contains(base.options.schemes, scheme[i+1:]) {
		return scheme[i+1:] + ":" + rest
	}
	return uri
}

// merge takes over what base declares. It returns the schema of both.
func (k *Kind) merge(base Kind) (*schema, error) {
	merged := &schema{kind: "object", properties: slices.Concat(base.schema.properties, k.schema.properties)}
	for _, p := range k.schema.properties {
		if slices.ContainsFunc(base.schema.properties, func(b property) bool { return b.name == p.name }) {
			return nil, fmt.Errorf("kind %q: setting %q is one of %q, too", k.id, p.name, base.id)
		}
	}
	for _, s := range k.slots {
		if slices.ContainsFunc(base.slots, func(b slot) bool { return b.name == s.name }) {
			return nil, fmt.Errorf("kind %q: secret slot %q is one of %q, too", k.id, s.name, base.id)
		}
	}
	example := map[string]json.RawMessage{}
	for _, text := range [][]byte{base.example, k.example} {
		if len(text) > 0 {
			if err := json.Unmarshal(text, &example); err != nil {
				return nil, fmt.Errorf("kind %q: the example: %w", k.id, err)
			}
		}
	}
	var err error
	if k.example, err = json.Marshal(example); err != nil {
		return nil, fmt.Errorf("kind %q: the example: %w", k.id, err)
	}
	k.slots = slices.Concat(base.slots, k.slots)
	o, b := &k.options, base.options
	if o.doc == "" {
		o.doc = b.doc
	}
	if o.maxBody == 0 {
		o.maxBody = b.maxBody
	}
	o.ownership = o.ownership || b.ownership
	o.emits = slices.Concat(b.emits, o.emits)
	return merged, nil
}

// split parts an instance's settings and secrets; what neither has is a problem here or goes to base.
func split(in spec, own *schema, ownSlots []slot, merged *schema) (mine, theirs spec, problems []Problem) {
	mine, theirs = in, in
	mine.config = nil
	mine.secrets, theirs.secrets = map[string][][]byte{}, maps.Clone(in.secrets)
	for _, s := range ownSlots {
		if values, ok := in.secrets[s.name]; ok {
			mine.secrets[s.name] = values
			delete(theirs.secrets, s.name)
		}
	}
	raw := in.config
	if len(bytes.TrimSpace(raw)) == 0 {
		raw = []byte("{}")
	}
	tree, err := parseJSON(raw)
	fields, ok := tree.(map[string]any)
	if err != nil || !ok {
		return mine, theirs, nil
	}
	ours, rest := map[string]any{}, map[string]any{}
	for name, value := range fields {
		is := func(p property) bool { return p.name == name }
		switch {
		case slices.ContainsFunc(own.properties, is):
			ours[name] = value
		case slices.ContainsFunc(merged.properties, is):
			rest[name] = value
		default:
			problems = append(problems, merged.unknown(name, "/config"))
		}
	}
	mine.config, _ = json.Marshal(ours) // of what was read from JSON
	theirs.config, _ = json.Marshal(rest)
	return mine, theirs, problems
}
