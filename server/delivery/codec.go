package delivery

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
)

// recordVersion begins every value. It changes only when old readers would misread new records.
const recordVersion = 2

var (
	errTruncated = errors.New("record is cut off")
	errBadKey    = errors.New("key does not fit the layout")
)

// encoder appends the fields of a record; decoder reads them back in the same order. Numbers are varints, text
// and bytes have their length in front.
type encoder []byte

func newRecord(b []byte) encoder { return append(b, recordVersion) }

func (e *encoder) byte(v byte)       { *e = append(*e, v) }
func (e *encoder) uint(v uint64)     { *e = binary.AppendUvarint(*e, v) }
func (e *encoder) int(v int)         { e.uint(uint64(max(v, 0))) }
func (e *encoder) text(s string)     { e.uint(uint64(len(s))); *e = append(*e, s...) }
func (e *encoder) bytes(b []byte)    { e.uint(uint64(len(b))); *e = append(*e, b...) }
func (e *encoder) instant(i Instant) { e.uint(uint64(i)) }

// time keeps a time of the years 1 to 9999 to the nanosecond: 0 for none, else seconds since year 1 above two
// bits of which one says that there is something and the other that nanoseconds follow.
func (e *encoder) time(t time.Time) {
	if t.IsZero() {
		e.uint(0)
		return
	}
	seconds := uint64(min(max(t.Unix()+unixInstant, 0), maxInstantSeconds))
	if nanos := t.Nanosecond(); nanos != 0 {
		e.uint(seconds<<2 | 3)
		e.uint(uint64(nanos))
		return
	}
	e.uint(seconds<<2 | 1)
}

// decoder reads a record. After an error it returns zero values only.
type decoder struct {
	b   []byte
	err error
	// purged: the event that is read has no payload any more.
	purged bool
}

func readRecord(value []byte) *decoder {
	d := &decoder{b: value}
	if v := d.byte(); d.err == nil && v != recordVersion {
		d.err = fmt.Errorf("record version %d is not known to this release", v)
	}
	return d
}

func (d *decoder) fail() {
	d.b = nil
	if d.err == nil {
		d.err = errTruncated
	}
}

func (d *decoder) byte() byte {
	if len(d.b) == 0 {
		d.fail()
		return 0
	}
	v := d.b[0]
	d.b = d.b[1:]
	return v
}

func (d *decoder) uint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) int() int { return int(min(d.uint(), 1<<31-1)) }

// bytes is lent: it is a part of the value.
func (d *decoder) bytes() []byte {
	n := d.uint()
	if n > uint64(len(d.b)) {
		d.fail()
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) fixed(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.fail()
		return nil
	}
	v := d.b[:n:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) text() string     { return string(d.bytes()) }
func (d *decoder) instant() Instant { return Instant(min(d.uint(), 1<<62)) }

func (d *decoder) time() time.Time {
	v := d.uint()
	if v == 0 {
		return time.Time{}
	}
	nanos := uint64(0)
	if v&2 != 0 {
		nanos = d.uint()
	}
	return time.Unix(int64(v>>2)-unixInstant, int64(nanos%1_000_000_000))
}
