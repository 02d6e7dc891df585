package tracing

import (
	"testing"

	"github.com/grapnel/grapnel/server/delivery"
)

// BenchmarkUnsampled is what tracing costs an event that is not sampled.
func BenchmarkUnsampled(b *testing.B) {
	b.Setenv("OTEL_TRACES_EXPORTER", "otlp")
	b.Setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
	b.Setenv("OTEL_TRACES_SAMPLER_ARG", "0")
	tracer, err := Open(b.Context(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	events := []*delivery.Event{{Attributes: map[string]string{"tenant": "eu"}}}
	job := &delivery.Job{ID: delivery.ID{Seq: 1}, Event: events[0]}
	b.ReportAllocs()
	for b.Loop() {
		if tracer.Publish(b.Context(), "acme", events) != nil || tracer.Attempt(job, nil) != nil {
			b.Fatal("sampled")
		}
	}
}

// BenchmarkSampled is what it costs one that is, of which there is one attempt.
func BenchmarkSampled(b *testing.B) {
	b.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
	tracer, err := Open(b.Context(), Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		events := []*delivery.Event{{UID: "evt_1"}}
		p := tracer.Publish(b.Context(), "acme", events)
		p.Append(func(int) bool { return true })()
		p.End(func(int) Published { return Published{UID: "evt_1"} })
		a := tracer.Attempt(&delivery.Job{ID: delivery.ID{Seq: 1}, Event: events[0]}, nil)
		a.Sent(p.start)
		a.End(Ended{Namespace: "acme", Subscription: "shop", Host: "example.com", First: p.start, Outcome: "succeeded", Status: 200, Steps: []Step{{Name: "sign"}, {Name: "first_byte"}, {Name: "body"}}})
	}
}
