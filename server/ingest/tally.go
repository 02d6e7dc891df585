package ingest

import (
	"slices"
	"sync"
	"time"
)

// tallyFor is how far back accepted events are counted.
const tallyFor = 24 * time.Hour

// tallies count the accepted events of each namespace, by its UID, by minutes for an hour and by hours for a day.
// They hold what was counted only, so that a namespace costs what it publishes, and nothing after a day.
type tallies struct {
	mu      sync.Mutex
	all     map[[16]byte]*tally
	sweepAt time.Time
}

// tally is sorted by time.
type tally struct{ minutes, hours []counted }

type counted struct {
	slot int64 // minutes or hours since 1970
	n    int64
}

func (t *tallies) add(uid [16]byte, now time.Time, n int) {
	if n == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all == nil {
		t.all = make(map[[16]byte]*tally)
	}
	if now.After(t.sweepAt) {
		t.sweep(now)
		t.sweepAt = now.Add(time.Hour)
	}
	found := t.all[uid]
	if found == nil {
		found = &tally{}
		t.all[uid] = found
	}
	minute := now.Unix() / 60
	found.minutes = count(found.minutes, minute, 60, n)
	found.hours = count(found.hours, minute/60, 24, n)
}

// count adds to a slot and forgets those that are as many slots old.
func count(list []counted, slot, keep int64, n int) []counted {
	if last := len(list) - 1; last < 0 || list[last].slot < slot {
		list = append(list, counted{slot: slot})
	}
	list[len(list)-1].n += int64(n)
	for len(list) > 1 && list[0].slot < slot-keep {
		list = slices.Delete(list, 0, 1)
	}
	return list
}

// sweep forgets namespaces that have published nothing for longer than is counted.
func (t *tallies) sweep(now time.Time) {
	oldest := now.Add(-tallyFor-time.Hour).Unix() / 3600
	for uid, found := range t.all {
		if found.hours[len(found.hours)-1].slot < oldest {
			delete(t.all, uid)
		}
	}
}

// sum adds up what was accepted within a window, of one namespace or, without one, of all.
func (t *tallies) sum(uid *[16]byte, now time.Time, window time.Duration) (n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if uid != nil {
		if found := t.all[*uid]; found != nil {
			n = found.sum(now, window)
		}
		return n
	}
	for _, found := range t.all {
		n += found.sum(now, window)
	}
	return n
}

func (t *tally) sum(now time.Time, window time.Duration) (n int64) {
	list, unit := t.minutes, time.Minute
	if window > time.Hour {
		list, unit = t.hours, time.Hour
	}
	slot := now.Unix() / int64(unit/time.Second)
	first := slot - int64((window+unit-1)/unit)
	for _, c := range list {
		if c.slot >= first && c.slot <= slot {
			n += c.n
		}
	}
	return n
}
