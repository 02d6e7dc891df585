package api

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"time"

	"google.golang.org/grpc"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// WatchSubscriptions tells what becomes of a namespace's subscriptions.
func (s subscriptionService) WatchSubscriptions(r *grapnelv1.WatchSubscriptionsRequest, stream grpc.ServerStreamingServer[grapnelv1.WatchSubscriptionsResponse]) error {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
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
	if !s.edge.tailsOf.enter(ns) {
		return s.edge.tailsOf.refusal(ns, "watches")
	}
	defer s.edge.tailsOf.leave(ns)
	ctx, end := s.watchContext(stream.Context())
	defer end()
	out := sendTo(stream, s.WatchPatience, &s.edge.tailBytes)
	defer out.close()
	heartbeat := heartbeatOf(r)
	var w *subscription.Watcher
	// Nobody reads what etcd tells while a message waits: it would pile up.
	halt := func() {
		if w != nil {
			w.Close()
			w = nil
		}
	}
	defer func() { halt() }()
	for {
		if _, now, err := s.existingNamespace("parent", r.GetParent()); err != nil {
			return err
		} else if now != space { // deleted, and made anew
			return notFound(r.GetParent(), "namespace")
		}
		if err := out.send(ctx, &grapnelv1.WatchSubscriptionsResponse{ResumeToken: at.String()}, halt); err != nil {
			return err
		}
		for quiet := time.Now().Add(heartbeat); ; {
			if w == nil {
				w = s.Registry.Watch(ctx, ns, at.revision)
			}
			changes, err := nextWatched(ctx, w, quiet)
			if err != nil {
				return watchError(err)
			}
			if changes == nil {
				break
			}
			to := w.Revision()
			for i, ch := range changes {
				if i == len(changes)-1 {
					at.revision = to
				} else if ch.Revision != changes[i+1].Revision {
					at.revision = ch.Revision
				}
				m := watchedMessage(f, ch)
				if m == nil {
					continue
				}
				m.ResumeToken = at.String()
				if err := out.send(ctx, m, halt); err != nil {
					return err
				}
				quiet = time.Now().Add(heartbeat)
			}
			if !time.Now().Before(quiet) {
				break
			}
		}
		if w != nil {
			at.revision = max(at.revision, w.Revision())
			if err := w.Ask(); err != nil && ctx.Err() == nil {
				halt() // and watch anew
			}
		}
	}
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
func watchedMessage(f *filter.Filter[*grapnelv1.Subscription], ch subscription.Watched) *grapnelv1.WatchSubscriptionsResponse {
	m := &grapnelv1.WatchSubscriptionsResponse{Subscription: ch.Now, Deleted: ch.Now == nil}
	switch {
	case ch.Now != nil && f.Match(ch.Now), ch.Before != nil && f.Match(ch.Before):
	case ch.Now == nil && ch.Before == nil: // it may have been wanted
	default:
		return nil
	}
	if m.Deleted {
		if m.Subscription = ch.Before; m.Subscription == nil {
			m.Subscription = &grapnelv1.Subscription{Name: ch.Name}
		}
	}
	return m
}

// historyToken is a place in the history of a namespace in etcd.
type historyToken struct {
	cluster  uint64
	space    delivery.NamespaceKey
	revision int64
}

func (h historyToken) String() string {
	var b []byte
	for _, v := range []uint64{h.cluster, uint64(h.space), uint64(h.revision)} {
		b = binary.BigEndian.AppendUint64(b, v)
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

func parseHistoryToken(text string) (h historyToken, ok bool) {
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) != 24 {
		return h, false
	}
	h.cluster, h.space = binary.BigEndian.Uint64(b), delivery.NamespaceKey(binary.BigEndian.Uint64(b[8:]))
	h.revision = int64(binary.BigEndian.Uint64(b[16:]))
	return h, h.revision > 0
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
