package keyspace

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// ErrCompacted says that etcd does not keep what has changed since a revision any more.
var ErrCompacted = errors.New("etcd does not keep changes since then any more")

// Seen is a change as a Watcher tells it.
type Seen struct {
	Change
	// Made: there was no such key before.
	Made bool
}

// Watcher tells each change below a prefix, from etcd's history: of several to one key, each. It is for one goroutine, and
// is to be closed.
type Watcher struct {
	s        *Space
	watch    clientv3.WatchChan
	ctx      context.Context // of its stream
	cancel   context.CancelFunc
	revision int64
}

// Watch tells what has changed, and changes, below a prefix of keys after a revision, until ctx ends.
func (s *Space) Watch(ctx context.Context, prefix string, after int64) *Watcher {
	// The client has watches of the same metadata share a stream, where one would wait for another's history.
	ctx = metadata.AppendToOutgoingContext(ctx, "grapnel-watch", uuid.NewString())
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	return &Watcher{
		s: s, ctx: ctx, cancel: cancel, revision: after,
		watch: s.client.Watch(ctx, s.prefix+prefix, clientv3.WithPrefix(), clientv3.WithRev(after+1)),
	}
}

// Reached is the revision up to which Apply has taken in all that was written. It is at most some seconds behind etcd's while
// that is Healthy.
func (s *Space) Reached() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reached
}

// Head is etcd's revision, which is some seconds' work at the most. Its error wraps ErrUnavailable.
func (s *Space) Head(ctx context.Context) (int64, error) {
	head, err := s.head(ctx)
	if err != nil {
		return 0, err
	}
	return head.Header.Revision, nil
}

// Close ends the watch. It may be called again.
func (w *Watcher) Close() { w.cancel() }

// Revision is up to where everything has been told.
func (w *Watcher) Revision() int64 { return w.revision }

// Before is the value that a change replaced. It returns ErrCompacted when that is not kept any more, *BrokenError when it is
// damaged, and an error that wraps ErrUnavailable.
func (s *Space) Before(ctx context.Context, c Seen) ([]byte, error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	found, err := s.client.Get(ctx, s.prefix+c.Key, clientv3.WithRev(c.Revision-1))
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		return nil, ErrCompacted
	case err != nil:
		return nil, unavailable(ctx, err)
	case len(found.Kvs) == 0:
		return nil, nil
	}
	value, ok := CheckSum(c.Key, found.Kvs[0].Value)
	if !ok {
		return nil, &BrokenError{Key: s.prefix + c.Key}
	}
	return value, nil
}

// askFor is how long Ask waits for a client that is looking for etcd.
const askFor = time.Second

// Ask has etcd say how far it is, if it is there, so that Revision rises where nothing changes below the prefix, in the course
// of a later Next.
func (w *Watcher) Ask() {
	ctx, cancel := context.WithTimeout(w.ctx, askFor)
	defer cancel()
	_ = w.s.client.RequestProgress(ctx) // what is wrong with the watch is told by Next
}

// Next waits for changes, and returns those of one or several revisions, never of a part of one. Values that are damaged
// are left out. It returns an error when ctx ends, after which it may be called again, ErrCompacted, or one that wraps
// ErrUnavailable.
func (w *Watcher) Next(ctx context.Context) ([]Seen, error) {
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var resp clientv3.WatchResponse
		var open bool
		select { // what has come is taken, whatever ctx says by then
		case resp, open = <-w.watch:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		switch err := resp.Err(); {
		case errors.Is(err, rpctypes.ErrCompacted):
			return nil, ErrCompacted
		case err != nil:
			return nil, fmt.Errorf("%w: watch %s: %w", ErrUnavailable, w.s.prefix, err)
		case !open:
			return nil, fmt.Errorf("%w: watch %s: %w", ErrUnavailable, w.s.prefix, errClosed)
		case resp.Header.GetClusterId() != w.s.cluster:
			return nil, fmt.Errorf("%w: watch %s: another etcd answers", ErrUnavailable, w.s.prefix)
		}
		if resp.IsProgressNotify() {
			w.revision = max(w.revision, resp.Header.GetRevision())
			continue
		}
		if len(resp.Events) == 0 {
			continue
		}
		w.revision = resp.Events[len(resp.Events)-1].Kv.ModRevision
		if changes := w.seen(resp.Events); len(changes) > 0 {
			return changes, nil
		}
	}
}

func (w *Watcher) seen(events []*clientv3.Event) []Seen {
	changes := make([]Seen, 0, len(events))
	for _, ev := range events {
		key := string(ev.Kv.Key[len(w.s.prefix):])
		c := Seen{Change: Change{Key: key, Deleted: ev.Type == clientv3.EventTypeDelete, Revision: ev.Kv.ModRevision}, Made: ev.IsCreate()}
		if !c.Deleted {
			value, ok := CheckSum(key, ev.Kv.Value)
			if !ok { // Run has said so
				continue
			}
			c.Value = value
		}
		changes = append(changes, c)
	}
	return changes
}
