package eventtype

import (
	"context"
	"errors"
	"fmt"
	"net/url"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/eventtype/schema"
	"github.com/grapnel/grapnel/server/keyspace"
)

const (
	// MaxTypeBytes bounds the schemas of one type together.
	MaxTypeBytes = 512 << 10
	// MaxNamespaceBytes bounds the types of one namespace together, with a KiB counted for each.
	MaxNamespaceBytes = 32 << 20
	// writeTries is how often a write begins again when somebody else's comes between.
	writeTries = 8
)

// UpdateOptions for Update.
type UpdateOptions struct {
	// AllowMissing creates the type when it is absent; mutate then gets an empty message.
	AllowMissing bool
	// ValidateOnly checks everything and stores nothing.
	ValidateOnly bool
}

// Create registers a type. Of p, which may be nil, name, type, times and etag do not count. Errors: *InvalidError,
// ErrExists, ErrNamespaceDeleted, ErrUnavailable, *FullError, and *NotFoundError for the namespace.
func (s *Store) Create(ctx context.Context, ns, id string, p *grapnelv1.EventType, validateOnly bool) (*Type, error) {
	return s.edit(ctx, ns, id, validateOnly, func(it keyspace.Item, _ *grapnelv1.EventType) (*grapnelv1.EventType, error) {
		if it.Revision != 0 && it.Err == nil {
			return nil, fmt.Errorf("%s %w", Name(ns, id), ErrExists)
		}
		return proto.CloneOf(p), nil
	})
}

// Update lets mutate change a copy of a type, of the etag's version when one is given; what identifies it is put back.
// mutate may run several times. Errors also: *EtagError, and *NotFoundError for the type.
func (s *Store) Update(ctx context.Context, ns, id, etag string, mutate func(*grapnelv1.EventType) error, o UpdateOptions) (*Type, error) {
	return s.edit(ctx, ns, id, o.ValidateOnly, func(it keyspace.Item, stored *grapnelv1.EventType) (*grapnelv1.EventType, error) {
		if it.Revision == 0 && (!o.AllowMissing || etag != "") {
			return nil, &NotFoundError{Name: Name(ns, id)}
		}
		if err := checkEtag(etag, it); err != nil {
			return nil, err
		}
		if it.Err != nil {
			return nil, it.Err
		}
		wanted := proto.CloneOf(stored)
		return wanted, mutate(wanted)
	})
}

// Delete removes a type. It works in a deleted namespace, too. Errors: as Update.
func (s *Store) Delete(ctx context.Context, ns, id, etag string) error {
	name := Name(ns, id)
	_, err := s.space.Edit(ctx, []string{namespaceName(ns), keyPrefix + name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		if err := checkNamespace(items[0]); err != nil && !errors.Is(err, ErrNamespaceDeleted) {
			return keyspace.Txn{}, err
		}
		if items[1].Revision == 0 {
			return keyspace.Txn{}, &NotFoundError{Name: name}
		}
		if err := checkEtag(etag, items[1]); err != nil {
			return keyspace.Txn{}, err
		}
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Delete(keyPrefix + name)}}, nil
	})
	return err
}

// plan makes the new content out of what is stored, an empty message where there is nothing.
type plan func(it keyspace.Item, stored *grapnelv1.EventType) (*grapnelv1.EventType, error)

// edit stores what plan makes, in a namespace that is in use. Schemas are compiled outside the time that a write may take
// and without a writer's place: what was checked is written only if plan still makes the same of what is stored then.
func (s *Store) edit(ctx context.Context, ns, id string, validateOnly bool, plan plan) (*Type, error) {
	name := Name(ns, id)
	keys := []string{namespaceName(ns), keyPrefix + name}
	for range writeTries {
		items, err := s.space.Read(ctx, keys...)
		if err != nil {
			return nil, err
		}
		wanted, _, err := s.planned(id, items, plan)
		if err != nil {
			return nil, err
		}
		if err := s.check(ctx, ns, id, wanted); err != nil {
			return nil, err
		}
		if validateOnly {
			t := s.made(ns, wanted, items[1].Revision)
			if t.Proto.Etag = ""; items[1].Revision != 0 {
				t.Proto.Etag = etag(items[1].Revision)
			}
			return t, nil
		}
		t, err := s.write(ctx, ns, id, keys, wanted, plan)
		if !errors.Is(err, errChanged) {
			return t, err
		}
	}
	return nil, fmt.Errorf("%w: %s is changed by others all the time", ErrUnavailable, name)
}

