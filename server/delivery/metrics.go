package delivery

import (
	"errors"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are plain counters on the hot path, read when they are collected.
type metrics struct {
	stored, duplicates, refused atomic.Uint64
	settled, buffered           atomic.Uint64
	syncSeconds                 prometheus.Histogram
	registerer                  prometheus.Registerer
	collectors                  []prometheus.Collector
}

func newMetrics() *metrics {
	return &metrics{syncSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "grapnel_journal_sync_seconds", Help: "Time of synced commits.",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 12),
	})}
}

// applied counts what a commit did.
func (m *metrics) applied(c *commit) {
	m.stored.Add(uint64(len(c.stored)))
	m.duplicates.Add(c.duplicate)
	m.refused.Add(c.refused)
	m.settled.Add(c.settled)
}

func (m *metrics) synced(d time.Duration) { m.syncSeconds.Observe(d.Seconds()) }

func (m *metrics) register(r prometheus.Registerer, j *Journal) error {
	if r == nil {
		return nil
	}
	m.registerer = r
	m.collectors = []prometheus.Collector{
		m.syncSeconds,
		count("events_total", "Events stored.", m.stored.Load),
		count("duplicates_total", "Events that had been accepted before.", m.duplicates.Load),
		count("refused_total", "Events refused: conflict or disk full.", m.refused.Load),
		count("settles_total", "Delivery steps recorded.", m.settled.Load),
		count("buffered_commits_total", "Commits that were synced later.", m.buffered.Load),
		gauge("free_bytes", "Free space on the journal's disk.", func() float64 { return float64(j.space.free.Load()) }),
		gauge("size_bytes", "Space taken by the journal.", func() float64 {
			leave, err := j.enter()
			if err != nil {
				return 0
			}
			defer leave()
			return float64(j.db.Metrics().DiskSpaceUsage())
		}),
		gauge("watches", "Watches of deliveries and attempts that are open.", func() float64 {
			n := int64(0)
			for _, s := range *j.watches.spaces.Load() {
				n += s.watches.Load()
			}
			return float64(n)
		}),
		gauge("watched_namespaces", "Namespaces whose changes are recorded, for those who watch or have until lately.", func() float64 {
			return float64(len(*j.watches.spaces.Load()))
		}),
		gauge("disk_full", "1 while publishes are refused for want of space.", func() float64 {
			if j.space.low() {
				return 1
			}
			return 0
		}),
	}
	var errs []error
	for _, c := range m.collectors {
		errs = append(errs, r.Register(c))
	}
	return errors.Join(errs...)
}

func (m *metrics) unregister() {
	for _, c := range m.collectors {
		m.registerer.Unregister(c)
	}
}

func count(name, help string, read func() uint64) prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "grapnel_journal_" + name, Help: help},
		func() float64 { return float64(read()) })
}

func gauge(name, help string, read func() float64) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "grapnel_journal_" + name, Help: help}, read)
}
