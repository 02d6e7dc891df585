package delivery

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// syncDelay is how long a buffered commit waits for its sync; settleDelay and the sync itself come on top and must
// stay below the promised 100 ms.
const syncDelay = 60 * time.Millisecond

// syncs knows what of the write-ahead log, which all partitions share, is durable, and how long the oldest sync
// that is under way has been.
type syncs struct {
	// written counts buffered commits, synced those that are known to be durable.
	written, synced atomic.Uint64
	dirty           chan struct{}
	// told is called when more has become durable; it must be fast.
	told func()
	// awaited: somebody waits for more.
	awaited atomic.Bool

	mu      sync.Mutex
	more    chan struct{} // closed when more has become durable; nil while nobody waits
	running map[time.Time]int
}

func (s *syncs) begin(firm bool) time.Time {
	now := time.Now()
	if !firm {
		return now
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running == nil {
		s.running = make(map[time.Time]int)
	}
	s.running[now]++
	return now
}

func (s *syncs) end(start time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[start]--; s.running[start] <= 0 {
		delete(s.running, start)
	}
}

// age is how long the oldest sync under way has been; 0 when there is none.
func (s *syncs) age() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	oldest := time.Duration(0)
	for start := range s.running {
		oldest = max(oldest, time.Since(start))
	}
	return oldest
}

func (s *syncs) buffered() {
	s.written.Add(1)
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// done notes that the first n buffered commits are durable.
func (s *syncs) done(n uint64) {
	for {
		old := s.synced.Load()
		if old >= n {
			return
		}
		if s.synced.CompareAndSwap(old, n) {
			break
		}
	}
	s.told()
	if s.awaited.Load() {
		s.mu.Lock()
		s.awaited.Store(false)
		if s.more != nil { // else another one has just told them
			close(s.more)
			s.more = nil
		}
		s.mu.Unlock()
	}
}

// wait returns when the first n buffered commits are durable.
func (s *syncs) wait(ctx context.Context, n uint64) error {
	for s.synced.Load() < n {
		s.mu.Lock()
		if s.more == nil {
			s.more = make(chan struct{})
		}
		more := s.more
		s.awaited.Store(true)
		s.mu.Unlock()
		if s.synced.Load() >= n {
			return nil // whoever waits, too, is told with the next
		}
		select {
		case <-more:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// SyncAge is how long the oldest sync of the journal that is under way has been; 0 when there is none. A disk that
// hangs shows in it while it hangs.
func (j *Journal) SyncAge() time.Duration { return j.syncs.age() }

// sync makes all buffered commits durable. The log is one file, so syncing any later record will do.
func (j *Journal) sync() {
	n := j.syncs.written.Load()
	if j.syncs.synced.Load() >= n {
		return
	}
	marks := j.found()
	start := j.syncs.begin(true)
	j.still.RLock()
	err := j.db.LogData([]byte("sync"), pebble.Sync)
	j.still.RUnlock()
	if err != nil {
		j.die("sync: " + err.Error())
	}
	j.syncs.end(start)
	j.syncs.done(n)
	for i, m := range marks {
		j.durable(uint16(i), m)
	}
}

// syncLoop keeps buffered commits from staying unsynced for longer than syncDelay, and the counters from growing.
func (j *Journal) syncLoop() {
	for {
		select {
		case <-j.stop:
			return
		case <-j.syncs.dirty:
		}
		timer := time.NewTimer(syncDelay)
		select {
		case <-j.stop:
			timer.Stop()
			return
		case <-timer.C:
		}
		j.sync()
	}
}

// Flush returns when all settles made before it are durable and visible.
func (j *Journal) Flush(ctx context.Context) error {
	for _, p := range j.partitions {
		if err := p.do(ctx, func(*commit) error { return nil }); err != nil {
			return err
		}
	}
	j.sync()
	return nil
}
