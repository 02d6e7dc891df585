package dispatch

import (
	"container/heap"
	"sync"
	"time"
)

// alarms wakes lanes: one heap for the whole engine in which each lane is at most once, never a timer for each delivery.
type alarms struct {
	mu   sync.Mutex
	due  alarmHeap
	wake chan struct{}
}

// alarm is a lane's place in the heap; index -1 is none.
type alarm struct {
	at    time.Time
	index int
}

// set wakes the lane at a time, or before. Who is woken early sets another one.
func (a *alarms) set(l *lane, at time.Time) {
	a.mu.Lock()
	switch {
	case l.alarm.index < 0:
		l.alarm.at = at
		heap.Push(&a.due, l)
	case at.Before(l.alarm.at):
		l.alarm.at = at
		heap.Fix(&a.due, l.alarm.index)
	default:
		a.mu.Unlock()
		return
	}
	first := l.alarm.index == 0
	a.mu.Unlock()
	if first {
		signal(a.wake)
	}
}

func (a *alarms) remove(l *lane) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l.alarm.index >= 0 {
		heap.Remove(&a.due, l.alarm.index)
	}
}

// next takes the lane whose time has come, or returns how long to wait; 0 means until the next set.
func (a *alarms) next(now time.Time) (*lane, time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.due) == 0 {
		return nil, 0
	}
	if wait := a.due[0].alarm.at.Sub(now); wait > 0 {
		return nil, wait
	}
	return heap.Pop(&a.due).(*lane), 0
}

// wakeLanes wakes lanes when their time has come, until the engine stops.
func (e *Engine) wakeLanes() {
	e.whenDue(e.alarms.wake, func() (time.Duration, bool) {
		now := e.now()
		l, wait := e.alarms.next(now)
		if l != nil {
			l.mu.Lock()
			l.kick(now)
			l.mu.Unlock()
		}
		return wait, l != nil
	})
}

// whenDue does one thing after another until the engine stops. do does the next that is due, or returns false and how
// long to wait for it; 0 means until wake says that something has been added.
func (e *Engine) whenDue(wake <-chan struct{}, do func() (wait time.Duration, done bool)) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for !e.stopping.Load() {
		wait, done := do()
		if done {
			continue
		}
		if wait == 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-e.stopped:
			return
		case <-wake:
		case <-timer.C:
		}
	}
}

type alarmHeap []*lane

func (h alarmHeap) Len() int           { return len(h) }
func (h alarmHeap) Less(i, j int) bool { return h[i].alarm.at.Before(h[j].alarm.at) }

func (h alarmHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].alarm.index, h[j].alarm.index = i, j
}

func (h *alarmHeap) Push(x any) {
	l := x.(*lane)
	l.alarm.index = len(*h)
	*h = append(*h, l)
}

func (h *alarmHeap) Pop() any {
	old := *h
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	last.alarm.index = -1
	return last
}

// maxDrift is how far the wall clock may move against the journal's before that is told.
const maxDrift = 2 * time.Second

// drift is how far the wall clock has moved against the monotonic one since start.
func drift(start, now time.Time) time.Duration {
	return now.Round(0).Sub(start.Round(0)) - now.Sub(start)
}
