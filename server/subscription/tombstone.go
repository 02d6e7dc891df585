package subscription

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// tombstones is what the keys of tombstones begin with; the uid in hexadecimal digits follows.
const tombstones = "tombstones/"

// forgetBatch is how many tombstones one transaction removes.
const forgetBatch = 100

// Tombstone says that a namespace or subscription was deleted: it is a fact, where absence alone may be a
// store that is not the right one, or damaged. It is written with the deletion, in one transaction, and stays
// until Forget: who keeps something of what was deleted calls that when nothing of it is left. Nothing else
// bounds their number.
type Tombstone struct {
	// UID is that of what was deleted.
	UID [16]byte
	// Name is its full resource name at that time; it may be another's by now.
	Name string
	// NamespaceUID is that of the namespace that it was in, or was.
	NamespaceUID [16]byte
	// OfNamespace is set for a namespace: then everything that was in it is deleted, too.
	OfNamespace bool
	// Time is when, by the clock of the server that deleted it.
	Time time.Time
	// Revision is etcd's revision of the deletion.
	Revision int64
}

// UIDKey returns the last 8 bytes of a uid as a big endian number, which tells it from all others: a uid is
// drawn again when its key is taken. It is never zero for one that was drawn.
func UIDKey(uid [16]byte) uint64 {
	return binary.BigEndian.Uint64(uid[8:])
}

func tombstoneKey(uid [16]byte) string { return tombstones + hex.EncodeToString(uid[:]) }

func (r *Registry) tombstone(t Tombstone) (keyspace.Write, error) {
	kind := storev1.TombstoneRecord_KIND_SUBSCRIPTION
	if t.OfNamespace {
		kind = storev1.TombstoneRecord_KIND_NAMESPACE
	}
	value, err := marshal(&storev1.TombstoneRecord{
		Kind: kind, Name: t.Name, NamespaceUid: t.NamespaceUID[:], DeleteTime: time.Now().UnixNano(),
	})
	return keyspace.Put(tombstoneKey(t.UID), value), err
}

func decodeTombstone(c keyspace.Change) (Tombstone, error) {
	t := Tombstone{Revision: c.Revision}
	uid, err := parseTombstoneKey(c.Key)
	if err != nil {
		return t, err
	}
	rec := &storev1.TombstoneRecord{}
	if err := proto.Unmarshal(c.Value, rec); err != nil {
		return t, fmt.Errorf("read tombstone: %w", err)
	}
	if len(rec.NamespaceUid) != len(t.NamespaceUID) {
		return t, fmt.Errorf("read tombstone: namespace uid of %d bytes", len(rec.NamespaceUid))
	}
	t.UID, t.NamespaceUID, t.Name, t.Time = uid, [16]byte(rec.NamespaceUid), rec.Name, time.Unix(0, rec.DeleteTime)
	switch rec.Kind {
	case storev1.TombstoneRecord_KIND_SUBSCRIPTION:
	case storev1.TombstoneRecord_KIND_NAMESPACE:
		t.OfNamespace = true
	default:
		return t, fmt.Errorf("read tombstone: unknown kind %d", rec.Kind)
	}
	return t, nil
}

func parseTombstoneKey(key string) (uid [16]byte, err error) {
	raw, err := hex.DecodeString(strings.TrimPrefix(key, tombstones))
	if err != nil || len(raw) != len(uid) {
		return uid, fmt.Errorf("not the key of a tombstone")
	}
	return [16]byte(raw), nil
}

// Forget removes the tombstones of uids, for which nothing is left to do anywhere. Those that have none are
// passed over. It can be repeated when it failed. That of a namespace comes again, and is told again, when
// it is forgotten before PurgeNamespace has ended.
func (r *Registry) Forget(ctx context.Context, uids ...[16]byte) error {
	for len(uids) > 0 {
		n := min(len(uids), forgetBatch)
		keys := make([]string, n)
		for i, uid := range uids[:n] {
			keys[i] = tombstoneKey(uid)
		}
		uids = uids[n:]
		_, err := r.space.Edit(ctx, keys, func(items []keyspace.Item) (keyspace.Txn, error) {
			var txn keyspace.Txn
			for _, it := range items {
				if it.Revision != 0 {
					txn.Then = append(txn.Then, keyspace.Delete(it.Key))
				}
			}
			return txn, nil
		})
		if err != nil {
			return fmt.Errorf("forget tombstones: %w", err)
		}
	}
	return nil
}
