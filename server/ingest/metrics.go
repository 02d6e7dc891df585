package ingest

import (
	"errors"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/eventtype"
)

// metrics counts outcomes. The counters are looked up once.
type metrics struct {
	accepted, duplicate                prometheus.Counter
	rate, quota, size, conflict, other prometheus.Counter
	mismatch, unregistered             prometheus.Counter
	conditions, mismatches             prometheus.Counter
}

func newMetrics(r prometheus.Registerer) metrics {
	events := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "grapnel_ingest_events_total",
		Help: "Events offered, by what became of them.",
	}, []string{"outcome"})
	conditions := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_condition_errors_total",
		Help: "Conditions of subscriptions that could not be evaluated for an accepted event, which then did not match.",
	})
	mismatches := prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_schema_mismatches_total",
		Help: "Events that the schema of their type does not allow, refused or, where it only warns, accepted.",
	})
	if r != nil {
		r.MustRegister(events, conditions, mismatches)
	}
	return metrics{
		mismatches: mismatches,
		conditions: conditions,
		accepted:   events.WithLabelValues("accepted"),
		duplicate:  events.WithLabelValues("duplicate"),
		rate:       events.WithLabelValues("rate_limited"),
		quota:      events.WithLabelValues("quota_exceeded"),
		size:       events.WithLabelValues("too_large"),
		conflict:   events.WithLabelValues("conflict"),
		other:      events.WithLabelValues("refused"),

		mismatch:     events.WithLabelValues("schema_mismatch"),
		unregistered: events.WithLabelValues("type_not_registered"),
	}
}

func (m *metrics) count(results []Result) {
	accepted := 0
	for k := range results {
		switch r := &results[k]; {
		case r.Err != nil:
			m.refusal(r.Err).Inc()
		case r.Duplicate:
			m.duplicate.Inc()
		default:
			accepted++
		}
	}
	if accepted > 0 {
		m.accepted.Add(float64(accepted))
	}
}

func (m *metrics) refusal(err error) prometheus.Counter {
	if _, ok := errors.AsType[*RateError](err); ok {
		return m.rate
	}
	if _, ok := errors.AsType[*QuotaError](err); ok {
		return m.quota
	}
	if _, ok := errors.AsType[*FieldError](err); ok {
		return m.size
	}
	if _, ok := errors.AsType[*eventtype.MismatchError](err); ok {
		return m.mismatch
	}
	if _, ok := errors.AsType[*UnregisteredError](err); ok {
		return m.unregistered
	}
	if errors.Is(err, delivery.ErrEventConflict) {
		return m.conflict
	}
	return m.other
}

func tooLarge(size, most int) error {
	return &FieldError{
		Field:       "payload",
		Description: "is " + strconv.Itoa(size) + " bytes; the namespace takes at most " + strconv.Itoa(most),
		Rule:        "max_event_bytes",
	}
}
