package keyspace

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

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
		s.log.Warn("etcd watch ended, listing anew", "prefix", s.watch, "err", err)
		if time.Since(started) > abandonAfter {
			wait = least
		}
		for {
			if pause(ctx, wait) != nil {
				return nil
			}
			wait = min(2*wait, most)
			if err = s.resync(ctx); err == nil {
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			s.log.Warn("listing etcd failed, trying again", "prefix", s.watch, "retry_in", wait, "err", err)
		}
		s.log.Info("etcd is followed again", "prefix", s.watch, "revision", s.revision)
	}
}

// follow applies what the watch brings until it breaks.
func (s *Space) follow(ctx context.Context) error {
	// Without a leader the server would keep the stream open and silent.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	var probing sync.WaitGroup
	defer probing.Wait()
	defer cancel()

	watch := s.client.Watch(ctx, s.watch, clientv3.WithPrefix(), clientv3.WithRev(s.revision+1))
	revisions := make(chan int64)
	probing.Go(func() { s.probe(ctx, revisions) })
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
			spoken, owes = max(spoken, resp.Header.GetRevision()), time.Time{}
			s.take(resp.Events)
		case revision := <-revisions:
			s.heard.Store(time.Now().UnixNano())
			switch {
			case revision < s.revision:
				return errPast
			case revision <= spoken:
				owes = time.Time{}
			case owes.IsZero():
				owes = time.Now()
			case time.Since(owes) > abandonAfter:
				return errSilent
			}
		}
	}
}

// probe asks etcd for its revision now and then, and the watch to tell how far it is: on its own it would
// be silent as long as no watched key changes. A watch that has nothing to catch up with does not answer.
func (s *Space) probe(ctx context.Context, revisions chan<- int64) {
	for pause(ctx, probeEvery) == nil {
		asking, cancel := context.WithTimeout(ctx, healthyFor)
		resp, err := s.client.Get(asking, s.watch, clientv3.WithCountOnly())
		if err == nil {
			// An error shows as silence.
			_ = s.client.RequestProgress(asking)
			select {
			case revisions <- resp.Header.Revision:
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
		key := string(ev.Kv.Key[len(s.prefix):])
		if !s.keep(key) {
			continue
		}
		c := Change{Key: key, Value: ev.Kv.Value, Revision: ev.Kv.ModRevision, Deleted: ev.Type == clientv3.EventTypeDelete}
		if c.Deleted {
			delete(s.known, key)
		} else {
			s.known[key] = c.Revision
		}
		changes = append(changes, c)
	}
	s.advance(events[len(events)-1].Kv.ModRevision, changes)
}

// resync lists the watched keys and applies what differs from what is known.
func (s *Space) resync(ctx context.Context) error {
	known := make(map[string]int64, len(s.known))
	var changes []Change
	revision, cluster, forget := int64(0), uint64(0), false
	end := clientv3.GetPrefixRangeEnd(s.watch)
	for from := s.watch; from != ""; {
		page, err := s.page(ctx, from, end, revision)
		if err != nil {
			return err
		}
		if revision == 0 {
			revision, cluster = page.Header.Revision, page.Header.ClusterId
			// Another history may use the same revision numbers for other values.
			forget = cluster != s.cluster || revision < s.revision
		}
		from = ""
		for _, kv := range page.Kvs {
			if page.More {
				from = string(kv.Key) + "\x00"
			}
			key := string(kv.Key[len(s.prefix):])
			if !s.keep(key) {
				continue
			}
			if known[key] = kv.ModRevision; forget || s.known[key] != kv.ModRevision {
				changes = append(changes, Change{Key: key, Value: kv.Value, Revision: kv.ModRevision})
			}
		}
	}
	for key := range s.known {
		if _, ok := known[key]; !ok {
			changes = append(changes, Change{Key: key, Deleted: true, Revision: revision})
		}
	}
	s.known, s.cluster = known, cluster
	s.heard.Store(time.Now().UnixNano())
	s.advance(revision, changes)
	return nil
}

func (s *Space) page(ctx context.Context, from, end string, revision int64) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*timeout, ErrUnavailable)
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(revision)}
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
	s.revision = revision
	if s.advanced != nil {
		close(s.advanced)
		s.advanced = nil
	}
}
