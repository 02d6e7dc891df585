package delivery

import (
	"context"
	"iter"
	"time"
)

type Journal struct{}

func Open(Options) (*Journal, error)                                           { return nil, ErrClosed }
func (j *Journal) Close() error                                                { return nil }
func (j *Journal) Start(onCommit func([]*Job))                                 {}
func (j *Journal) OnTimer(func(lane LaneKey, partition uint16, due time.Time)) {}
func (j *Journal) Append(ctx context.Context, events []*Event) []AppendResult  { return nil }
func (j *Journal) Settle(*Job, Step, *Attempt)                                 {}
func (j *Journal) SetLowWater(LaneKey, uint16, uint64)                         {}
func (j *Journal) Flush(ctx context.Context) error                             { return nil }
func (j *Journal) Lanes() iter.Seq2[LaneState, error]                          { return nil }
func (j *Journal) Backlog(lane LaneKey, partition uint16, from uint64, max int, maxBytes int) (jobs []*Job, next uint64, err error) {
	return
}
func (j *Journal) Timers(lane LaneKey, partition uint16, until time.Time, max int, maxBytes int) (jobs []*Job, nextDue time.Time, err error) {
	return
}
func (j *Journal) Cancel(ctx context.Context, id ID, reason string) (*Delivery, error) {
	return nil, nil
}
func (j *Journal) Retry(ctx context.Context, id ID, ifAttempts int) (*Delivery, error) {
	return nil, nil
}
func (j *Journal) CancelLane(ctx context.Context, lane LaneKey, uid UID, reason string) (int, error) {
	return 0, nil
}
func (j *Journal) DropNamespace(ctx context.Context, ns string) error { return nil }
func (j *Journal) Event(ns, eventID string) (*Event, error)           { return nil, nil }
func (j *Journal) Events(EventQuery) (EventPage, error)               { return EventPage{}, nil }
func (j *Journal) Delivery(ID) (*Delivery, error)                     { return nil, nil }
func (j *Journal) Deliveries(Query) (Page, error)                     { return Page{}, nil }
func (j *Journal) Attempts(ID) ([]Attempt, error)                     { return nil, nil }
func (j *Journal) OpenIn(ns string) int64                             { return 0 }
func (j *Journal) OpenOf(LaneKey) int64                               { return 0 }
func (j *Journal) Partitions() int                                    { return 0 }
func (j *Journal) Retain(ctx context.Context, retention func(ns string) time.Duration) error {
	return nil
}