// planned is what plan makes, without what is not the caller's, and what is stored.
func (s *Store) planned(id string, items []keyspace.Item, plan plan) (wanted, stored *grapnelv1.EventType, err error) {
	if err := checkNamespace(items[0]); err != nil {
		return nil, nil, err
	}
	stored = &grapnelv1.EventType{}
	if it := &items[1]; it.Revision != 0 && it.Err == nil {
		_, found, err := read(it.Key[len(keyPrefix):], it.Value)
		if err != nil { // as good as damaged
			it.Err = fmt.Errorf("%s in etcd %w: %w; create it again, or restore etcd from a backup", s.space.Key(it.Key), ErrDamaged, err)
		} else {
			stored = found
		}
	}
	if wanted, err = plan(items[1], stored); err != nil {
		return nil, nil, err
	}
	if wanted == nil {
		wanted = &grapnelv1.EventType{}
	}
	wanted.Name, wanted.Type, wanted.Etag = "", id, ""
	wanted.CreateTime, wanted.UpdateTime = stored.GetCreateTime(), stored.GetUpdateTime()
	return wanted, stored, nil
}

// write stores wanted if plan still makes it.
func (s *Store) write(ctx context.Context, ns, id string, keys []string, wanted *grapnelv1.EventType, plan plan) (*Type, error) {
	release, err := s.reserve(ns, id, sizeOf(wanted))
	if err != nil {
		return nil, err
	}
	defer release()
	var stored *grapnelv1.EventType
	current := int64(0)
	revision, err := s.space.Edit(ctx, keys, func(items []keyspace.Item) (keyspace.Txn, error) {
		now, before, err := s.planned(id, items, plan)
		if err != nil {
			return keyspace.Txn{}, err
		}
		if !proto.Equal(now, wanted) {
			return keyspace.Txn{}, errChanged
		}
		stored, current = now, items[1].Revision
		if current != 0 && items[1].Err == nil && proto.Equal(now, before) {
			return keyspace.Txn{}, nil
		}
		stored = proto.CloneOf(now)
		stored.UpdateTime = timestamppb.Now()
		if stored.CreateTime == nil {
			stored.CreateTime = stored.UpdateTime
		}
		value, err := proto.MarshalOptions{Deterministic: true}.Marshal(stored)
		if err != nil {
			return keyspace.Txn{}, fmt.Errorf("encode %s: %w", Name(ns, id), err)
		}
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(keys[1], value)}}, nil
	})
	if err != nil {
		return nil, err
	}
	if revision == 0 {
		revision = current
	}
	return s.made(ns, stored, revision), nil
}

// reserve keeps room in a namespace for what is being written, so that many at once do not overrun it together.
func (s *Store) reserve(ns, id string, size int) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	catalog := s.In(ns)
	used := 0
	if catalog != nil {
		used = catalog.size
	}
	if old := catalog.Get(id); old != nil {
		if size <= old.size { // one that does not grow needs no room
			return func() {}, nil
		}
		used -= old.size
	}
	if used+s.writing[ns]+size > MaxNamespaceBytes {
		return nil, &FullError{Namespace: ns}
	}
	s.writing[ns] += size
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.writing[ns] -= size; s.writing[ns] == 0 {
			delete(s.writing, ns)
		}
	}, nil
}

