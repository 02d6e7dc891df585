package dispatch

import (
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// few is how many attempts a lane may have in flight that hangs.
	few = 2
	// defaultInFlight is for subscriptions without a limit.
	defaultInFlight = 16
)

// slots are the attempts in flight. What keeps them fair, however many lanes hang:
//
//   - Suspects, lanes that hang or are slow, start nothing while they hold half of the slots, all together. The fuller
//     that half is, the fewer each one may hold, down to one. One that hangs holds few anyway, and one that has never
//     answered just one.
//   - A lane of which nothing is known has one attempt, on trial. A trial is short: after it the lane has proven itself or
//     is a suspect. An eighth of the slots is for trials, so that a new lane waits for other trials, never for those
//     that hang. Trials stop while they and the suspects hold three quarters of the slots, and those of one namespace while
//     its lanes hold five eighths. The last eighth of either is spread over the time that an attempt may hang, so that there
//     always is a trial to be had soon, and the lane of the youngest subscription has the next one: if it is well it is
//     answered within moments, however many wait that are not.
//   - What trials and suspects leave is for proven lanes. One that begins to hang is known for it only after a while. So
//     once half of that is in use, a proven lane starts nothing while it holds few, and in the last quarter while it
//     holds any.
//   - Suspects start evenly, all together no more attempts in a second than the processors have time for beside their
//     work: a thousand that hang, or time out, at the same moment would otherwise take the processors and the plugin's
//     connections from the others. So do trials, of which those that are answered do not count, and of which more start at
//     once the more are answered.
//   - No lane holds more than its subscription's limit.
//   - The same holds for what a plugin takes at once, where that is less: see pools.
//
// With 4096 slots and attempts that hang for 15 s, new lanes that hang take 2048 in some seconds and 1024 more in fifteen, and
// leave 1024 to the proven ones. Of 1000 proven lanes that begin to hang at once with 16 deliveries each, the first 128
// take 2048 slots, the next 512 take 1024 and the other 360 one each: 664 slots are left, one for each who needs it.
type slots struct {
	total int64
	// every is the time from start to start of a pace.
	every time.Duration
	used  atomic.Int64
	// trial counts those of unknown lanes, slow those of suspects.
	trial, slow atomic.Int64
	// paces are those of unknown lanes and of suspects; that of proven ones is not used.
	paces [standings]pace
	// last is that of the last eighth of trials.
	last pace
	// trust is how many trials start together beyond fewTrials.
	trust atomic.Int64
}

// pace spreads starts evenly over time. The zero pace knows of none yet.
type pace struct {
	// due is when the next start is, in nanoseconds since 1970, if each kept to its time.
	due atomic.Int64
}

// fewTrials is how many trials start together, at least.
const fewTrials = 32

// early is how much before its time a start may be: so many of a standing start together. Trials are more by one with each
// that is answered, up to all that there are, and half as many with each that is not.
func (s *slots) early(st standing) time.Duration {
	if st == unknown {
		return time.Duration(fewTrials+s.trust.Load()) * s.every
	}
	return 16 * s.every
}

// wait is how long there is no start to be had that may be early by so much.
func (p *pace) wait(now time.Time, early time.Duration) time.Duration {
	return max(0, time.Duration(p.due.Load()-now.UnixNano())-early)
}

// start takes a start, if there is one; the next is due after every.
func (p *pace) start(now time.Time, early, every time.Duration) bool {
	for {
		at := p.due.Load()
		if time.Duration(at-now.UnixNano()) > early {
			return false
		}
		if p.due.CompareAndSwap(at, max(at, now.UnixNano())+int64(every)) {
			return true
		}
	}
}

// wait is how long there is no start to be had for lanes of a standing.
func (s *slots) wait(st standing, now time.Time) time.Duration {
	wait := s.paces[st].wait(now, s.early(st))
	if st == unknown && s.nearlyTaken() {
		wait = max(wait, s.last.wait(now, 0))
	}
	return wait
}

// start takes a start for a lane whose attempt may hang for so long, if there is one.
func (s *slots) start(l *lane, hang time.Duration, now time.Time) bool {
	st := l.standing
	if st == proven {
		return true
	}
	if !s.paces[st].start(now, s.early(st), s.every) {
		return false
	}
	if st != unknown {
		return true
	}
	every := hang / time.Duration(part8(s.total, 1))
	if s.nearlyTaken() && !s.last.start(now, 0, every) || l.tenant.nearlyFull(s) && !l.tenant.last.start(now, 0, every) {
		s.paces[st].due.Add(-int64(s.every))
		return false
	}
	return true
}

// regain gives a start back that has cost nothing.
func (s *slots) regain(st standing, t *tenant) {
	s.paces[st].due.Add(-int64(s.every))
	if st == unknown {
		s.last.due.Store(0)
		t.last.due.Store(0)
	}
}

