package plugin

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// attemptStream is one Attempt call: a receiver that only hands out, workers that keep their stacks, and
// one sender that sends what is ready.
type attemptStream struct {
	s       *server
	stream  grpc.ServerStream
	tasks   chan *task // capacity window: handing out never blocks while the host keeps to its credits
	done    *results
	maxBody int

	// open is how many attempts are accepted and not yet answered.
	open     atomic.Int64
	draining bool     // the receiver's own
	returned []uint64 // the receiver's own: not started because of a drain

	// abandoned keeps workers from starting what they still find.
	abandoned atomic.Bool

	watched    atomic.Bool // watchTimer is set, or watch is at work
	watchTimer *time.Timer

	mu      sync.Mutex // guards workers
	workers []*worker  // replaced, not changed, when one leaves
	// cancelled are seqs that were cancelled before a worker had taken them; nearly always empty.
	cancelled   sync.Map
	cancelledN  atomic.Int64
	workersDone sync.WaitGroup
}

// worker runs attempts one after the other.
type worker struct {
	// task is nil while it is idle. Whoever takes a task out of here answers it: the worker, or watch.
	task atomic.Pointer[task]
	scratch
}

// Attempt is the hot path.
func (s *server) Attempt(stream grpc.BidiStreamingServer[pluginv1.AttemptRequest, pluginv1.AttemptResponse]) error {
	hello, err := stream.Recv()
	if err != nil {
		return err
	}
	if hello.GetHello() == nil {
		return status.Error(codes.InvalidArgument, "the first frame is hello")
	}
	err = stream.Send(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Welcome{
		Welcome: &pluginv1.Welcome{Credits: window},
	}})
	if err != nil {
		return err
	}
	a := &attemptStream{
		s: s, stream: stream, tasks: make(chan *task, window), done: newResults(),
		maxBody: int(hello.GetHello().GetMaxResponseBody()),
	}
	a.watchTimer = time.AfterFunc(time.Hour, a.watch)
	defer a.watchTimer.Stop()
	return a.run(stream.Context())
}

// run ends when the host half-closes or drains and all is answered, or when the stream breaks.
func (a *attemptStream) run(ctx context.Context) error {
	stopSending := make(chan struct{})
	sent := make(chan error, 1)
	go func() { sent <- a.send(stopSending) }()
	unwatch := context.AfterFunc(ctx, a.abandon)
	defer unwatch()
	err := a.receive()
	if err != nil {
		a.abandon()
	}
	close(a.tasks)
	a.workersDone.Wait()
	close(stopSending)
	sendErr := <-sent
	if err == nil {
		err = sendErr
	}
	if err == nil && a.draining {
		err = a.stream.SendMsg(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Drained{
			Drained: &pluginv1.Drained{Returned: a.returned},
		}})
	}
	return err
}

// receive takes frames until the host has no more; nil means that all accepted work is to be finished.
func (a *attemptStream) receive() error {
	var frame requestFrame
	for {
		err := a.stream.RecvMsg(&frame)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if frame.other == nil {
			if err := a.accept(&frame); err != nil {
				return err
			}
			continue
		}
		switch f := frame.other.GetFrame().(type) {
		case *pluginv1.AttemptRequest_Cancel:
			for _, seq := range f.Cancel.GetSeqs() {
				a.cancel(seq)
			}
		case *pluginv1.AttemptRequest_Drain:
			a.drain(f.Drain.GetGrace().AsDuration())
			return nil
		default: // a frame of a later minor
		}
	}
}

