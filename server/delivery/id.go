package delivery

import (
	"encoding/base32"
	"encoding/binary"
	"errors"
	"strings"
	"time"
)

// ID names a delivery: an event and the subscription it is for. Its text form sorts by creation time and leads
// to the partition.
type ID struct {
	// Seq is the event's sequence: unix milliseconds << 16 | counter, rising within a partition.
	Seq       uint64
	Partition uint16
	// Subscription is the lane's, so that it needs no look at the event's targets.
	Subscription SubscriptionKey
}

// ErrInvalidID says that a text is not the text form of an ID.
var ErrInvalidID = errors.New("not a delivery id")

const (
	idTextLen = 29
	idLen     = 18
	// base32hex keeps the order of the bytes; lower case is what resource names allow.
	hexAlphabet = "0123456789abcdefghijklmnopqrstuv"
)

func textEncoding() *base32.Encoding {
	return base32.NewEncoding(hexAlphabet).WithPadding(base32.NoPadding)
}

// String returns the 29 characters that name the delivery.
func (id ID) String() string {
	var raw [idLen]byte
	binary.BigEndian.PutUint64(raw[0:], id.Seq)
	binary.BigEndian.PutUint16(raw[8:], id.Partition)
	binary.BigEndian.PutUint64(raw[10:], uint64(id.Subscription))
	var text [idTextLen]byte
	encodeText(text[:], raw[:])
	return string(text[:])
}

// Time is when the event was accepted, to the millisecond.
func (id ID) Time() time.Time { return seqTime(id.Seq) }

// ParseID reads what String wrote; anything else is ErrInvalidID.
func ParseID(text string) (ID, error) {
	if len(text) != idTextLen {
		return ID{}, ErrInvalidID
	}
	raw, err := textEncoding().DecodeString(text)
	if err != nil || len(raw) != idLen {
		return ID{}, ErrInvalidID
	}
	id := ID{
		Seq:          binary.BigEndian.Uint64(raw[0:]),
		Partition:    binary.BigEndian.Uint16(raw[8:]),
		Subscription: SubscriptionKey(binary.BigEndian.Uint64(raw[10:])),
	}
	// The last character has spare bits: only one spelling of an ID is accepted.
	if id.String() != text {
		return ID{}, ErrInvalidID
	}
	return id, nil
}

// encodeText writes src as base32hex into dst without allocating.
func encodeText(dst, src []byte) {
	var acc uint32
	var bits, n int
	for _, b := range src {
		acc = acc<<8 | uint32(b)
		bits += 8
		for bits >= 5 {
			bits -= 5
			dst[n] = hexAlphabet[acc>>bits&31]
			n++
		}
	}
	if bits > 0 {
		dst[n] = hexAlphabet[acc<<(5-bits)&31]
	}
}

const (
	uidPrefix = "evt_"
	// idBytes is how much of a journal's id is random.
	idBytes = 5
)

// eventUID makes the webhook-id of an event: 24 characters after the prefix, unique over all journals.
func eventUID(journal [idBytes]byte, partition uint16, seq uint64) string {
	var raw [15]byte
	binary.BigEndian.PutUint64(raw[0:], seq)
	binary.BigEndian.PutUint16(raw[8:], partition)
	copy(raw[10:], journal[:])
	var text [len(uidPrefix) + 24]byte
	copy(text[:], uidPrefix)
	encodeText(text[len(uidPrefix):], raw[:])
	return string(text[:])
}

// parseUID reads what eventUID wrote for this journal.
func parseUID(journal [idBytes]byte, uid string) (partition uint16, seq uint64, ok bool) {
	text, ok := strings.CutPrefix(uid, uidPrefix)
	if !ok || len(text) != 24 {
		return 0, 0, false
	}
	raw, err := textEncoding().DecodeString(text)
	if err != nil || len(raw) != 15 || string(raw[10:]) != string(journal[:]) {
		return 0, 0, false
	}
	return binary.BigEndian.Uint16(raw[8:]), binary.BigEndian.Uint64(raw), true
}

const seqCounterBits = 16

// seqAt is the lowest sequence of an event accepted at t; 0 for times before 1970.
func seqAt(t time.Time) uint64 {
	ms := t.UnixMilli()
	if ms < 0 {
		return 0
	}
	return uint64(ms) << seqCounterBits
}

func seqTime(seq uint64) time.Time { return time.UnixMilli(int64(seq >> seqCounterBits)) }

// partitionOf places an event, by its ordering key, or its id if it has none. The result is stored nowhere and must never
// change: FNV-1a over the namespace's key and that text, mixed so that the low bits depend on every byte.
func partitionOf(ns NamespaceKey, text string, partitions int) uint16 {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	for i := 0; i < 64; i += 8 {
		h = (h ^ uint64(ns)>>i&0xff) * prime
	}
	for i := range len(text) {
		h = (h ^ uint64(text[i])) * prime
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	return uint16(h % uint64(partitions))
}