// tried learns from a lane's first attempt that has ended. One that was answered gives its start back.
func (s *slots) tried(t *tenant, answered bool) {
	trust := s.trust.Load()
	if !answered {
		s.trust.Store(trust / 2)
		return
	}
	s.trust.Store(min(trust+1, part8(s.total, 1)))
	s.regain(unknown, t)
}

// tenant is a namespace with lanes.
type tenant struct {
	key   delivery.NamespaceKey
	lanes int          // Engine.mu
	slow  atomic.Int64 // slots of lanes that are not proven
	last  pace         // of the last eighth of its trials
	// spaces are what waits on the ring, weighed when its weight was last looked up: ring.mu.
	spaces  [standings]space
	weighed time.Time
}

// nearlyFull reports whether what its lanes that are not proven may still have is the last eighth.
func (t *tenant) nearlyFull(s *slots) bool { return t.slow.Load() >= part8(s.total, 4) }

func part8(total, eighths int64) int64 { return max(1, total*eighths/8) }

// room reports whether lanes of this standing may have another slot.
func (s *slots) room(st standing, now time.Time) bool {
	if s.used.Load() >= s.total {
		return false
	}
	return !s.taken(st) && (st == proven || s.wait(st, now) == 0)
}

// taken reports whether lanes of this standing hold all that they may, together.
func (s *slots) taken(st standing) bool {
	switch st {
	case unknown:
		trial := s.trial.Load()
		return trial >= part8(s.total, 1) || trial+s.slow.Load() >= part8(s.total, 6)
	case suspect:
		return s.slow.Load() >= part8(s.total, 4)
	}
	return false
}

// nearlyTaken reports whether what trials may still have is the last eighth.
func (s *slots) nearlyTaken() bool { return s.trial.Load()+s.slow.Load() >= part8(s.total, 5) }

// scarce reports whether there may be fewer slots for lanes of this standing than they want, of whom so many wait.
func (s *slots) scarce(st standing, waiting int64) bool {
	return st != proven || s.used.Load()+waiting >= part8(s.total, 6)
}

// roomFor reports whether lanes of a namespace may have another slot, if there is room, and else when to ask again: 0 means
// when a slot is released.
func (s *slots) roomFor(t *tenant, st standing, now time.Time) (bool, time.Duration) {
	switch {
	case st != unknown || !t.nearlyFull(s):
		return true, 0
	case t.slow.Load() >= part8(s.total, 5):
		return false, 0
	}
	wait := t.last.wait(now, 0)
	return wait == 0, wait
}

// acquire takes a slot for a lane, whose mutex is held, and whose attempt may hang for so long.
func (s *slots) acquire(l *lane, hang time.Duration, now time.Time) bool {
	if ok, _ := s.roomFor(l.tenant, l.standing, now); !ok || !s.room(l.standing, now) {
		return false
	}
	if s.used.Add(1) > s.total {
		s.used.Add(-1)
		return false
	}
	if !s.start(l, hang, now) {
		s.used.Add(-1)
		return false
	}
	s.count(l, 1)
	return true
}

// returned gives a slot back that was not used.
func (s *slots) returned(l *lane) {
	s.regain(l.standing, l.tenant)
	s.count(l, -1)
	s.used.Add(-1)
}

// count has slots of the lane count for its standing, or no more. What several take at once may pass the bounds of a
// standing by as many; only used is exact.
func (s *slots) count(l *lane, n int64) {
	s.tally(l.standing, n)
	if l.standing != proven {
		l.tenant.slow.Add(n)
	}
}

func (s *slots) tally(st standing, n int64) {
	switch st {
	case unknown:
		s.trial.Add(n)
	case suspect:
		s.slow.Add(n)
	}
}

// countStrays has slots of attempts to an older target count among those of suspects.
func (s *slots) countStrays(l *lane, n int64) {
	s.slow.Add(n)
	l.tenant.slow.Add(n)
}

// share is how many slots one lane may hold.
func (s *slots) share(h *health.Health, st standing, sub *subscription.Subscription) int {
	most := maxInFlight(sub)
	slow := s.slow.Load()
	switch st {
	case unknown:
		return 1
	case proven:
		others := slow + s.trial.Load()
		used, left := s.used.Load()-others, s.total-others
		switch {
		case used < part8(left, 4):
			return most
		case used < part8(left, 6):
			return min(most, few)
		}
		return 1
	}
	switch {
	case !h.Answers():
		return 1
	case slow < part8(s.total, 2) && !h.Hangs():
		return min(most, max(few, int(s.total/10)))
	case slow < part8(s.total, 3):
		return min(most, few)
	}
	return 1
}

func maxInFlight(sub *subscription.Subscription) int {
	if sub.MaxInFlight <= 0 {
		return defaultInFlight
	}
	return sub.MaxInFlight
}

// release gives a slot back that stands in flying no more, and the next lane its turn.
func (e *Engine) release() {
	left := e.slots.used.Add(-1)
	if left == 0 && e.stopping.Load() {
		signal(e.drained)
		return
	}
	if e.ring.waiting() > 0 {
		signal(e.ring.wake)
	}
}
