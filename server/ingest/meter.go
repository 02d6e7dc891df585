package ingest

import (
	"math"
	"sync"
	"time"
)

// burst is the span over which max_publish_rate is averaged.
const burst = 10 * time.Second

// meter counts one namespace: a token bucket against its quota, and what it had accepted in each of the
// last 60 seconds.
type meter struct {
	mu     sync.Mutex
	tokens float64
	filled time.Time
	// perSecond[s%60] counts second s, if stamps[s%60] == s.
	perSecond [60]int32
	stamps    [60]int64
}

func newMeter() *meter { return &meter{tokens: math.Inf(1)} }

// take asks for n tokens at limit per second and grants as many as there are. wait is when the first one
// that was not granted would be; zero when all were.
func (m *meter) take(now time.Time, n, limit int) (granted int, wait time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	most := float64(limit) * burst.Seconds()
	if passed := now.Sub(m.filled).Seconds(); passed > 0 {
		if !math.IsInf(m.tokens, 1) {
			m.tokens += passed * float64(limit)
		}
		m.filled = now
	}
	// The first look, and a quota that was lowered, leave at most a full bucket.
	m.tokens = min(m.tokens, most)
	granted = min(n, int(m.tokens))
	m.tokens -= float64(granted)
	if granted < n {
		wait = time.Duration((1 - m.tokens) / float64(limit) * float64(time.Second))
	}
	return granted, wait
}

// add counts n accepted events.
func (m *meter) add(now time.Time, n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := now.Unix()
	k := s % 60
	if m.stamps[k] != s {
		m.stamps[k], m.perSecond[k] = s, 0
	}
	m.perSecond[k] += int32(n)
}

// rate is events per second over the last minute.
func (m *meter) rate(now time.Time) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	var sum int64
	for k, s := range m.stamps {
		if age := now.Unix() - s; age >= 0 && age < 60 {
			sum += int64(m.perSecond[k])
		}
	}
	return float64(sum) / 60
}
