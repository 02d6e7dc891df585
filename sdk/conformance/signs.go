package conformance

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// signing is the suite's end of the Sign stream; one batch at a time.
type signing struct {
	mu     sync.Mutex // guards use of the stream
	stream pluginv1.SignerService_SignClient
}

// signTime is when items are signed, unless a case says otherwise.
func signTime() time.Time { return time.Date(2026, 3, 1, 12, 30, 45, 123456789, time.UTC) }

// signItem is a request to sign.
func signItem(ref, content uint32) *pluginv1.SignItem {
	return &pluginv1.SignItem{InstanceRef: ref, Content: content, Created: timestamppb.New(signTime()), Nonce: []byte("conformance-0123")}
}

// signBatch sends items as one batch and returns their results in the order of the items. That every item
// is answered, and once, is for its own case to judge: excess lists answers that nothing asked for.
func (ses *session) signBatch(contents []*pluginv1.Content, items ...*pluginv1.SignItem) (results []*pluginv1.SignResult, excess []uint64, err error) {
	ses.mu.Lock()
	if ses.sign == nil {
		ses.sign = &signing{}
	}
	s := ses.sign
	ses.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream == nil {
		if s.stream, err = pluginv1.NewSignerServiceClient(ses.conn).Sign(ses.t.ctx); err != nil {
			return nil, nil, fmt.Errorf("open sign stream: %w", err)
		}
	}
	at := map[uint64]int{}
	for i, item := range items {
		item.Seq = ses.nextSeq()
		at[item.GetSeq()] = i
	}
	if err := s.stream.Send(&pluginv1.SignRequest{Contents: contents, Items: items}); err != nil {
		if _, cause := s.stream.Recv(); cause != nil && cause != io.EOF { //nolint:errorlint // grpc's own
			err = cause
		}
		return nil, nil, fmt.Errorf("sign stream: %w%s", err, ses.ending())
	}
	results = make([]*pluginv1.SignResult, len(items))
	type received struct {
		resp *pluginv1.SignResponse
		err  error
	}
	timer := time.NewTimer(callLimit)
	defer timer.Stop()
	for open := len(items); open > 0; {
		next := make(chan received, 1)
		go func() {
			resp, err := s.stream.Recv()
			next <- received{resp, err}
		}()
		var r received
		select {
		case r = <-next:
		case <-timer.C:
			s.stream = nil
			return results, excess, latef("%d of %d items were not answered within %v", open, len(items), callLimit)
		}
		if r.err != nil {
			s.stream = nil
			return results, excess, fmt.Errorf("sign stream: %w%s", r.err, ses.ending())
		}
		for _, res := range r.resp.GetResults() {
			i, known := at[res.GetSeq()]
			if !known || results[i] != nil {
				excess = append(excess, res.GetSeq())
				continue
			}
			results[i] = res
			open--
		}
	}
	return results, excess, nil
}

// signOne signs one request, which must succeed.
func (ses *session) signOne(ref uint32, c *pluginv1.Content) (*pluginv1.SignResult, error) {
	results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(ref, 0))
	if err != nil {
		return nil, err
	}
	return results[0], signFailure(results[0])
}

func signFailure(r *pluginv1.SignResult) error {
	if f := r.GetFailure(); f != nil {
		return fmt.Errorf("it could not sign: %s", failureText(f))
	}
	return nil
}

func failureText(f *pluginv1.Failure) string {
	return fmt.Sprintf("%s %s %s (%q)", strings.TrimPrefix(f.GetSource().String(), "SOURCE_"), f.GetCode(),
		strings.TrimPrefix(f.GetWireState().String(), "WIRE_STATE_"), f.GetMessage())
}

// signatureText is all that a signer added, in an order of its own, to compare.
func signatureText(r *pluginv1.SignResult) string {
	lines := make([]string, 0, len(r.GetHeaders())+1)
	for _, h := range r.GetHeaders() {
		lines = append(lines, h.GetName()+": "+h.GetValue())
	}
	slices.Sort(lines)
	if f := r.GetFailure(); f != nil {
		lines = append(lines, failureText(f))
	}
	return strings.Join(append(lines, r.GetUri()), "\n")
}
