package pluginhost

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
	"github.com/grapnel/grapnel/server/tracing"
)

// pending is one attempt in the host's hands. Its owner is, in turn, the caller, the plan that is being
// made, a link's queue, a link's slot, and whoever took it out of there to complete it.
type pending struct {
	job *delivery.Job
	// jobs are all that the request carries, job first, where it may carry several; else nil.
	jobs []*delivery.Job
	sink delivery.Sink
	sub  *subscription.Subscription
	plan *plan
	// event is the job's, or what a dead letter makes of it.
	event *delivery.Event

	// Attempt is what is written of it.
	wire.Attempt
	// first and written are when it was first and last written to a plugin, due when that counts as hung: timeout and grace
	// later.
	first, written, due time.Time
	// traced is nil of events that are not sampled.
	traced *tracing.Attempt
	// told is what the transport says of its time.
	told wire.Timings
	// stage is how many remote signers have signed; setBy says which of them set each header, or setBySubscription.
	stage int
	setBy []int
	// made is what the transformer has made, once that is stored; held is what it counts for in memory.
	made *delivery.Made
	held int64
	// tried: what is made is all that is wanted.
	tried bool
	// shaped is set once Content is what the plan wants.
	shaped bool
	// suspicion is the job's, or what its subscription is accused of.
	suspicion int
	// resent counts instances that the plugin did not know.
	resent    int
	parkUntil time.Time
}

// setBySubscription stands for the stage of headers that a subscription makes of the event.
const setBySubscription = -1

func (h *Host) newPending(sub *subscription.Subscription, job *delivery.Job, sink delivery.Sink) *pending {
	p, ok := h.free.Get().(*pending)
	if !ok {
		p = new(pending)
	}
	p.sub, p.job, p.sink, p.event = sub, job, sink, eventOf(job)
	p.Number, p.Content = uint32(job.Attempts+1), wire.ContentOf(p.event, nil)
	return p
}

// eventOf is a job's event, or what a dead letter makes of it.
func eventOf(job *delivery.Job) *delivery.Event {
	if job.Letter != nil {
		return job.Event.With(job.Letter.Attributes())
	}
	return job.Event
}

// events are those of all jobs.
func (p *pending) events() []*delivery.Event {
	if p.jobs == nil {
		return []*delivery.Event{p.event}
	}
	events := make([]*delivery.Event, len(p.jobs))
	for i, job := range p.jobs {
		events[i] = eventOf(job)
	}
	return events
}

// stamp notes that p is written, and sets what every part of one attempt shares; a resent one keeps that.
func (p *pending) stamp(now time.Time) {
	if p.written = now; p.first.IsZero() {
		p.first = now
	}
	if p.Created.IsZero() {
		p.Created = now
		hi, lo := rand.Uint64(), rand.Uint64()
		for i := range 8 {
			p.Nonce[i], p.Nonce[8+i] = byte(hi>>(8*i)), byte(lo>>(8*i))
		}
	}
}

// complete ends p; it must not be used afterwards.
func (h *Host) complete(p *pending, r delivery.Result) {
	job, sink := p.job, p.sink
	r.Number = job.Attempts + 1
	r.Manual = job.Manual
	if p.Answer {
		r.Batch, r.BatchSize = p.Content.ID(), max(1, len(p.jobs))
	}
	if job.Trial() && p.made != nil && p.plan != nil {
		r.Made = p.shownMade()
	}
	if p.traced != nil {
		h.endTrace(p, &r)
	}
	h.made.add(-p.held)
	*p = pending{}
	h.free.Put(p)
	h.metrics.open.Add(-1)
	sink.Complete(job, r)
}

// unspent gives the job back: nothing was tried.
func (h *Host) unspent(p *pending, why string) {
	h.metrics.unspent.Inc()
	h.complete(p, delivery.Result{Cause: delivery.CauseUnspent, Attempt: delivery.Attempt{
		Outcome: delivery.OutcomePluginError, Error: why, Start: time.Now(),
	}})
}

// refused ends an attempt that the plugin's side made impossible; the receiver had no part in it.
func (h *Host) refused(p *pending, why string) {
	start := p.Created
	if start.IsZero() {
		start = time.Now()
	}
	h.complete(p, delivery.Result{Cause: delivery.CausePlugin, Attempt: delivery.Attempt{
		Outcome: delivery.OutcomePluginError, Error: why, Start: start,
	}})
}

// tooLarge ends an attempt whose body its transport does not carry. Several jobs may travel in smaller ones.
func (h *Host) tooLarge(p *pending, limit int) {
	if len(p.jobs) > 1 {
		h.complete(p, delivery.Result{Cause: delivery.CauseCrowded})
		return
	}
	h.unfit(p, fmt.Sprintf("body of %d bytes is larger than the transport carries, %d", len(p.Content.Body()), limit))
}

// unfit ends an attempt whose request is larger than may be, and stays so.
func (h *Host) unfit(p *pending, why string) {
	h.complete(p, delivery.Result{Cause: delivery.CausePolicy, Attempt: delivery.Attempt{
		Outcome: delivery.OutcomePermanent, Start: time.Now(), Error: why,
	}})
}

// interrupted ends an attempt that was written to a process which is gone.
func (h *Host) interrupted(p *pending, why string, guilt delivery.Guilt) {
	h.metrics.indeterminate.Inc()
	start := p.Created
	h.complete(p, delivery.Result{Cause: delivery.CausePlugin, Indeterminate: true, Guilt: guilt, Attempt: delivery.Attempt{
		Outcome: delivery.OutcomeInterrupted, Error: "plugin lost: " + why, Start: start, Duration: time.Since(start),
	}})
}
