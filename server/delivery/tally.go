package delivery

import (
	"context"
	"errors"

	"github.com/cockroachdb/pebble/v2"
)

// CountReplay counts what a replay with this picker would make as of now, in all partitions, and makes nothing. It looks a
// little at a time, as a step does, each time when turn has it look.
func (j *Journal) CountReplay(ctx context.Context, pick *Picker, turn func(look func() error) error) (sum ReplayCounts, err error) {
	leave, err := j.enter()
	if err != nil {
		return sum, err
	}
	defer leave()
	for _, p := range j.partitions {
		p.visible.RLock()
		at := cursor{high: p.appliedSeq + 1}
		p.visible.RUnlock()
		t := &tally{}
		for !at.done {
			var step looked
			var found []selected
			if err := turn(func() (err error) {
				step, found, err = p.look(ctx, pick, &at, advanceLook, t)
				return err
			}); err != nil {
				return sum, err
			}
			sum.add(step.counts)
			sum.Created += int64(len(found))
			at.seq, at.sub, at.done = step.seq, step.sub, step.done
		}
	}
	return sum, nil
}

// tally foresees what the commits of a replay leave out of what it selects: deliveries whose event is gone, and all but the
// first of those by which it would send one event to one subscription.
type tally struct {
	low, high uint64
	// sent is the event that was sent last, to Picker.To, as one of those that were made with it.
	sent uint64
}

func (t *tally) makes(p *partition, r pebble.Reader, pick *Picker, lane LaneKey, at *place) (bool, error) {
	origin := at.eventSeq()
	day, err := p.home(r, lane.Namespace, origin)
	if err != nil {
		return false, err
	}
	if head, err := p.readHead(r, day, lane.Namespace, origin); err != nil || head.purged || pick.Again {
		return err == nil && !head.purged, passGone(err)
	}
	if at.origin == 0 { // the others that were made with the event have come right before it
		first := pick.To == 0 || t.sent != origin
		t.sent = origin
		return first, nil
	}
	return t.firstOf(p, r, pick, day, lane, at)
}

// firstOf reports whether no delivery of an event is selected that comes before one that was made again.
func (t *tally) firstOf(p *partition, r pebble.Reader, pick *Picker, day dayKey, lane LaneKey, at *place) (bool, error) {
	selected := func(sub SubscriptionKey, seq uint64) error {
		other := pick.To == 0 && sub != lane.Subscription || pick.Subscription != 0 && sub != pick.Subscription
		if other || seq < t.low || seq >= t.high || seq > at.row.Seq || seq == at.row.Seq && sub >= lane.Subscription {
			return nil
		}
		before, _, verdict, err := p.judge(r, pick, LaneKey{lane.Namespace, sub}, seq)
		if err == nil && before != nil && verdict == Take {
			return errStopped
		}
		return p.passOver(err)
	}
	head, err := p.readHead(r, day, lane.Namespace, at.origin)
	if err != nil {
		return false, err
	}
	var subs []SubscriptionKey
	if err := p.targets(r, day, lane.Namespace, at.origin, &head, func(list *targetList) {
		for i := range list.n {
			subs = append(subs, list.uid(i).SubscriptionKey())
		}
	}); err != nil {
		return false, err
	}
	for _, sub := range subs {
		if err = selected(sub, at.origin); err != nil {
			break
		}
	}
	if err == nil {
		err = p.eachReplay(r, day, lane.Namespace, at.origin, func(of LaneKey, own, _ uint64) error { return selected(of.Subscription, own) })
	}
	if errors.Is(err, errStopped) {
		return false, nil
	}
	return err == nil, err
}
