package ingest

import (
	"context"

	"github.com/google/uuid"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// Record stores events that the server makes itself, of what has happened in a namespace, and answers as Publish does.
// An event is stored only if a subscription wants it that is not younger than the event's Time; else its Result is empty.
//
// They are taken while the server drains, too, and do not count against max_publish_rate. Beyond max_open_deliveries
// there is room for them, a tenth of it and recordSpare more: what is told there is most likely why it is reached.
func (i *Ingest) Record(ctx context.Context, namespace delivery.NamespaceKey, events []*delivery.Event) []Result {
	results := make([]Result, len(events))
	snap := i.registry.Snapshot()
	ns := snap.NamespaceByKey(uint64(namespace))
	err := error(nil)
	switch {
	case ns == nil:
		err = ErrNamespaceNotFound
	case ns.Deleted():
		err = ErrNamespaceDeleted
	default:
		err = i.full(ns, int64(ns.Quota().MaxOpenDeliveries)/10+recordSpare)
	}
	if err != nil {
		for k := range results {
			results[k].Err = err
		}
		return results
	}
	var wanted []delivery.Publication
	var places []int
	var candidate subscription.Candidate
	for k, ev := range events {
		to := targets(snap, ns, &candidate, ev, ev.Time)
		if len(to) == 0 {
			continue
		}
		ev.Namespace = namespace
		if ev.ID == "" {
			ev.ID = uuid.Must(uuid.NewV7()).String()
		}
		wanted = append(wanted, delivery.Publication{Event: ev, Targets: to})
		places = append(places, k)
	}
	if len(wanted) == 0 {
		return results
	}
	stored := make([]Result, len(wanted))
	i.store(ctx, ns, wanted, stored)
	i.metrics.count(stored)
	for k, r := range stored {
		results[places[k]] = r
	}
	return results
}

// recordSpare is how many open deliveries there is room for beyond the quota, at least.
const recordSpare = 100
