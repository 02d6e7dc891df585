package delivery

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Layout. Every key begins with its partition (2 bytes, big endian) and a tag, so that a partition is one
// contiguous range that can be copied, replayed or handed over by itself. ns, sub and id hold no zero byte.
// Numbers are big endian; seq is 8 bytes.
//
//	e | ns 0 | seq                   EventRecord
//	i | day u32 | ns 0 | id          IdempotencyRecord, day since 1970 of the sequence
//	d | ns 0 | sub 0 | seq           DeliveryRecord. The Pending ones without a timer, at or above the lane's
//	                                 low-water mark, are the FIFO; settling overwrites in place
//	t | ns 0 | sub 0 | due i64 | seq empty; timers of Scheduled deliveries and of Pending ones with a
//	                                 delivery time. A lane needs one timer in memory: its first key
//	x | ns 0 | sub 0 | state | seq   empty; every state but Succeeded and Pending-in-the-FIFO. So all that
//	                                 is open is the FIFO, x|Pending and x|Scheduled
//	h | ns 0 | sub 0 | seq | n u32   AttemptRecord of attempts that did not succeed
//	c | ns 0 | sub 0                 LaneRecord
//	p                                PartitionRecord
//
// The meta record is at partition 0xffff, which no event can have.
const (
	tagEvent       = 'e'
	tagIdempotency = 'i'
	tagDelivery    = 'd'
	tagTimer       = 't'
	tagIndex       = 'x'
	tagAttempt     = 'h'
	tagLane        = 'c'
	tagPartition   = 'p'

	// maxPartitions keeps partition numbers away from the meta key.
	maxPartitions = 4096
	tagOffset     = 2
	bodyOffset    = 3
)

func metaKey() []byte { return []byte("\xff\xffmeta") }

func appendTag(b []byte, partition uint16, tag byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, partition), tag)
}

func appendName(b []byte, name string) []byte {
	return append(append(b, name...), 0)
}

// appendSpace is the prefix of a namespace's keys under a tag.
func appendSpace(b []byte, partition uint16, tag byte, namespace string) []byte {
	return appendName(appendTag(b, partition, tag), namespace)
}

// appendLane is the prefix of a lane's keys under a tag.
func appendLane(b []byte, partition uint16, tag byte, lane LaneKey) []byte {
	return appendName(appendSpace(b, partition, tag, lane.Namespace), lane.Subscription)
}

func appendSeq(b []byte, seq uint64) []byte { return binary.BigEndian.AppendUint64(b, seq) }

func appendEventKey(b []byte, partition uint16, namespace string, seq uint64) []byte {
	return appendSeq(appendSpace(b, partition, tagEvent, namespace), seq)
}

func appendDay(b []byte, partition uint16, day uint32) []byte {
	return binary.BigEndian.AppendUint32(appendTag(b, partition, tagIdempotency), day)
}

func appendIdempotencyKey(b []byte, partition uint16, day uint32, namespace, eventID string) []byte {
	return append(appendName(appendDay(b, partition, day), namespace), eventID...)
}

func appendDeliveryKey(b []byte, partition uint16, lane LaneKey, seq uint64) []byte {
	return appendSeq(appendLane(b, partition, tagDelivery, lane), seq)
}

func appendTimerKey(b []byte, partition uint16, lane LaneKey, due int64, seq uint64) []byte {
	b = appendLane(b, partition, tagTimer, lane)
	return appendSeq(binary.BigEndian.AppendUint64(b, uint64(max(due, 0))), seq)
}

func appendStatePrefix(b []byte, partition uint16, lane LaneKey, state State) []byte {
	return append(appendLane(b, partition, tagIndex, lane), byte(state))
}

func appendIndexKey(b []byte, partition uint16, lane LaneKey, state State, seq uint64) []byte {
	return appendSeq(appendStatePrefix(b, partition, lane, state), seq)
}

func appendAttemptKey(b []byte, partition uint16, lane LaneKey, seq uint64, number int) []byte {
	b = appendSeq(appendLane(b, partition, tagAttempt, lane), seq)
	return binary.BigEndian.AppendUint32(b, uint32(number))
}

func appendLaneKey(b []byte, partition uint16, lane LaneKey) []byte {
	return appendLane(b, partition, tagLane, lane)
}

// prefixEnd is the first key after all keys that begin with prefix. Prefixes end in a tag, a zero byte, a
// state or a number, none of which is all ones in practice; nil would mean no end.
func prefixEnd(prefix []byte) []byte {
	end := bytes.Clone(prefix)
	for i := len(end) - 1; i >= 0; i-- {
		end[i]++
		if end[i] != 0 {
			return end[:i+1]
		}
	}
	return nil
}

// splitName cuts a zero-terminated name off the front.
func splitName(b []byte) (name string, rest []byte, ok bool) {
	head, rest, ok := bytes.Cut(b, []byte{0})
	return string(head), rest, ok
}

// splitLane reads the lane of a d, t, x, h or c key; rest is what follows it.
func splitLane(key []byte) (lane LaneKey, rest []byte, ok bool) {
	if len(key) < bodyOffset {
		return LaneKey{}, nil, false
	}
	if lane.Namespace, rest, ok = splitName(key[bodyOffset:]); !ok {
		return LaneKey{}, nil, false
	}
	lane.Subscription, rest, ok = splitName(rest)
	return lane, rest, ok
}

// lastSeqOf reads the sequence that ends an e, d, t or x key.
func lastSeqOf(key []byte) (uint64, bool) {
	if len(key) < bodyOffset+8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(key[len(key)-8:]), true
}

// splitTimer reads what follows the lane in a t key.
func splitTimer(rest []byte) (due int64, seq uint64, ok bool) {
	if len(rest) != 16 {
		return 0, 0, false
	}
	return int64(binary.BigEndian.Uint64(rest)), binary.BigEndian.Uint64(rest[8:]), true
}

// keyText shows a key to people.
func keyText(key []byte) string {
	if bytes.Equal(key, metaKey()) {
		return "meta"
	}
	if len(key) < bodyOffset {
		return fmt.Sprintf("%q", key)
	}
	return fmt.Sprintf("partition %d %c %q", binary.BigEndian.Uint16(key), key[tagOffset], key[bodyOffset:])
}

// dayOfKey reads the day of an i key.
func dayOfKey(key []byte) (uint32, bool) {
	if len(key) < bodyOffset+4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(key[bodyOffset:]), true
}
