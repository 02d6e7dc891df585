package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// Status says how a lane stands.
type Status struct {
	// Open: attempts may start. Otherwise Reason says why not, in words for people, and Until when that ends by itself;
	// zero when it does not.
	Open   bool
	Reason string
	Until  time.Time
	// FailingSince is when the run of failures without a success began; zero when there is none.
	FailingSince time.Time
	// LastSuccess is when the target last took a delivery; zero when that was never or long ago.
	LastSuccess time.Time
	// Slow: the lane holds fewer slots, because its target hangs or takes long. Latency is how long attempts take, on a
	// moving average; 0 when that is not known.
	Slow    bool
	Latency time.Duration
	// InFlight attempts, and Waiting deliveries in memory; more may wait on disk.
	InFlight, Waiting int
	// OldestDue is the age of the oldest delivery that is due; see Engine.OldestDue.
	OldestDue time.Duration
}

// Status of a lane; of one that nothing is open in, too.
func (e *Engine) Status(key delivery.LaneKey) Status {
	now := e.now()
	l := e.find(key)
	if l == nil {
		l = &lane{e: e, key: key, alarm: alarm{index: -1}}
		e.mu.RLock()
		l.health = e.healths[key]
		e.mu.RUnlock()
		l.mu.Lock()
	}
	defer l.mu.Unlock()
	g, h := l.gate(now), &l.health
	return Status{
		Open: g.open(), Reason: g.reason, Until: g.until,
		FailingSince: h.failing, LastSuccess: h.succeeded,
		Slow: h.standing() == suspect, Latency: h.latency,
		InFlight: l.inFlight(), Waiting: l.waiting(), OldestDue: l.oldestDue(now),
	}
}

// WaitReason says why a delivery that is due is not tried: why its lane is closed, and until when. It is empty while
// the delivery is in flight or its lane is open.
func (e *Engine) WaitReason(id delivery.ID, key delivery.LaneKey) string {
	if e.InFlight(id, key) {
		return ""
	}
	s := e.Status(key)
	if s.Open || s.Until.IsZero() {
		return s.Reason
	}
	return s.Reason + " until " + s.Until.UTC().Format(time.RFC3339)
}
