package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// patience is how long a transformation may take for others not to notice.
	patience = 10 * time.Millisecond
	// maxStrain is how many quick ones make up for many that took long.
	maxStrain = 16
	// transformWindow is how many wait without those that come next being left unread.
	transformWindow = 256
	// messageBytes is what results in one message may take before the next begins: 64 of the largest are more than a host reads.
	messageBytes = 1 << 20
	// maxMadeHeaders is what the headers of a result may take here; the host takes less.
	maxMadeHeaders = 64 << 10
	// maxReason is the most of an error or a reason, which scripts choose the size of; the host shows less.
	maxReason = 4 << 10
)

// strain is how much an instance has tried patience of late: what it does runs in its turn while there is any.
type strain struct{ n atomic.Int32 }

func (s *strain) any() bool { return s.n.Load() > 0 }

// note counts a transformation: two more for one that took long, one less for one that did not.
func (s *strain) note(long bool) {
	for {
		n := s.n.Load()
		next := max(0, n-1)
		if long {
			next = min(maxStrain, n+2)
		}
		if n == next || s.n.CompareAndSwap(n, next) {
			return
		}
	}
}

// transforming is one Transform call: a receiver that only hands out, workers, and a sender that sends what is ready. What
// a worker does that takes long has another one take its place, and its instance wait for turns from then on, so that one
// who computes for long holds up nobody else.
type transforming struct {
	s       *server
	ctx     context.Context //nolint:containedctx // the call's
	tasks   chan *transformTask
	done    chan *pluginv1.TransformResult
	running sync.WaitGroup
}

type transformTask struct {
	item     *pluginv1.TransformItem
	event    *Event // nil when there is none
	received time.Time
}

// Transform is the hot path of transformers.
func (s *server) Transform(stream grpc.BidiStreamingServer[pluginv1.TransformRequest, pluginv1.TransformResponse]) error {
	t := &transforming{
		s: s, ctx: stream.Context(), tasks: make(chan *transformTask, transformWindow), done: make(chan *pluginv1.TransformResult, batchMax),
	}
	for range max(2, runtime.GOMAXPROCS(0)) {
		t.running.Go(t.work)
	}
	sent := make(chan error, 1)
	go func() { sent <- t.send(stream) }()
	err := t.receive(stream)
	close(t.tasks)
	t.running.Wait()
	close(t.done)
	return errors.Join(err, <-sent)
}

func (t *transforming) receive(stream grpc.BidiStreamingServer[pluginv1.TransformRequest, pluginv1.TransformResponse]) error {
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		now := time.Now()
		events := make([]*Event, len(req.GetEvents()))
		for i, e := range req.GetEvents() {
			events[i] = eventOf(e)
		}
		tasks := make([]transformTask, len(req.GetItems()))
		for i, item := range req.GetItems() {
			task := &tasks[i]
			task.item, task.received = item, now
			if int(item.GetEvent()) < len(events) {
				task.event = events[item.GetEvent()]
			}
			select {
			case t.tasks <- task:
			case <-t.ctx.Done():
				return context.Cause(t.ctx)
			}
		}
	}
}

func eventOf(e *pluginv1.Event) *Event {
	return &Event{
		MessageID: e.GetMessageId(), ID: e.GetId(), Source: e.GetSource(), Type: e.GetType(), Subject: e.GetSubject(),
		Schema: e.GetDataSchema(), Attributes: e.GetAttributes(), Time: e.GetTime().AsTime(), ContentType: e.GetContentType(), Data: e.GetData(),
	}
}

// work ends with the call, or when another has taken its place.
func (t *transforming) work() {
	for task := range t.tasks {
		inst := t.s.instances.get(task.item.GetInstanceRef())
		if inst != nil && inst.strain.any() {
			t.running.Go(func() { t.inTurn(task, inst) })
			continue
		}
		t.running.Add(1) // for the one who takes its place
		late := time.AfterFunc(patience, func() {
			defer t.running.Done()
			if inst != nil {
				inst.strain.note(true)
			}
			t.work()
		})
		res := t.s.transform(t.ctx, task)
		stays := late.Stop()
		t.done <- res
		if !stays {
			return
		}
		t.running.Done()
	}
}

// inTurn is for instances that have taken long.
func (t *transforming) inTurn(task *transformTask, inst *instance) {
	given := t.ctx
	if ms := task.item.GetTimeoutMs(); ms > 0 {
		var cancel context.CancelFunc
		given, cancel = context.WithDeadline(given, task.received.Add(time.Duration(ms)*time.Millisecond))
		defer cancel()
	}
	leave, entered := t.s.long.Enter(given.Done(), 0, inst.tenant)
	if !entered {
		t.done <- task.failed(failure{source: SourcePlugin, code: CodeTimeout, wire: NotSent,
			message: "the transformation's turn did not come in time: earlier ones of the subscription, or of others, took long"})
		return
	}
	began := time.Now()
	var res *pluginv1.TransformResult
	gate.Modestly(func() { res = t.s.transform(t.ctx, task) })
	leave()
	inst.strain.note(time.Since(began) > patience)
	t.done <- res
}

