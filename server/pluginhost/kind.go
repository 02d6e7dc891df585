package pluginhost

import (
	"bytes"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/santhosh-tekuri/jsonschema/v6"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// kind is one signer or transport that a process offers. Immutable; it outlives the process, so that
// configs can be checked while that is being restarted.
type kind struct {
	id     string
	proc   *process
	proto  *pluginv1.Kind
	schema *jsonschema.Schema // nil when the kind has no settings
}

func (k *kind) signer() bool { return k.proto.GetSigner() != nil }

// emits are the headers that it sets, lower case; none of a nil kind.
func (k *kind) emits() []string {
	switch {
	case k == nil:
		return nil
	case k.signer():
		return k.proto.GetSigner().GetEmitsHeaders()
	}
	return k.proto.GetTransport().GetMayAddHeaders()
}

func newKind(p *process, pk *pluginv1.Kind) (*kind, error) {
	k := &kind{id: pk.GetId(), proc: p, proto: pk}
	if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`).MatchString(k.id) {
		return nil, fmt.Errorf("kind %q: the id must match ^[a-z][a-z0-9-]{0,62}$", k.id)
	}
	if pk.GetSigner() == nil && pk.GetTransport() == nil {
		return nil, fmt.Errorf("kind %q is neither signer nor transport", k.id)
	}
	if pk.GetConfigSchema() == "" {
		return k, nil
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(pk.GetConfigSchema()))
	if err != nil {
		return nil, fmt.Errorf("kind %q: config schema is not JSON: %w", k.id, err)
	}
	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft2020)
	compiler.UseLoader(noLoader{}) // a schema is whole; it fetches nothing
	if err := compiler.AddResource("config.json", doc); err != nil {
		return nil, fmt.Errorf("kind %q: config schema: %w", k.id, err)
	}
	if k.schema, err = compiler.Compile("config.json"); err != nil {
		return nil, fmt.Errorf("kind %q: config schema: %w", k.id, err)
	}
	if ex := pk.GetConfigExample(); ex != "" {
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader([]byte(ex)))
		if err == nil {
			err = k.schema.Validate(v)
		}
		if err != nil {
			return nil, fmt.Errorf("kind %q: its example does not pass its schema: %w", k.id, err)
		}
	}
	return k, nil
}

type noLoader struct{}

func (noLoader) Load(url string) (any, error) {
	return nil, fmt.Errorf("schema refers to %s, which is not loaded", url)
}

// kindTable has every kind that a plugin of the host offers, or offered when it last ran. Readers take no lock.
type kindTable struct {
	mu    sync.Mutex // serialises writers
	table atomic.Pointer[map[string]*kind]
}

func (t *kindTable) all() map[string]*kind {
	if m := t.table.Load(); m != nil {
		return *m
	}
	return nil
}

func (t *kindTable) get(id string) *kind { return t.all()[id] }

func (t *kindTable) byScheme(scheme string) string {
	all := t.all()
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if slices.Contains(all[id].proto.GetTransport().GetUriSchemes(), scheme) {
			return id
		}
	}
	return ""
}

// set replaces what the processes of a plugin offer, in one step. A kind that another plugin offers already is refused.
func (t *kindTable) set(p *process, kinds []*kind) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.without(p.key)
	for _, k := range kinds {
		if other := next[k.id]; other != nil {
			return fmt.Errorf("kind %q is offered by %s already", k.id, other.proc.displayName())
		}
		next[k.id] = k
	}
	t.table.Store(&next)
	return nil
}

// remove forgets what the processes of a plugin offer.
func (t *kindTable) remove(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.without(key)
	t.table.Store(&next)
}

func (t *kindTable) without(key string) map[string]*kind {
	next := map[string]*kind{}
	for id, k := range t.all() {
		if k.proc.key != key {
			next[id] = k
		}
	}
	return next
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
