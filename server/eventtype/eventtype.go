// Package eventtype owns what is registered of the types of events: their rules, their storage in etcd by compare-and-set,
// the immutable catalogs that the publish path asks, and the check of a payload against its type's schema.
//
// It guarantees that a write returns only after its own catalog shows it, that readers never wait for etcd, and that a
// schema is compiled when the first event needs it, in its bounded turn, and not for the events of other types. What is
// kept of compiled schemas is bounded in bytes. What a change or a look-up costs does not grow with how many types there
// are, but for a logarithm. It does not know subscriptions, journals or the wire.
package eventtype

import (
	"context"
	"fmt"
	"iter"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidwall/btree"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/eventtype/schema"
)

// Type is one event type as stored. It does not change, but for what is counted of its events.
type Type struct {
	// Proto is all of it, and Brief all but the texts of schemas and the example. Neither must be changed.
	Proto, Brief *grapnelv1.EventType
	// Namespace is an ID, and ID the type as events have it.
	Namespace, ID string
	// Revision is etcd's modification revision of the stored value.
	Revision int64

	store    *Store
	versions []*version
	// size is what it counts for in its namespace.
	size int

	mismatches atomic.Int64
	last       atomic.Pointer[Mismatch]
}

// Mismatch is the latest of a type.
type Mismatch struct {
	// Text says what was wrong, in 200 bytes at most.
	Text string
	Time time.Time
}

// version is one schema, compiled when it is first needed.
type version struct {
	namespace, name, text string
	deprecated            bool

	id       func() string // its $id
	compiled atomic.Pointer[compiled]
}

// Catalog is what one namespace has registered. It is immutable; nil has nothing.
type Catalog struct {
	types *btree.Map[string, *Type]
	// size is what all its types count for.
	size int
}

// Get returns one type, nil when it is not registered.
func (c *Catalog) Get(id string) *Type {
	if c == nil {
		return nil
	}
	t, _ := c.types.Get(id)
	return t
}

// Types goes through the types in their order, beginning behind after.
func (c *Catalog) Types(after string) iter.Seq[*Type] {
	return func(yield func(*Type) bool) {
		if c == nil {
			return
		}
		c.types.Ascend(after, func(id string, t *Type) bool { return id == after || yield(t) })
	}
}

// Enforced reports whether payloads are looked at.
func (t *Type) Enforced() bool {
	return len(t.versions) > 0 && (t.Rejects() || t.Proto.GetEnforcement() == grapnelv1.EventType_ENFORCEMENT_WARN)
}

// Rejects reports whether an event that does not fit is to be refused.
func (t *Type) Rejects() bool {
	return t.Proto.GetEnforcement() == grapnelv1.EventType_ENFORCEMENT_REJECT
}

// Mismatches tells how many events did not fit since the type was changed or the process started, and the latest; nil when
// there was none.
func (t *Type) Mismatches() (int64, *Mismatch) { return t.mismatches.Load(), t.last.Load() }

// Check returns nil when the type's schema allows the payload, a *MismatchError when it does not, which is counted, and
// ctx's error when that ended before the schema's turn to be compiled had come, or the payload was checked. dataSchema is the event's data_schema.
// Types that are not Enforced allow everything.
func (t *Type) Check(ctx context.Context, contentType, dataSchema string, payload []byte) error {
	if !t.Enforced() {
		return nil
	}
	v := t.version(dataSchema)
	if v == nil {
		return t.mismatch(&MismatchError{Type: t.ID, Field: "data_schema", Faults: []schema.Fault{{
			Description: "names no version of the schema of " + quote(t.ID) + "; there are " + t.versionNames(), Keyword: "version",
		}}})
	}
	if !isJSON(contentType) {
		return t.mismatch(&MismatchError{Type: t.ID, Version: v.name, Field: "data_content_type", Faults: []schema.Fault{{
			Description: "is not that of JSON, which events of type " + quote(t.ID) + " must have", Keyword: "json",
		}}})
	}
	c, err := t.store.programs.get(ctx, v)
	if err != nil {
		return err
	}
	if c.err != nil { // taken by another version of this program
		return t.mismatch(&MismatchError{Type: t.ID, Version: v.name, Field: "type", Faults: []schema.Fault{{
			Description: "has a schema that this server cannot compile: " + c.err.Error(), Keyword: "compile",
		}}})
	}
	bad, err := c.schema.Check(ctx, payload)
	if err != nil {
		return err
	}
	if bad != nil {
		return t.mismatch(&MismatchError{Type: t.ID, Version: v.name, Field: "payload", Faults: bad.Faults, More: bad.More})
	}
	return nil
}

// mismatch counts an error and returns it.
func (t *Type) mismatch(err *MismatchError) error {
	t.mismatches.Add(1)
	now := time.Now()
	if last := t.last.Load(); last == nil || now.Sub(last.Time) > time.Second {
		t.last.Store(&Mismatch{clipped(err.Error(), 200), now})
	}
	return err
}

