package dispatch

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/window"
	"github.com/grapnel/grapnel/server/subscription"
)

// A lane with batching gathers what is due and sends it together. Nothing is set aside for that: deliveries wait where they
// would wait for a slot, in memory and in the order of their rows, so that what callers change meanwhile is done to them as
// to all others, and are taken out when the request is made up. What they wait for is company: until there is as much as
// a request carries, or for as long as they may.
//
// A request is an entry, too, the carrier of a parcel, which stands in no window. It holds the slot and is the sink of the
// attempt, and what health learns is learnt from it, once. What is in the parcel is flying, and each is settled by itself.

// parcel is what one request carries.
type parcel struct {
	carrier *entry
	// all are who is in it, in the order of the request. One that has been taken out of it, because it is given up, bears it
	// no more.
	all []*entry
	// bytes are the payloads and attributes.
	bytes int64
}

// carries reports whether x is a request with a parcel.
func (x *entry) carries() bool { return x.parcel != nil && x.parcel.carrier == x }

// travels reports whether x is in a parcel.
func (x *entry) travels() bool { return x.parcel != nil && x.parcel.carrier != x }

// gathers reports whether the lane waits for company, and sets the alarm for when that is over. l.mu is held.
func (l *lane) gathers(g gate, now time.Time) bool {
	sub := g.sub
	lead := l.next(sub)
	if lead == nil || lead.expired(now) || g.isolated || l.behind(now) && !l.reading { // memory holds no more of it
		return false
	}
	repeats := l.withRepeats(lead, sub)
	n, weight := l.fresh.n+l.timers.n, l.fresh.weight+l.timers.weight
	if !repeats {
		n, weight = l.fresh.firsts+l.timers.firsts, l.fresh.weight
	}
	if n >= l.company(lead, sub) || weight >= sub.Batching.MaxBytes { // before each one is looked at
		return false
	}
	until := l.gathersUntil(sub, repeats, now)
	if !now.Before(until) {
		return false
	}
	l.arm(until)
	return true
}

// gathering is what was found when those that wait were looked at: until when they do.
type gathering struct {
	sub              *subscription.Subscription // nil: look again
	repeats, reading bool
	until            time.Time
}

// gathersUntil is when the first of those that wait has waited long enough; zero when none does.
func (l *lane) gathersUntil(sub *subscription.Subscription, repeats bool, now time.Time) time.Time {
	if g := &l.gathering; g.sub != sub || g.repeats != repeats || g.reading != l.reading || !now.Before(g.until) {
		*g = gathering{sub, repeats, l.reading, l.lookWho(sub, repeats)}
	}
	return l.gathering.until
}

// joins has one more wait. l.mu is held.
func (l *lane) joins(x *entry) {
	if g := &l.gathering; g.sub != nil {
		if at := l.patience(x, g.sub.Batching.MaxWait); g.until.IsZero() || at.Before(g.until) {
			g.until = at
		}
	}
}

// lookWho looks at all that wait: they are in the order of their rows, and not of how long they do.
func (l *lane) lookWho(sub *subscription.Subscription, repeats bool) (until time.Time) {
	for _, q := range []*queue{&l.fresh, &l.timers} {
		for x := q.head; x != nil; x = x.next {
			if x.repeats() && !repeats || x.Order != 0 && l.orders[x.Order] > 0 {
				continue
			}
			if at := l.patience(x, sub.Batching.MaxWait); until.IsZero() || at.Before(until) {
				until = at
			}
		}
	}
	return until
}

// patience is until when an entry waits for company. What it has waited for anything else counts, but what is being read
// comes along. So that none expires meanwhile, it is half of what it has left at most.
func (l *lane) patience(x *entry, most time.Duration) time.Time {
	since := x.at.time()
	if due := x.due(); due.Before(since) && !l.reading {
		since = due
	}
	if !x.Expire.IsZero() {
		most = min(most, x.Expire.Sub(since)/2)
	}
	return since.Add(most)
}

// due is since when x could have been made. Nobody notes since when it has had the turn of its ordering key: that is taken for
// when it came to memory.
func (x *entry) due() time.Time {
	if since := x.Ready(); !since.IsZero() {
		return since
	}
	return x.at.time()
}

// behind reports whether more is due than there is in memory.
func (l *lane) behind(now time.Time) bool {
	if l.first(delivery.FIFO) != nil {
		return true
	}
	timer := l.first(delivery.Timer)
	return timer != nil && timer.Next(delivery.Timer).Due <= instant(now)
}

