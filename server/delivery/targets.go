package delivery

import (
	"encoding/binary"
	"slices"
)

// maxWithin is how large targets may be to lie in their event's record: who reads the event for a job reads past
// them, and a record of their own costs about as much, of a key, a header in batch and log, and a node of the
// memtable. It is some 16 targets; more lie apart.
const maxWithin = 512

// Where an event's targets are.
const (
	targetsNone = iota
	targetsWithin
	targetsApart
	// targetsPurged is beside the place: the event's payload has been purged.
	targetsPurged = 0x80
)

func targetsPlace(targets []Target) byte {
	switch {
	case len(targets) == 0:
		return targetsNone
	case sizeOfTargets(targets) <= maxWithin:
		return targetsWithin
	}
	return targetsApart
}

// encodeTargets writes the targets in the order of their keys: first all UIDs, then where each name ends, then
// the names, so that one is found without reading the others.
func encodeTargets(b []byte, targets []Target) []byte {
	var few [16]int
	order := few[:0]
	for i := range targets {
		order = append(order, i)
	}
	slices.SortFunc(order, func(a, b int) int {
		ka, kb := targets[a].UID.key(), targets[b].UID.key()
		switch {
		case ka < kb:
			return -1
		case ka > kb:
			return 1
		}
		return 0
	})
	w := newRecord(b)
	w = binary.BigEndian.AppendUint32(w, uint32(len(targets)))
	for _, i := range order {
		w = append(w, targets[i].UID[:]...)
	}
	end := 0
	for _, i := range order {
		end += len(targets[i].Subscription)
		w = binary.BigEndian.AppendUint32(w, uint32(end))
	}
	for _, i := range order {
		w = append(w, targets[i].Subscription...)
	}
	return w
}

func sizeOfTargets(targets []Target) int {
	size := 5
	for i := range targets {
		size += 20 + len(targets[i].Subscription)
	}
	return size
}

// targetList is a targets record, read where it lies.
type targetList struct {
	n           int
	uids, rest  []byte // rest: ends of names, names
	namesOffset int
}

func decodeTargets(value []byte) (t targetList, err error) {
	d := readRecord(value)
	if head := d.fixed(4); d.err == nil {
		t.n = int(binary.BigEndian.Uint32(head))
	}
	t.uids = d.fixed(16 * t.n)
	t.namesOffset = 4 * t.n
	if t.rest = d.b; len(t.rest) < t.namesOffset {
		d.fail()
	}
	if d.err == nil && t.n > 0 && len(t.rest)-t.namesOffset != t.nameEnd(t.n-1) {
		d.fail()
	}
	if d.err != nil {
		return targetList{}, d.err
	}
	return t, nil
}

func (t *targetList) uid(i int) (u UID) {
	copy(u[:], t.uids[16*i:])
	return u
}

func (t *targetList) nameEnd(i int) int { return int(binary.BigEndian.Uint32(t.rest[4*i:])) }

func (t *targetList) name(i int) string {
	start := 0
	if i > 0 {
		start = t.nameEnd(i - 1)
	}
	end := t.nameEnd(i)
	if start > end || t.namesOffset+end > len(t.rest) {
		return ""
	}
	return string(t.rest[t.namesOffset+start : t.namesOffset+end])
}

// find is where a subscription stands among the targets.
func (t *targetList) find(key SubscriptionKey) (int, bool) {
	low, high := 0, t.n
	for low < high {
		mid := (low + high) / 2
		if binary.BigEndian.Uint64(t.uids[16*mid+8:]) < uint64(key) {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low, low < t.n && binary.BigEndian.Uint64(t.uids[16*low+8:]) == uint64(key)
}

// target is the subscription's as far as it is on record; the zero Target when it is none of them.
func (t *targetList) target(key SubscriptionKey) (target Target) {
	if i, ok := t.find(key); ok {
		target.Subscription, target.UID = t.name(i), t.uid(i)
	}
	return target
}

// keys are the subscriptions, in order.
func (t *targetList) keys() []SubscriptionKey {
	keys := make([]SubscriptionKey, t.n)
	for i := range keys {
		keys[i] = t.uid(i).SubscriptionKey()
	}
	return keys
}

// clone is no part of a record.
func (t *targetList) clone() targetList {
	return targetList{t.n, slices.Clone(t.uids), slices.Clone(t.rest), t.namesOffset}
}

// targets reads the targets that an event's record holds, lent; nil where there are none or they lie apart.
func (d *decoder) targets() (within []byte, apart bool) {
	place := d.byte()
	d.purged = place&targetsPurged != 0
	switch place &^ targetsPurged {
	case targetsNone:
	case targetsWithin:
		return d.bytes(), false
	case targetsApart:
		return nil, true
	default:
		d.fail()
	}
	return nil, false
}
