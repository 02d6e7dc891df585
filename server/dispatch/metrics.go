package dispatch

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
)

// metrics for Prometheus. No label names a tenant, so their number is fixed.
type metrics struct {
	attempts   [delivery.OutcomeInterrupted + 1]prometheus.Counter
	deliveries [delivery.Skipped + 1]prometheus.Counter
	parked     prometheus.Counter
	latency    prometheus.Histogram
	together   prometheus.Histogram
	opened     prometheus.Counter
	probes     [2]prometheus.Counter // that failed, that were answered
	cuts       prometheus.Counter
	down       prometheus.Counter
	blocked    prometheus.Counter
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
		m.attempts[o] = attempts.WithLabelValues(delivery.Outcome(o).String())
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
	m.together = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "grapnel_batch_deliveries", Help: "Deliveries in a request of subscriptions with batching.",
		Buckets: []float64{1, 2, 5, 10, 20, 50, 100, 200, 500, 1000},
	})
	m.opened = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_breaker_opened_total", Help: "Times that a breaker has opened.",
	})
	probes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "grapnel_breaker_probes_total", Help: "Attempts that decided on an open breaker, by what they said of the receiver.",
	}, []string{"result"})
	m.probes = [2]prometheus.Counter{probes.WithLabelValues("failed"), probes.WithLabelValues("answered")}
	m.cuts = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_limit_cuts_total", Help: "Times that the limit of a receiver's attempts in flight was taken back.",
	})
	m.blocked = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_ordering_keys_blocked_total", Help: "Times that a delivery that failed for good has kept those of its ordering key behind it waiting.",
	})
	m.down = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_hosts_down_total", Help: "Times that a host was found down by several receivers on it.",
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
		r.MustRegister(attempts, deliveries, m.parked, m.latency, m.together, m.opened, probes, m.cuts, m.down, m.blocked, flying, slow, memory, newLaneStates(e))
	}
	return m
}

// settled counts an attempt at an event.
func (m *metrics) settled(ev *delivery.Event, o delivery.Outcome, s delivery.State, since time.Duration) {
	if int(o) >= len(m.attempts) {
		o = 0
	}
	m.attempts[o].Inc()
	m.ended(s)
	if s == delivery.Succeeded {
		m.delivered(ev, since)
	}
}

// delivered notes how long a delivery took, and where its event is sampled, the trace as an example.
func (m *metrics) delivered(ev *delivery.Event, since time.Duration) {
	if ev.Trace == nil {
		m.latency.Observe(since.Seconds())
		return
	}
	m.latency.(prometheus.ExemplarObserver).ObserveWithExemplar(since.Seconds(), prometheus.Labels{"trace_id": ev.Trace.String()})
}

func (m *metrics) learnt(v health.Verdict) {
	switch {
	case v.Opened:
		m.opened.Inc()
	case v.Probed && v.Shut:
		m.probes[1].Inc()
	case v.Probed:
		m.probes[0].Inc()
	case v.Cut:
		m.cuts.Inc()
	}
}

// keyBlocked counts what a step does to the delivery's ordering key.
func (m *metrics) keyBlocked(j *delivery.Job, step delivery.Step) {
	if step.Block && j.Order != 0 && step.State.Final() && step.State != delivery.Succeeded {
		m.blocked.Inc()
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
	e                                   *Engine
	lanes, breakers, limits, hosts, due *prometheus.Desc
}

func newLaneStates(e *Engine) *laneStates {
	return &laneStates{
		e, prometheus.NewDesc("grapnel_lanes", "Lanes, by state.", []string{"state"}, nil),
		prometheus.NewDesc("grapnel_breakers", "Lanes with a breaker that is not closed, by its state.", []string{"state"}, nil),
		prometheus.NewDesc("grapnel_limited_lanes", "Lanes that have something open and hold back from their subscription's max_in_flight for a sign of overload.", nil, nil),
		prometheus.NewDesc("grapnel_hosts", "Hosts that lanes deliver to: up, or down for several lanes, with the breaker that they share open or half open.", []string{"state"}, nil),
		prometheus.NewDesc("grapnel_oldest_due_age_seconds", "Age of the oldest delivery that is due and not done, of lanes that may start attempts (open) and of those that wait for their receiver (closed).", []string{"state"}, nil),
	}
}

// Describe implements prometheus.Collector.
func (s *laneStates) Describe(c chan<- *prometheus.Desc) {
	c <- s.lanes
	c <- s.breakers
	c <- s.limits
	c <- s.hosts
	c <- s.due
}

// Collect implements prometheus.Collector.
func (s *laneStates) Collect(c chan<- prometheus.Metric) {
	now := s.e.now()
	var idle, busy, closed, open, half, limited float64
	var late, held time.Duration
	for _, l := range s.e.allLanes() {
		l.mu.Lock()
		switch {
		case len(l.parts) == 0:
			idle++
		case l.gate(now).open():
			busy++
			late = max(late, l.oldestDue(now))
		default:
			closed++
			held = max(held, l.oldestDue(now))
		}
		switch state, _, _, _ := l.health.Breaker(now); {
		case state == health.BreakerOpen:
			open++
		case state == health.BreakerHalfOpen:
			half++
		case len(l.parts) > 0 && l.health.Lowered():
			limited++
		}
		l.mu.Unlock()
	}
	for name, n := range map[string]float64{"idle": idle, "open": busy, "closed": closed} {
		c <- prometheus.MustNewConstMetric(s.lanes, prometheus.GaugeValue, n, name)
	}
	c <- prometheus.MustNewConstMetric(s.due, prometheus.GaugeValue, late.Seconds(), "open")
	c <- prometheus.MustNewConstMetric(s.due, prometheus.GaugeValue, held.Seconds(), "closed")
	c <- prometheus.MustNewConstMetric(s.breakers, prometheus.GaugeValue, open, "open")
	c <- prometheus.MustNewConstMetric(s.breakers, prometheus.GaugeValue, half, "half_open")
	c <- prometheus.MustNewConstMetric(s.limits, prometheus.GaugeValue, limited)
	for state, n := range s.e.origins.states(now) {
		c <- prometheus.MustNewConstMetric(s.hosts, prometheus.GaugeValue, float64(n), [...]string{"up", "open", "half_open"}[state])
	}
}
