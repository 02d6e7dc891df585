package dispatch

import (
	"sync"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const (
	// gravediggers is how many lanes of deleted subscriptions are worked off at once: each walks all partitions.
	gravediggers = 2
	// walkAgain is after how long a lane is walked again in which something was cancelled, because what was accepted with
	// an older snapshot comes late, or could not be.
	walkAgain = 5 * time.Second
)

// graves are the lanes of subscriptions whose deletion has been seen. Each is walked until a walk finds nothing.
type graves struct {
	mu    sync.Mutex
	known map[delivery.LaneKey]struct{}
	// claims are the lanes that callers are deleting, who cancel and count themselves.
	claims map[delivery.LaneKey]*claim
	// now are to be walked at once, later after a while; both in the order of their times.
	now   []delivery.LaneKey
	later []grave
	wake  chan struct{}
}

// claim is that of the callers who delete one subscription.
type claim struct {
	callers int
	parked  bool // to be walked when they have done
}

type grave struct {
	lane delivery.LaneKey
	at   time.Time
}

func (g *graves) add(key delivery.LaneKey) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, ok := g.known[key]; ok {
		return
	}
	if g.known == nil {
		g.known = make(map[delivery.LaneKey]struct{})
	}
	g.known[key] = struct{}{}
	g.now = append(g.now, key)
	signal(g.wake)
}

// next takes a lane, or says how long to wait; 0 means until one is added.
func (g *graves) next(now time.Time) (key delivery.LaneKey, wait time.Duration, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.later) > 0 && !now.Before(g.later[0].at) {
		g.now = append(g.now, g.later[0].lane)
		g.later = g.later[1:]
	}
	if len(g.now) > 0 {
		key, g.now = g.now[0], g.now[1:]
		if len(g.now) > 0 {
			signal(g.wake) // for the others
		}
		return key, 0, true
	}
	if len(g.later) > 0 {
		wait = g.later[0].at.Sub(now)
	}
	return key, wait, false
}

func (g *graves) again(key delivery.LaneKey, at time.Time) {
	g.mu.Lock()
	g.later = append(g.later, grave{key, at})
	g.mu.Unlock()
	signal(g.wake)
}

func (g *graves) done(key delivery.LaneKey) {
	g.mu.Lock()
	delete(g.known, key)
	g.mu.Unlock()
}

// claim keeps a lane from being walked until it is released.
func (g *graves) claim(key delivery.LaneKey) (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.claims[key]
	if c == nil {
		c = &claim{}
		if g.claims == nil {
			g.claims = make(map[delivery.LaneKey]*claim)
		}
		g.claims[key] = c
	}
	c.callers++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.callers--; c.callers > 0 {
			return
		}
		delete(g.claims, key)
		if c.parked {
			g.now = append(g.now, key)
			signal(g.wake)
		}
	})
}

// park puts a lane off that is claimed, until it is released.
func (g *graves) park(key delivery.LaneKey) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.claims[key]
	if c != nil {
		c.parked = true
	}
	return c != nil
}

// bury works off the lanes of deleted subscriptions until the engine stops.
func (e *Engine) bury() {
	e.whenDue(e.graves.wake, func() (time.Duration, bool) {
		key, wait, ok := e.graves.next(e.now())
		if ok {
			e.walk(key)
		}
		return wait, ok
	})
}

// walk cancels what a deleted subscription has left. Its namespace may have been taken back meanwhile.
func (e *Engine) walk(key delivery.LaneKey) {
	if e.graves.park(key) {
		return
	}
	n, err := e.CancelLane(e.taking, key, e.subs.EndReason(key), func() bool { return e.subs.Deleted(key) })
	if e.taking.Err() != nil {
		return
	}
	if err != nil {
		e.log.Warn("deliveries of a deleted subscription not cancelled yet",
			"namespace_key", key.Namespace, "subscription_key", key.Subscription, "err", err)
	}
	now := e.now()
	if !e.subs.Deleted(key) { // it is there after all: UndeleteNamespace or a resync has brought it back
		e.graves.done(key)
		return
	}
	if l := e.find(key); l != nil {
		l.sweepAt = now // to find that nothing is there any more
		l.kick(now)
		l.mu.Unlock()
	}
	if err != nil || n > 0 || e.journal.OpenOf(key) > 0 {
		e.graves.again(key, now.Add(walkAgain))
		return
	}
	e.graves.done(key)
	e.mu.Lock()
	delete(e.healths, key)
	e.mu.Unlock()
	// The lane, if it is still there, does not leave its health when it goes.
	e.journal.SetFailing(key, time.Time{})
	if e.workedOff != nil {
		e.workedOff(key)
	}
}
