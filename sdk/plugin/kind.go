package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Kind is one signer, transport or transformer that a plugin offers, made by Signer, Transport or Transformer.
type Kind struct {
	id       string
	options  kindOptions
	role     role
	schema   *schema
	slots    []slot
	example  []byte
	err      error
	assemble func(spec) (built, []Problem)
}

// role is what a kind is.
type role uint8

const (
	transportRole role = iota
	signerRole
	transformerRole
)

func (r role) String() string { return [...]string{"transport", "signer", "transformer"}[r] }

// spec is one instance as configured.
type spec struct {
	config  []byte
	secrets map[string][][]byte
	target  Target
	// shapeOnly leaves out the author's build, for want of secrets.
	shapeOnly bool
}

// built is one instance ready for use; one of the three is set.
type built struct {
	sign      SignFunc
	attempt   AttemptFunc
	transform TransformFunc
	// emits are the headers that the config has chosen, for kinds with the option EmitsFrom.
	emits []string
}

type kindOptions struct {
	doc     string
	schemes []string
	emits   []string
	example any
	maxBody int
	check   any
	// emitsFrom is a func(C) []string.
	emitsFrom any
	formats   map[string]SecretFormat
	// random signers sign the same request differently each time.
	random    bool
	ownership bool
	batches   bool
}

// Option adds to a Kind.
type Option func(*kindOptions)

// Doc is one line about the kind for people.
func Doc(text string) Option { return func(o *kindOptions) { o.doc = text } }

// Schemes are the URI schemes that a transport is the default for.
func Schemes(schemes ...string) Option { return func(o *kindOptions) { o.schemes = schemes } }

// Emits are the headers that a signer sets, or that a transport may add after signing.
func Emits(headers ...string) Option {
	return func(o *kindOptions) {
		for _, h := range headers {
			o.emits = append(o.emits, lower(h))
		}
	}
}

// EmitsFrom says which headers a signer sets with a config, where the config decides; they count instead of
// those of Emits when a subscription's signers are compared. C must be the config type of the kind.
func EmitsFrom[C any](headers func(C) []string) Option {
	return func(o *kindOptions) { o.emitsFrom = headers }
}

// Example is a config that passes the schema: a value of the config struct, of which fields that are zero and not
// required are left out, as are secrets; or anything that marshals to the JSON meant.
func Example(config any) Option { return func(o *kindOptions) { o.example = config } }

// MaxBody is the largest body a transport carries; 0 means no limit of its own.
func MaxBody(bytes int) Option { return func(o *kindOptions) { o.maxBody = bytes } }

// Check adds a check of meaning, after the schema's of shape. It does no I/O. Secrets may be empty: then
// only the config is checked. C must be the config type of the kind.
func Check[C any](check func(C, Target) []Problem) Option {
	return func(o *kindOptions) { o.check = check }
}

// Nondeterministic says that a signer's algorithm draws randomness, as ECDSA and RSA-PSS do; without it
// the same request must give the same bytes.
func Nondeterministic() Option { return func(o *kindOptions) { o.random = true } }

// OwnershipCheck says that a transport knows what to do with a Request whose OwnershipCheck is set.
func OwnershipCheck() Option { return func(o *kindOptions) { o.ownership = true } }

// Batches says that a transport carries a body with several events like any other, and knows what Request.Batch asks for.
func Batches() Option { return func(o *kindOptions) { o.batches = true } }

// Signer offers a signer. C is the config struct, whose tags the package comment lists; build is called once per
// instance and generation, also to validate a config, so it does no I/O: connections are made by the first
// attempt that needs them, and given back by Target.OnClose. A fault in the declaration (a bad id, a field type that has no
// JSON Schema) is reported by Serve.
func Signer[C any](id string, build func(C, Target) (SignFunc, error), opts ...Option) Kind {
	k := newKind[C](id, signerRole, opts)
	check, err := checkOf[C](k.options.check)
	k.err = errors.Join(k.err, err)
	emits, err := emitsOf[C](k.options.emitsFrom)
	k.err = errors.Join(k.err, err)
	schema, slots := k.schema, k.slots
	k.assemble = func(s spec) (built, []Problem) {
		config, problems := decode[C](schema, slots, s, check)
		if hasErrors(problems) {
			return built{}, problems
		}
		b := built{emits: emits(config)}
		if s.shapeOnly {
			return b, problems
		}
		var err error
		b.sign, err = build(config, s.target)
		return b, append(problems, buildProblem(err, b.sign == nil)...)
	}
	return k
}

// Transport offers a transport. It is the same as Signer otherwise.
func Transport[C any](id string, build func(C, Target) (AttemptFunc, error), opts ...Option) Kind {
	k := newKind[C](id, transportRole, opts)
	check, err := checkOf[C](k.options.check)
	k.err = errors.Join(k.err, err)
	schema, slots := k.schema, k.slots
	k.assemble = func(s spec) (built, []Problem) {
		config, problems := decode[C](schema, slots, s, check)
		if s.shapeOnly || hasErrors(problems) {
			return built{}, problems
		}
		attempt, err := build(config, s.target)
		return built{attempt: attempt}, append(problems, buildProblem(err, attempt == nil)...)
	}
	return k
}

