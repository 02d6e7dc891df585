package secret

import (
	"context"
	"errors"
	"maps"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grapnel/grapnel/server/keyspace"
)

// eraseRetry is how long the eraser waits after etcd refused it. Nothing is handed out meanwhile.
const eraseRetry = 5 * time.Second

// eraseExpired tells of versions as they expire and erases them from etcd, until ctx ends.
func (s *Store) eraseExpired(ctx context.Context) {
	told := make(map[string]time.Time)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.expiring:
		case <-timer.C:
		}
		now := time.Now()
		due, next := s.dueAt(now)
		maps.DeleteFunc(told, func(name string, _ time.Time) bool { return due[name].IsZero() })
		var names []string
		for name, at := range due {
			if !told[name].Equal(at) {
				told[name] = at
				names = append(names, name)
			}
		}
		s.tell(names)
		for name := range due {
			if err := s.erase(ctx, name); err != nil {
				if ctx.Err() == nil {
					s.log.Warn("expired version not erased yet", "secret", name, "err", err)
				}
				next = now.Add(eraseRetry)
			}
		}
		if !next.IsZero() {
			timer.Reset(time.Until(next))
		}
	}
}

// dueAt returns the secrets with an expired version, by its time, and when the next one expires.
func (s *Store) dueAt(now time.Time) (due map[string]time.Time, next time.Time) {
	due = make(map[string]time.Time)
	for _, sec := range s.all() {
		at := sec.nextExpiry()
		switch {
		case at.IsZero():
		case !at.After(now):
			due[sec.name()] = at
		case next.IsZero() || at.Before(next):
			next = at
		}
	}
	return due, next
}

// erase removes expired versions of one secret from etcd.
func (s *Store) erase(ctx context.Context, name string) error {
	_, err := s.space.Edit(ctx, []string{keyPrefix + name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		rec, err := s.record(named(items[0]), "")
		if errors.Is(err, ErrNotFound) {
			return keyspace.Txn{}, nil
		}
		if err != nil {
			return keyspace.Txn{}, err
		}
		live := liveRecords(rec.Versions, time.Now())
		if len(live) == len(rec.Versions) {
			return keyspace.Txn{}, nil
		}
		rec.Versions = live
		value, err := proto.Marshal(rec)
		if err != nil {
			return keyspace.Txn{}, err
		}
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(keyPrefix+name, value)}}, nil
	})
	return err
}

// wakeEraser never blocks: one wake-up that waits is enough.
func (s *Store) wakeEraser() {
	select {
	case s.expiring <- struct{}{}:
	default:
	}
}
