// Package tracing owns how events show up in distributed traces: whether one is sampled, which is decided once, when it is
// published; the spans of its publication and of each attempt; and where they are sent, by OTLP.
//
// The trace of an event that is sampled is part of its record, so that attempts after a restart, retries and replays belong to it:
//
//	publish ─┬─ append
//	         ├─ deliver, one for each attempt at each subscription ─┬─ queue
//	         │                                                      ├─ transform, sign: in plugins of their own
//	         │                                                      └─ attempt ─┬─ sign, dns, connect, tls, first_byte, body
//	         │                                                                  └─ what the receiver makes of traceparent
//	         └─ deliver …
//
// Spans are made when what they tell has ended, out of what was noted meanwhile. They hold names of ours, ids and numbers, and
// no text of a plugin, a receiver or a publisher but the type of the event: no URI, header or secret.
//
// A collector that is away, slow or full costs spans and nothing else: what waits for it is bounded. All methods may be called
// at the same time, and on nil, which traces nothing.
package tracing

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/instrumentation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Options of a Tracer.
type Options struct {
	// Version and NodeName are attributes of the resource, which the environment may change.
	Version, NodeName string
	// Logger is told when the collector takes nothing; nil discards.
	Logger *slog.Logger
	// Registerer takes the metrics; nil keeps none.
	Registerer prometheus.Registerer
}

// Tracer makes spans and sends them.
type Tracer struct {
	sampler   sdktrace.Sampler
	processor sdktrace.SpanProcessor
	sender    *sender
	resource  *resource.Resource
	scope     instrumentation.Scope
}

// Open makes a Tracer as the environment's OTEL_* variables say; it returns nil when they ask for no traces. It does not wait
// for the collector. A variable that makes no sense is an error that names it.
func Open(ctx context.Context, o Options) (*Tracer, error) {
	env, err := readEnvironment()
	if err != nil || !env.on {
		return nil, err
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	exporter, err := env.exporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the exporter of traces: %w", err)
	}
	described, err := resource.New(ctx, resource.WithTelemetrySDK(), resource.WithAttributes(
		attribute.String("service.name", "grapnel"), attribute.String("service.version", o.Version),
		attribute.String("service.instance.id", o.NodeName),
	), resource.WithFromEnv())
	if err != nil {
		return nil, errors.New("OTEL_RESOURCE_ATTRIBUTES: want NAME=VALUE, with commas between and other characters percent-encoded")
	}
	t := &Tracer{
		sampler: env.sampler, sender: newSender(exporter, env.secrets, o), resource: described,
		scope: instrumentation.Scope{Name: "github.com/grapnel/grapnel/server", Version: o.Version},
	}
	t.processor = sdktrace.NewBatchSpanProcessor(t.sender)
	return t, nil
}

// Close sends what waits, as far as ctx leaves time for it.
func (t *Tracer) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	defer t.sender.end()
	defer context.AfterFunc(ctx, t.sender.end)()
	if err := t.processor.Shutdown(ctx); err != nil {
		return fmt.Errorf("send the last traces: %w", err)
	}
	return nil
}

func newTraceID() (id trace.TraceID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64()|1) // never zeros; the ratio samplers go by the other half
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

func newSpanID() (id trace.SpanID) {
	v := rand.Uint64() | 1
	for i := range id {
		id[i] = byte(v >> (8 * i))
	}
	return id
}

// span is what one is made of.
type span struct {
	name       string
	kind       trace.SpanKind
	from, to   time.Time
	id         trace.SpanID // random where it is zero
	links      []sdktrace.Link
	failed     string // what it failed of; empty when it did not
	attributes []attribute.KeyValue
}

// emit makes a span that has ended, within a parent, which may be none. It returns the place of its children.
func (t *Tracer) emit(parent trace.SpanContext, traceID trace.TraceID, s *span) trace.SpanContext {
	if !s.id.IsValid() {
		s.id = newSpanID()
	}
	if s.to.Before(s.from) { // clocks may differ
		s.to = s.from
	}
	if s.kind == trace.SpanKindUnspecified {
		s.kind = trace.SpanKindInternal
	}
	r := &record{span: s, tracer: t, parent: parent, place: trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: traceID, SpanID: s.id, TraceFlags: trace.FlagsSampled, TraceState: parent.TraceState(),
	})}
	if s.failed != "" {
		s.attributes = append(s.attributes, attribute.String("error.type", s.failed))
		r.status = sdktrace.Status{Code: codes.Error, Description: s.failed}
	}
	t.processor.OnEnd(r)
	t.sender.recorded.Inc()
	return r.place
}

// record is a span as the SDK's processor and exporters read it. The SDK makes its own in several times the time, since those
// can still be added to. What it may come to ask further is nobody's: the tests of an update show it.
type record struct {
	sdktrace.ReadOnlySpan
	*span
	tracer        *Tracer
	parent, place trace.SpanContext
	status        sdktrace.Status
}

// What follows implements sdktrace.ReadOnlySpan.

func (r *record) Name() string                                { return r.name }
func (r *record) SpanContext() trace.SpanContext              { return r.place }
func (r *record) Parent() trace.SpanContext                   { return r.parent }
func (r *record) SpanKind() trace.SpanKind                    { return r.kind }
func (r *record) StartTime() time.Time                        { return r.from }
func (r *record) EndTime() time.Time                          { return r.to }
func (r *record) Attributes() []attribute.KeyValue            { return r.attributes }
func (r *record) Links() []sdktrace.Link                      { return r.links }
func (r *record) Events() []sdktrace.Event                    { return nil }
func (r *record) Status() sdktrace.Status                     { return r.status }
func (r *record) InstrumentationScope() instrumentation.Scope { return r.tracer.scope }
func (r *record) InstrumentationLibrary() instrumentation.Scope {
	return r.tracer.scope
}
func (r *record) Resource() *resource.Resource { return r.tracer.resource }
func (r *record) DroppedAttributes() int       { return 0 }
func (r *record) DroppedLinks() int            { return 0 }
func (r *record) DroppedEvents() int           { return 0 }
func (r *record) ChildSpanCount() int          { return 0 }
