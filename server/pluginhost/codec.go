package pluginhost

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// codec is protobuf. On the attempt stream a batch is written from the attempts themselves and results
// are read into structs that are used again; every other message goes the usual way. What is on the wire
// is the same.
type codec struct {
	usual encoding.CodecV2
}

func newCodec() codec { return codec{usual: encoding.GetCodecV2(proto.Name)} }

func (codec) Name() string { return proto.Name }

// Marshal is called by gRPC.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*batchFrame)
	if !ok {
		return c.usual.Marshal(v)
	}
	pool := mem.DefaultBufferPool()
	buf := pool.Get(f.sizeHint())
	*buf = f.append((*buf)[:0])
	return mem.BufferSlice{mem.NewBuffer(buf, pool)}, nil
}

// Unmarshal is called by gRPC; data is its own.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*responseFrame)
	if !ok {
		return c.usual.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	if err := f.parse(buf.ReadOnlyData()); err != nil {
		return fmt.Errorf("read attempt response: %w", err)
	}
	return nil
}
