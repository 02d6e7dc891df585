package subscription

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Bounds and defaults of batching.
const (
	leastBatchEvents, mostBatchEvents = 2, 1000
	leastBatchBytes, mostBatchBytes   = 1 << 10, 512 << 10
	mostBatchWait                     = 10 * time.Second

	defaultBatchEvents = 100
	defaultBatchBytes  = 256 << 10
	defaultBatchWait   = time.Second
)

func fillBatching(b *grapnelv1.Batching) {
	if b == nil {
		return
	}
	if b.MaxEvents == 0 {
		b.MaxEvents = defaultBatchEvents
	}
	if b.MaxBytes == 0 {
		b.MaxBytes = defaultBatchBytes
	}
	if b.MaxWait == nil {
		b.MaxWait = durationpb.New(defaultBatchWait)
	}
	if b.Format == grapnelv1.Batching_FORMAT_UNSPECIFIED {
		b.Format = grapnelv1.Batching_FORMAT_JSON_ARRAY
	}
}

// batchingOf brings what is stored within the bounds; nil is none.
func batchingOf(b *grapnelv1.Batching) *Batching {
	if b == nil {
		return nil
	}
	return &Batching{
		MaxEvents: int(clamp(b.MaxEvents, leastBatchEvents, mostBatchEvents)),
		MaxBytes:  int(clamp(b.MaxBytes, leastBatchBytes, mostBatchBytes)),
		MaxWait:   clamp(b.MaxWait.AsDuration(), 0, mostBatchWait),
	}
}

// batching checks how deliveries share requests, and that nothing else says what a body is.
func (c *checker) batching(field string, p *grapnelv1.Subscription) {
	b := p.Batching
	if b == nil {
		return
	}
	c.number(field+".max_events", float64(b.MaxEvents), leastBatchEvents, mostBatchEvents)
	c.number(field+".max_bytes", float64(b.MaxBytes), leastBatchBytes, mostBatchBytes)
	c.duration(field+".max_wait", b.MaxWait, 0, mostBatchWait)
	if _, known := grapnelv1.Batching_Format_name[int32(b.Format)]; !known {
		c.add(field+".format", "enum.defined_only", "%d is not a format; want %s", b.Format, choices(grapnelv1.Batching_Format_name))
	}
	s := p.PayloadShape
	if s.Format != grapnelv1.PayloadShape_FORMAT_RAW {
		c.add("subscription.payload_shape.format", "batching.format", "%v is the form of one event, and batching.format that of several; leave out one of the two", s.Format)
	}
	if s.ContentType != "" && s.Format == grapnelv1.PayloadShape_FORMAT_RAW {
		c.add("subscription.payload_shape.content_type", "batching.content_type", "%q is the media type of one event, and a batch has that of batching.format; leave it out", s.ContentType)
	}
}

// batchingWarnings is Warnings for batching.
func batchingWarnings(p *grapnelv1.Subscription) []string {
	rate, most := p.GetMaxRate(), p.GetBatching().GetMaxEvents()
	if p.GetBatching() == nil || rate == 0 {
		return nil
	}
	return []string{fmt.Sprintf("max_rate is of requests, and batching has each carry up to %d deliveries: up to %v a second", most, rate*float64(most))}
}
