package delivery

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// counters hold how many deliveries are open, per lane and namespace. Changes are added as they are applied; what
// was open when the journal was opened is counted from a snapshot in the background. What has come down to none is
// forgotten now and then, so that they cost what is open.
type counters struct {
	mu     sync.RWMutex
	lanes  map[LaneKey]*atomic.Int64
	spaces map[NamespaceKey]*atomic.Int64
	// jobs are deliveries that replays have made or reopened and that are open.
	jobs map[jobKey]int64
	// dropped namespaces are not counted from the snapshot any more.
	dropped map[NamespaceKey]struct{}
	exact   atomic.Bool
}

func newCounters() *counters {
	return &counters{
		lanes: make(map[LaneKey]*atomic.Int64), spaces: make(map[NamespaceKey]*atomic.Int64), jobs: make(map[jobKey]int64),
		dropped: make(map[NamespaceKey]struct{}),
	}
}

// apply counts what a commit has opened and ended.
func (c *counters) apply(done *commit) {
	for i := range done.stored {
		e := done.stored[i].Event
		for k := range done.stored[i].Targets {
			if t := &done.stored[i].Targets[k]; !t.Skip {
				c.add(LaneKey{e.Namespace, t.UID.SubscriptionKey()}, 1)
			}
		}
	}
	for _, o := range done.opened {
		c.add(o.lane, o.by)
		if o.job != 0 {
			c.addJob(jobKey{o.lane.Namespace, o.job}, o.by)
		}
	}
}

func (c *counters) add(lane LaneKey, n int64) {
	c.mu.RLock()
	if l := c.lanes[lane]; l != nil {
		l.Add(n)
		c.spaces[lane.Namespace].Add(n)
		c.mu.RUnlock()
		return
	}
	c.mu.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addLocked(lane, n)
}

// jobKey names a replay.
type jobKey struct {
	ns  NamespaceKey
	job uint64
}

func (c *counters) addJob(key jobKey, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.jobs[key] += n; c.jobs[key] == 0 {
		delete(c.jobs, key)
	}
}

func (c *counters) ofJob(key jobKey) int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.jobs[key]
}

func (c *counters) addLocked(lane LaneKey, n int64) {
	if c.lanes[lane] == nil {
		c.lanes[lane] = &atomic.Int64{}
	}
	if c.spaces[lane.Namespace] == nil {
		c.spaces[lane.Namespace] = &atomic.Int64{}
	}
	c.lanes[lane].Add(n)
	c.spaces[lane.Namespace].Add(n)
}

// prune forgets what has come down to none.
func (c *counters) prune() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.exact.Load() {
		return
	}
	for lane, n := range c.lanes {
		if n.Load() == 0 {
			delete(c.lanes, lane)
		}
	}
	spaces := make(map[NamespaceKey]*atomic.Int64)
	for lane := range c.lanes {
		spaces[lane.Namespace] = c.spaces[lane.Namespace]
	}
	c.spaces = spaces
}

// addOld adds what the snapshot holds.
func (c *counters) addOld(lane LaneKey, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, gone := c.dropped[lane.Namespace]; !gone && n != 0 {
		c.addLocked(lane, n)
	}
}

func (c *counters) drop(ns NamespaceKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.exact.Load() {
		c.dropped[ns] = struct{}{}
	}
	delete(c.spaces, ns)
	for job := range c.jobs {
		if job.ns == ns {
			delete(c.jobs, job)
		}
	}
	for lane := range c.lanes {
		if lane.Namespace == ns {
			delete(c.lanes, lane)
		}
	}
}

// OpenIn is the number of open deliveries of a namespace. It is too low until Counted.
func (j *Journal) OpenIn(ns NamespaceKey) int64 {
	j.counts.mu.RLock()
	defer j.counts.mu.RUnlock()
	if n := j.counts.spaces[ns]; n != nil {
		return max(n.Load(), 0)
	}
	return 0
}

// OpenOf is the number of open deliveries of a subscription. It is too low until Counted.
func (j *Journal) OpenOf(lane LaneKey) int64 {
	j.counts.mu.RLock()
	defer j.counts.mu.RUnlock()
	if n := j.counts.lanes[lane]; n != nil {
		return max(n.Load(), 0)
	}
	return 0
}

// Counted reports whether what was open at the start has been counted, which takes about a tenth of a second per
// million deliveries.
func (j *Journal) Counted() bool { return j.counts.exact.Load() }

// countOpen counts what was open in the snapshot.
func (j *Journal) countOpen(snapshot *pebble.Snapshot) {
	for _, p := range j.partitions {
		if err := p.countOpen(snapshot); errors.Is(err, errStopped) {
			return
		} else if err != nil {
			j.log.Error("count open deliveries", "partition", p.number, "err", err)
		}
	}
	j.counts.mu.Lock()
	defer j.counts.mu.Unlock()
	j.counts.exact.Store(true)
	clear(j.counts.dropped)
}

func (p *partition) countOpen(snapshot *pebble.Snapshot) error {
	for _, kind := range []Kind{FIFO, Timer} {
		var lane LaneKey
		var n int64
		prefix, looked := appendTag(nil, p.number, tagOf(kind)), 0
		err := p.j.iterate(snapshot, prefix, prefixEnd(prefix), func(it *pebble.Iterator) error {
			for ok := it.First(); ok; ok = it.Next() {
				at, valid := splitLane(it.Key())
				if !valid {
					return p.j.corrupt(it.Key(), errBadKey)
				}
				if at != lane {
					p.j.counts.addOld(lane, n)
					lane, n = at, 0
				}
				n++
				if kind == Timer {
					p.countJob(it, at.Namespace)
				}
				if looked++; looked%4096 == 0 && p.j.stopped() {
					return errStopped
				}
			}
			return nil
		})
		p.j.counts.addOld(lane, n)
		if err != nil {
			return err
		}
	}
	return nil
}

// countJob counts a row for the replay that has made it. A row that cannot be read counts for none.
func (p *partition) countJob(it *pebble.Iterator, ns NamespaceKey) {
	value, err := it.ValueAndErr()
	if err != nil || len(value) < 2 || value[1]&flagReplayed == 0 {
		return
	}
	if pr, err := decodeProgress(value); err == nil && pr.job != 0 {
		p.j.counts.addOldJob(jobKey{ns, pr.job})
	}
}

func (c *counters) addOldJob(key jobKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, gone := c.dropped[key.ns]; gone {
		return
	}
	if c.jobs[key]++; c.jobs[key] == 0 {
		delete(c.jobs, key)
	}
}
