package ingest

import (
	"math"
	"sync"
	"time"
)

// burst is the span over which max_publish_rate is averaged.
const burst = 10 * time.Second

// memory is how long a meter remembers anything: one that was not used for longer is as good as a new one.
const memory = time.Minute

// meters holds one for each namespace that has published within the last minute or so, by its UID: a name
// that is used again starts anew.
type meters struct {
	mu  sync.RWMutex // guards what follows
	all map[[16]byte]*meter
	// sweepAt is how many there may be before the idle ones are dropped.
	sweepAt int
}

// leastMeters is how few are not worth a sweep.
const leastMeters = 64

// find returns nil when the namespace has not published lately.
func (m *meters) find(uid [16]byte) *meter {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.all[uid]
}

// use has f count on the namespace's meter. f is called once, with nothing dropping the meter meanwhile.
func (m *meters) use(uid [16]byte, now time.Time, f func(*meter)) {
	m.mu.RLock()
	if found := m.all[uid]; found != nil {
		f(found)
		m.mu.RUnlock()
		return
	}
	m.mu.RUnlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	found := m.all[uid]
	if found == nil {
		m.sweep(now)
		found = newMeter()
		m.all[uid] = found
	}
	f(found)
}

// sweep drops idle meters, each time their number has doubled: a new one costs the same whatever their number.
func (m *meters) sweep(now time.Time) {
	if m.all == nil {
		m.all = make(map[[16]byte]*meter)
	}
	if len(m.all) < max(m.sweepAt, leastMeters) {
		return
	}
	for uid, found := range m.all {
		if found.idle(now) {
			delete(m.all, uid)
		}
	}
	m.sweepAt = 2 * len(m.all)
}

// meter counts one namespace: a token bucket against its quota, and what it had accepted in each of the
// last 60 seconds.
type meter struct {
	mu     sync.Mutex
	tokens float64
	filled time.Time
	used   time.Time
	// seconds are those of the last minute in which something was counted, since 1970.
	seconds []counted
	// near is when it was last told that a quota is near.
	near map[string]time.Time
}

func newMeter() *meter { return &meter{tokens: math.Inf(1)} }

// take asks for n tokens at limit per second, 0 for no limit, and grants as many as there are. wait is when
// the first one that was not granted would be; zero when all were.
func (m *meter) take(now time.Time, n, limit int) (granted int, wait time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used = now
	if limit == 0 {
		m.tokens = math.Inf(1)
		return n, 0
	}
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

// idle reports whether the bucket is full and the minute is over, whatever the limit.
func (m *meter) idle(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return now.Sub(m.used) > memory
}

// add counts n accepted events, and returns how many there were in the burst before, once a second; else 0.
func (m *meter) add(now time.Time, n int) (recent int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used = now
	s := now.Unix()
	if last := len(m.seconds) - 1; last < 0 || m.seconds[last].slot < s {
		recent = m.within(now, int64(burst/time.Second))
	}
	m.seconds = count(m.seconds, s, 60, n)
	return recent
}

// within counts the last seconds.
func (m *meter) within(now time.Time, seconds int64) (sum int64) {
	for _, c := range m.seconds {
		if age := now.Unix() - c.slot; age >= 0 && age < seconds {
			sum += c.n
		}
	}
	return sum
}

// rate is events per second over the last minute.
func (m *meter) rate(now time.Time) float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return float64(m.within(now, 60)) / 60
}
