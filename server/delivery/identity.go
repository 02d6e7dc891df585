package delivery

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
)

// identity of an event in its namespace, as CloudEvents has it: source and id. The hash of the id alone stands in
// front, so that an event is found by its id too.
type identity struct{ id, sourced uint64 }

func identityOf(source, id string) identity {
	var buffer [128]byte
	b := append(buffer[:0], id...)
	plain := sha256.Sum256(b)
	b = append(append(append(b[:0], source...), 0), id...)
	both := sha256.Sum256(b)
	return identity{binary.BigEndian.Uint64(plain[:]), binary.BigEndian.Uint64(both[:])}
}

// known is an identity's record: where its event is, and what a duplicate is told when that has been erased.
type known struct {
	seq    uint64
	accept Instant
	hash   [16]byte

	matched, skipped, faults int
}

func encodeKnown(b []byte, k *known) []byte {
	w := newRecord(b)
	w.uint(k.seq)
	w.instant(k.accept)
	w.int(k.matched)
	w.int(k.skipped)
	w.int(k.faults)
	return append(w, k.hash[:]...)
}

func decodeKnown(value []byte) (k known, err error) {
	d := readRecord(value)
	k.seq, k.accept = d.uint(), d.instant()
	k.matched, k.skipped, k.faults = d.int(), d.int(), d.int()
	copy(k.hash[:], d.fixed(len(k.hash)))
	return k, d.err
}

const (
	// A filter's first segment takes firstSegment ids at filterBits each; every further one makes room for
	// four times as many until there is room for filterIDs. Beyond, the last segment fills up, and the filter
	// rules out less and less.
	firstSegment = 1 << 12
	filterBits   = 16
	filterProbes = 8
	filterIDs    = 1 << 19
	// maxLoad bounds the ids of one partition that are read at start.
	maxLoad = 1 << 20
	// idDays is how many days, from today back, an id may lie in that is still taken.
	idDays = 3
)

// idFilter says of most event ids that they are new, without asking the disk, which costs more than all else
// that an append does. It knows the ids of the last days: those that this process stored, and those that a load
// from the snapshot of Open found. Until that load is complete it rules nothing out.
type idFilter struct {
	loaded atomic.Pointer[idBloom]
	// Only the committer uses what follows: today and the days before.
	today dayKey
	days  [idDays]idBloom
}

// turn moves on to a day.
func (f *idFilter) turn(today dayKey) {
	for ; f.today < today; f.today++ {
		if today-f.today > idDays {
			f.today = today - idDays - 1
		}
		copy(f.days[1:], f.days[:idDays-1])
		f.days[0] = idBloom{}
	}
	f.today = today
}

func (id identity) mixed(ns NamespaceKey) uint64 {
	return (id.sourced ^ uint64(ns)) * 0x9e3779b97f4a7c15
}

func (f *idFilter) add(h uint64) { f.days[0].add(h) }

// fresh reports whether the id is certainly not among those of the last days.
func (f *idFilter) fresh(h uint64) bool {
	loaded := f.loaded.Load()
	if loaded == nil || loaded.has(h) {
		return false
	}
	for i := range f.days {
		if f.days[i].has(h) {
			return false
		}
	}
	return true
}

// loadFilters completes the filters of all partitions.
func (j *Journal) loadFilters(snapshot *pebble.Snapshot) {
	for _, p := range j.partitions {
		if err := p.loadFilter(snapshot); err != nil {
			j.log.Error("load event ids", "partition", p.number, "err", err)
		}
	}
}

// loadFilter reads the ids that the snapshot holds of the latest days, namespace by namespace.
func (p *partition) loadFilter(snapshot *pebble.Snapshot) error {
	found, n := &idBloom{}, 0
	today := dayOf(seqAt(p.j.now()))
	for _, day := range append(idDaysOf(today), p.aheadDays...) {
		err := p.eachSpace(snapshot, day, func(ns NamespaceKey) error {
			prefix := appendKind(nil, p.number, day, ns, kindIdentity)
			return p.j.scan(snapshot, prefix, prefixEnd(prefix), func(key, _ []byte) error {
				if n++; n > maxLoad || n%4096 == 0 && p.j.stopped() {
					return errStopped
				}
				if len(key) != recordPrefix+16 {
					return p.j.corrupt(key, errBadKey)
				}
				id := identity{binary.BigEndian.Uint64(key[recordPrefix:]), binary.BigEndian.Uint64(key[recordPrefix+8:])}
				found.add(id.mixed(ns))
				return nil
			})
		})
		if errors.Is(err, errStopped) {
			return nil // too many: the disk is asked until a restart finds fewer
		}
		if err != nil {
			return err
		}
	}
	p.ids.loaded.Store(found)
	return nil
}

// idDaysOf are the days in which an id of the last 24 hours may lie.
func idDaysOf(today dayKey) []dayKey {
	days := make([]dayKey, 0, idDays+1)
	for d := min(today+1, kept-1); len(days) < idDays+1; d-- { // the sequences may be a little ahead of the clock
		days = append(days, d)
		if d == 0 {
			break
		}
	}
	return days
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
