package dispatch

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// The journal gives a lane one delivery of each ordering key at a time, and the next when that has ended: see
// delivery.Job.Order. What is left to the engine is an attempt that goes on after its delivery has ended, because a caller
// has cancelled it: the next one of the key waits for it, or the target could see the two in either order.

// firstFree is the first entry of a queue of whose ordering key nothing is in flight; without repeats, that is none.
func (l *lane) firstFree(q *queue, repeats bool) *entry {
	if repeats && l.orders == nil {
		return q.head
	}
	if !repeats && q.firsts == 0 {
		return nil
	}
	for x := q.head; x != nil; x = x.next {
		if !repeats && x.repeats() {
			continue
		}
		if x.Order == 0 || l.orders[x.Order] == 0 {
			return x
		}
	}
	return nil
}

// keyInFlight counts an attempt for its ordering key.
func (l *lane) keyInFlight(x *entry, n int) {
	if x.Order == 0 {
		return
	}
	if l.orders == nil {
		l.orders = make(map[delivery.OrderKey]int)
	}
	l.gathering.sub = nil // others of the key may travel now, or not
	if l.orders[x.Order] += n; l.orders[x.Order] == 0 {
		if delete(l.orders, x.Order); len(l.orders) == 0 {
			l.orders = nil
		}
	}
}

// blocksKeys reports whether an ordered delivery of the lane that fails for good keeps those behind it waiting.
func (l *lane) blocksKeys() bool {
	sub := l.e.subs.Subscription(l.key)
	return sub != nil && sub.BlocksKeys
}

// unblocks are the lanes whose ordering keys are blocked and are to be let go of, because their subscriptions do not ask
// for it any more.
type unblocks struct {
	mu   sync.Mutex
	due  []grave // in the order of their times
	wake chan struct{}
}

// add has a lane walked at a time.
func (u *unblocks) add(key delivery.LaneKey, at time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	i, _ := slices.BinarySearchFunc(u.due, at, func(g grave, at time.Time) int {
		if g.at.After(at) {
			return 1
		}
		return -1
	})
	u.due = slices.Insert(u.due, i, grave{key, at})
	signal(u.wake)
}

func (u *unblocks) next(now time.Time) (key delivery.LaneKey, wait time.Duration, ok bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.due) == 0 {
		return key, 0, false
	}
	if wait = u.due[0].at.Sub(now); wait > 0 {
		return key, wait, false
	}
	key = u.due[0].lane
	u.due = u.due[1:]
	return key, 0, true
}

// unblock walks such lanes until the engine stops, each until a walk finds nothing.
func (e *Engine) unblock() {
	e.whenDue(e.unblocks.wake, func() (time.Duration, bool) {
		key, wait, ok := e.unblocks.next(e.now())
		if !ok {
			return wait, false
		}
		n, err := e.journal.Unblock(e.taking, key, func() bool {
			sub := e.subs.Subscription(key)
			return sub != nil && !sub.BlocksKeys
		})
		if err != nil && e.taking.Err() == nil {
			e.log.Warn("ordering keys not unblocked yet", "namespace_key", key.Namespace, "subscription_key", key.Subscription, "err", err)
		}
		if n > 0 || err != nil {
			e.unblocks.add(key, e.now().Add(walkAgain))
		}
		return 0, true
	})
}

// recoverBlocked finds what a change of configuration that came before the start has left to do: lanes that have nothing
// open but what waits for a delivery that has failed are no lanes of the engine.
func (e *Engine) recoverBlocked() error {
	blocked, err := e.journal.BlockedLanes()
	if err != nil {
		return fmt.Errorf("recover blocked ordering keys: %w", err)
	}
	for _, key := range blocked {
		switch sub := e.subs.Subscription(key); {
		case sub != nil && !sub.BlocksKeys:
			e.unblocks.add(key, e.now())
		case sub == nil && e.subs.Deleted(key):
			e.graves.add(key)
		}
	}
	return nil
}
