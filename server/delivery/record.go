package delivery

import (
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// recordVersion begins every value. It changes only when old readers would misread new records; fields
// added to the messages do not change it.
const recordVersion = 1

var errNoVersion = errors.New("record has no version")

// putRecord writes a record straight into the batch's buffer.
func putRecord(b *pebble.Batch, key []byte, m proto.Message) {
	size := proto.Size(m)
	op := b.SetDeferred(len(key), 1+size)
	copy(op.Key, key)
	op.Value[0] = recordVersion
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(op.Value[1:1], m)
	if err != nil || len(out) != size {
		// Only text that is not UTF-8 gets here, and Append has refused it.
		panic(fmt.Sprintf("delivery: record %s cannot be encoded: %v", keyText(key), err))
	}
	_ = op.Finish() // Finish cannot fail on a batch without an index.
}

// putMark writes a key that says all by itself.
func putMark(b *pebble.Batch, key []byte) {
	op := b.SetDeferred(len(key), 0)
	copy(op.Key, key)
	_ = op.Finish()
}

func deleteKey(b *pebble.Batch, key []byte) {
	op := b.DeleteDeferred(len(key))
	copy(op.Key, key)
	_ = op.Finish()
}

// body checks a value's version and returns the rest.
func body(value []byte) ([]byte, error) {
	if len(value) == 0 {
		return nil, errNoVersion
	}
	if value[0] != recordVersion {
		return nil, fmt.Errorf("record version %d is not known to this release", value[0])
	}
	return value[1:], nil
}

// decode reads a record; m must be empty. Errors are *CorruptError.
func (j *Journal) decode(key, value []byte, m proto.Message) error {
	raw, err := body(value)
	if err == nil {
		err = proto.Unmarshal(raw, m)
	}
	if err != nil {
		return j.corrupt(key, err)
	}
	return nil
}

func (j *Journal) corrupt(key []byte, reason error) error {
	return &CorruptError{Dir: j.dir, Key: keyText(key), Reason: reason}
}

// Field numbers that are read without decoding the whole record.
const (
	fieldState       = 1
	fieldNextAttempt = 7

	fieldEventID      = 1
	fieldEventType    = 3
	fieldEventAccept  = 10
	fieldEventTargets = 13
)

// peek reads state and next attempt time of a DeliveryRecord, for scans that look at many.
func (j *Journal) peek(key, value []byte) (state State, next int64, err error) {
	raw, err := body(value)
	if err != nil {
		return 0, 0, j.corrupt(key, err)
	}
	for len(raw) > 0 {
		num, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return 0, 0, j.corrupt(key, protowire.ParseError(n))
		}
		raw = raw[n:]
		if typ == protowire.VarintType && (num == fieldState || num == fieldNextAttempt) {
			v, n := protowire.ConsumeVarint(raw)
			if n < 0 {
				return 0, 0, j.corrupt(key, protowire.ParseError(n))
			}
			raw = raw[n:]
			if num == fieldState {
				state = State(v)
			} else {
				next = int64(v)
			}
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, raw); n < 0 {
			return 0, 0, j.corrupt(key, protowire.ParseError(n))
		}
		raw = raw[n:]
	}
	return state, next, nil
}

// eventHead is what a Delivery shows of its event.
type eventHead struct {
	id, eventType string
	accept        time.Time
	targets       []string
}

// head reads the front matter of an EventRecord and leaves the payload alone.
func (j *Journal) head(key, value []byte) (h eventHead, err error) {
	raw, err := body(value)
	if err != nil {
		return h, j.corrupt(key, err)
	}
	for len(raw) > 0 {
		num, typ, n := protowire.ConsumeTag(raw)
		if n < 0 {
			return h, j.corrupt(key, protowire.ParseError(n))
		}
		size := protowire.ConsumeFieldValue(num, typ, raw[n:])
		if size < 0 {
			return h, j.corrupt(key, protowire.ParseError(size))
		}
		value := raw[n : n+size]
		raw = raw[n+size:]
		switch {
		case num == fieldEventAccept && typ == protowire.VarintType:
			v, _ := protowire.ConsumeVarint(value)
			h.accept = fromNano(int64(v))
		case typ != protowire.BytesType:
		case num == fieldEventID:
			h.id, _ = protowire.ConsumeString(value)
		case num == fieldEventType:
			h.eventType, _ = protowire.ConsumeString(value)
		case num == fieldEventTargets:
			var t storev1.Target
			inner, _ := protowire.ConsumeBytes(value)
			if err := proto.Unmarshal(inner, &t); err != nil {
				return h, j.corrupt(key, err)
			}
			h.targets = append(h.targets, t.GetSubscription())
		}
	}
	return h, nil
}

func toNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNano(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// eventRecord fills rec, whose target messages are used again, with e. rec shares e's memory.
func eventRecord(rec *storev1.EventRecord, e *Event) {
	rec.Id, rec.Source, rec.Type, rec.Subject = e.ID, e.Source, e.Type, e.Subject
	rec.Time = toNano(e.Time)
	rec.DataContentType, rec.DataSchema = e.ContentType, e.Schema
	rec.Attributes, rec.Payload = e.Attributes, e.Payload
	rec.AcceptTime, rec.DeliverTime, rec.Ttl = toNano(e.AcceptTime), toNano(e.DeliverTime), int64(e.TTL)
	rec.ContentHash = e.ContentHash[:]
	all := rec.Targets[:cap(rec.Targets)]
	for len(all) < len(e.Targets) {
		all = append(all, nil)
	}
	for i := range e.Targets {
		if all[i] == nil {
			all[i] = &storev1.Target{}
		}
		all[i].Subscription, all[i].Uid = e.Targets[i].Subscription, e.Targets[i].UID[:]
	}
	rec.Targets = all[:len(e.Targets)]
}

// eventOf turns a record into the event it was made of. Targets know only subscription and UID.
func (j *Journal) eventOf(partition uint16, namespace string, seq uint64, key, value []byte) (*Event, error) {
	var rec storev1.EventRecord
	if err := j.decode(key, value, &rec); err != nil {
		return nil, err
	}
	e := &Event{
		Namespace: namespace, ID: rec.GetId(), Source: rec.GetSource(), Type: rec.GetType(), Subject: rec.GetSubject(),
		Time: fromNano(rec.GetTime()), ContentType: rec.GetDataContentType(), Schema: rec.GetDataSchema(),
		Attributes: rec.GetAttributes(), Payload: rec.GetPayload(),
		DeliverTime: fromNano(rec.GetDeliverTime()), TTL: time.Duration(rec.GetTtl()),
		Partition: partition, Seq: seq, AcceptTime: fromNano(rec.GetAcceptTime()),
		UID: eventUID(j.id, partition, seq),
	}
	copy(e.ContentHash[:], rec.GetContentHash())
	e.Targets = make([]Target, len(rec.GetTargets()))
	for i, t := range rec.GetTargets() {
		e.Targets[i].Subscription = t.GetSubscription()
		copy(e.Targets[i].UID[:], t.GetUid())
	}
	return e, nil
}

// attemptRecord fills rec with a; bodies and headers only when asked for.
func attemptRecord(rec *storev1.AttemptRecord, a *Attempt, bodies bool) {
	rec.Number, rec.Outcome, rec.ResponseCode = uint32(a.Number), uint32(a.Outcome), uint32(a.ResponseCode)
	rec.StartTime, rec.Duration, rec.RetryAfter = toNano(a.Start), int64(a.Duration), int64(a.RetryAfter)
	rec.Error, rec.Peer, rec.Manual = validText(a.Error), validText(a.Peer), a.Manual
	rec.ResponseBody, rec.ResponseHeaders, rec.RequestHeaders = nil, nil, nil
	if bodies {
		rec.ResponseBody = a.ResponseBody
		rec.ResponseHeaders = headerRecords(a.ResponseHeaders)
		rec.RequestHeaders = headerRecords(a.RequestHeaders)
	}
}

func headerRecords(headers []Header) []*storev1.Header {
	if len(headers) == 0 {
		return nil
	}
	block := make([]storev1.Header, len(headers))
	recs := make([]*storev1.Header, len(headers))
	for i, h := range headers {
		recs[i] = &block[i]
		recs[i].Name, recs[i].Value = validText(h.Name), validText(h.Value)
	}
	return recs
}

func attemptOf(rec *storev1.AttemptRecord) *Attempt {
	if rec == nil {
		return nil
	}
	return &Attempt{
		Number: int(rec.GetNumber()), Start: fromNano(rec.GetStartTime()), Duration: time.Duration(rec.GetDuration()),
		Outcome: Outcome(rec.GetOutcome()), ResponseCode: int(rec.GetResponseCode()), Error: rec.GetError(),
		RetryAfter: time.Duration(rec.GetRetryAfter()), Peer: rec.GetPeer(), Manual: rec.GetManual(),
		ResponseBody: rec.GetResponseBody(), ResponseHeaders: headersOf(rec.GetResponseHeaders()),
		RequestHeaders: headersOf(rec.GetRequestHeaders()),
	}
}

func headersOf(recs []*storev1.Header) []Header {
	if len(recs) == 0 {
		return nil
	}
	headers := make([]Header, len(recs))
	for i, r := range recs {
		headers[i] = Header{Name: r.GetName(), Value: r.GetValue()}
	}
	return headers
}

// deliveryOf joins a record with its event's head.
func deliveryOf(id ID, lane LaneKey, rec *storev1.DeliveryRecord, head *eventHead) *Delivery {
	d := &Delivery{
		ID: id, Namespace: lane.Namespace, EventID: head.id, EventType: head.eventType, Subscription: lane.Subscription,
		State: State(rec.GetState()), StateReason: rec.GetStateReason(),
		Attempts: int(rec.GetAttemptCount()), MaxAttempts: int(rec.GetMaxAttempts()),
		NextAttempt: fromNano(rec.GetNextAttemptTime()), Expire: fromNano(rec.GetExpireTime()),
		Last: attemptOf(rec.GetLastAttempt()), CreateTime: head.accept, CompleteTime: fromNano(rec.GetCompleteTime()),
	}
	copy(d.SubscriptionUID[:], rec.GetSubscriptionUid())
	if d.CreateTime.IsZero() {
		d.CreateTime = seqTime(id.Seq)
	}
	return d
}

// jobOf makes the job of a record that is open; due is zero for the FIFO.
func jobOf(rec *storev1.DeliveryRecord, e *Event, lane LaneKey, due int64) *Job {
	job := &Job{
		ID:    ID{Seq: e.Seq, Partition: e.Partition, Ordinal: uint16(rec.GetOrdinal())},
		Event: e, Subscription: lane.Subscription,
		Attempts: int(rec.GetAttemptCount()), MaxAttempts: int(rec.GetMaxAttempts()),
		Expire: fromNano(rec.GetExpireTime()), Due: fromNano(due), Manual: rec.GetManual(),
		Indeterminate: int(rec.GetIndeterminateCount()), Suspicion: int(rec.GetSuspicion()),
	}
	copy(job.SubscriptionUID[:], rec.GetSubscriptionUid())
	return job
}
