package notice

import "github.com/prometheus/client_golang/prometheus"

// Why a notice is dropped.
const (
	dropCrowded  = "crowded"
	dropRefused  = "refused"
	dropStopping = "stopping"
)

type metrics struct {
	events, drops *prometheus.CounterVec
	coalesced     prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "grapnel_operational_events_total", Help: "Operational events stored, by type.",
		}, []string{"type"}),
		drops: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "grapnel_operational_events_dropped_total", Help: "Notices of which no operational event was made, by why.",
		}, []string{"reason"}),
		coalesced: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "grapnel_operational_events_coalesced_total", Help: "Notices that became part of another one's operational event.",
		}),
	}
	for _, why := range []string{dropCrowded, dropRefused, dropStopping} {
		m.drops.WithLabelValues(why)
	}
	if r != nil {
		r.MustRegister(m.events, m.drops, m.coalesced)
	}
	return m
}

func (m *metrics) recorded(eventType string) { m.events.WithLabelValues(eventType).Inc() }

func (m *metrics) dropped(why string, n int) { m.drops.WithLabelValues(why).Add(float64(n)) }
