package delivery

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"time"
)

// Layout, format 2. Every key begins with its partition (2 bytes) and a tag, so that a partition is one contiguous
// range that can be copied, replayed or handed over by itself. Numbers are big endian; ns and lane are the keys of
// the namespace's and the subscription's UID, 8 bytes each, and so is seq; day (2 bytes) is that of the sequence.
//
//	q | ns lane seq             Job: waiting, untried
//	t | ns lane due seq         Job: waiting for a time. due is an Instant, 8 bytes
//	k | ns lane order           ordering key that is busy: which delivery has its turn. order is an OrderKey, 8 bytes
//	o | ns lane order seq       waiting for the turn of an ordering key, and not looked at before
//	r | day ns b seq            event; its targets too, where they are few
//	r | day ns t seq            its targets, where they are many
//	r | day ns i h8 h8          where the event with this id is: hash of the id, hash of source and id
//	r | day ns d lane seq       where a delivery stands; none while it is PENDING, and so in q or t
//	r | day ns a lane seq n     failed attempt with its bodies; n is 4 bytes
//	r | day ns z seq lane       the delivery has ended without success; when, and how
//	r | day ns g own lane       a delivery made again, with a sequence of its own: of which event, why, for whom
//	r | day ns x seq lane own   what a transformer has made of the event for a subscription, and of a dead letter, whose own
//	                            is 0 otherwise
//	r | day ns y seq own lane   the event is sent again as that delivery; the job that does so
//	r | day ns s                up to which sequence the payloads of the day have gone before the rest
//	r | day ns s seq            but for that event's, which was open then; in kept: that event's are being purged
//	r | 0xffff ns …             kept: the same, of events that outlive their day because a delivery is open; i has
//	                            the sequence behind it, since an id may come again after a day
//	f | ns lane                 since when the target has been failing
//	j | ns job                  replay: what it is to do, and how it ended; in the namespace's own partition
//	e | ns job                  erasure: the same
//	c | ns job                  where a replay or an erasure that goes on stands in this partition
//	u | ns commit part          changes of deliveries that a commit has made, of a namespace that is watched
//	v | ns                      since which commit those are there
//	w                           the newest commit
//	p                           journal id, and what the partition remembers of itself
//
// What is open (q, t, o) is keyed by lane and vanishes at its end. What has ended is keyed by day and goes by the day,
// so that a question costs what it touches and retention what it erases. The meta record is at partition 0xffff,
// which no event can have.
//
// A q or t key is Set once between its deletes: edits move rows, they never overwrite them. Four functions write
// there: putRow, putTimer, dropRow and dropNamespace.
const (
	tagFIFO      = 'q'
	tagTimer     = 't'
	tagTurn      = 'k'
	tagBlocked   = 'o'
	tagRecord    = 'r'
	tagFailing   = 'f'
	tagJob       = 'j'
	tagErasure   = 'e'
	tagCursor    = 'c'
	tagNews      = 'u'
	tagWatched   = 'v'
	tagCommit    = 'w'
	tagPartition = 'p'

	kindEvent    = 'b'
	kindTargets  = 't'
	kindIdentity = 'i'
	kindDelivery = 'd'
	kindAttempt  = 'a'
	kindDead     = 'z'
	kindAgain    = 'g'
	kindReplay   = 'y'
	kindMade     = 'x'
	kindSwept    = 's'

	// maxPartitions keeps partition numbers away from the meta key.
	maxPartitions = 4096
	tagOffset     = 2
	bodyOffset    = 3
	laneEnd       = bodyOffset + 16
	recordPrefix  = bodyOffset + 2 + 8 + 1 // of an r key: partition, tag, day, ns, kind
)

// dayKey is a day as keys have it: days since 1970.
type dayKey uint16

// kept stands in place of the day for what outlives it.
const kept dayKey = 0xffff

const msPerDay = uint64(24 * time.Hour / time.Millisecond)

