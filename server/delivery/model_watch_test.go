package delivery

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// modelWatch follows a namespace over reconnects, restarts and losses of power: what it is told, laid over how the
// deliveries stood when it began, is how they stand.
type modelWatch struct {
	space    NamespaceKey
	w        *Watcher
	position string
	stands   map[ID]string
	last     map[uint16]changeAt
}

// standsText is what a watch is to know of a delivery.
func standsText(d *Delivery) string {
	number := 0
	if d.Last != nil {
		number = d.Last.Number
	}
	return fmt.Sprintf("%v of event %s (%s) to %s: %d of %d attempts, the last %d, next %v, complete %v, gap %d, replay %q",
		d.State, d.EventID, d.EventUID, d.Subscription, d.Attempts, d.MaxAttempts, number, d.NextAttempt, d.CompleteTime, d.OrderingGap, d.ReplayJob)
}

// watch begins to follow a namespace, comes back, or goes away.
func (m *model) watch() {
	switch n := m.rng.IntN(6); {
	case m.watching == nil:
		m.watching = &modelWatch{space: m.space(), last: map[uint16]changeAt{}}
		m.connect()
		m.say("watch %d", m.watching.space)
	case n == 0:
		m.hangUp()
		m.watching = nil
		m.say("watch no more")
	case n == 1:
		for range m.rng.IntN(20) {
			m.watchOne()
		}
	case n == 2:
		m.hangUp()
		m.say("watch is cut")
	default:
		if m.watching.w == nil {
			m.connect()
			m.say("watch goes on")
		}
	}
}

func (m *model) connect() {
	v := m.watching
	after, err := ParsePosition(v.position)
	if err != nil {
		m.fail("position %q: %v", v.position, err)
	}
	w, err := m.b.Watch(context.Background(), WatchQuery{Namespace: v.space, After: after})
	if err != nil {
		m.fail("watch %d after %q: %v", v.space, v.position, err)
	}
	v.w = w
	if v.stands != nil {
		return
	}
	if err := m.b.Flush(context.Background()); err != nil {
		m.fail("%v", err)
	}
	v.stands, v.last = map[ID]string{}, map[uint16]changeAt{}
	for key := range m.deliveries {
		if d, err := m.b.Delivery(key.ns, key.ID); err == nil && key.ns == v.space {
			v.stands[key.ID] = standsText(d)
		}
	}
	v.position = w.Position().String()
}

func (m *model) hangUp() {
	if v := m.watching; v != nil && v.w != nil {
		m.noteWatch()
		v.w.Close()
		v.w = nil
	}
}

// noteWatch notes how far the watch is, for when it is lost.
func (m *model) noteWatch() {
	if v := m.watching; v != nil && v.w != nil {
		v.position = v.w.Position().String()
	}
}

// watchOne takes the next change, and reports false where there is none.
func (m *model) watchOne() bool {
	v := m.watching
	if v.w == nil || m.watchedAll() {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	ch, err := v.w.Next(ctx)
	if err != nil {
		m.fail("watch: %v", err)
	}
	before := v.last[ch.ID.Partition]
	if ch.at.commit < before.commit || ch.at.commit == before.commit && ch.at.n <= before.n && before.commit != 0 {
		m.fail("a change of commit %d, %d after one of %d, %d", ch.at.commit, ch.at.n, before.commit, before.n)
	}
	v.last[ch.ID.Partition] = ch.at
	d, err := ch.Delivery()
	if errors.Is(err, ErrNotFound) {
		return true // retention was faster, which the end is compared without
	}
	if err != nil {
		m.fail("change of %v: %v", ch.ID, err)
	}
	v.stands[ch.ID] = standsText(d)
	return true
}

// watchedAll reports whether no change is left to be told.
func (m *model) watchedAll() bool {
	v := m.watching
	m.b.sync()
	pos := v.w.Position()
	for _, p := range m.b.partitions {
		left := false
		prefix := appendSpace(nil, p.number, tagNews, v.space)
		if err := m.b.lastKey(m.b.db, prefix, prefixEnd(prefix), func(key []byte) error {
			_, commit, _ := splitNews(key)
			left = commit > pos.at[p.number].commit
			return nil
		}); err != nil {
			m.fail("%v", err)
		}
		if left {
			return false
		}
	}
	return true
}

// checkWatch compares what a watch has told with what there is.
func (m *model) checkWatch() {
	v := m.watching
	if v == nil {
		return
	}
	if v.w == nil {
		m.connect()
	}
	for m.watchOne() { // until all is told
	}
	for key, d := range m.deliveries {
		got, err := m.b.Delivery(key.ns, key.ID)
		if key.ns != v.space || d.gone || err != nil {
			continue
		}
		if want := standsText(got); v.stands[key.ID] != want {
			m.fail("watch knows %v as\n  %s\nwant\n  %s", key, v.stands[key.ID], want)
		}
	}
}