// version is the schema that applies to events with a data_schema, by version or $id; with "" the last that is not
// deprecated, or the last. Nil: there is none such.
func (t *Type) version(dataSchema string) *version {
	if dataSchema == "" {
		for i := len(t.versions) - 1; i >= 0; i-- {
			if !t.versions[i].deprecated {
				return t.versions[i]
			}
		}
		if len(t.versions) > 0 {
			return t.versions[len(t.versions)-1]
		}
		return nil
	}
	for _, v := range t.versions {
		if v.name == dataSchema {
			return v
		}
	}
	for _, v := range t.versions {
		if v.id() == dataSchema {
			return v
		}
	}
	return nil
}

func (t *Type) versionNames() string {
	names := make([]string, len(t.versions))
	for i, v := range t.versions {
		names[i] = v.name
	}
	return strings.Join(names, ", ")
}

// Sample returns a payload for a version, as for version; of the one for events without data_schema it is the example, if
// there is one. Errors: *NoSampleError, and ctx's.
func (t *Type) Sample(ctx context.Context, dataSchema string) (payload []byte, of string, err error) {
	v := t.version(dataSchema)
	switch {
	case v == nil && dataSchema != "":
		return nil, "", &NoSampleError{t.Proto.GetName(), "it has no version " + quote(dataSchema)}
	case t.Proto.GetExample() != "" && v == t.version(""):
		if v != nil {
			of = v.name
		}
		return []byte(t.Proto.GetExample()), of, nil
	case v == nil:
		return nil, "", &NoSampleError{t.Proto.GetName(), "it has neither a schema nor an example"}
	}
	leave, err := enter(ctx, t.store.programs.samples, t.Namespace)
	if err != nil {
		return nil, "", err
	}
	defer leave()
	payload, err = schema.Sample(ctx, []byte(v.text))
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, "", err
	case err != nil:
		return nil, "", &NoSampleError{t.Proto.GetName(), clipped(err.Error(), 400)}
	}
	return payload, v.name, nil
}

// decode reads a stored type.
func decode(s *Store, key string, value []byte, revision int64) (*Type, error) {
	ns, p, err := read(key, value)
	if err != nil {
		return nil, err
	}
	return s.made(ns, p, revision), nil
}

// read reads the message that is stored under a name.
func read(name string, value []byte) (ns string, p *grapnelv1.EventType, err error) {
	p = &grapnelv1.EventType{}
	if err := proto.Unmarshal(value, p); err != nil {
		return "", nil, fmt.Errorf("read event type: %w", err)
	}
	ns, ok := namespaceIn(name)
	if !ok || Name(ns, p.GetType()) != name {
		return "", nil, fmt.Errorf("holds the event type %q", p.GetType())
	}
	return ns, p, nil
}

// made is a type of its stored message.
func (s *Store) made(ns string, p *grapnelv1.EventType, revision int64) *Type {
	p.Name, p.Etag = Name(ns, p.GetType()), etag(revision)
	t := &Type{Proto: p, Namespace: ns, ID: p.GetType(), Revision: revision, store: s, size: sizeOf(p)}
	for _, v := range p.GetSchemas() {
		t.versions = append(t.versions, &version{
			namespace: ns, name: v.GetVersion(), text: v.GetJsonSchema(), deprecated: v.GetDeprecated(),
			id: sync.OnceValue(func() string { return schema.ID([]byte(v.GetJsonSchema())) }),
		})
	}
	t.Brief = brief(p)
	return t
}

// brief leaves the long texts out.
func brief(p *grapnelv1.EventType) *grapnelv1.EventType {
	out := &grapnelv1.EventType{
		Name: p.GetName(), Type: p.GetType(), Description: p.GetDescription(),
		Deprecated: p.GetDeprecated(), DeprecationReason: p.GetDeprecationReason(), Enforcement: p.GetEnforcement(),
		CreateTime: p.GetCreateTime(), UpdateTime: p.GetUpdateTime(), Etag: p.GetEtag(),
	}
	for _, v := range p.GetSchemas() {
		out.Schemas = append(out.Schemas, &grapnelv1.EventTypeSchema{Version: v.GetVersion(), Deprecated: v.GetDeprecated()})
	}
	return out
}

// sizeOf is what a type counts for: its bytes, and about what is kept beside them.
func sizeOf(p *grapnelv1.EventType) int { return proto.Size(p) + 1024 }

// Name is the full name of a type: what is not unreserved in RFC 3986 stands as %XX.
func Name(ns, id string) string { return namespaceName(ns) + "/eventTypes/" + escape(id) }

func namespaceName(ns string) string { return "namespaces/" + ns }

func escape(id string) string {
	const hex = "0123456789ABCDEF"
	b := make([]byte, 0, len(id))
	for i := range len(id) {
		c := id[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._~-", c) >= 0 {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return string(b)
}

// namespaceIn is the namespace's ID in the name of a type.
func namespaceIn(name string) (string, bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != "namespaces" || parts[2] != "eventTypes" || parts[1] == "" || parts[3] == "" {
		return "", false
	}
	return parts[1], true
}

func etag(revision int64) string { return strconv.FormatInt(revision, 36) }

// isJSON reports whether a media type is one of JSON.
func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	return media == "application/json" || media == "text/json" || strings.HasSuffix(media, "+json")
}

func quote(s string) string { return strconv.Quote(clipped(s, 80)) }

func clipped(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most-len("…")], "") + "…"
	}
	return s
}
