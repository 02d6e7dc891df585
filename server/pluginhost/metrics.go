package pluginhost

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics of all plugins. open is also what Drain waits for.
type metrics struct {
	open          atomic.Int64
	restarts      *prometheus.CounterVec
	unspent       prometheus.Counter
	indeterminate prometheus.Counter
	faults        prometheus.Counter
	hangs         prometheus.Counter
	shortages     prometheus.Counter
	upgrades      *prometheus.CounterVec
	phases        *phases
}

func newMetrics(reg prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: "grapnel", Subsystem: "plugin", Name: name, Help: help})
	}
	m := &metrics{
		phases: newPhases(),
		restarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "grapnel", Subsystem: "plugin", Name: "restarts_total", Help: "Ends of plugin processes that were not asked for.",
		}, []string{"plugin"}),
		upgrades: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "grapnel", Subsystem: "plugin", Name: "upgrades_total", Help: "Plugins replaced while they ran, and those that were not because the new one did not come up.",
		}, []string{"result"}),
		shortages:     counter("shortages_total", "Attempts given back because the machine had no descriptor, socket or memory left for them."),
		hangs:         counter("hangs_total", "Plugin processes that were ended because they did not answer any more."),
		unspent:       counter("unspent_total", "Attempts given back because no plugin was there to make them."),
		indeterminate: counter("indeterminate_total", "Attempts that were written to a plugin process which ended without an answer."),
		faults:        counter("protocol_faults_total", "Plugin processes that were ended because they broke the protocol."),
	}
	if reg != nil {
		open := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "grapnel", Subsystem: "plugin", Name: "open_attempts", Help: "Attempts in the plugin host's hands.",
		}, func() float64 { return float64(m.open.Load()) })
		reg.MustRegister(m.restarts, m.unspent, m.indeterminate, m.faults, m.hangs, m.shortages, m.upgrades, m.phases, open)
	}
	return m
}

const (
	latencyPeriod = 30 * time.Second
	latencySteps  = 4 // buckets per doubling
)

// latency keeps the overhead of a process's attempts: what they took less what the plugin says it took.
// It covers the last one to two periods.
type latency struct {
	mu      sync.Mutex // guards what follows
	since   time.Time
	now     [40 * latencySteps]uint32
	before  [40 * latencySteps]uint32
	nowN    uint32
	beforeN uint32
}

// observe adds one; negative ones, from clocks that differ, count as nothing.
func (l *latency) observe(d time.Duration, at time.Time) {
	b := latencyBucket(uint64(max(0, d.Microseconds())))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn(at)
	l.now[b]++
	l.nowN++
}

func (l *latency) turn(at time.Time) {
	if at.Sub(l.since) < latencyPeriod {
		return
	}
	if at.Sub(l.since) < 2*latencyPeriod {
		l.before, l.beforeN = l.now, l.nowN
	} else {
		clear(l.before[:])
		l.beforeN = 0
	}
	clear(l.now[:])
	l.nowN, l.since = 0, at
}

// quantile is an upper bound of what part, above 0 and at most 1, of the attempts took; zero when nothing was observed.
func (l *latency) quantile(part float64, at time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn(at)
	above := uint64((1 - part) * float64(uint64(l.nowN)+uint64(l.beforeN)))
	var seen uint64
	for b := len(l.now) - 1; b >= 0; b-- {
		seen += uint64(l.now[b]) + uint64(l.before[b])
		if seen > above {
			return time.Duration(latencyBound(b)) * time.Microsecond
		}
	}
	return 0
}

func latencyBucket(us uint64) int {
	if us < latencySteps {
		return int(us)
	}
	top := bits.Len64(us) - 1                      // us >= 4, so top >= 2
	step := (us >> (top - 2)) & (latencySteps - 1) // the two bits below the top one
	return min((top-1)*latencySteps+int(step), 40*latencySteps-1)
}

// latencyBound is the first value above bucket b.
func latencyBound(b int) uint64 {
	if b < latencySteps {
		return uint64(b) + 1
	}
	top, step := b/latencySteps+1, uint64(b%latencySteps)
	return (latencySteps + step + 1) << (top - 2)
}