func (a *attemptStream) accept(f *requestFrame) error {
	if a.s.isDraining() {
		for i := range f.attempts {
			a.giveBack(f.attempts[i].seq)
		}
		return nil
	}
	now := time.Now()
	tasks := make([]task, len(f.attempts))
	for i := range f.attempts {
		if f.attempts[i].content >= uint32(len(f.contents)) {
			return status.Errorf(codes.InvalidArgument, "attempt %d names content %d of %d", f.attempts[i].seq, f.attempts[i].content, len(f.contents))
		}
		t := &tasks[i]
		t.attempt, t.received, t.maxBody = f.attempts[i], now, a.maxBody
		t.content = f.contents[t.attempt.content]
		t.ctx.of = &t.attempt
		if t.maxAnswer > 0 {
			t.maxBody = int(t.maxAnswer)
		}
		if t.timeout > 0 {
			t.ctx.deadline = now.Add(t.timeout)
		}
		n := a.open.Add(1)
		if n > window {
			return status.Errorf(codes.ResourceExhausted, "more than %d attempts are open", window)
		}
		a.s.inFlight.Add(1)
		// Every open attempt has a worker, so that none waits behind a slow one.
		a.growTo(int(n))
		a.tasks <- t
	}
	a.watching()
	return nil
}

// growTo starts a worker when there are fewer than n. It is called by the receiver only.
func (a *attemptStream) growTo(n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n <= len(a.workers) {
		return
	}
	w := &worker{}
	a.workers = append(a.workers, w)
	a.workersDone.Add(1)
	go a.work(w)
}

// work ends with the stream, or once its attempt has been given up, when another has taken its place.
func (a *attemptStream) work(w *worker) {
	for t := range a.tasks {
		w.task.Store(t)
		if a.abandoned.Load() {
			t.ctx.end(context.Canceled)
		}
		if a.cancelledN.Load() != 0 {
			if _, found := a.cancelled.LoadAndDelete(t.seq); found {
				a.cancelledN.Add(-1)
				t.ctx.end(context.Canceled)
			}
		}
		res := a.s.run(&t.ctx, t, &w.scratch)
		t.ctx.end(context.Canceled)
		if !w.task.CompareAndSwap(t, nil) {
			t.returned(a.s)
			return
		}
		a.answer(res)
	}
	a.workersDone.Done()
}

func (a *attemptStream) answer(r result) {
	a.s.inFlight.Add(-1)
	a.open.Add(-1)
	a.done.put(r)
}

// cancel finds the attempt at its worker, or leaves word for the worker that will take it. The word is
// left first: a worker that takes the attempt meanwhile then sees one or the other.
func (a *attemptStream) cancel(seq uint64) {
	if a.cancelledN.Load() > window { // unknown seqs pile up
		a.cancelled.Clear()
		a.cancelledN.Store(0)
	}
	a.cancelled.Store(seq, nil)
	a.cancelledN.Add(1)
	for _, w := range a.snapshot() {
		if t := w.task.Load(); t != nil && t.seq == seq {
			t.ctx.end(context.Canceled)
		}
	}
}

func (a *attemptStream) cancelAll() {
	for _, w := range a.snapshot() {
		if t := w.task.Load(); t != nil {
			t.ctx.end(context.Canceled)
		}
	}
}

// drain lets open attempts end within grace, then cancels them; the workers answer each. What no worker
// has taken yet is given back.
func (a *attemptStream) drain(grace time.Duration) {
	a.draining = true
	time.AfterFunc(grace, a.abandon)
	for {
		select {
		case t := <-a.tasks:
			a.giveBack(t.seq)
			a.open.Add(-1)
			a.s.inFlight.Add(-1)
		default:
			return
		}
	}
}

func (a *attemptStream) giveBack(seq uint64) {
	a.draining = true
	a.returned = append(a.returned, seq)
}

// abandon cancels what is open and lets nothing more start.
func (a *attemptStream) abandon() {
	a.abandoned.Store(true)
	a.cancelAll()
}

// send answers with what is ready, up to batchMax at a time, and never waits for more.
func (a *attemptStream) send(stop <-chan struct{}) error {
	var spare []result
	var frame resultsFrame
	for {
		select {
		case <-a.done.wake:
		case <-stop:
			return a.flush(&frame, a.done.take(nil))
		}
		ready := a.done.take(spare)
		if err := a.flush(&frame, ready); err != nil {
			return err
		}
		clear(ready)
		spare = ready
	}
}

func (a *attemptStream) flush(frame *resultsFrame, ready []result) error {
	for len(ready) > 0 {
		n := min(batchMax, len(ready))
		frame.results = ready[:n]
		if err := a.stream.SendMsg(frame); err != nil {
			return err
		}
		ready = ready[n:]
	}
	return nil
}
