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

// tellRetry is how long the eraser waits to tell again what was not done with.
const tellRetry = 15 * time.Second

// ExpiresSoon is how long before its end a version is told of as expiring.
const ExpiresSoon = 6 * time.Hour

// Expiring is a version that is about to go out of use.
type Expiring struct {
	// Namespace and ID are the segments of the secret's name.
	Namespace, ID string
	Version       int
	ExpireTime    time.Time
}

// eraseExpired tells of versions as they expire and erases them from etcd, until ctx ends.
func (s *Store) eraseExpired(ctx context.Context) {
	told, soon := make(map[string]time.Time), make(map[Expiring]bool)
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
		if at := s.tellExpiring(now, soon); !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
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

// tellExpiring tells of versions that expire soon and are not among those told, which it keeps, and returns when there will
// be one to tell of.
func (s *Store) tellExpiring(now time.Time, told map[Expiring]bool) (next time.Time) {
	if s.tellSoon == nil {
		return next
	}
	maps.DeleteFunc(told, func(e Expiring, _ bool) bool { return !e.ExpireTime.After(now) })
	for _, sec := range s.all() {
		for _, v := range sec.record.Versions {
			e := Expiring{Namespace: sec.Namespace, ID: sec.ID, Version: int(v.Version), ExpireTime: unixTime(v.ExpireTime)}
			if !e.ExpireTime.After(now) || told[e] {
				continue
			}
			tell := e.ExpireTime.Add(-ExpiresSoon)
			if !tell.After(now) {
				if s.tellSoon(e) {
					told[e] = true
					continue
				}
				tell = now.Add(tellRetry)
			}
			if next.IsZero() || tell.Before(next) {
				next = tell
			}
		}
	}
	return next
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
