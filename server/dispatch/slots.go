package dispatch

import (
	"sync/atomic"

	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// few is how many attempts a lane may have in flight of which nothing has been answered.
	few = 2
	// defaultInFlight is for subscriptions without a limit.
	defaultInFlight = 16
)

// slots are the attempts in flight. Three bounds keep them fair:
//
//   - Lanes that are not proven hold no more than half of them, all together. The fuller that half is, the fewer each
//     one may hold, down to one, and one that has answered nothing holds few anyway. The first attempts of lanes of
//     which nothing is known may take an eighth of all beyond that half, so that they need not wait for those that hang.
//   - A proven lane that begins to hang is known for it only after slowAfter. So once half of the slots are in use, a
//     proven lane holds no more than its share of the other half among all that hold any.
//   - No lane holds more than its subscription's limit, nor more than a tenth once half are in use.
//
// With 4096 slots and 1000 lanes that hang for 15 s, these hold at most 2048, and 128 lanes that begin to hang with 16
// each take 2048 while the next ones get a share of 2048/1000, that is 2.
type slots struct {
	total int64
	used  atomic.Int64
	// slow counts those of lanes that are not proven, busy the lanes that hold any.
	slow, busy atomic.Int64
}

// room reports whether lanes of this standing may have another slot.
func (s *slots) room(st standing) bool {
	if s.used.Load() >= s.total {
		return false
	}
	return st == proven || s.slow.Load() < s.half(st)
}

// half is what lanes that are not proven may hold together.
func (s *slots) half(st standing) int64 {
	half := max(1, s.total/2)
	if st == unknown {
		half += s.total / 8
	}
	return half
}

// acquire takes a slot.
func (s *slots) acquire(st standing) bool {
	if s.used.Add(1) > s.total {
		s.used.Add(-1)
		return false
	}
	if st != proven && s.slow.Add(1) > s.half(st) {
		s.slow.Add(-1)
		s.used.Add(-1)
		return false
	}
	return true
}

// share is how many slots one lane may hold.
func (s *slots) share(h *health, st standing, sub *subscription.Subscription) int {
	most := maxInFlight(sub)
	tenth := max(1, int(s.total/10))
	if st == proven {
		if 2*s.used.Load() < s.total {
			return most
		}
		return min(most, tenth, max(1, int(s.total/(2*max(1, s.busy.Load())))))
	}
	if !h.answers || h.hangs {
		most = min(most, few)
	}
	switch slow, half := s.slow.Load(), s.half(suspect); {
	case 2*slow < half:
		return min(most, max(few, tenth))
	case 4*slow < 3*half:
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

// returned gives a slot back that was not used.
func (s *slots) returned(st standing) {
	if st != proven {
		s.slow.Add(-1)
	}
	s.used.Add(-1)
}