// check returns an *InvalidError for content that may not be stored. Schemas that are stored already are not compiled
// again.
func (s *Store) check(ctx context.Context, ns, id string, p *grapnelv1.EventType) error {
	var bad InvalidError
	add := func(field, reason, format string, args ...any) {
		bad.Violations = append(bad.Violations, Violation{Field: field, Reason: reason, Description: fmt.Sprintf(format, args...)})
	}
	if p.GetDeprecationReason() != "" && !p.GetDeprecated() {
		add("event_type.deprecation_reason", "deprecation_reason", "is only for a type that is deprecated")
	}
	total := 0
	for _, v := range p.GetSchemas() {
		total += len(v.GetJsonSchema())
	}
	if total > MaxTypeBytes {
		add("event_type.schemas", "schemas.size", "have %d bytes together; at most %d are allowed", total, MaxTypeBytes)
		return &bad
	}
	known := s.In(ns).Get(id)
	seen := make(map[string]bool)
	for i, v := range p.GetSchemas() {
		at := fmt.Sprintf("event_type.schemas[%d]", i)
		if seen[v.GetVersion()] {
			add(at+".version", "schema_version.unique", "%s is the version of another one, too", quote(v.GetVersion()))
		}
		seen[v.GetVersion()] = true
		if known.has(v.GetJsonSchema()) {
			continue
		}
		if err := s.compile(ctx, ns, v.GetJsonSchema()); err != nil {
			wrong, ok := errors.AsType[*schema.Error](err)
			if !ok {
				return err
			}
			add(at+".json_schema"+clipped(wrong.Pointer, 100), wrong.Reason, "%s", wrong.Description)
		}
	}
	if len(bad.Violations) == 0 && p.GetExample() != "" {
		if err := s.checkExample(ctx, ns, p, add); err != nil {
			return err
		}
	}
	if len(bad.Violations) > 0 {
		return &bad
	}
	return nil
}

// has reports whether a schema of the type has this text.
func (t *Type) has(text string) bool {
	if t == nil {
		return false
	}
	for _, v := range t.versions {
		if v.text == text {
			return true
		}
	}
	return false
}

// compile takes a turn.
func (s *Store) compile(ctx context.Context, ns, text string) error {
	leave, err := enter(ctx, s.programs.gate, ns)
	if err != nil {
		return err
	}
	defer leave()
	_, err = schema.Compile([]byte(text))
	return err
}

// checkExample checks an example against the schema that applies to events without data_schema.
func (s *Store) checkExample(ctx context.Context, ns string, p *grapnelv1.EventType, add func(field, reason, format string, args ...any)) error {
	text := "true"
	if v := s.made(ns, proto.CloneOf(p), 0).version(""); v != nil {
		text = v.text
	}
	leave, err := enter(ctx, s.programs.gate, ns)
	if err != nil {
		return err
	}
	defer leave()
	compiled, err := schema.Compile([]byte(text))
	if err != nil {
		return nil //nolint:nilerr // a stored one that this program does not take, as it was said of it before
	}
	wrong, err := compiled.Check(ctx, []byte(p.GetExample()))
	if err != nil {
		return err
	}
	if wrong != nil {
		for _, f := range wrong.Faults {
			add("event_type.example"+f.Pointer, "schema."+f.Keyword, "%s", f.Description)
		}
	}
	return nil
}

// checkNamespace refuses changes in a namespace that is absent or deleted.
func checkNamespace(it keyspace.Item) error {
	if it.Revision == 0 {
		return &NotFoundError{Name: it.Key}
	}
	if it.Err != nil {
		return it.Err
	}
	p := &grapnelv1.Namespace{}
	if err := proto.Unmarshal(it.Value, p); err != nil {
		return fmt.Errorf("%s: read namespace: %w", it.Key, err)
	}
	if p.State == grapnelv1.Namespace_STATE_DELETED {
		return fmt.Errorf("%s: %w and will be erased on %s", it.Key, ErrNamespaceDeleted, p.PurgeTime.AsTime().Format("2006-01-02"))
	}
	return nil
}

func checkEtag(given string, it keyspace.Item) error {
	if current := etag(it.Revision); given != "" && given != current {
		return &EtagError{Name: it.Key[len(keyPrefix):], Current: current}
	}
	return nil
}

// unescape is the type in the last segment of a name.
func unescape(segment string) (string, bool) {
	id, err := url.PathUnescape(segment)
	return id, err == nil
}
