package tracing

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"google.golang.org/grpc/metadata"

	"github.com/grapnel/grapnel/server/delivery"
)

type callerKey struct{}

// Caller has events that are published under the context belong to the trace that the metadata of the call name, unless
// they name one themselves.
func (t *Tracer) Caller(ctx context.Context) context.Context {
	if t == nil {
		return ctx
	}
	parents := metadata.ValueFromIncomingContext(ctx, "traceparent")
	if len(parents) != 1 {
		return ctx
	}
	state := ""
	for i, s := range metadata.ValueFromIncomingContext(ctx, "tracestate") { // several are one (section 3.3.1)
		if i > 0 {
			state += ","
		}
		if state += s; len(state) > delivery.MaxTraceState {
			state = ""
			break
		}
	}
	if parent := contextOf(parents[0], state); parent.IsValid() {
		return context.WithValue(ctx, callerKey{}, parent)
	}
	return ctx
}

// contextOf reads a traceparent and its tracestate. It is not valid when the former is not; a tracestate that is not is
// left out, as W3C Trace Context has it.
func contextOf(parent, state string) trace.SpanContext {
	p, ok := delivery.ParseTraceparent(parent)
	if !ok {
		return trace.SpanContext{}
	}
	c := trace.SpanContextConfig{TraceID: p.ID, SpanID: p.Span, TraceFlags: trace.TraceFlags(p.Flags) & trace.FlagsSampled, Remote: true}
	if len(state) <= delivery.MaxTraceState {
		if s, err := trace.ParseTraceState(state); err == nil {
			c.TraceState = s
		}
	}
	return trace.NewSpanContext(c)
}

// Publishing notes the publication of the sampled ones of some events.
type Publishing struct {
	tracer    *Tracer
	namespace string
	start     time.Time
	// appendFrom and appendTo are those of the events that were appended.
	appendFrom, appendTo time.Time
	events               []publishedEvent
}

type publishedEvent struct {
	place  int
	event  *delivery.Event
	parent trace.SpanContext
	// appended: it was given to the journal.
	appended bool
}

// Publish decides which of the events are sampled and sets their Trace. It returns nil when none is.
func (t *Tracer) Publish(ctx context.Context, namespace string, events []*delivery.Event) *Publishing {
	if t == nil {
		return nil
	}
	var p *Publishing
	caller, _ := ctx.Value(callerKey{}).(trace.SpanContext)
	under := context.Background()
	if caller.IsValid() {
		under = trace.ContextWithRemoteSpanContext(under, caller)
	}
	for k, ev := range events {
		parent, under := caller, under
		if text := ev.Attributes["traceparent"]; text != "" {
			if own := contextOf(text, ev.Attributes["tracestate"]); own.IsValid() {
				parent, under = own, trace.ContextWithRemoteSpanContext(context.Background(), own)
			}
		}
		id := parent.TraceID()
		if !parent.IsValid() {
			id = newTraceID()
		}
		decision := t.sampler.ShouldSample(sdktrace.SamplingParameters{ParentContext: under, TraceID: id, Name: "publish", Kind: trace.SpanKindServer})
		if decision.Decision != sdktrace.RecordAndSample {
			continue
		}
		if p == nil {
			p = &Publishing{tracer: t, namespace: namespace, start: time.Now()}
		}
		ev.Trace = &delivery.Trace{ID: id, Span: newSpanID(), State: decision.Tracestate.String()}
		p.events = append(p.events, publishedEvent{place: k, event: ev, parent: parent})
	}
	return p
}

// Append notes that those events are given to the journal that are admitted, by their places; what it returns is called once
// that has taken them.
func (p *Publishing) Append(admitted func(place int) bool) (taken func()) {
	if p == nil {
		return func() {}
	}
	for i := range p.events {
		p.events[i].appended = admitted(p.events[i].place)
	}
	p.appendFrom = time.Now()
	return func() { p.appendTo = time.Now() }
}

// Published is what has become of an event.
type Published struct {
	// UID is that of the stored one: of a duplicate the one that was there before. Empty of one that was refused.
	UID       string
	Duplicate bool
	// Refused names why it was, by a word of ours; empty when it was not.
	Refused string
}

// End makes the spans; outcome says what has become of an event by its place. One that was refused is an operation that has
// failed, as OpenTelemetry has it: its span is an error, with why, and is as much decided on by the sampler as any other.
func (p *Publishing) End(outcome func(place int) Published) {
	if p == nil {
		return
	}
	now := time.Now()
	for _, e := range p.events {
		became := outcome(e.place)
		s := span{
			name: "publish", kind: trace.SpanKindServer, from: p.start, to: now, id: e.event.Trace.Span,
			attributes: []attribute.KeyValue{
				attribute.String("grapnel.namespace", p.namespace), attribute.String("grapnel.event.type", e.event.Type),
			},
			failed: became.Refused,
		}
		if became.UID != "" {
			s.attributes = append(s.attributes, attribute.String("grapnel.event.uid", became.UID))
		}
		if became.Duplicate {
			s.attributes = append(s.attributes, attribute.Bool("grapnel.event.duplicate", true))
		}
		within := p.tracer.emit(e.parent, e.event.Trace.ID, &s)
		if e.appended {
			p.tracer.emit(within, e.event.Trace.ID, &span{name: "append", from: p.appendFrom, to: p.appendTo})
		}
	}
}
