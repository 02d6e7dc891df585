package wire

import (
	"errors"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// ErrMalformed says that bytes are no message.
var ErrMalformed = errors.New("malformed message")

// Fields calls each with every field of a message: with v, which is never nil, for length-delimited ones, with x for
// varints. Fields of other types are skipped. v is part of b.
func Fields(b []byte, each func(num protowire.Number, v []byte, x uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return ErrMalformed
		}
		b = b[n:]
		var v []byte
		var x uint64
		known := true
		switch typ {
		case protowire.BytesType:
			v, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			x, n = protowire.ConsumeVarint(b)
		default:
			known = false
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return ErrMalformed
		}
		if known {
			if err := each(num, v, x); err != nil {
				return err
			}
		}
		b = b[n:]
	}
	return nil
}

// Only returns the content of the field num when it is all that b holds; false otherwise.
func Only(b []byte, num protowire.Number) ([]byte, bool, error) {
	got, typ, n := protowire.ConsumeTag(b)
	if n < 0 || got != num || typ != protowire.BytesType {
		return nil, false, nil
	}
	v, m := protowire.ConsumeBytes(b[n:])
	if m < 0 || n+m != len(b) {
		return nil, false, ErrMalformed
	}
	return v, true, nil
}

// AppendUint writes a number; 0 is left out.
func AppendUint(b []byte, num protowire.Number, v uint64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, num, protowire.VarintType), v)
}

// AppendBytes writes bytes, also when there are none.
func AppendBytes(b []byte, num protowire.Number, v []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, num, protowire.BytesType), v)
}

// AppendText writes a string; "" is left out. What is not UTF-8, as a receiver's header may not be, is replaced: it would
// spoil the whole message.
func AppendText(b []byte, num protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	if !utf8.ValidString(s) {
		s = strings.ToValidUTF8(s, "\uFFFD")
	}
	return protowire.AppendString(protowire.AppendTag(b, num, protowire.BytesType), s)
}

// AppendHeader writes a message of a name and a value, which plugin.proto's Header is.
func AppendHeader(b []byte, num protowire.Number, name, value string) []byte {
	b, at := Open(b, num)
	b = AppendText(b, 1, name)
	b = AppendText(b, 2, value)
	return Shut(b, at)
}

// lengthRoom is what Open leaves for a length: enough for 2 MiB.
const lengthRoom = 3

// Open begins a nested message, whose length is written after its content, into room left for it, so that nothing is
// measured twice. It returns where the message begins, for Shut.
func Open(b []byte, num protowire.Number) ([]byte, int) {
	b = protowire.AppendTag(b, num, protowire.BytesType)
	return append(b, 0, 0, 0), len(b) + lengthRoom
}

// Shut ends the nested message that began at. One that is longer than the room allows for is moved.
func Shut(b []byte, at int) []byte {
	n := len(b) - at
	if n >= 1<<(7*lengthRoom) {
		b = append(b, 0, 0)
		copy(b[at+2:], b[at:at+n])
		padded(b[at-lengthRoom:at+2], uint64(n))
		return b
	}
	padded(b[at-lengthRoom:at], uint64(n))
	return b
}

// padded writes a varint that fills its room: leading zero groups are valid, if longer than need be.
func padded(room []byte, n uint64) {
	for i := range room {
		room[i] = byte(n) | 0x80
		n >>= 7
	}
	room[len(room)-1] &= 0x7f
}
