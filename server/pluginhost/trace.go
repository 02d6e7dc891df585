package pluginhost

import (
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/tracing"
)

// trace has p belong to the traces of its events, where they are sampled.
func (h *Host) trace(p *pending) {
	if h.opts.Tracer == nil {
		return
	}
	if p.traced = h.opts.Tracer.Attempt(p.job, p.jobs); p.traced == nil {
		p.Unsampled = true
		return
	}
	p.Trace = &wire.Trace{}
	p.Trace.Receiver, p.Trace.Plugin, p.Trace.State = p.traced.Context()
}

// endTrace makes the spans of an attempt. One that was given back is none: the next one tells how long it has waited.
func (h *Host) endTrace(p *pending, r *delivery.Result) {
	if r.Cause == delivery.CauseUnspent || r.Cause == delivery.CauseCrowded {
		return
	}
	e := tracing.Ended{
		Namespace: p.sub.Namespace, Subscription: p.sub.ID, First: p.first, Status: r.ResponseCode,
		Outcome: r.Outcome.String(), Failed: r.Outcome != delivery.OutcomeSucceeded,
	}
	if r.Cause == delivery.CauseDropped {
		e.Outcome, e.Failed, e.Dropped = "dropped", false, true
	}
	if len(r.Refused) > 0 {
		n := len(p.jobs)
		e.Own = func(place int) delivery.Outcome { return r.Of(place, n).Outcome }
	}
	if p.plan != nil {
		if u, err := url.Parse(p.plan.uri); err == nil {
			e.Host = strings.ToValidUTF8(u.Hostname(), "?")
			e.Port, _ = strconv.Atoi(u.Port())
		}
	}
	names := phaseNames()
	for i, us := range p.told {
		if us > 0 {
			took := min(time.Duration(us)*time.Microsecond, time.Since(p.written))
			e.Steps = append(e.Steps, tracing.Step{Name: names[phaseSign+phase(i)], Took: took})
		}
	}
	p.traced.End(e)
}
