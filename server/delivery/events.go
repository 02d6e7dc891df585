package delivery

import (
	"maps"
	"strconv"
	"sync"
	"sync/atomic"
)

// eventOverhead is what an event takes beside its payload, attributes and headers.
const eventOverhead = 400

// eventTable holds the events of one partition that jobs in memory need: each once, however many jobs share it.
// It is forgotten with the last job.
type eventTable struct {
	bytes *atomic.Int64 // over all partitions

	mu     sync.Mutex
	events map[uint64]*Event
}

func (e *Event) size() int64 {
	size := eventOverhead + len(e.Payload) + len(e.ID) + len(e.Source) + len(e.Type) + len(e.Subject) + len(e.Schema)
	for name, value := range e.Attributes {
		size += 32 + len(name) + len(value)
	}
	for name, value := range e.Headers {
		size += 32 + len(name) + len(value)
	}
	for _, f := range e.Faults {
		size += 32 + len(f.Subscription) + len(f.Text)
	}
	if e.Trace != nil {
		size += 64 + len(e.Trace.State)
	}
	return int64(size)
}

// With is the event with further attributes, for the one who sends it: nobody else holds it.
func (e *Event) With(attributes map[string]string) *Event {
	all := maps.Clone(e.Attributes)
	if all == nil {
		all = make(map[string]string, len(attributes))
	}
	maps.Copy(all, attributes)
	return &Event{
		Namespace: e.Namespace, ID: e.ID, Source: e.Source, Type: e.Type, Subject: e.Subject, Time: e.Time, ContentType: e.ContentType,
		Schema: e.Schema, Attributes: all, Payload: e.Payload, DeliverTime: e.DeliverTime, TTL: e.TTL, ContentHash: e.ContentHash,
		Partition: e.Partition, Seq: e.Seq, AcceptTime: e.AcceptTime, Matched: e.Matched, Skipped: e.Skipped, UID: e.UID,
		Faults: e.Faults, FaultCount: e.FaultCount, OrderingKey: e.OrderingKey, Headers: e.Headers, Trace: e.Trace,
	}
}

// LetterPrefix is what the names of a letter's attributes begin with, and no publisher's.
const LetterPrefix = "deadletter"

// Attributes say in an event's attributes what a dead letter is of.
func (l *Letter) Attributes() map[string]string {
	a := map[string]string{
		"deadletterfrom": l.From, "deadletterreason": l.Reason, "deadletterattempts": strconv.Itoa(l.Attempts),
		"deadletterstate": map[State]string{Exhausted: "EXHAUSTED", Rejected: "REJECTED"}[l.State],
	}
	if l.ResponseCode != 0 {
		a["deadlettercode"] = strconv.Itoa(l.ResponseCode)
	}
	return a
}

// add takes an event in and holds it. When the table has it already it returns that one, held.
func (t *eventTable) add(e *Event) *Event {
	t.mu.Lock()
	defer t.mu.Unlock()
	if known := t.events[e.Seq]; known != nil && known.Namespace == e.Namespace {
		known.refs++
		return known
	}
	if t.events == nil {
		t.events = make(map[uint64]*Event)
	}
	e.refs = 1
	t.events[e.Seq] = e
	t.bytes.Add(e.size())
	return e
}

// find holds and returns the event; nil when the table does not have it.
func (t *eventTable) find(ns NamespaceKey, seq uint64) *Event {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.events[seq]
	if e == nil || e.Namespace != ns {
		return nil
	}
	e.refs++
	return e
}

func (t *eventTable) hold(e *Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.refs > 0 {
		e.refs++
	}
}

func (t *eventTable) release(e *Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.refs == 0 {
		return
	}
	if e.refs--; e.refs == 0 {
		delete(t.events, e.Seq)
		t.bytes.Add(-e.size())
	}
}

// Hold keeps the event of a job that Offer lends. Jobs from Read are held already.
func (j *Journal) Hold(e *Event) {
	if int(e.Partition) < len(j.partitions) {
		j.partitions[e.Partition].events.hold(e)
	}
}

// Release gives up what Hold or Read has held: once for each job.
func (j *Journal) Release(e *Event) {
	if int(e.Partition) < len(j.partitions) {
		j.partitions[e.Partition].events.release(e)
	}
}

// EventBytes is the size of all events that are held, each counted once: payload, attributes and 400 bytes.
func (j *Journal) EventBytes() int64 { return j.eventBytes.Load() }
