// Package wire is what both ends of the plugin protocol need to write and read the messages of the hot path without a
// message's struct: a gRPC codec for frames that know their own bytes, and the few pieces of protobuf's encoding that
// frames are made of. What is on the wire is what plugin.proto says.
package wire

import (
	"fmt"
	"sync"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// ProtocolMinor is the newest minor version of the plugin protocol that both ends know: PROTOCOL.md.
const ProtocolMinor = 5

// Writer is a message that writes itself.
type Writer interface {
	// SizeHint is about how many bytes Append adds; fewer costs a copy.
	SizeHint() int
	// Append adds the message to b, as protobuf has it, and returns the extended slice.
	Append(b []byte) []byte
}

// Reader is a message that reads itself.
type Reader interface {
	// Parse replaces the message by what b holds. It must not keep b.
	Parse(b []byte) error
}

// codec is protobuf. Writers and Readers write and read themselves into structs that are used again, because theirs
// are the hot path; all others go the usual way.
type codec struct {
	usual   encoding.CodecV2
	buffers *buffers
}

// NewCodec makes a codec for one connection, which shares its buffers.
func NewCodec() encoding.CodecV2 {
	return codec{usual: encoding.GetCodecV2(proto.Name), buffers: &buffers{}}
}

func (codec) Name() string { return proto.Name }

// Marshal is called by gRPC.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	w, ok := v.(Writer)
	if !ok {
		return c.usual.Marshal(v)
	}
	buf := c.buffers.Get(w.SizeHint())
	*buf = w.Append((*buf)[:0])
	return mem.BufferSlice{mem.NewBuffer(buf, c.buffers)}, nil
}

// Unmarshal is called by gRPC; data is its own.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(Reader)
	if !ok {
		return c.usual.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(c.buffers)
	defer buf.Free()
	if err := r.Parse(buf.ReadOnlyData()); err != nil {
		return fmt.Errorf("read %T: %w", v, err)
	}
	return nil
}

// buffers are the stream's own: gRPC's pool comes in few sizes and clears what it hands out, which costs
// more than the rest of the copy.
type buffers struct{ free sync.Pool }

// keepBuffer is the largest that is used again.
const keepBuffer = 4 << 20

// Get is part of mem.BufferPool. What is in the buffer is of no meaning.
func (b *buffers) Get(length int) *[]byte {
	buf, ok := b.free.Get().(*[]byte)
	if !ok || cap(*buf) < length {
		fresh := make([]byte, length, max(length+length/4, 4096))
		return &fresh
	}
	*buf = (*buf)[:length]
	return buf
}

// Put is part of mem.BufferPool.
func (b *buffers) Put(buf *[]byte) {
	if cap(*buf) <= keepBuffer {
		b.free.Put(buf)
	}
}
