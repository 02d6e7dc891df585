package plugin

import (
	"context"
	"slices"
	"time"
)

const (
	// watchEvery is how often deadlines are looked after: an attempt's context ends that much late at most.
	watchEvery = 20 * time.Millisecond
	// overrunGrace is how long past its deadline an AttemptFunc may take to return. The host waits longer.
	overrunGrace = time.Second
	// maxOverruns is how many attempts of one instance may be under way although they have been given up. Beyond
	// it the instance takes no more, so that one receiver cannot fill the process's memory.
	maxOverruns = 256
)

// watching has watch run as long as attempts are open.
func (a *attemptStream) watching() {
	if a.watched.CompareAndSwap(false, true) {
		a.watchTimer.Reset(watchEvery)
	}
}

// watch ends the contexts whose time is up, and gives up attempts that go on regardless.
func (a *attemptStream) watch() {
	now := time.Now()
	for _, w := range a.snapshot() {
		t := w.task.Load()
		if t == nil || !t.ctx.expired(now) {
			continue
		}
		t.ctx.end(context.DeadlineExceeded)
		if now.Sub(t.ctx.deadline) > overrunGrace {
			a.giveUp(w, t)
		}
	}
	if a.open.Load() > 0 {
		a.watchTimer.Reset(watchEvery)
		return
	}
	a.watched.Store(false)
	if a.open.Load() > 0 { // accepted in between
		a.watching()
	}
}

// snapshot is the list of workers; it is replaced, not changed.
func (a *attemptStream) snapshot() []*worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers
}

// giveUp answers an attempt whose AttemptFunc ignores its context, and leaves the goroutine to itself.
func (a *attemptStream) giveUp(w *worker, t *task) {
	inst := a.s.instances.get(t.ref)
	if inst != nil {
		inst.overruns.Add(1)
	}
	t.overrunOf = inst
	if !w.task.CompareAndSwap(t, nil) { // it has returned at the last moment
		if inst != nil {
			inst.overruns.Add(-1)
		}
		return
	}
	a.mu.Lock()
	a.workers = slices.DeleteFunc(slices.Clone(a.workers), func(other *worker) bool { return other == w })
	a.mu.Unlock()
	a.workersDone.Done()
	a.answer(overrun(t))
	a.s.log().Error("attempt ignores its context", "overruns", a.s.overruns.Add(1))
}

func overrun(t *task) result {
	return result{seq: t.seq, total: time.Since(t.received), failure: failure{
		source: SourcePlugin, code: CodeTimeout, message: "the plugin did not end the attempt when its time was up", wire: MaybeSent,
	}}
}

// returned is called for an attempt that ended after it had been given up.
func (t *task) returned(s *server) {
	if t.overrunOf != nil {
		t.overrunOf.overruns.Add(-1)
	}
	s.overruns.Add(-1)
}