// dayOf is the day of a sequence.
func dayOf(seq uint64) dayKey { return dayKey(min(seq>>seqCounterBits/msPerDay, uint64(kept)-1)) }

// firstSeq is the lowest sequence of a day.
func firstSeq(d dayKey) uint64 { return uint64(d) * msPerDay << seqCounterBits }

func metaKey() []byte { return []byte("\xff\xffmeta") }

func appendTag(b []byte, partition uint16, tag byte) []byte {
	return append(binary.BigEndian.AppendUint16(b, partition), tag)
}

func appendU64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

// appendSpace is the prefix of a namespace's keys under q, t, k, o or f.
func appendSpace(b []byte, partition uint16, tag byte, ns NamespaceKey) []byte {
	return appendU64(appendTag(b, partition, tag), uint64(ns))
}

// appendLane is the prefix of a lane's keys under q, t, k, o or f.
func appendLane(b []byte, partition uint16, tag byte, lane LaneKey) []byte {
	return appendU64(appendSpace(b, partition, tag, lane.Namespace), uint64(lane.Subscription))
}

func appendRow(b []byte, partition uint16, lane LaneKey, row Row) []byte {
	if row.Kind == FIFO {
		return appendU64(appendLane(b, partition, tagFIFO, lane), row.Seq)
	}
	return appendU64(appendU64(appendLane(b, partition, tagTimer, lane), uint64(row.Due)), row.Seq)
}

// appendPos is the first key of a lane's rows of a kind that are not before a place.
func appendPos(b []byte, partition uint16, lane LaneKey, kind Kind, at Pos) []byte {
	return appendRow(b, partition, lane, Row{Kind: kind, Due: at.Due, Seq: at.Seq})
}

func appendTurn(b []byte, partition uint16, lane LaneKey, key OrderKey) []byte {
	return appendU64(appendLane(b, partition, tagTurn, lane), uint64(key))
}

// appendBlocked is the prefix of what waits for the turn of an ordering key.
func appendBlocked(b []byte, partition uint16, lane LaneKey, key OrderKey) []byte {
	return appendU64(appendLane(b, partition, tagBlocked, lane), uint64(key))
}

func appendBlockedRow(b []byte, partition uint16, lane LaneKey, key OrderKey, seq uint64) []byte {
	return appendU64(appendBlocked(b, partition, lane, key), seq)
}

func appendDay(b []byte, partition uint16, day dayKey) []byte {
	return binary.BigEndian.AppendUint16(appendTag(b, partition, tagRecord), uint16(day))
}

// appendDaySpace is the prefix of a namespace's records of a day.
func appendDaySpace(b []byte, partition uint16, day dayKey, ns NamespaceKey) []byte {
	return appendU64(appendDay(b, partition, day), uint64(ns))
}

func appendKind(b []byte, partition uint16, day dayKey, ns NamespaceKey, kind byte) []byte {
	return append(appendDaySpace(b, partition, day, ns), kind)
}

func appendEventKey(b []byte, partition uint16, day dayKey, ns NamespaceKey, seq uint64) []byte {
	return appendU64(appendKind(b, partition, day, ns, kindEvent), seq)
}

func appendTargetsKey(b []byte, partition uint16, day dayKey, ns NamespaceKey, seq uint64) []byte {
	return appendU64(appendKind(b, partition, day, ns, kindTargets), seq)
}

func appendIdentityKey(b []byte, partition uint16, day dayKey, ns NamespaceKey, id identity) []byte {
	return appendU64(appendU64(appendKind(b, partition, day, ns, kindIdentity), id.id), id.sourced)
}

func appendKeptIdentity(b []byte, partition uint16, ns NamespaceKey, id identity, seq uint64) []byte {
	return appendU64(appendIdentityKey(b, partition, kept, ns, id), seq)
}