// send answers with what is ready, as much as a message holds, and never waits for more. It takes what there is also when it
// can send no more.
func (t *transforming) send(stream grpc.BidiStreamingServer[pluginv1.TransformRequest, pluginv1.TransformResponse]) (err error) {
	for res := range t.done {
		out := &pluginv1.TransformResponse{Results: []*pluginv1.TransformResult{res}}
		size := len(res.GetTransformed().GetBody())
		for more := true; more && len(out.Results) < batchMax && size < messageBytes; {
			select {
			case res, more = <-t.done:
				if more {
					out.Results = append(out.Results, res)
					size += len(res.GetTransformed().GetBody())
				}
			default:
				more = false
			}
		}
		if err == nil {
			err = stream.Send(out)
		}
	}
	return err
}

func (task *transformTask) failed(f failure) *pluginv1.TransformResult {
	return &pluginv1.TransformResult{Seq: task.item.GetSeq(), Outcome: &pluginv1.TransformResult_Failure{Failure: f.pb()}}
}

// labelled is a context that bears an instance's labels, too.
type labelled struct {
	context.Context                 //nolint:containedctx // this is one
	labels          context.Context //nolint:containedctx // pprof keeps labels in one
}

func (l labelled) Value(key any) any {
	if v := l.labels.Value(key); v != nil {
		return v
	}
	return l.Context.Value(key)
}

// transform never panics.
func (s *server) transform(ctx context.Context, task *transformTask) (out *pluginv1.TransformResult) {
	inst := s.instances.get(task.item.GetInstanceRef())
	if inst == nil || inst.built.transform == nil || !inst.life.enter() {
		return task.failed(stale(task.item.GetInstanceRef()).failure)
	}
	defer inst.life.leave()
	if task.event == nil {
		return task.failed(failure{source: SourcePlugin, code: CodeProtocol, message: "no such event", wire: NotSent})
	}
	defer func() {
		if p := recover(); p != nil {
			s.log().Error("panic in transformer", "stack", string(debug.Stack()))
			out = task.failed(failure{source: SourcePlugin, code: CodePanic, message: "the transformer panicked", wire: NotSent})
		}
	}()
	if ms := task.item.GetTimeoutMs(); ms > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, task.received.Add(time.Duration(ms)*time.Millisecond))
		defer cancel()
	}
	ctx = withTrace(ctx, task.item.GetTraceparent(), task.item.GetTracestate())
	pprof.SetGoroutineLabels(inst.labels)
	defer pprof.SetGoroutineLabels(context.Background())
	made, err := inst.built.transform(labelled{ctx, inst.labels}, task.event)
	reason, dropped := DropReason(err)
	switch {
	case dropped:
		return &pluginv1.TransformResult{Seq: task.item.GetSeq(), Outcome: &pluginv1.TransformResult_Dropped{
			Dropped: &pluginv1.Dropped{Reason: clipped(redact.Text(reason, inst.secrets))},
		}}
	case err == nil && made == nil:
		err = errors.New("the transformer returned neither a result nor an error")
	case err == nil && len(made.Body) > MaxTransformed:
		err = fmt.Errorf("the body has %d bytes; at most %d can be sent", len(made.Body), MaxTransformed)
	case err == nil:
		size := len(made.ContentType)
		for _, h := range made.Headers {
			size += len(h.Name) + len(h.Value)
		}
		if size > maxMadeHeaders {
			err = fmt.Errorf("content type and headers have %d bytes; headers may have 8 KiB", size)
		}
	}
	if err != nil {
		return task.failed(transformFailure(ctx, err, inst.secrets))
	}
	return &pluginv1.TransformResult{Seq: task.item.GetSeq(), Outcome: &pluginv1.TransformResult_Transformed{
		Transformed: &pluginv1.Transformed{Body: made.Body, ContentType: valid(made.ContentType), Headers: wireHeaders(made.Headers)},
	}}
}

func transformFailure(ctx context.Context, err error, secrets [][]byte) failure {
	f := failure{source: SourcePlugin, code: CodeTransform, message: clipped(redact.Text(err.Error(), secrets)), wire: NotSent}
	var given *Failure
	switch {
	case errors.As(err, &given) && given.Code != "":
		f.code, f.message = given.Code, clipped(redact.Text(given.Message, secrets))
	case errors.Is(context.Cause(ctx), context.DeadlineExceeded):
		f.code = CodeTimeout
	case ctx.Err() != nil:
		f.code = CodeCancelled
	}
	return f
}

// clipped is as much of a text as is sent.
func clipped(s string) string {
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "…"
	}
	return valid(s)
}
