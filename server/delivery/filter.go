package delivery

import (
	"errors"
	"hash/maphash"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// A filter's first segment takes firstSegment ids at filterBits each; every further one makes room for
	// four times as many until there is room for filterIDs. Beyond, the last segment fills up, and the filter rules out less and less.
	firstSegment = 1 << 12
	filterBits   = 16
	filterProbes = 8
	filterIDs    = 1 << 19
	// maxLoad bounds the ids of one partition that are read at start.
	maxLoad = 1 << 20
)

// idFilter says of most event ids that they are new, without asking the disk, which costs more than all else
// that an append does. It knows the ids of two days: those that this process stored, and those that a load from
// the snapshot of Open found. Until that load is complete it rules nothing out.
type idFilter struct {
	seed   maphash.Seed
	loaded atomic.Pointer[idBloom]
	// Only the committer uses what follows.
	today     uint32
	now, last idBloom
}

func newIDFilter() *idFilter { return &idFilter{seed: maphash.MakeSeed()} }

// hash of an idempotency key, whose day is left out.
func (f *idFilter) hash(key []byte) uint64 { return maphash.Bytes(f.seed, key[bodyOffset+4:]) }

// turn moves on to a day.
func (f *idFilter) turn(today uint32) {
	if today == f.today {
		return
	}
	if today == f.today+1 {
		f.last = f.now
	} else {
		f.last = idBloom{}
	}
	f.now, f.today = idBloom{}, today
}

func (f *idFilter) add(h uint64) { f.now.add(h) }

// fresh reports whether the id is certainly not among those of today and yesterday.
func (f *idFilter) fresh(h uint64) bool {
	loaded := f.loaded.Load()
	return loaded != nil && !f.now.has(h) && !f.last.has(h) && !loaded.has(h)
}

// loadFilters completes the filters of all partitions.
func (j *Journal) loadFilters(snapshot *pebble.Snapshot) {
	for _, p := range j.partitions {
		// The committer's day never lies before this one.
		if err := p.filter.load(j, snapshot, p.index, dayOf(seqAt(j.now()))); err != nil {
			j.log.Error("load event ids", "partition", p.index, "err", err)
		}
	}
}

// load reads what the snapshot holds of the two latest days before the filter took over. Days that pass while
// the journal is open leave it too full rather than wrong.
func (f *idFilter) load(j *Journal, snapshot *pebble.Snapshot, partition uint16, today uint32) error {
	found, n := &idBloom{}, 0
	lower := appendDay(nil, partition, max(today, 1)-1)
	err := j.scan(snapshot, lower, prefixEnd(appendTag(nil, partition, tagIdempotency)), func(key, _ []byte) error {
		if n++; n > maxLoad || n%4096 == 0 && j.stopped() {
			return errStopped
		}
		if _, ok := dayOfKey(key); !ok {
			return j.corrupt(key, errBadKey)
		}
		found.add(f.hash(key))
		return nil
	})
	if errors.Is(err, errStopped) {
		return nil // too many: the disk is asked until a restart finds fewer
	}
	if err == nil {
		f.loaded.Store(found)
	}
	return err
}

// idBloom is a filter that grows.
type idBloom struct {
	segments []segment
	ids      int
	room     int
}

type segment []uint64

func (b *idBloom) add(h uint64) {
	if b.ids >= b.room && b.room < filterIDs {
		n := max(firstSegment, 3*b.room)
		b.segments = append(b.segments, make(segment, n*filterBits/64))
		b.room += n
	}
	b.ids++
	s := b.segments[len(b.segments)-1]
	for i := range uint64(filterProbes) {
		at := s.bit(h, i)
		s[at>>6] |= 1 << (at & 63)
	}
}

func (b *idBloom) has(h uint64) bool {
	for _, s := range b.segments {
		if s.has(h) {
			return true
		}
	}
	return false
}

func (s segment) has(h uint64) bool {
	for i := range uint64(filterProbes) {
		at := s.bit(h, i)
		if s[at>>6]&(1<<(at&63)) == 0 {
			return false
		}
	}
	return true
}

// bit is the i'th probe by double hashing.
func (s segment) bit(h, i uint64) uint64 {
	return (h + i*(h>>32|1)*0x9e3779b97f4a7c15) % uint64(len(s)*64)
}
