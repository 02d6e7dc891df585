package subscription

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

// switches is what the keys of switches begin with, dispatchKey that of the one there is.
const (
	switches    = "switches/"
	dispatchKey = switches + "dispatch"
)

// Switch stops all dispatch. The zero value is one that was never turned: dispatch goes on.
type Switch struct {
	Paused bool
	// Reason is what the caller gave who turned it, Time when that was.
	Reason string
	Time   time.Time
	// Revision is etcd's of its latest change.
	Revision int64
}

// Etag is the validator of this version.
func (s Switch) Etag() string { return etag(s.Revision) }

// SetDispatch turns the switch for all dispatch, of the etag's version when one is given, and returns it as it is then.
// Errors: *EtagError, ErrUnavailable.
func (r *Registry) SetDispatch(ctx context.Context, etag string, paused bool, reason string) (Switch, error) {
	reason = oneLine(reason)
	var out Switch
	revision, err := r.space.Edit(ctx, []string{dispatchKey}, func(items []keyspace.Item) (keyspace.Txn, error) {
		it := items[0]
		if err := checkEtag(etag, it); err != nil {
			return keyspace.Txn{}, err
		}
		old := Switch{}
		if it.Revision != 0 && it.Err == nil {
			var err error
			if old, err = decodeSwitch(it.Value, it.Revision); err != nil {
				return keyspace.Txn{}, fmt.Errorf("%s: %w", r.space.Key(it.Key), err)
			}
		}
		out = old
		if it.Err == nil && old.Paused == paused && old.Reason == reason {
			return keyspace.Txn{}, nil
		}
		out = Switch{Paused: paused, Reason: reason, Time: time.Now()}
		value, err := marshal(&storev1.SwitchRecord{Paused: paused, Reason: reason, ChangeTime: out.Time.UnixNano()})
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(dispatchKey, value)}}, err
	})
	if err != nil {
		return Switch{}, err
	}
	if revision != 0 {
		out.Revision = revision
	}
	return out, nil
}

func decodeSwitch(value []byte, revision int64) (Switch, error) {
	rec := &storev1.SwitchRecord{}
	if err := proto.Unmarshal(value, rec); err != nil {
		return Switch{}, fmt.Errorf("read switch: %w", err)
	}
	return Switch{Paused: rec.Paused, Reason: rec.Reason, Time: time.Unix(0, rec.ChangeTime), Revision: revision}, nil
}

// turn takes in the switch. One that is gone, as in an etcd from before it was turned, stops nothing.
func (n *news) turn(c keyspace.Change) error {
	if c.Key != dispatchKey {
		return fmt.Errorf("not the key of a switch")
	}
	now := Switch{}
	if !c.Deleted {
		var err error
		if now, err = decodeSwitch(c.Value, c.Revision); err != nil {
			return err
		}
	}
	if was := n.editor.dispatch; was.Paused != now.Paused {
		n.gates = append(n.gates, Gate{Opened: was.Paused})
	}
	n.editor.dispatch = now
	return nil
}
