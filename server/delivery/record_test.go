package delivery

import (
	"bytes"
	"maps"
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// decoders read what is on the disk, whatever that is; encode writes it again where that is the other way round.
//
//nolint:gochecknoglobals // a table
var decoders = map[string]struct {
	decode func([]byte) (any, error)
	encode func(any) []byte
	sample []byte
}{
	"event": {
		func(v []byte) (any, error) { return decodeEvent(v) },
		func(x any) []byte { return encodeEvent(nil, x.(*Event), nil) },
		encodeEvent(nil, &Event{ID: "e", Source: "//s", Time: time.Unix(1, 2), Attributes: map[string]string{"a": "b"}, Payload: []byte("x"), Matched: 3}, []Target{{Subscription: "b", UID: uid(2)}, {Subscription: "a", UID: uid(1)}}),
	},
	"head": {func(v []byte) (any, error) { return decodeHead(v) }, nil, encodeEvent(nil, &Event{ID: "e", Type: "t", AcceptTime: time.Unix(5, 0)}, []Target{{Subscription: "b", UID: uid(2)}})},
	"targets": {
		func(v []byte) (any, error) {
			t, err := decodeTargets(v)
			if err == nil { // all of it can be used
				for i := range t.n {
					t.uid(i)
					t.name(i)
					t.find(t.uid(i).SubscriptionKey())
				}
			}
			return t, err
		}, nil, encodeTargets(nil, []Target{{Subscription: "b", UID: uid(2)}, {Subscription: "a", UID: uid(1)}}),
	},
	"progress": {
		func(v []byte) (any, error) { return decodeProgress(v) },
		func(x any) []byte { p := x.(progress); return encodeProgress(nil, &p) },
		encodeProgress(nil, &progress{epoch: 3, attempts: 2, maxAttempts: 10, expire: 77, indeterminate: 1, suspicion: 1, parted: 2, manual: true}),
	},
	"standing": {
		func(v []byte) (any, error) { return decodeStanding(v) },
		func(x any) []byte { s := x.(standing); return encodeStanding(nil, &s) },
		encodeStanding(nil, &standing{progress: progress{epoch: 1}, state: Exhausted, reason: "r", complete: 5, last: attemptAt(1, OutcomeRetryable, 500, time.Unix(9, 9))}),
	},
	"attempt": {
		func(v []byte) (any, error) { return decodeAttempt(v) },
		func(x any) []byte { return encodeAttempt(nil, x.(*Attempt)) },
		encodeAttempt(nil, func() *Attempt {
			a := attemptAt(1, OutcomeRetryable, 500, time.Unix(9, 9))
			a.Batch, a.BatchSize = "bat_1", 7
			return a
		}()),
	},
	"known": {
		func(v []byte) (any, error) { return decodeKnown(v) },
		func(x any) []byte { k := x.(known); return encodeKnown(nil, &k) },
		encodeKnown(nil, &known{seq: 1 << 50, accept: 7, hash: [16]byte{1, 2}, matched: 300, skipped: 7, faults: 2}),
	},
	"order": {
		func(v []byte) (any, error) { return decodeOrder(v) }, nil, encodeEvent(nil, publication("e", 1).Event, nil),
	},
	"commit": {
		func(v []byte) (any, error) { return decodeCommitMark(v) },
		func(x any) []byte { return encodeCommitMark(nil, x.(commitMark)) },
		encodeCommitMark(nil, commitMark{index: 8, lastSeq: 1 << 50, at: 9}),
	},
	"memory": {
		func(v []byte) (any, error) { return decodeMemory(v) },
		func(x any) []byte { m := x.(memory); return encodeMemory(nil, &m) },
		encodeMemory(nil, &memory{swept: sweptDays{1, 2, 3}, ahead: aheadSpan{4, 5, 6}}),
	},
	"meta": {
		func(v []byte) (any, error) { return decodeMeta(v) },
		func(x any) []byte { return encodeMeta(nil, x.(meta)) },
		encodeMeta(nil, meta{format: 2, partitions: 16, id: [idBytes]byte{1}}),
	},
}

func FuzzDecode(f *testing.F) {
	for _, d := range decoders {
		f.Add(d.sample)
	}
	f.Add([]byte{recordVersion, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Add(bytes.Repeat([]byte{recordVersion}, 100))
	f.Fuzz(func(t *testing.T, value []byte) {
		for name, d := range decoders {
			before := allocated()
			read, err := d.decode(value)
			if took := allocated() - before; took > 1<<20+100*uint64(len(value)) {
				t.Errorf("%s: %d bytes for a record of %d", name, took, len(value))
			}
			if err != nil || d.encode == nil {
				continue
			}
			again, err := d.decode(d.encode(read))
			if err != nil {
				t.Errorf("%s: %+v cannot be read again: %v", name, read, err)
			}
			if name != "meta" && !sameRecord(read, again) {
				t.Errorf("%s: %+v became %+v", name, read, again)
			}
		}
		for _, split := range []func([]byte){
			func(k []byte) { splitRow(k) }, func(k []byte) { splitLane(k) }, func(k []byte) { keyText(k) },
			func(k []byte) {
				if _, _, kind, rest, ok := splitRecord(k); ok {
					recordSeq(kind, rest)
				}
			},
		} {
			split(value)
		}
	})
}

func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}

// sameRecord compares what records say; damaged ones may hold times and texts that are not kept as they are.
func sameRecord(a, b any) bool {
	if reflect.DeepEqual(a, b) {
		return true
	}
	return cmp.Equal(a, b, cmp.Exporter(func(reflect.Type) bool { return true }), cmp.Comparer(func(x, y time.Time) bool {
		return x.Equal(y) || x.Year() > 9999 || x.Year() < 1
	}), cmp.Comparer(func(x, y string) bool { return validText(x) == validText(y) }),
		cmp.Comparer(func(x, y time.Duration) bool { return x == y || x < 0 }))
}

// A record that is cut off anywhere is told from a whole one, and nothing panics.
func TestRecordsThatAreCutOff(t *testing.T) {
	for name, d := range decoders {
		if _, err := d.decode(d.sample); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if name == "head" {
			continue // it is the beginning of a record
		}
		for n := range len(d.sample) {
			if _, err := d.decode(d.sample[:n]); err == nil {
				t.Errorf("%s: %d bytes of %d are taken for a record", name, n, len(d.sample))
			}
		}
	}
}

// Of whatever event, its ordering key is the one that it has.
func TestOrderIsReadAlone(t *testing.T) {
	for name, change := range map[string]func(*Event){
		"bare":    func(*Event) {},
		"key":     func(e *Event) { e.OrderingKey = "k" },
		"headers": func(e *Event) { e.Headers = map[string]string{"a": "b"} },
		"faults":  func(e *Event) { e.FaultCount, e.Faults = 3, []Fault{{"a", "b"}, {"c", "d"}} },
		"trace":   func(e *Event) { e.Trace = &Trace{ID: [16]byte{1}, Span: [8]byte{2}, State: "a=b"} },
		"everything": func(e *Event) {
			e.Trace = &Trace{ID: [16]byte{1}, Span: [8]byte{2}}
			e.OrderingKey, e.Attributes, e.TTL = "key", map[string]string{"a": "b", "c": ""}, time.Hour
			e.FaultCount, e.Faults, e.Payload, e.Headers = 1, []Fault{{"a", "b"}}, make([]byte, 5000), map[string]string{"c": "d"}
		},
	} {
		pub := publication("e", 1, 2)
		change(pub.Event)
		if e, err := decodeEvent(encodeEvent(nil, pub.Event, pub.Targets)); err != nil || !reflect.DeepEqual(e.Trace, pub.Event.Trace) {
			t.Errorf("%s: the trace %v is read as %v, %v", name, pub.Event.Trace, e.Trace, err)
		}
		if got, err := decodeOrder(encodeEvent(nil, pub.Event, pub.Targets)); err != nil || got != orderKeyOf(pub.Event.OrderingKey) {
			t.Errorf("%s: %x, %v", name, got, err)
		}
		if e, err := decodeEvent(encodeEvent(nil, pub.Event, pub.Targets)); err != nil || !maps.Equal(e.Headers, pub.Event.Headers) || e.OrderingKey != pub.Event.OrderingKey {
			t.Errorf("%s: read as %+v, %v", name, e, err)
		}
	}
}
