package conformance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// transformTimeout is what items are given, unless a case is about time.
const transformTimeout = 8 * time.Second

// newEvent is an event for transformers.
func newEvent(messageID string, data []byte) *pluginv1.Event {
	return &pluginv1.Event{
		MessageId: messageID, Id: messageID, Source: "//conformance", Type: "conformance.test", Subject: "tests/1",
		Time: timestamppb.New(signTime()), ContentType: "application/json", DataSchema: "https://schemas.example/test.json",
		Attributes: map[string]string{"region": "eu"}, Data: data,
	}
}

// newTransform asks for events[event] to be transformed.
func newTransform(ref uint32, event int) *pluginv1.TransformItem {
	return &pluginv1.TransformItem{InstanceRef: ref, Event: uint32(event), TimeoutMs: uint32(transformTimeout.Milliseconds())}
}

// transforms is the suite's end of a Transform stream, which it reads at once.
type transforms struct {
	ses    *session
	stream pluginv1.TransformerService_TransformClient

	mu      sync.Mutex // guards what follows
	results map[uint64]*pluginv1.TransformResult
	open    map[uint64]bool
	// excess are answers that nothing asked for, or that came a second time.
	excess  []uint64
	changed chan struct{}
	// err is why the stream has ended; io.EOF when the plugin ended it.
	err error
}

func (ses *session) openTransforms() (*transforms, error) {
	ctx, cancel := context.WithCancel(ses.t.ctx)
	ses.t.atEnd(cancel)
	stream, err := pluginv1.NewTransformerServiceClient(ses.conn).Transform(ctx)
	if err != nil {
		return nil, fmt.Errorf("open transform stream: %w", err)
	}
	tr := &transforms{
		ses: ses, stream: stream, results: map[uint64]*pluginv1.TransformResult{}, open: map[uint64]bool{}, changed: make(chan struct{}),
	}
	go tr.receive()
	return tr, nil
}

// sharedTransforms is the stream for cases that need none of their own. One that has ended is opened again.
func (ses *session) sharedTransforms() (*transforms, error) {
	ses.mu.Lock()
	tr := ses.transforms
	ses.mu.Unlock()
	if tr != nil && tr.ended() == nil {
		return tr, nil
	}
	tr, err := ses.openTransforms()
	if err == nil {
		ses.mu.Lock()
		ses.transforms = tr
		ses.mu.Unlock()
	}
	return tr, err
}

func (tr *transforms) receive() {
	for {
		resp, err := tr.stream.Recv()
		tr.mu.Lock()
		for _, r := range resp.GetResults() {
			if !tr.open[r.GetSeq()] {
				tr.excess = append(tr.excess, r.GetSeq())
				continue
			}
			delete(tr.open, r.GetSeq())
			tr.results[r.GetSeq()] = r
		}
		tr.err = err
		close(tr.changed)
		tr.changed = make(chan struct{})
		tr.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (tr *transforms) ended() error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.err
}

// send sends items as one batch, and gives them numbers.
func (tr *transforms) send(events []*pluginv1.Event, items ...*pluginv1.TransformItem) error {
	tr.mu.Lock()
	for _, item := range items {
		item.Seq = tr.ses.nextSeq()
		tr.open[item.GetSeq()] = true
	}
	tr.mu.Unlock()
	err := tr.stream.Send(&pluginv1.TransformRequest{Events: events, Items: items})
	if errors.Is(err, io.EOF) { // the reason is what reading gives
		err = nil
	}
	if err != nil {
		return fmt.Errorf("transform stream: %w%s", err, tr.ses.ending())
	}
	return nil
}

// await returns the results of items that were sent, in their order.
func (tr *transforms) await(limit time.Duration, items ...*pluginv1.TransformItem) ([]*pluginv1.TransformResult, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	results := make([]*pluginv1.TransformResult, len(items))
	for {
		tr.mu.Lock()
		missing := 0
		for i, item := range items {
			if results[i] = tr.results[item.GetSeq()]; results[i] == nil {
				missing++
			}
		}
		err, changed := tr.err, tr.changed
		tr.mu.Unlock()
		switch {
		case missing == 0:
			return results, nil
		case err != nil:
			return results, fmt.Errorf("transform stream: it ended with %d of %d items unanswered: %w%s", missing, len(items), err, tr.ses.ending())
		}
		select {
		case <-changed:
		case <-timer.C:
			return results, latef("%d of %d items were not answered within %v", missing, len(items), limit)
		case <-tr.ses.t.ctx.Done():
			return results, tr.ses.t.ctx.Err()
		}
	}
}

// finish ends the suite's half of the stream, and wants the plugin to end its own.
func (tr *transforms) finish(limit time.Duration) error {
	if err := tr.stream.CloseSend(); err != nil {
		return err
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		tr.mu.Lock()
		err, changed := tr.err, tr.changed
		tr.mu.Unlock()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("transform stream: it ended otherwise than well: %w%s", err, tr.ses.ending())
		}
		select {
		case <-changed:
		case <-timer.C:
			return latef("the stream was not ended within %v of the host's ending its half", limit)
		case <-tr.ses.t.ctx.Done():
			return tr.ses.t.ctx.Err()
		}
	}
}

// surplus says with an error which answers nothing asked for.
func (tr *transforms) surplus() error {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if len(tr.excess) > 0 {
		return fmt.Errorf("answers that nothing asked for, or a second time: seq %v", tr.excess)
	}
	return nil
}

// forget keeps a soak from growing itself.
func (tr *transforms) forget() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	clear(tr.results)
}

// transformBatch sends items as one batch and returns their results in the order of the items.
func (ses *session) transformBatch(events []*pluginv1.Event, items ...*pluginv1.TransformItem) ([]*pluginv1.TransformResult, error) {
	tr, err := ses.sharedTransforms()
	if err != nil {
		return nil, err
	}
	if err := tr.send(events, items...); err != nil {
		return nil, err
	}
	return tr.await(callLimit, items...)
}

// transformOne has one event transformed.
func (ses *session) transformOne(ref uint32, e *pluginv1.Event) (*pluginv1.TransformResult, error) {
	results, err := ses.transformBatch([]*pluginv1.Event{e}, newTransform(ref, 0))
	if err != nil {
		return nil, err
	}
	return results[0], nil
}

// transformText is all that came of an item, to compare.
func transformText(r *pluginv1.TransformResult) string {
	switch {
	case r.GetTransformed() != nil:
		made := r.GetTransformed()
		return fmt.Sprintf("made %q of %q with %v", made.GetBody(), made.GetContentType(), made.GetHeaders())
	case r.GetDropped() != nil:
		return fmt.Sprintf("dropped: %q", r.GetDropped().GetReason())
	case r.GetFailure() != nil:
		return "failed: " + failureText(r.GetFailure())
	}
	return "no outcome"
}

// transformClass is what kind of outcome it is.
func transformClass(r *pluginv1.TransformResult) string {
	switch {
	case r.GetTransformed() != nil:
		return "transformed"
	case r.GetDropped() != nil:
		return "dropped"
	case r.GetFailure() != nil:
		return "failure"
	}
	return "no outcome"
}
