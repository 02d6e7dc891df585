package dispatch

import (
	"sync"
	"sync/atomic"

	"github.com/grapnel/grapnel/server/subscription"
)

const (
	// What a lane may hold waiting while there is plenty of room, while there is some, and otherwise.
	deepJobs, deepBytes = 8192, 8 << 20
	someJobs, someBytes = 256, 1 << 20
	fewJobs, fewBytes   = 4, 16 << 10
	// timerJobs is how many of the jobs may be timers.
	timerJobs = 256
	// fedAtOnce is how many lanes are fed when one gives room.
	fedAtOnce = 2
)

// budget bounds what is in memory, counted as an entry for each job and each event once. Up to half of the limit a lane
// may hold much, so that a burst need not be read back from disk, and up to three quarters some. What lanes hold that are not
// proven, their events counted in full for each, ends at a quarter and a half: they cannot push the others out. Beyond
// these bounds only a lane of which nothing waits in memory gets a few jobs, one that is on trial just one, and at the limit
// it waits for its turn to: in one rota suspects, in another all others, which comes first. Proven lanes have a quarter
// more than the limit, where each of which nothing is in memory gets one job.
type budget struct {
	limit  int64
	events Events
	// entries is bytes of entries without events, slow what lanes that are not proven hold with them.
	entries, slow atomic.Int64

	hungry atomic.Int64 // lanes in waiting
	mu     sync.Mutex
	// waiting are lanes that wait for room: first all others, then suspects.
	waiting [2]rota
}

// room is what a lane may have in memory waiting.
type room struct {
	jobs  int
	bytes int64
	// bare: only while nothing of it waits in memory; alone: nor is in flight.
	bare, alone bool
}

func (b *budget) used() int64 { return b.entries.Load() + b.events.EventBytes() }

// room is what a lane of a standing may hold.
func (b *budget) room(st standing, limited bool) room {
	used := b.used()
	slow := int64(0)
	if st != proven {
		slow = b.slow.Load()
	}
	half, limit := b.limit/2, b.limit
	switch {
	case used < half && slow < limit/4 && !limited:
		return room{jobs: deepJobs, bytes: min(deepBytes, max(half-used, fewBytes))}
	case used < limit*3/4 && slow < limit/4:
		return room{jobs: someJobs, bytes: min(someBytes, max(limit*3/4-used, fewBytes))}
	case st == suspect && (slow >= half || used >= limit), st == unknown && used >= limit, used >= limit+limit/4:
		return room{bare: true}
	case st == unknown:
		return room{jobs: 1, bytes: fewBytes, bare: true}
	case used >= limit:
		return room{jobs: 1, bytes: fewBytes, bare: true, alone: true}
	}
	return room{jobs: fewJobs, bytes: fewBytes, bare: true}
}

// fits reports whether the lane may take more into a room that is bare. l.mu is held.
func (l *lane) fits(r room) bool { return l.waiting() == 0 && !(r.alone && l.flying.n > 0) }

// room is what the lane may hold. l.mu is held.
func (l *lane) room(sub *subscription.Subscription) room {
	r := l.e.budget.room(l.standing, sub == nil || sub.MaxRate > 0)
	switch {
	case l.health.Isolated() && r.jobs > 0:
		return room{jobs: 1, bytes: fewBytes, bare: true}
	case !r.bare && sub != nil:
		r.jobs = max(r.jobs, 2*l.health.Limit(maxInFlight(sub)))
	}
	return r
}

// charge notes that the lane holds more, or less. l.mu is held.
func (l *lane) charge(jobs int, size int64) {
	b := &l.e.budget
	b.entries.Add(int64(jobs) * entryBytes)
	l.bytes += size
	if l.standing != proven {
		b.slow.Add(size)
	}
	if size < 0 && b.hungry.Load() > 0 {
		l.e.feed()
	}
}

func (b *budget) rotaOf(st standing) *rota {
	if st == suspect {
		return &b.waiting[1]
	}
	return &b.waiting[0]
}

// hunger has the lane wait for room. l.mu is held.
func (l *lane) hunger() {
	b := &l.e.budget
	b.mu.Lock()
	l.hungry, l.hungryAs = true, l.standing
	b.rotaOf(l.standing).add(l)
	b.hungry.Add(1)
	b.mu.Unlock()
	l.e.feed() // room may have come before it stood there
}

// sated has the lane wait no more, and reports whether it did. l.mu is held.
func (l *lane) sated() bool {
	b := &l.e.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if !l.hungry {
		return false
	}
	b.rotaOf(l.hungryAs).remove(l)
	b.fed(l)
	return true
}

func (b *budget) fed(l *lane) {
	l.hungry = false
	b.hungry.Add(-1)
}

// feed has lanes read for which there is room now.
func (e *Engine) feed() {
	b := &e.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	for range fedAtOnce {
		r := &b.waiting[0]
		if l := r.next(); l == nil || b.room(l.hungryAs, true).jobs == 0 {
			r = &b.waiting[1]
		}
		if l := r.next(); l == nil || b.room(l.hungryAs, true).jobs == 0 {
			return
		}
		l := r.take()
		b.fed(l)
		e.reads.push(l)
	}
}
