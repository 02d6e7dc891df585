package delivery

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// counters hold how many deliveries are open, per lane and namespace. Changes are added as they are
// made; what was open when the journal was opened is counted from a snapshot in the background.
type counters struct {
	mu     sync.RWMutex
	lanes  map[LaneKey]*atomic.Int64
	spaces map[string]*atomic.Int64
	// dropped namespaces are not counted from the snapshot any more.
	dropped map[string]struct{}
	exact   atomic.Bool
}

func newCounters() *counters {
	return &counters{
		lanes: make(map[LaneKey]*atomic.Int64), spaces: make(map[string]*atomic.Int64),
		dropped: make(map[string]struct{}),
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

// addOld adds what the snapshot holds.
func (c *counters) addOld(lane LaneKey, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, gone := c.dropped[lane.Namespace]; !gone && n != 0 {
		c.addLocked(lane, n)
	}
}

func (c *counters) drop(namespace string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.exact.Load() {
		c.dropped[namespace] = struct{}{}
	}
	delete(c.spaces, namespace)
	for lane := range c.lanes {
		if lane.Namespace == namespace {
			delete(c.lanes, lane)
		}
	}
}

// OpenIn is the number of open deliveries of a namespace. It is too low until Counted.
func (j *Journal) OpenIn(namespace string) int64 {
	j.counts.mu.RLock()
	defer j.counts.mu.RUnlock()
	if n := j.counts.spaces[namespace]; n != nil {
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

// Counted reports whether what was open at the start has been counted, which takes about a second per
// million deliveries.
func (j *Journal) Counted() bool { return j.counts.exact.Load() }

var errStopped = errors.New("journal is closing")

// countOpen counts what was open in the snapshot.
func (j *Journal) countOpen(snapshot *pebble.Snapshot) {
	defer snapshot.Close()
	for _, p := range j.partitions {
		err := j.eachLane(snapshot, p.index, func(lane LaneKey) error {
			n, err := j.countLane(snapshot, p.index, lane)
			j.counts.addOld(lane, n)
			return err
		})
		if errors.Is(err, errStopped) {
			return
		}
		if err != nil {
			j.log.Error("count open deliveries", "partition", p.index, "err", err)
		}
	}
	j.counts.mu.Lock()
	defer j.counts.mu.Unlock()
	j.counts.exact.Store(true)
	clear(j.counts.dropped)
}

func (j *Journal) countLane(r pebble.Reader, partition uint16, lane LaneKey) (int64, error) {
	var n int64
	err := j.eachOpen(r, partition, lane, ^uint64(0), func(uint64) error {
		n++
		if n%4096 == 0 && j.stopped() {
			return errStopped
		}
		return nil
	})
	return n, err
}

// eachOpen visits the sequences below limit of a lane's open deliveries: those of the FIFO from the low-water
// mark on, then those with timers. Sequences are in order within each, not over all.
func (j *Journal) eachOpen(r pebble.Reader, partition uint16, lane LaneKey, limit uint64, visit func(seq uint64) error) error {
	from := j.lowWaterIn(r, partition, lane)
	if from < limit {
		prefix := appendLane(nil, partition, tagDelivery, lane)
		err := j.scan(r, appendSeq(prefix[:len(prefix):len(prefix)], from), appendSeq(prefix, limit), func(key, value []byte) error {
			state, next, err := j.peek(key, value)
			if err != nil || state != Pending || next != 0 {
				return err
			}
			return visitSeq(j, key, visit)
		})
		if err != nil {
			return err
		}
	}
	for _, state := range []State{Pending, Scheduled} {
		prefix := appendStatePrefix(nil, partition, lane, state)
		err := j.scan(r, prefix, appendSeq(prefix[:len(prefix):len(prefix)], limit), func(key, _ []byte) error {
			return visitSeq(j, key, visit)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func visitSeq(j *Journal, key []byte, visit func(seq uint64) error) error {
	seq, ok := lastSeqOf(key)
	if !ok {
		return j.corrupt(key, errBadKey)
	}
	return visit(seq)
}
