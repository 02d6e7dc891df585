//go:build unix

package conformance_test

import (
	"context"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const rawCredits = 1000

// rawStream is one Attempt call of the raw plugin: a goroutine per attempt, results sent one by one.
type rawStream struct {
	r       *raw
	s       grpc.BidiStreamingServer[pluginv1.AttemptRequest, pluginv1.AttemptResponse]
	maxBody int
	work    sync.WaitGroup
	workers chan struct{} // nil: as many as there are attempts

	sending sync.Mutex
	mu      sync.Mutex // guards what follows
	cancels map[uint64]context.CancelFunc
}

func (r *raw) Attempt(s grpc.BidiStreamingServer[pluginv1.AttemptRequest, pluginv1.AttemptResponse]) error {
	hello, err := s.Recv()
	if err != nil {
		return err
	}
	welcome := &pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Welcome{Welcome: &pluginv1.Welcome{Credits: rawCredits}}}
	switch {
	case r.is("no-welcome"):
		welcome.Frame = &pluginv1.AttemptResponse_Credit{Credit: &pluginv1.Credit{Add: rawCredits}}
	case r.is("no-credits"):
		welcome.GetWelcome().Credits = 0
	}
	if err := s.Send(welcome); err != nil {
		return err
	}
	a := &rawStream{r: r, s: s, maxBody: int(hello.GetHello().GetMaxResponseBody()), cancels: map[uint64]context.CancelFunc{}}
	if r.is("few-workers") {
		a.workers = make(chan struct{}, 32)
	}
	return a.run()
}

func (a *rawStream) run() error {
	for {
		req, err := a.s.Recv()
		if err != nil {
			a.cancelAll()
			a.work.Wait()
			return nil
		}
		switch f := req.GetFrame().(type) {
		case *pluginv1.AttemptRequest_Batch:
			if err := a.batch(f.Batch); err != nil {
				return err
			}
		case *pluginv1.AttemptRequest_Cancel:
			if err := a.cancel(f.Cancel.GetSeqs()); err != nil {
				return err
			}
		case *pluginv1.AttemptRequest_Drain:
			a.drain(f.Drain.GetGrace().AsDuration())
			return a.s.Send(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Drained{Drained: &pluginv1.Drained{}}})
		default:
			if a.r.is("strict-frames") {
				return status.Error(codes.InvalidArgument, "what is that?")
			}
		}
	}
}

func (a *rawStream) batch(b *pluginv1.AttemptBatch) error {
	var bad, unknown bool
	for _, at := range b.GetAttempts() {
		bad = bad || int(at.GetContent()) >= len(b.GetContents())
		unknown = unknown || a.r.get(at.GetInstanceRef()) == nil
	}
	if bad && a.r.is("content-crash") {
		os.Exit(2)
	}
	if bad {
		return status.Error(codes.InvalidArgument, "no such content")
	}
	for _, at := range b.GetAttempts() {
		if a.r.is("unknown-ref-spoils-batch") && unknown && a.r.get(at.GetInstanceRef()) != nil {
			a.answer(at, failed(pluginv1.Failure_SOURCE_PLUGIN, "protocol", pluginv1.Failure_WIRE_STATE_NOT_SENT))
			continue
		}
		timeout := time.Duration(at.GetTimeoutMs()) * time.Millisecond
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		a.mu.Lock()
		a.cancels[at.GetSeq()] = cancel
		open := len(a.cancels)
		a.mu.Unlock()
		if open > 600 && a.r.is("small-window") {
			return status.Error(codes.ResourceExhausted, "too many")
		}
		a.work.Go(func() {
			defer cancel()
			if a.workers != nil {
				a.workers <- struct{}{}
				defer func() { <-a.workers }()
			}
			a.answer(at, a.r.attempt(ctx, at, b.GetContents()[at.GetContent()], a.maxBody))
		})
	}
	return nil
}

func (a *rawStream) answer(at *pluginv1.Attempt, res *pluginv1.AttemptResult) {
	a.mu.Lock()
	delete(a.cancels, at.GetSeq())
	a.mu.Unlock()
	res.Seq = at.GetSeq()
	results := []*pluginv1.AttemptResult{res}
	a.r.mu.Lock()
	a.r.settled++
	if a.r.settled%100 == 0 && a.r.is("answers-twice") {
		results = append(results, res)
	}
	a.r.mu.Unlock()
	if a.r.is("stdout-noise") {
		_, _ = os.Stdout.WriteString("made an attempt" + strings.Repeat(".", 80) + "\n")
	}
	a.sending.Lock()
	defer a.sending.Unlock()
	_ = a.s.Send(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Results{Results: &pluginv1.AttemptResults{Results: results}}})
}

func (a *rawStream) cancel(seqs []uint64) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, seq := range seqs {
		cancel := a.cancels[seq]
		if cancel == nil && a.r.is("cancel-strict") {
			return status.Error(codes.NotFound, "no such attempt")
		}
		if cancel != nil && !a.r.is("ignores-cancel") {
			cancel()
		}
	}
	return nil
}

func (a *rawStream) cancelAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, cancel := range a.cancels {
		cancel()
	}
}

func (a *rawStream) drain(grace time.Duration) {
	switch {
	case a.r.is("drain-forgets"):
		return
	case a.r.is("drain-waits"):
		a.work.Wait()
		return
	}
	timer := time.AfterFunc(grace, a.cancelAll)
	defer timer.Stop()
	a.work.Wait()
}

func (r *raw) AttemptOne(_ context.Context, req *pluginv1.AttemptOneRequest) (*pluginv1.AttemptOneResponse, error) {
	if r.is("no-attempt-one") {
		return nil, status.Error(codes.Unimplemented, "no")
	}
	at := req.GetAttempt()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(at.GetTimeoutMs())*time.Millisecond)
	defer cancel()
	res := r.attempt(ctx, at, req.GetContent(), int(req.GetMaxResponseBody()))
	res.Seq = at.GetSeq()
	if f := res.GetFailure(); f.GetSource() == pluginv1.Failure_SOURCE_CONFIG {
		f.WireState = pluginv1.Failure_WIRE_STATE_NOT_SENT
	}
	return &pluginv1.AttemptOneResponse{Result: res}, nil
}
