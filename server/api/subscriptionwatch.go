package api

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// maxHistories bounds the watches of subscriptions, and maxHistoriesOf those of one namespace: etcd sends each of them its own
// copy of what changes, and of what has since a resume token.
const maxHistories, maxHistoriesOf = 256, 16

// WatchSubscriptions tells what becomes of a namespace's subscriptions, or of all.
func (s subscriptionService) WatchSubscriptions(r *grapnelv1.WatchSubscriptionsRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchSubscriptionsResponse]) error {
	ns, space, err := s.watchedParent(r.GetParent())
	if err != nil {
		return err
	}
	f, err := parseFilter(r.GetFilter(), subscriptionFields())
	if err != nil {
		return err
	}
	at := historyToken{cluster: s.Registry.ClusterID(), space: space, revision: s.Registry.Reached()}
	if r.GetResumeToken() != "" {
		if at, err = s.resumeHistory(stream.Context(), r.GetResumeToken(), at); err != nil {
			return err
		}
	}
	if !s.edge.historiesOf.enter(ns) {
		return s.edge.historiesOf.refusal(cmp.Or(ns, allNamespaces), "watches of subscriptions")
	}
	defer s.edge.historiesOf.leave(ns)
	if !s.edge.histories.enter() {
		return rateLimited("watches", fmt.Sprintf("%d watches of subscriptions are open, which is all there may be", maxHistories), time.Minute)
	}
	defer s.edge.histories.leave()
	ctx, end := s.watchContext(stream.Context())
	defer end()
	out := sendTo(stream, s.WatchPatience, &s.edge.tailBytes)
	defer out.close()
	heartbeat := heartbeatOf(r)
	var w *subscription.Watcher
	again := int64(0) // changes that come first, and have been told
	// Nobody reads what etcd tells while a message waits: it would pile up.
	halt := func() {
		if w != nil {
			w.Close()
			w = nil
		}
	}
	defer func() { halt() }()
	same := func() error {
		if _, now, err := s.watchedParent(r.GetParent()); err != nil {
			return err
		} else if now != space { // deleted, and made anew
			return notFound(r.GetParent(), "namespace")
		}
		return nil
	}
	for {
		if err := same(); err != nil {
			return err
		}
		if err := out.send(ctx, &grapnelv1.WatchSubscriptionsResponse{ResumeToken: at.String()}, halt); err != nil {
			return err
		}
		for quiet := time.Now().Add(heartbeat); ; {
			if w == nil {
				w, again = s.Registry.Watch(ctx, ns, at.revision), at.part
			}
			changes, err := nextWatched(ctx, w, quiet)
			if err != nil {
				return watchError(err)
			}
			if changes == nil {
				break
			}
			to := w.Revision()
			if err := s.Registry.Reach(ctx, changes[len(changes)-1]); err != nil {
				return err
			}
			if err := same(); err != nil { // before anything of another one is told
				return err
			}
			for i, ch := range changes {
				changes[i] = subscription.Watched{}
				told := again > 0
				again = max(again-1, 0)
				switch {
				case i == len(changes)-1:
					at.revision, at.part, again = to, 0, 0
				case ch.Revision() != changes[i+1].Revision():
					at.revision, at.part, again = ch.Revision(), 0, 0
				case !told:
					at.part++
				}
				if told {
					continue
				}
				m, err := s.watchedMessage(ctx, f, ch)
				if err != nil {
					return err
				}
				if m == nil {
					continue
				}
				m.ResumeToken = at.String()
				if err := out.send(ctx, m, halt); err != nil {
					return err
				}
				quiet = time.Now().Add(heartbeat)
				if w == nil {
					break // the rest is read again
				}
			}
			if !time.Now().Before(quiet) {
				break
			}
		}
		if w != nil {
			if at.revision < w.Revision() {
				at.revision, at.part = w.Revision(), 0
			}
			w.Ask()
		}
	}
}

// watchedParent is existingNamespace that also takes namespaces/-, of which all is zero.
func (s *Server) watchedParent(name string) (ns string, space delivery.NamespaceKey, err error) {
	if ns, err = parseParent("parent", name); err != nil || ns == "" {
		return ns, 0, err
	}
	return s.existingNamespace("parent", name)
}

// nextWatched is nil when nothing changes until then.
func nextWatched(ctx context.Context, w *subscription.Watcher, until time.Time) ([]subscription.Watched, error) {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	changes, err := w.Next(waiting)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, nil
	}
	return changes, err
}

// watchedMessage is nil where the filter wants none.
func (s subscriptionService) watchedMessage(ctx context.Context, f *filter.Filter[*grapnelv1.Subscription], ch subscription.Watched) (*grapnelv1.WatchSubscriptionsResponse, error) {
	now := ch.Now()
	switch {
	case now != nil && f.Match(now):
		return &grapnelv1.WatchSubscriptionsResponse{Subscription: now}, nil
	case ch.Made(), now == nil && !ch.Deleted(): // which cannot be read
		return nil, nil
	}
	before, err := ch.Before(ctx)
	switch {
	case err != nil:
		return nil, err
	case before != nil && !f.Match(before): // and where it is not known, it may have matched
		return nil, nil
	case now != nil:
		return &grapnelv1.WatchSubscriptionsResponse{Subscription: now}, nil
	case before == nil:
		before = &grapnelv1.Subscription{Name: ch.Name()}
	}
	return &grapnelv1.WatchSubscriptionsResponse{Subscription: before, Deleted: true}, nil
}

// historyToken is a place in the history of a namespace in etcd, or of all: behind a revision, and part changes of the next one that
// has any. A namespace that is erased has many in one.
type historyToken struct {
	cluster        uint64
	space          delivery.NamespaceKey
	revision, part int64
}

func (h historyToken) String() string {
	places := []uint64{h.cluster, uint64(h.space), uint64(h.revision)}
	if h.part > 0 {
		places = append(places, uint64(h.part))
	}
	var b []byte
	for _, v := range places {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func parseHistoryToken(text string) (h historyToken, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) != 24 && len(b) != 32 {
		return h, false
	}
	h.cluster, h.space = binary.BigEndian.Uint64(b), delivery.NamespaceKey(binary.BigEndian.Uint64(b[8:]))
	h.revision = int64(binary.BigEndian.Uint64(b[16:]))
	if len(b) == 32 {
		h.part = int64(binary.BigEndian.Uint64(b[24:]))
	}
	return h, h.revision > 0 && h.part >= 0
}

// resumeHistory reads a token of the same history as now.
func (s *Server) resumeHistory(ctx context.Context, text string, now historyToken) (historyToken, error) {
	at, ok := parseHistoryToken(text)
	if !ok {
		return at, notAToken()
	}
	if at.cluster != now.cluster || at.space != now.space {
		return at, watchError(subscription.ErrCompacted)
	}
	if at.revision <= now.revision {
		return at, nil
	}
	head, err := s.Registry.Head(ctx)
	if err == nil && at.revision > head { // etcd has gone back, or it is made up
		err = watchError(subscription.ErrCompacted)
	}
	return at, err
}