// company is how many a request may carry that carries x. One that a plugin may have died of goes by itself, and so does one
// that decides on a breaker.
func (l *lane) company(x *entry, sub *subscription.Subscription) int {
	if x.Suspicion > 0 || l.health.Isolated() {
		return 1
	}
	return delivery.Company(x.Parted, sub.Batching.MaxEvents)
}

// withRepeats reports whether repeats may travel with lead, as far as their budget goes.
func (l *lane) withRepeats(lead *entry, sub *subscription.Subscription) bool {
	return lead.repeats() || l.mayRepeat(true, sub)
}

// takeTogether is take for a lane with batching: what has expired, and one request.
func (l *lane) takeTogether(b *batch, g gate, now time.Time) {
	if l.behind(now) {
		l.wantRead(g, now)
	}
	lead := l.next(g.sub)
	for ; lead != nil && lead.expired(now); lead = l.next(g.sub) {
		if b.n == quantum {
			return
		}
		l.pick(b, lead, true, visit{}, g, now)
	}
	if lead == nil || b.n == quantum || l.gathers(g, now) {
		return
	}
	v, ok := l.mayStart(g, now)
	if !ok {
		return
	}
	c := l.fill(g.sub, lead, now)
	l.set(b, c, v, g, now)
	b.entries[b.n] = c
	b.n++
}

// fill makes up a request with lead and those behind it, first its own kind's, up to the first that does not fit.
func (l *lane) fill(sub *subscription.Subscription, lead *entry, now time.Time) *entry {
	c := &entry{lane: l}
	c.parcel = &parcel{carrier: c}
	c.ID, c.Kind, c.Due, c.Attempts, c.Manual = lead.ID, lead.Kind, lead.Due, lead.Attempts, lead.Manual
	l.timerTurn = lead.Kind == delivery.FIFO
	most, room := sub.Batching.MaxEvents, sub.Batching.MaxBytes
	queues := [2]*queue{&l.fresh, &l.timers}
	if lead.Kind == delivery.Timer {
		queues[0], queues[1] = queues[1], queues[0]
	}
	repeats := l.withRepeats(lead, sub)
	for _, q := range queues {
		for x := l.firstFree(q, repeats); x != nil && len(c.parcel.all) < most; x = l.firstFree(q, repeats) {
			n := len(c.parcel.all)
			if l.company(x, sub) <= n || n > 0 && x.weight > room || x.expired(now) {
				break
			}
			most, room = min(most, l.company(x, sub)), room-x.weight
			q.remove(x)
			x.stage, x.parcel = window.Flying, c.parcel
			l.keyInFlight(x, 1)
			c.parcel.all = append(c.parcel.all, x)
			c.parcel.bytes += int64(x.weight)
		}
	}
	l.e.metrics.together.Observe(float64(len(c.parcel.all)))
	l.chargeBody(c.parcel.bytes)
	return c
}

// weight is what an event counts for in a batch.
func weight(ev *delivery.Event) int {
	n := len(ev.Payload) + len(ev.ID) + len(ev.Source) + len(ev.Type) + len(ev.Subject) + len(ev.Schema)
	for name, value := range ev.Attributes {
		n += len(name) + len(value)
	}
	return n
}

// jobs are those of all that is in it, whose places results name.
func (p *parcel) jobs() []*delivery.Job {
	jobs := make([]*delivery.Job, len(p.all))
	for i, x := range p.all {
		jobs[i] = &x.Job
	}
	return jobs
}

// leave takes an entry that is given up out of its parcel, which goes on. With the last one it is given up, too.
func (l *lane) leave(x *entry) {
	p, c := x.parcel, x.parcel.carrier
	l.keyInFlight(x, -1)
	x.parcel, x.gone = nil, true
	if slices.ContainsFunc(p.all, func(other *entry) bool { return other.parcel == p }) {
		return
	}
	l.land(c)
	l.returned(c)
	c.gone = true
	l.e.release()
}

// unload has a request that has ended, or was not made, hold nothing any more of what all share.
func (l *lane) unload(c *entry) {
	for _, x := range c.parcel.all {
		if x.parcel == c.parcel {
			l.keyInFlight(x, -1)
		}
	}
	l.chargeBody(-c.parcel.bytes)
}

// chargeBody notes that a request's body, which is made of copies, is in memory or no more.
func (l *lane) chargeBody(size int64) {
	l.e.budget.entries.Add(size)
	l.charge(0, size)
}

