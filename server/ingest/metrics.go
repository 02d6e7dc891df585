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
	accepted, duplicate    prometheus.Counter
	refused                map[string]prometheus.Counter // by outcomeOf
	conditions, mismatches prometheus.Counter
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
	m := metrics{
		mismatches: mismatches,
		conditions: conditions,
		accepted:   events.WithLabelValues("accepted"),
		duplicate:  events.WithLabelValues("duplicate"),
		refused:    make(map[string]prometheus.Counter),
	}
	for _, outcome := range []string{outcomeRate, outcomeQuota, outcomeSize, outcomeMismatch, outcomeUnregistered, outcomeConflict, outcomeOther} {
		m.refused[outcome] = events.WithLabelValues(outcome)
	}
	return m
}

func (m *metrics) count(results []Result) {
	accepted := 0
	for k := range results {
		switch r := &results[k]; {
		case r.Err != nil:
			m.refused[outcomeOf(r.Err)].Inc()
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

// Outcomes of events that are refused, as metrics and spans name them.
const (
	outcomeRate         = "rate_limited"
	outcomeQuota        = "quota_exceeded"
	outcomeSize         = "too_large"
	outcomeMismatch     = "schema_mismatch"
	outcomeUnregistered = "type_not_registered"
	outcomeConflict     = "conflict"
	outcomeOther        = "refused"
)

func outcomeOf(err error) string {
	if _, ok := errors.AsType[*RateError](err); ok {
		return outcomeRate
	}
	if _, ok := errors.AsType[*QuotaError](err); ok {
		return outcomeQuota
	}
	if _, ok := errors.AsType[*FieldError](err); ok {
		return outcomeSize
	}
	if _, ok := errors.AsType[*eventtype.MismatchError](err); ok {
		return outcomeMismatch
	}
	if _, ok := errors.AsType[*UnregisteredError](err); ok {
		return outcomeUnregistered
	}
	if errors.Is(err, delivery.ErrEventConflict) {
		return outcomeConflict
	}
	return outcomeOther
}

func tooLarge(size, most int) error {
	return &FieldError{
		Field:       "payload",
		Description: "is " + strconv.Itoa(size) + " bytes; the namespace takes at most " + strconv.Itoa(most),
		Rule:        "max_event_bytes",
	}
}