func appendDeliveryKey(b []byte, partition uint16, day dayKey, lane LaneKey, seq uint64) []byte {
	b = appendKind(b, partition, day, lane.Namespace, kindDelivery)
	return appendU64(appendU64(b, uint64(lane.Subscription)), seq)
}

// appendAttempts is the prefix of a delivery's attempts.
func appendAttempts(b []byte, partition uint16, day dayKey, lane LaneKey, seq uint64) []byte {
	b = appendKind(b, partition, day, lane.Namespace, kindAttempt)
	return appendU64(appendU64(b, uint64(lane.Subscription)), seq)
}

func appendAttemptKey(b []byte, partition uint16, day dayKey, lane LaneKey, seq uint64, number int) []byte {
	return binary.BigEndian.AppendUint32(appendAttempts(b, partition, day, lane, seq), uint32(number))
}

func appendDeadKey(b []byte, partition uint16, day dayKey, lane LaneKey, seq uint64) []byte {
	b = appendKind(b, partition, day, lane.Namespace, kindDead)
	return appendU64(appendU64(b, seq), uint64(lane.Subscription))
}

func appendAgainKey(b []byte, partition uint16, day dayKey, lane LaneKey, own uint64) []byte {
	b = appendKind(b, partition, day, lane.Namespace, kindAgain)
	return appendU64(appendU64(b, own), uint64(lane.Subscription))
}

// appendReplays is the prefix of an event's replays.
func appendReplays(b []byte, partition uint16, day dayKey, ns NamespaceKey, seq uint64) []byte {
	return appendU64(appendKind(b, partition, day, ns, kindReplay), seq)
}

func appendReplayKey(b []byte, partition uint16, day dayKey, lane LaneKey, seq, own uint64) []byte {
	return appendU64(appendU64(appendReplays(b, partition, day, lane.Namespace, seq), own), uint64(lane.Subscription))
}

// appendMade is the prefix of what transformers have made of an event.
func appendMade(b []byte, partition uint16, day dayKey, ns NamespaceKey, seq uint64) []byte {
	return appendU64(appendKind(b, partition, day, ns, kindMade), seq)
}

func appendMadeKey(b []byte, partition uint16, day dayKey, lane LaneKey, seq, own uint64) []byte {
	return appendU64(appendU64(appendMade(b, partition, day, lane.Namespace, seq), uint64(lane.Subscription)), own)
}

func appendSweptKey(b []byte, partition uint16, day dayKey, ns NamespaceKey) []byte {
	return appendKind(b, partition, day, ns, kindSwept)
}

func appendWaitKey(b []byte, partition uint16, day dayKey, ns NamespaceKey, seq uint64) []byte {
	return appendU64(appendSweptKey(b, partition, day, ns), seq)
}

func appendJobKey(b []byte, partition uint16, tag byte, ns NamespaceKey, job uint64) []byte {
	return appendU64(appendSpace(b, partition, tag, ns), job)
}

// splitJob reads a j, e or c key.
func splitJob(key []byte) (ns NamespaceKey, job uint64, ok bool) {
	if len(key) != laneEnd {
		return 0, 0, false
	}
	return NamespaceKey(binary.BigEndian.Uint64(key[bodyOffset:])), binary.BigEndian.Uint64(key[bodyOffset+8:]), true
}

// prefixEnd is the first key after all keys that begin with prefix; nil would mean no end, and no prefix is all
// ones.
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

// splitRow reads a q or t key.
func splitRow(key []byte) (lane LaneKey, row Row, ok bool) {
	if len(key) < laneEnd+8 {
		return lane, row, false
	}
	lane, _ = splitLane(key)
	rest := key[laneEnd:]
	switch {
	case key[tagOffset] == tagFIFO && len(rest) == 8:
		row.Seq = binary.BigEndian.Uint64(rest)
	case key[tagOffset] == tagTimer && len(rest) == 16:
		row.Kind, row.Due, row.Seq = Timer, Instant(binary.BigEndian.Uint64(rest)), binary.BigEndian.Uint64(rest[8:])
	default:
		return lane, row, false
	}
	return lane, row, true
}

