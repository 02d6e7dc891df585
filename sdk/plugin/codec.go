package plugin

import (
	"fmt"
	"sync"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec is protobuf. The two messages of the attempt stream are read into and written from plain structs
// that are used again, because that stream is the hot path; all others go the usual way. What is on the
// wire is the same.
type codec struct {
	usual   encoding.CodecV2
	buffers *buffers
}

func newCodec() codec { return codec{usual: encoding.GetCodecV2(proto.Name), buffers: &buffers{}} }

func (codec) Name() string { return proto.Name }

// Marshal is called by gRPC.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*resultsFrame)
	if !ok {
		return c.usual.Marshal(v)
	}
	buf := c.buffers.Get(f.sizeHint())
	*buf = f.append((*buf)[:0])
	return mem.BufferSlice{mem.NewBuffer(buf, c.buffers)}, nil
}

// Unmarshal is called by gRPC; data is its own.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*requestFrame)
	if !ok {
		return c.usual.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(c.buffers)
	defer buf.Free()
	if err := f.parse(buf.ReadOnlyData()); err != nil {
		return fmt.Errorf("read attempt request: %w", err)
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
