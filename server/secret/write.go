package secret

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// maxUsers bounds the list in an InUseError.
const maxUsers = 10

// Create stores a value that Make or a plugin has checked. Errors: *InvalidError, ErrExists,
// ErrNamespaceDeleted, ErrUnavailable, and *NotFoundError for the namespace.
func (s *Store) Create(ctx context.Context, ns, id string, m Material) (*Secret, error) {
	if err := checkIDs("parent", ns, "secret_id", id); err != nil {
		return nil, err
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	return s.edit(ctx, ns, id, func(it keyspace.Item) (*storev1.SecretRecord, error) {
		if it.Revision != 0 {
			return nil, fmt.Errorf("%s %w", it.Key, ErrExists)
		}
		now := time.Now().UnixNano()
		rec := &storev1.SecretRecord{Name: it.Key, Kind: uint32(m.Kind), CreateTime: now, Plugin: m.Plugin, Slot: m.Slot}
		return rec, s.addVersion(rec, 1, m, now)
	})
}

// Rotate adds a version of the kind, plugin and slot that the secret has. The version before it stays in use
// for overlap, 0 to MaxOverlap; with 0 it ends at once. Versions that end earlier anyway still do. With an
// etag it returns an *EtagError unless that is current, and without one when the secret has been replaced by
// one of another kind or plugin; ErrTooManyVersions while MaxVersions are live.
func (s *Store) Rotate(ctx context.Context, ns, id string, m Material, overlap time.Duration, etag string) (*Secret, error) {
	if err := checkIDs("name", ns, "name", id); err != nil {
		return nil, err
	}
	if overlap < 0 || overlap > MaxOverlap {
		return nil, invalid("overlap", "duration.range", "%v is out of range; want 0s to %v", overlap, MaxOverlap)
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	return s.edit(ctx, ns, id, func(it keyspace.Item) (*storev1.SecretRecord, error) {
		rec, err := s.record(it, etag)
		if err != nil {
			return nil, err
		}
		if rec.Kind != uint32(m.Kind) || rec.Plugin != m.Plugin || rec.Slot != m.Slot {
			return nil, &EtagError{Name: it.Key, Current: currentEtag(it)}
		}
		now := time.Now()
		end := now.Add(overlap).UnixNano()
		// The newest version never expires, so that its number is the highest ever given.
		number := uint32(1)
		for _, v := range rec.Versions {
			number = max(number, v.Version+1)
			if v.ExpireTime == 0 || v.ExpireTime > end {
				v.ExpireTime = end
			}
		}
		rec.Versions = liveRecords(rec.Versions, now)
		if len(rec.Versions) >= MaxVersions {
			return nil, fmt.Errorf("%s: %w, which is the most; the first of them ends on %s", it.Key, ErrTooManyVersions,
				unixTime(rec.Versions[len(rec.Versions)-1].ExpireTime).UTC().Format(time.RFC3339))
		}
		return rec, s.addVersion(rec, number, m, now.UnixNano())
	})
}

// Delete removes a secret that no subscription refers to; otherwise it returns an *InUseError. It works in a deleted
// namespace, too.
func (s *Store) Delete(ctx context.Context, ns, id, etag string) error {
	if err := checkIDs("name", ns, "name", id); err != nil {
		return err
	}
	name := secretName(ns, id)
	refs := "refs/" + name + "/"
	_, err := s.space.Edit(ctx, []string{namespaceName(ns), keyPrefix + name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		if err := checkNamespace(items[0]); err != nil && !errors.Is(err, ErrNamespaceDeleted) {
			return keyspace.Txn{}, err
		}
		it := named(items[1])
		if it.Revision == 0 {
			return keyspace.Txn{}, &NotFoundError{Name: name}
		}
		if err := checkEtag(etag, it); err != nil {
			return keyspace.Txn{}, err
		}
		keys, _, err := s.space.Below(ctx, refs, maxUsers)
		if err != nil {
			return keyspace.Txn{}, err
		}
		if len(keys) > 0 {
			users := make([]string, len(keys))
			for i, key := range keys {
				users[i] = strings.TrimPrefix(key, refs)
			}
			return keyspace.Txn{}, &InUseError{Name: name, Users: users}
		}
		return keyspace.Txn{
			// A subscription that begins to refer to it asks in its transaction that it exists.
			If:   []keyspace.Cond{keyspace.NoneBelow(refs)},
			Then: []keyspace.Write{keyspace.Delete(keyPrefix + name)},
		}, nil
	})
	return err
}

// edit stores the record that plan makes, in a namespace that is in use.
func (s *Store) edit(ctx context.Context, ns, id string, plan func(keyspace.Item) (*storev1.SecretRecord, error)) (*Secret, error) {
	var value []byte
	name := secretName(ns, id)
	revision, err := s.space.Edit(ctx, []string{namespaceName(ns), keyPrefix + name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		if err := checkNamespace(items[0]); err != nil {
			return keyspace.Txn{}, err
		}
		rec, err := plan(named(items[1]))
		if err != nil {
			return keyspace.Txn{}, err
		}
		if value, err = proto.Marshal(rec); err != nil {
			return keyspace.Txn{}, fmt.Errorf("encode %s: %w", name, err)
		}
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(keyPrefix+name, value)}}, nil
	})
	if err != nil {
		return nil, err
	}
	return decode(name, value, revision, s.keys)
}

// named is an item with the secret's name in place of its key.
func named(it keyspace.Item) keyspace.Item {
	it.Key = strings.TrimPrefix(it.Key, keyPrefix)
	return it
}

// addVersion seals a value into a new newest version.
func (s *Store) addVersion(rec *storev1.SecretRecord, number uint32, m Material, now int64) error {
	v := &storev1.SecretVersionRecord{
		Version: number, CreateTime: now,
		Algorithm: m.Algorithm, PublicKey: m.PublicKey, Jwk: m.JWK, SigningKeyId: m.KeyID,
	}
	if err := s.keys.seal(rec, v, m.Value); err != nil {
		return fmt.Errorf("seal %s: %w", rec.Name, err)
	}
	rec.Versions = append([]*storev1.SecretVersionRecord{v}, rec.Versions...)
	return nil
}

// record reads an item as a record whose etag, where one is given, is current.
func (s *Store) record(it keyspace.Item, etag string) (*storev1.SecretRecord, error) {
	if it.Revision == 0 {
		return nil, &NotFoundError{Name: it.Key}
	}
	if err := checkEtag(etag, it); err != nil {
		return nil, err
	}
	if it.Err != nil {
		return nil, it.Err
	}
	sec, err := decode(it.Key, it.Value, it.Revision, s.keys)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.space.Key(keyPrefix+it.Key), err)
	}
	return sec.record, nil
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
	if current := currentEtag(it); given != "" && given != current {
		return &EtagError{Name: it.Key, Current: current}
	}
	return nil
}

func currentEtag(it keyspace.Item) string { return etag(it.Revision) }

// checkIDs returns an *InvalidError when an ID given by a caller could not be part of a name.
func checkIDs(fields ...string) error {
	for i := 0; i+1 < len(fields); i += 2 {
		if !validID(fields[i+1]) {
			return invalid(fields[i], "id", "%q is not a valid ID: want 1 to 63 lower case letters, digits and hyphens, beginning with a letter", fields[i+1])
		}
	}
	return nil
}

func namespaceName(ns string) string { return "namespaces/" + ns }