// splitTurn reads a k key.
func splitTurn(key []byte) (lane LaneKey, order OrderKey, ok bool) {
	if len(key) != laneEnd+8 || key[tagOffset] != tagTurn {
		return lane, 0, false
	}
	lane, _ = splitLane(key)
	return lane, OrderKey(binary.BigEndian.Uint64(key[laneEnd:])), true
}

// splitBlocked reads an o key.
func splitBlocked(key []byte) (lane LaneKey, order OrderKey, seq uint64, ok bool) {
	if len(key) != laneEnd+16 || key[tagOffset] != tagBlocked {
		return lane, 0, 0, false
	}
	lane, _ = splitLane(key)
	return lane, OrderKey(binary.BigEndian.Uint64(key[laneEnd:])), binary.BigEndian.Uint64(key[laneEnd+8:]), true
}

// splitRecord reads what every r key has; rest is what follows the kind.
func splitRecord(key []byte) (day dayKey, ns NamespaceKey, kind byte, rest []byte, ok bool) {
	if len(key) < recordPrefix || key[tagOffset] != tagRecord {
		return 0, 0, 0, nil, false
	}
	day = dayKey(binary.BigEndian.Uint16(key[bodyOffset:]))
	ns = NamespaceKey(binary.BigEndian.Uint64(key[bodyOffset+2:]))
	return day, ns, key[recordPrefix-1], key[recordPrefix:], true
}

// recordSeq reads the sequence of an r key that has one.
func recordSeq(kind byte, rest []byte) (uint64, bool) {
	switch {
	case (kind == kindEvent || kind == kindTargets || kind == kindDead || kind == kindAgain || kind == kindReplay || kind == kindMade) && len(rest) >= 8:
		return binary.BigEndian.Uint64(rest), true
	case (kind == kindDelivery || kind == kindAttempt) && len(rest) >= 16:
		return binary.BigEndian.Uint64(rest[8:]), true
	}
	return 0, false
}

// keyText is a key for people.
func keyText(key []byte) string {
	if bytes.Equal(key, metaKey()) {
		return "meta"
	}
	if len(key) < bodyOffset {
		return fmt.Sprintf("%x", key)
	}
	partition, tag := binary.BigEndian.Uint16(key), key[tagOffset]
	if lane, row, ok := splitRow(key); ok {
		return fmt.Sprintf("partition %d %c namespace %016x delivery %s", partition, tag, uint64(lane.Namespace),
			ID{row.Seq, partition, lane.Subscription})
	}
	if lane, order, seq, ok := splitBlocked(key); ok {
		return fmt.Sprintf("partition %d %c namespace %016x ordering key %016x delivery %s", partition, tag, uint64(lane.Namespace),
			uint64(order), ID{seq, partition, lane.Subscription})
	}
	if lane, order, ok := splitTurn(key); ok {
		return fmt.Sprintf("partition %d %c namespace %016x subscription %016x ordering key %016x", partition, tag, uint64(lane.Namespace),
			uint64(lane.Subscription), uint64(order))
	}
	if day, ns, kind, rest, ok := splitRecord(key); ok {
		seq, _ := recordSeq(kind, rest)
		return fmt.Sprintf("partition %d %c%c day %d namespace %016x sequence %016x key %x", partition, tag, kind, day, uint64(ns), seq, key)
	}
	return fmt.Sprintf("partition %d %c %x", partition, tag, key[bodyOffset:])
}

// splitLane reads the lane of a q, t, k, o or f key.
func splitLane(key []byte) (lane LaneKey, ok bool) {
	if len(key) < laneEnd {
		return lane, false
	}
	lane.Namespace = NamespaceKey(binary.BigEndian.Uint64(key[bodyOffset:]))
	lane.Subscription = SubscriptionKey(binary.BigEndian.Uint64(key[bodyOffset+8:]))
	return lane, true
}