// putBack has an entry wait again that has landed. If a caller has ended or replaced it meanwhile, that was it.
func (l *lane) putBack(x *entry) {
	x.parcel = nil
	if x.marked {
		w := l.window(x.ID.Partition)
		w.Forget(x.Row())
		l.forget(x)
		l.tidy(x.ID.Partition)
		return
	}
	x.stage = window.Waiting
	l.queueOf(x).putBack(x)
	l.gathering.sub = nil
}

// outcome is how one delivery of a request goes on.
type outcome struct {
	x       *entry
	step    delivery.Step
	attempt delivery.Attempt
}

// completeAll is Complete for a request with a parcel.
func (x *entry) completeAll(r delivery.Result) {
	l := x.lane
	e := l.e
	now := e.now()
	l.mu.Lock()
	if x.stage != window.Flying || x.gone {
		l.mu.Unlock()
		return
	}
	switch r.Cause {
	case delivery.CauseUnspent:
		l.health.Unspent(now, r.Error)
		e.metrics.parked.Inc()
		fallthrough
	case delivery.CauseCrowded:
		if r.Cause == delivery.CauseCrowded {
			for _, p := range x.parcel.all {
				p.Parted = delivery.Crowded(p.Parted)
			}
		}
		l.back(x)
		l.kick(now)
		l.mu.Unlock()
		return
	}
	took := now.Sub(x.at.time())
	n := len(x.parcel.all)
	x.stage = window.Settling
	l.land(x)
	ends := make([]outcome, 0, n)
	for i, p := range x.parcel.all {
		if p.parcel == x.parcel {
			p.parcel, p.sub = nil, x.sub
			own := r.Of(i, n)
			step := p.end(&own, now, took)
			ends = append(ends, outcome{p, step, own.Attempt})
			if _, named := r.Refused[i]; !named {
				p.Parted = delivery.Part(&p.Job, r, n)
			}
		}
	}
	lesson := r
	if len(ends) > 0 && len(r.Refused) == n {
		lesson.Outcome = delivery.OutcomeRetryable
	}
	v := l.learn(x, &lesson, ends[0].step, took, now)
	x.square(x.cost(took))
	down := x.visit.ended(l.key, &lesson, x.at.time(), now)
	for i := range ends {
		l.count(now, ends[i].attempt.Outcome, ends[i].step.State, ends[i].x.since(now))
	}
	l.mu.Unlock()

	for i := range ends {
		end := &ends[i]
		e.trace(end.x, &end.attempt, end.step)
		e.metrics.settled(end.x.Event, end.attempt.Outcome, end.step.State, end.x.since(now))
		e.metrics.keyBlocked(&end.x.Job, end.step)
	}
	e.metrics.learnt(v)
	if down {
		e.metrics.down.Inc()
	}
	if v.Noted {
		l.note()
	}
	if v.Half {
		l.warn(x.sub)
	}
	x.tellHealth(v, &lesson.Attempt, now)
	for i := range ends {
		e.tellEnd(x.sub, &ends[i].x.Job, ends[i].step, now)
		e.journal.Settle(&ends[i].x.Job, ends[i].step, &ends[i].attempt, ends[i].x)
	}
	e.release()

	l.mu.Lock()
	l.proceed(now)
	l.mu.Unlock()
}

// end draws the conclusions for a delivery whose attempt has ended, and which is to be settled next, and completes the
// attempt. l.mu is held.
func (x *entry) end(r *delivery.Result, now time.Time, took time.Duration) delivery.Step {
	a := &r.Attempt
	a.Number, a.Manual = x.Attempts+1, x.Manual
	if a.Start.IsZero() {
		a.Start = now.Add(-took)
	}
	if a.Duration == 0 {
		a.Duration = took
	}
	step := delivery.Next(policy(x.sub), &x.Job, *r, now, rand.Float64())
	step.Block = x.lane.blocksKeys()
	x.Suspicion = delivery.Watch(&x.Job, *r)
	if r.Indeterminate {
		x.Indeterminate++
	}
	if x.Letter == nil && (step.State == delivery.Exhausted || step.State == delivery.Rejected) {
		step.DeadLetter = x.lane.e.subs.DeadLetter(x.sub)
	}
	x.stage = window.Settling
	return step
}

// since is how long it has taken from when the delivery could have been made.
func (x *entry) since(now time.Time) time.Duration {
	return now.Sub(laterOf(x.Event.AcceptTime, x.Event.DeliverTime))
}
