package dispatch

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
)

// metrics for Prometheus. No label names a tenant, so their number is fixed.
type metrics struct {
	attempts   [delivery.OutcomeInterrupted + 1]prometheus.Counter
	deliveries [delivery.Skipped + 1]prometheus.Counter
	parked     prometheus.Counter
	latency    prometheus.Histogram
}

func outcomeName(o delivery.Outcome) string {
	switch o {
	case delivery.OutcomeSucceeded:
		return "succeeded"
	case delivery.OutcomeRetryable:
		return "retryable"
	case delivery.OutcomePermanent:
		return "permanent"
	case delivery.OutcomeTimedOut:
		return "timed_out"
	case delivery.OutcomeUnreachable:
		return "unreachable"
	case delivery.OutcomePluginError:
		return "plugin_error"
	case delivery.OutcomeInterrupted:
		return "interrupted"
	}
	return "unknown"
}

func stateName(s delivery.State) string {
	switch s {
	case delivery.Scheduled:
		return "scheduled"
	case delivery.Succeeded:
		return "succeeded"
	case delivery.Exhausted:
		return "exhausted"
	case delivery.Rejected:
		return "rejected"
	case delivery.Cancelled:
		return "cancelled"
	}
	return "unknown"
}

func newMetrics(e *Engine, r prometheus.Registerer) *metrics {
	m := &metrics{}
	attempts := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "grapnel_attempts_total", Help: "Attempts that ended, by outcome.",
	}, []string{"outcome"})
	for o := range m.attempts {
		m.attempts[o] = attempts.WithLabelValues(outcomeName(delivery.Outcome(o)))
	}
	deliveries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "grapnel_deliveries_total", Help: "Deliveries settled, by the state they were settled to.",
	}, []string{"state"})
	for s := range m.deliveries {
		m.deliveries[s] = deliveries.WithLabelValues(stateName(delivery.State(s)))
	}
	m.parked = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_attempts_unspent_total", Help: "Attempts put back because the plugin was not ready, or the machine had nothing left to try with.",
	})
	m.latency = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "grapnel_delivery_latency_seconds", Help: "Time from an event's acceptance to its delivery.",
		Buckets: prometheus.ExponentialBuckets(0.001, 4, 12),
	})
	flying := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_in_flight", Help: "Attempts in flight.",
	}, func() float64 { return float64(e.slots.used.Load()) })
	memory := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_window_bytes", Help: "Size of the deliveries in memory.",
	}, func() float64 { return float64(e.budget.used()) })
	slow := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "grapnel_in_flight_slow", Help: "Attempts in flight to targets that hang, are slow or have not answered yet.",
	}, func() float64 { return float64(e.slots.slow.Load() + e.slots.trial.Load()) })
	if r != nil {
		r.MustRegister(attempts, deliveries, m.parked, m.latency, flying, slow, memory, newLaneStates(e))
	}
	return m
}

func (m *metrics) settled(o delivery.Outcome, s delivery.State, since time.Duration) {
	if int(o) >= len(m.attempts) {
		o = 0
	}
	m.attempts[o].Inc()
	m.ended(s)
	if s == delivery.Succeeded {
		m.latency.Observe(since.Seconds())
	}
}

func (m *metrics) ended(s delivery.State) {
	if int(s) >= len(m.deliveries) {
		s = 0
	}
	m.deliveries[s].Inc()
}

// laneStates counts lanes when it is scraped.
type laneStates struct {
	e    *Engine
	desc *prometheus.Desc
}

func newLaneStates(e *Engine) *laneStates {
	return &laneStates{e, prometheus.NewDesc("grapnel_lanes", "Lanes, by state.", []string{"state"}, nil)}
}

// Describe implements prometheus.Collector.
func (s *laneStates) Describe(c chan<- *prometheus.Desc) { c <- s.desc }

// Collect implements prometheus.Collector.
func (s *laneStates) Collect(c chan<- prometheus.Metric) {
	now := s.e.now()
	var idle, busy, closed float64
	for _, l := range s.e.allLanes() {
		l.mu.Lock()
		switch {
		case len(l.parts) == 0:
			idle++
		case l.gate(now).open():
			busy++
		default:
			closed++
		}
		l.mu.Unlock()
	}
	for name, n := range map[string]float64{"idle": idle, "open": busy, "closed": closed} {
		c <- prometheus.MustNewConstMetric(s.desc, prometheus.GaugeValue, n, name)
	}
}
