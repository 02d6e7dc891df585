package pluginhost

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

// phase is a part of the way of an attempt.
type phase int

const (
	// phaseQueue is from when an attempt could have been made to when it is first written to a plugin.
	phaseQueue phase = iota
	phaseTransform
	// phaseSign and those behind it are in the order of wire.Part.
	phaseSign
	phaseDNS
	phaseConnect
	phaseTLS
	phaseFirstByte
	phaseBody
	phaseCount
)

// phaseNames are the values of the label.
func phaseNames() [phaseCount]string {
	return [phaseCount]string{"queue", "transform", "sign", "dns", "connect", "tls", "first_byte", "body"}
}

const (
	// leastPhase is the bound of the first bucket, as a power of two of microseconds; each further one's is four times as much.
	leastPhase   = 4 // 16 µs
	phaseBuckets = 14
)

// phases are the histograms of how long phases take. Several are noted of each attempt, for some nanoseconds each: that is
// why they are not the library's.
type phases struct {
	of [phaseCount]struct {
		buckets [phaseBuckets + 1]atomic.Uint64 // the last has no bound
		micros  atomic.Uint64
	}
	desc *prometheus.Desc
}

func newPhases() *phases {
	return &phases{desc: prometheus.NewDesc("grapnel_attempt_phase_seconds",
		"How long the phases of attempts took: until they were made, by what plugins were seen to take, and by what transports tell.", []string{"phase"}, nil)}
}

// observe notes one; what clocks that differ make negative counts as nothing.
func (s *phases) observe(p phase, d time.Duration) {
	us := uint64(max(0, d.Microseconds()))
	of := &s.of[p]
	of.buckets[phaseBucket(us)].Add(1)
	of.micros.Add(us)
}

// phaseBucket is the first bucket whose bound is not below us.
func phaseBucket(us uint64) int {
	if us <= 1<<leastPhase {
		return 0
	}
	return min((bits.Len64(us-1)-leastPhase+1)/2, phaseBuckets)
}

// answered notes what is known of an attempt once its transport has answered. No part takes longer than the whole did.
func (s *phases) answered(p *pending, r *wire.Result, now time.Time) {
	if p.jobs == nil {
		s.queued(p.job, p.first)
	}
	for _, job := range p.jobs {
		s.queued(job, p.first)
	}
	for i, us := range r.Timings {
		if us > 0 {
			s.observe(phaseSign+phase(i), min(time.Duration(us)*time.Microsecond, now.Sub(p.written)))
		}
	}
}

// queued notes how long a job has waited. How long one has that had to wait for the turn of its ordering key is not known.
func (s *phases) queued(job *delivery.Job, until time.Time) {
	if since := job.Ready(); !since.IsZero() && !job.Trial() {
		s.observe(phaseQueue, until.Sub(since))
	}
}

// Describe implements prometheus.Collector.
func (s *phases) Describe(c chan<- *prometheus.Desc) { c <- s.desc }

// Collect implements prometheus.Collector.
func (s *phases) Collect(c chan<- prometheus.Metric) {
	for p, name := range phaseNames() {
		of := &s.of[p]
		var count uint64
		buckets := make(map[float64]uint64, phaseBuckets)
		for i := range phaseBuckets {
			count += of.buckets[i].Load()
			buckets[float64(uint64(1)<<(leastPhase+2*i))/1e6] = count
		}
		count += of.buckets[phaseBuckets].Load()
		c <- prometheus.MustNewConstHistogram(s.desc, count, float64(of.micros.Load())/1e6, buckets, name)
	}
}
