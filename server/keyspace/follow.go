package keyspace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// damaged stands for the revision of a key whose value was refused: whatever is read of it next is news.
const damaged = -1

var (
	errClosed = errors.New("watch was closed")
	errSilent = errors.New("watch does not answer")
	errPast   = errors.New("etcd has gone back to an earlier revision")
)

// Run follows the watched keys until ctx ends, and then returns nil. Whatever goes wrong in between is
// logged and repaired by listing anew.
func (s *Space) Run(ctx context.Context) error {
	const least, most = 50 * time.Millisecond, 2 * time.Second
	wait := least
	for {
		started := time.Now()
		err := s.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("etcd watch ended, listing anew", "prefix", s.prefix, "err", err)
		if time.Since(started) > abandonAfter {
			wait = least
		}
		for {
			if pause(ctx, wait) != nil {
				return nil
			}
			wait = min(2*wait, most)
			if err = s.list(ctx); err == nil {
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			if !s.reject(err) {
				s.log.Warn("listing etcd failed, trying again", "prefix", s.prefix, "retry_in", wait, "err", err)
			}
		}
		s.log.Info("etcd is followed again", "prefix", s.prefix, "revision", s.revision)
	}
}

// reject remembers that etcd is a stranger, and says so once, however often it is asked. False when the
// error is another one.
func (s *Space) reject(err error) bool {
	var stranger *StrangerError
	if !errors.As(err, &stranger) {
		return false
	}
	if old := s.stranger.Swap(stranger); old == nil || old.Error() != stranger.Error() {
		s.log.Error("etcd is not the one it should be, what is known stays", "prefix", s.prefix, "err", err)
	}
	return true
}

// follow applies what the watch brings until it breaks.
func (s *Space) follow(ctx context.Context) error {
	// Without a leader the server would keep the stream open and silent.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	var probing sync.WaitGroup
	defer probing.Wait()
	defer cancel()

	from := s.prefix + s.watch[0]
	end := clientv3.GetPrefixRangeEnd(s.prefix + s.watch[len(s.watch)-1])
	watch := s.client.Watch(ctx, from, clientv3.WithRange(end), clientv3.WithRev(s.revision+1))
	signs := make(chan sign)
	probing.Go(func() { s.probe(ctx, signs) })
	// spoken is the latest revision the watch has told of; owes is since when etcd is known to be further.
	spoken, owes := s.revision, time.Time{}
	for {
		select {
		case resp, ok := <-watch:
			if !ok {
				return errClosed
			}
			if err := resp.Err(); err != nil {
				return err
			}
			if cluster := resp.Header.GetClusterId(); cluster != s.cluster {
				return &StrangerError{Prefix: s.prefix, Want: s.identity, WantCluster: s.cluster, FoundCluster: cluster}
			}
			spoken, owes = max(spoken, resp.Header.GetRevision()), time.Time{}
			s.take(resp.Events)
			if resp.IsProgressNotify() {
				s.mu.Lock()
				s.reached = max(s.reached, resp.Header.GetRevision())
				s.mu.Unlock()
			}
		case sign := <-signs:
			if sign.err != nil {
				return sign.err
			}
			s.heard.Store(time.Now().UnixNano())
			switch {
			case sign.revision < sign.known:
				return errPast
			case sign.revision <= spoken:
				owes = time.Time{}
			case owes.IsZero():
				owes = time.Now()
			case time.Since(owes) > abandonAfter:
				return errSilent
			}
		}
	}
}

// sign is what etcd answered to a probe.
type sign struct {
	// known is the revision that was taken in before the question: etcd must be as far. The watch may be
	// further than the answer by the time it is looked at.
	known, revision int64
	// err is set when etcd is another one.
	err error
}

// probe asks etcd for its revision and identity now and then, and the watch to tell how far it is: on its
// own it would be silent as long as no watched key changes. A watch that has nothing to catch up with does
// not answer.
func (s *Space) probe(ctx context.Context, signs chan<- sign) {
	for pause(ctx, probeEvery) == nil {
		asking, cancel := context.WithTimeout(ctx, healthyFor)
		s.mu.Lock()
		known := s.revision
		s.mu.Unlock()
		found, err := s.client.Get(asking, s.prefix+identityKey)
		if err == nil {
			// An error shows as silence.
			_ = s.client.RequestProgress(asking)
			select {
			case signs <- sign{known: known, revision: found.Header.Revision, err: s.recognise(found)}:
			case <-ctx.Done():
			}
		}
		cancel()
	}
}

// take applies watch events. etcd never splits one revision over two responses.
func (s *Space) take(events []*clientv3.Event) {
	if len(events) == 0 {
		return
	}
	var changes []Change
	for _, ev := range events {
		key, ok := s.watched(ev.Kv.Key)
		switch {
		case !ok:
		case ev.Type == clientv3.EventTypeDelete:
			delete(s.known, key)
			s.mend(key)
			changes = append(changes, Change{Key: key, Deleted: true, Revision: ev.Kv.ModRevision})
		default:
			value, ok := s.check(key, ev.Kv.Value, ev.Kv.ModRevision)
			if !ok {
				s.known[key] = damaged
				continue
			}
			s.known[key] = ev.Kv.ModRevision
			changes = append(changes, Change{Key: key, Value: value, Revision: ev.Kv.ModRevision})
		}
	}
	s.advance(events[len(events)-1].Kv.ModRevision, changes)
}

// watched returns the key without the prefix; false when it is not one of those followed.
func (s *Space) watched(full []byte) (string, bool) {
	key := string(full[len(s.prefix):])
	under := func(part string) bool { return strings.HasPrefix(key, part) }
	return key, slices.ContainsFunc(s.watch, under)
}

// check returns the value of a watched key. One that is damaged is named, and not used.
func (s *Space) check(key string, stored []byte, revision int64) ([]byte, bool) {
	value, ok := CheckSum(key, stored)
	if ok {
		s.mend(key)
		return value, true
	}
	s.log.Error("stored value refused, what was known before stays", "key", s.prefix+key, "revision", revision,
		"err", &BrokenError{Key: s.prefix + key})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken[key] = true
	return nil, false
}

func (s *Space) mend(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.broken, key)
}