// Transformer offers a transformer. It is the same as Signer otherwise.
func Transformer[C any](id string, build func(C, Target) (TransformFunc, error), opts ...Option) Kind {
	k := newKind[C](id, transformerRole, opts)
	check, err := checkOf[C](k.options.check)
	k.err = errors.Join(k.err, err)
	schema, slots := k.schema, k.slots
	k.assemble = func(s spec) (built, []Problem) {
		config, problems := decode[C](schema, slots, s, check)
		if s.shapeOnly || hasErrors(problems) {
			return built{}, problems
		}
		transform, err := build(config, s.target)
		return built{transform: transform}, append(problems, buildProblem(err, transform == nil)...)
	}
	return k
}

func newKind[C any](id string, as role, opts []Option) Kind {
	k := Kind{id: id, role: as}
	for _, o := range opts {
		o(&k.options)
	}
	if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`).MatchString(id) {
		k.err = fmt.Errorf("kind %q: the id must match ^[a-z][a-z0-9-]{0,62}$", id)
	}
	var err error
	if k.schema, k.slots, err = schemaOf[C](); err != nil {
		k.err = errors.Join(k.err, fmt.Errorf("kind %q: %w", id, err))
	}
	for name := range k.options.formats {
		if !slices.ContainsFunc(k.slots, func(s slot) bool { return s.name == name }) {
			k.err = errors.Join(k.err, fmt.Errorf("kind %q: option Format names slot %q, which its config does not have", id, name))
		}
	}
	for i := range k.slots {
		k.slots[i].format = k.options.formats[k.slots[i].name]
	}
	if k.options.example != nil {
		_, value := k.options.example.(C)
		_, pointer := k.options.example.(*C)
		if k.example, err = k.exampleText(value || pointer); err != nil {
			k.err = errors.Join(k.err, fmt.Errorf("kind %q: the example: %w", id, err))
		}
	}
	return k
}

// exampleText is the example as JSON; ofConfig says that it is a value of the config struct.
func (k *Kind) exampleText(ofConfig bool) ([]byte, error) {
	text, err := json.Marshal(k.options.example)
	if err != nil {
		return nil, err
	}
	tree, err := parseJSON(text)
	if err != nil {
		return nil, err
	}
	if fields, ok := tree.(map[string]any); ok && ofConfig {
		for _, s := range k.slots {
			delete(fields, s.field)
		}
		k.schema.prune(tree)
	}
	if problems := k.schema.check(k.schema.fill(cloneJSON(tree)), "/config"); len(problems) > 0 {
		return nil, fmt.Errorf("%s: %s", problems[0].Pointer, problems[0].Summary)
	}
	return json.Marshal(tree)
}

func checkOf[C any](given any) (func(C, Target) []Problem, error) {
	if given == nil {
		return nil, nil
	}
	check, ok := given.(func(C, Target) []Problem)
	if !ok {
		return nil, fmt.Errorf("option Check takes %T, want func(%T, Target) []Problem", given, *new(C))
	}
	return check, nil
}

func emitsOf[C any](given any) (func(C) []string, error) {
	if given == nil {
		return func(C) []string { return nil }, nil
	}
	headers, ok := given.(func(C) []string)
	if !ok {
		return nil, fmt.Errorf("option EmitsFrom takes %T, want func(%T) []string", given, *new(C))
	}
	return func(c C) []string {
		names := headers(c)
		for i := range names {
			names[i] = lower(names[i])
		}
		return names
	}, nil
}

func buildProblem(err error, absent bool) []Problem {
	switch {
	case err != nil:
		return []Problem{{Code: "config.rejected", Summary: err.Error()}}
	case absent:
		return []Problem{{Code: "config.rejected", Summary: "the plugin built nothing for this config"}}
	}
	return nil
}

func hasErrors(problems []Problem) bool {
	for _, p := range problems {
		if !p.Warning {
			return true
		}
	}
	return false
}

// describe is the kind as told to the host.
func (k *Kind) describe() (*pluginv1.Kind, error) {
	out := &pluginv1.Kind{Id: k.id, Description: k.options.doc, ConfigExample: string(k.example)}
	doc, err := k.schema.document()
	if err != nil {
		return nil, fmt.Errorf("kind %q: %w", k.id, err)
	}
	out.ConfigSchema = string(doc)
	for _, s := range k.slots {
		out.SecretSlots = append(out.SecretSlots, &pluginv1.SecretSlot{
			Name: s.name, Description: s.doc, Required: s.required, Kinds: s.kinds,
			Algorithms: s.format.Algorithms, Format: s.format.Doc,
		})
	}
	switch k.role {
	case transformerRole:
		out.Traits = &pluginv1.Kind_Transformer{Transformer: &pluginv1.TransformerTraits{}}
		return out, nil
	case signerRole:
		out.Traits = &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{
			EmitsHeaders: k.options.emits, Deterministic: !k.options.random,
		}}
		return out, nil
	default:
	}
	out.Traits = &pluginv1.Kind_Transport{Transport: &pluginv1.TransportTraits{
		UriSchemes: k.options.schemes, MayAddHeaders: k.options.emits, MaxBodyBytes: uint32(k.options.maxBody),
		OwnershipCheck: k.options.ownership, Batches: k.options.batches,
	}}
	return out, nil
}
