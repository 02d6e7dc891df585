package dispatch

import (
	"container/heap"
	"sync"
	"time"
)

// alarms wakes lanes: one heap of lanes for the whole engine, never a timer for each delivery. A lane may
// be in it more than once; a call too many does no harm.
type alarms struct {
	mu   sync.Mutex
	due  alarmHeap
	wake chan struct{}
}

type alarm struct {
	// at carries the clock that does not jump.
	at   time.Time
	lane *lane
}

func (a *alarms) set(l *lane, at time.Time) {
	a.mu.Lock()
	heap.Push(&a.due, alarm{at, l})
	first := a.due[0].lane == l && a.due[0].at.Equal(at)
	a.mu.Unlock()
	if first {
		signal(a.wake)
	}
}

// next takes the lane whose time has come, or returns how long to wait; 0 means until the next set.
func (a *alarms) next(now time.Time) (*lane, time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.due) == 0 {
		return nil, 0
	}
	if wait := a.due[0].at.Sub(now); wait > 0 {
		return nil, wait
	}
	return heap.Pop(&a.due).(alarm).lane, 0
}

// wakeLanes wakes lanes when their time has come, until the engine stops.
func (e *Engine) wakeLanes() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		now := time.Now()
		l, wait := e.alarms.next(now)
		if l != nil {
			l.mu.Lock()
			l.armed = time.Time{}
			l.kick(now)
			l.mu.Unlock()
			continue
		}
		if wait == 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-e.stopped:
			return
		case <-e.alarms.wake:
		case <-timer.C:
		}
	}
}

type alarmHeap []alarm

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].at.Before(h[j].at) }
func (h alarmHeap) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *alarmHeap) Push(x any)        { *h = append(*h, x.(alarm)) }

func (h *alarmHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = alarm{}
	*h = old[:len(old)-1]
	return last
}

// maxDrift is how far the wall clock may move against the monotonic one before all timers are looked at
// again. Due times are on the wall clock, waiting is not.
const maxDrift = 2 * time.Second

// drift is how far the wall clock has moved against the monotonic one since start.
func drift(start, now time.Time) time.Duration {
	return now.Round(0).Sub(start.Round(0)) - now.Sub(start)
}

// rearmAll has every lane work out anew when it is due.
func (e *Engine) rearmAll(now time.Time) {
	for _, l := range e.allLanes() {
		l.mu.Lock()
		l.armed = time.Time{}
		l.kick(now)
		l.mu.Unlock()
	}
}