// list reads the watched keys and applies what differs from what is known. At Open nothing is known, and
// nobody reads yet: then each page is applied by itself, so that not everything is in memory twice.
func (s *Space) list(ctx context.Context) error {
	head, err := s.head(ctx)
	if err != nil {
		return err
	}
	first := s.cluster == 0
	revision := head.Header.Revision
	// Another history may use the same revision numbers for other values.
	forget := revision < s.revision
	known := make(map[string]int64, len(s.known))
	var changes []Change
	for _, part := range s.watch {
		end := clientv3.GetPrefixRangeEnd(s.prefix + part)
		limit := int64(leastPage)
		for from := s.prefix + part; from != ""; {
			page, err := s.page(ctx, from, end, limit, revision)
			if err != nil {
				return err
			}
			from, limit = "", nextPage(page, limit)
			if page.More {
				from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
			}
			for _, kv := range page.Kvs {
				key, ok := s.watched(kv.Key)
				if !ok {
					continue
				}
				value, ok := s.check(key, kv.Value, kv.ModRevision)
				if !ok {
					known[key] = damaged
					continue
				}
				if known[key] = kv.ModRevision; forget || s.known[key] != kv.ModRevision {
					changes = append(changes, Change{Key: key, Value: value, Revision: kv.ModRevision})
				}
			}
			if first {
				s.apply(revision, changes)
				changes = nil
			}
		}
	}
	for key := range s.known {
		if _, ok := known[key]; !ok {
			s.mend(key)
			changes = append(changes, Change{Key: key, Deleted: true, Revision: revision})
		}
	}
	s.known = known
	if first {
		s.cluster = head.Header.ClusterId
	}
	s.stranger.Store(nil)
	s.heard.Store(time.Now().UnixNano())
	s.advance(revision, changes)
	return nil
}

// nextPage is how many keys to ask for after a page.
func nextPage(page *clientv3.GetResponse, limit int64) int64 {
	size := int64(0)
	for _, kv := range page.Kvs {
		size += int64(len(kv.Key) + len(kv.Value))
	}
	fit := pageBytes * int64(len(page.Kvs)) / max(size, 1)
	return max(leastPage, min(fit, 2*limit, mostPage))
}

func (s *Space) page(ctx context.Context, from, end string, limit, revision int64) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*timeout, ErrUnavailable)
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(revision)}
	page, err := s.client.Get(ctx, from, opts...)
	if err != nil {
		return nil, unavailable(ctx, fmt.Errorf("read from revision %d: %w", revision, err))
	}
	return page, nil
}

// advance hands changes to the owner and then wakes those who wait for them.
func (s *Space) advance(revision int64, changes []Change) {
	s.apply(revision, changes)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision, s.reached = revision, revision
	if s.advanced != nil {
		close(s.advanced)
		s.advanced = nil
	}
}
