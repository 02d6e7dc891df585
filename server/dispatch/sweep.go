package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// sweepBatch is how many deliveries of a part one sweep looks at.
const sweepBatch = 256

// sweepDue reports whether a closed lane is to be looked through now.
func (l *lane) sweepDue(now time.Time) bool {
	return !l.sweepAt.IsZero() && !l.sweepAt.After(now)
}

// sweeper looks through a lane that makes no attempts, because its subscription is paused, disabled or
// gone. It settles what has expired, or everything when the subscription is gone.
//
// It looks at the head of the FIFO and stops at the first delivery that stays, and at the timers that
// are due: what expires behind those is found when they have gone, or when the lane opens.
type sweeper struct {
	l    *lane
	uid  delivery.UID
	gone bool
	now  time.Time
	more bool
}

// sweep is called with l.io held.
func (l *lane) sweep() {
	sub := l.e.subs.Subscription(l.key.Namespace, l.key.Subscription)
	s := sweeper{l: l, gone: sub == nil, now: time.Now()}
	if sub != nil {
		s.uid = sub.UID
	}
	s.memory()
	l.mu.Lock()
	parts := append([]*part(nil), l.parts...)
	l.mu.Unlock()
	var err error
	for _, p := range parts {
		if p != nil && err == nil {
			err = s.fifo(p)
		}
	}
	until := s.now
	if s.gone {
		until = farFuture()
	}
	l.mu.Lock()
	l.markReading(until.UnixNano())
	l.mu.Unlock()
	for _, p := range parts {
		if p != nil && p.reading {
			if err == nil {
				err = s.timers(p, until)
			}
			l.mu.Lock()
			p.reading, p.settled = false, nil
			l.mu.Unlock()
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.recountDue()
	next := sweepEvery
	if err != nil {
		l.readFailed("closed lane not swept", err)
		next = readAgain
	} else if s.more {
		next = 0
	}
	l.sweepAt = time.Now().Add(next)
}

func farFuture() time.Time { return time.Unix(1<<33, 0) }

// memory settles what still waits in memory.
func (s *sweeper) memory() {
	l := s.l
	l.mu.Lock()
	var ended []*entry
	for _, q := range []*queue{&l.fresh, &l.retries} {
		for x := q.head; x != nil; {
			next := x.next
			if judge(x.job, s.uid, s.gone, s.now) != attempt {
				q.remove(x)
				x.state.Store(settling)
				ended = append(ended, x)
			}
			x = next
		}
	}
	l.mu.Unlock()
	for _, x := range ended {
		l.e.settleUntried(x, judge(x.job, s.uid, s.gone, s.now))
	}
}

// settle ends a job that is not in memory, if it is to end.
func (s *sweeper) settle(j *delivery.Job) bool {
	v := judge(j, s.uid, s.gone, s.now)
	if v == attempt {
		return false
	}
	step := v.step()
	s.l.e.journal.Settle(j, step, nil)
	s.l.e.metrics.ended(step.State)
	return true
}

func (s *sweeper) fifo(p *part) error {
	l := s.l
	l.mu.Lock()
	from := p.from
	l.mu.Unlock()
	if from == 0 {
		return nil
	}
	began := time.Now()
	jobs, next, err := l.e.journal.Backlog(l.key, p.number, from, sweepBatch, readBytes)
	if err != nil {
		return err
	}
	last, stays := uint64(0), false
	for _, j := range jobs {
		seq := j.ID.Seq
		if !s.settle(j) {
			next, stays = seq, true
			break
		}
		last = seq
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.from != from { // the lane has opened and closed again meanwhile
		return nil
	}
	p.loaded = max(p.loaded, last)
	p.begun = max(p.begun, last)
	l.advance(p, from, next, began)
	s.more = s.more || (last != 0 && p.from != 0 && !stays)
	return nil
}

func (s *sweeper) timers(p *part, until time.Time) error {
	l := s.l
	jobs, nextDue, err := l.e.journal.Timers(l.key, p.number, until, sweepBatch, readBytes)
	if err != nil {
		return err
	}
	first, ended := int64(0), 0
	for _, j := range jobs {
		due := unixNano(j.Due)
		if l.e.index.has(j.ID) {
			continue
		}
		if s.settle(j) {
			ended++
		} else {
			first = earlier(first, due)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rearm(p, nextDue, s.now, ended > 0)
	p.nextDue = earlier(p.nextDue, first)
	s.more = s.more || (ended > 0 && p.nextDue != 0 && p.nextDue <= until.UnixNano())
	return nil
}
