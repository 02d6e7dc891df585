package tracing

import (
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/grapnel/grapnel/server/delivery"
)

// Attempt notes what happens in an attempt at one event or, with batching, at several, of which one at least is sampled. It
// belongs to one goroutine at a time.
type Attempt struct {
	tracer *Tracer
	begun  time.Time
	// jobs are those whose events are sampled, places theirs in the request. It belongs to the trace of the first.
	jobs   []*delivery.Job
	places []int
	// deliver and attempt are the ids of its spans.
	deliver, attempt trace.SpanID
	hops             []Step
	sent             time.Time
}

// Step is a part of an attempt.
type Step struct {
	// Name says which, Plugin who did it, where it was done in a plugin of its own.
	Name, Plugin string
	// From is zero where it is not known, but only that it began when the one before it ended.
	From time.Time
	Took time.Duration
}

// Attempt is nil when none of the events is sampled. It takes as little as can be, then.
func (t *Tracer) Attempt(job *delivery.Job, jobs []*delivery.Job) *Attempt {
	if t == nil || job.Event.Trace == nil && len(jobs) < 2 || job.Trial() {
		return nil
	}
	if len(jobs) == 0 {
		jobs = []*delivery.Job{job}
	}
	var sampled []*delivery.Job
	var places []int
	for i, j := range jobs {
		if j.Event.Trace != nil {
			sampled, places = append(sampled, j), append(places, i)
		}
	}
	if len(sampled) == 0 {
		return nil
	}
	return &Attempt{tracer: t, begun: time.Now(), jobs: sampled, places: places, deliver: newSpanID(), attempt: newSpanID()}
}

// Context is what receivers (of the attempt) and plugins (within the delivery) are told: traceparent and tracestate.
func (a *Attempt) Context() (receiver, plugin delivery.Traceparent, state string) {
	of := a.jobs[0].Event.Trace
	return delivery.Traceparent{ID: of.ID, Span: a.attempt, Flags: 1}, delivery.Traceparent{ID: of.ID, Span: a.deliver, Flags: 1}, of.State
}

// Hop notes a step before the request is sent.
func (a *Attempt) Hop(s Step) {
	if a != nil {
		a.hops = append(a.hops, s)
	}
}

// Sent notes that the request is given to its transport.
func (a *Attempt) Sent(now time.Time) {
	if a != nil {
		a.sent = now
	}
}

// Ended is how an attempt ended.
type Ended struct {
	// Namespace and Subscription are their ids, Host and Port those of the URI.
	Namespace, Subscription, Host string
	Port                          int
	// First is when it was first given to a plugin; zero when it was not.
	First time.Time
	// Outcome names that of the request, Failed says that it was no success, Dropped that there was nothing to send.
	Outcome         string
	Failed, Dropped bool
	// Own is the outcome of a delivery by its place in the request, where they differ; nil: they do not.
	Own func(place int) delivery.Outcome
	// Status is that of the answer; 0 without one.
	Status int
	// Steps are what the transport says that its time was spent on, in their order.
	Steps []Step
}

// End makes the spans.
func (a *Attempt) End(e Ended) {
	if a == nil {
		return
	}
	now := time.Now()
	var request trace.SpanContext
	for i, job := range a.jobs {
		if i == 0 {
			request = a.first(&e, now)
			continue
		}
		s := a.delivery(i, &e, now)
		s.links = []sdktrace.Link{{SpanContext: request}}
		a.tracer.emit(publicationOf(job.Event.Trace), job.Event.Trace.ID, s)
	}
}

// publicationOf is the place of an event's publish span.
func publicationOf(of *delivery.Trace) trace.SpanContext {
	c := trace.SpanContextConfig{TraceID: of.ID, SpanID: of.Span, TraceFlags: trace.FlagsSampled, Remote: true}
	if state, err := trace.ParseTraceState(of.State); err == nil {
		c.TraceState = state
	}
	return trace.NewSpanContext(c)
}

// delivery is the span of the i'th job.
func (a *Attempt) delivery(i int, e *Ended, now time.Time) *span {
	job, outcome, failed := a.jobs[i], e.Outcome, e.Failed
	if e.Own != nil {
		own := e.Own(a.places[i])
		outcome, failed = own.String(), own != delivery.OutcomeSucceeded
	}
	s := &span{name: "deliver", from: a.since(job), to: now, attributes: []attribute.KeyValue{
		attribute.String("grapnel.namespace", e.Namespace), attribute.String("grapnel.subscription", e.Subscription),
		attribute.String("grapnel.delivery", job.ID.String()), attribute.Int("grapnel.attempt", job.Attempts+1),
		attribute.String("grapnel.outcome", outcome),
	}}
	if failed {
		s.failed = outcome
	}
	return s
}

// since is when an attempt could have been made; of one that had to wait for the turn of its ordering key, when its event
// was accepted.
func (a *Attempt) since(job *delivery.Job) time.Time {
	since := job.Ready()
	if since.IsZero() {
		since = job.Event.AcceptTime
	}
	if since.IsZero() || since.After(a.begun) {
		return a.begun
	}
	return since
}

// first makes the spans of the one that the request belongs to, and returns the place of the request's.
func (a *Attempt) first(e *Ended, now time.Time) trace.SpanContext {
	t, job := a.tracer, a.jobs[0]
	id := job.Event.Trace.ID
	s := a.delivery(0, e, now)
	s.id = a.deliver
	within := t.emit(publicationOf(job.Event.Trace), id, s)
	until := e.First
	if until.IsZero() {
		until = now
	}
	t.emit(within, id, &span{name: "queue", from: s.from, to: until})
	for _, hop := range a.hops {
		t.emit(within, id, &span{name: hop.Name, from: hop.From, to: hop.From.Add(hop.Took), attributes: []attribute.KeyValue{
			attribute.String("grapnel.plugin", hop.Plugin),
		}})
	}
	if a.sent.IsZero() || e.Dropped {
		return within
	}
	request := &span{name: "attempt", kind: trace.SpanKindClient, id: a.attempt, from: a.sent, to: now}
	if e.Host != "" {
		request.attributes = append(request.attributes, attribute.String("server.address", e.Host))
	}
	if e.Port != 0 {
		request.attributes = append(request.attributes, attribute.Int("server.port", e.Port))
	}
	if e.Status != 0 {
		request.attributes = append(request.attributes, attribute.Int("http.response.status_code", e.Status))
	}
	if e.Failed {
		request.failed = e.Outcome
	}
	sent := t.emit(within, id, request)
	at := a.sent
	for _, step := range e.Steps {
		to := at.Add(step.Took)
		if to.After(now) { // what a plugin tells may be more than there was
			to = now
		}
		t.emit(sent, id, &span{name: step.Name, from: at, to: to})
		at = to
	}
	return sent
}
