package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// maxResponse is what the suite says it keeps of a response's body.
	maxResponse = 4096
	// attemptTimeout is long enough for what should succeed.
	attemptTimeout = 10 * time.Second
	// answerGrace is how much later than its timeout an attempt may be answered before the suite gives up on
	// it; the server gives up then too.
	answerGrace = 5 * time.Second
	// batchMax is the most attempts in one batch.
	batchMax = 64
)

// attempts is the suite's end of an Attempt stream, or of AttemptOne for plugins without one. It keeps to
// the credits, and notes what breaks the protocol instead of failing on it: that is for the case to judge.
type attempts struct {
	ses    *session
	ctx    context.Context //nolint:containedctx // the life of the stream
	cancel context.CancelFunc
	stream pluginv1.TransportService_AttemptClient // nil for AttemptOne
	client pluginv1.TransportServiceClient
	// credits granted with the welcome.
	credits int
	// grace stands in for answerGrace where that is longer.
	grace time.Duration

	sending sync.Mutex // serialises sends

	mu      sync.Mutex // guards what follows
	free    int
	changed chan struct{} // closed and replaced when free grows or the stream ends
	waiting map[uint64]*pending
	done    map[uint64]bool
	faults  []string
	drained *pluginv1.Drained
	ended   bool
	err     error // io.EOF for a clean end
}

// pending is an attempt that was sent.
type pending struct {
	seq    uint64
	sent   time.Time
	limit  time.Duration
	answer chan struct{} // closed with result and at set, or with err
	result *pluginv1.AttemptResult
	at     time.Time
	err    error
}

// openAttempts opens the stream, reads the welcome and goes on reading.
func (ses *session) openAttempts() (*attempts, error) {
	a, err := ses.dialAttempts()
	if err == nil && a.stream != nil {
		go a.receive()
	}
	return a, err
}

// dialAttempts opens the stream and reads the welcome.
func (ses *session) dialAttempts() (*attempts, error) {
	ctx, cancel := context.WithCancel(ses.t.ctx)
	ses.t.atEnd(cancel)
	a := &attempts{
		ses: ses, ctx: ctx, cancel: cancel, client: pluginv1.NewTransportServiceClient(ses.conn),
		changed: make(chan struct{}), waiting: map[uint64]*pending{}, done: map[uint64]bool{},
	}
	if !ses.t.s.can("attempt.stream") {
		a.credits, a.free = 256, 256
		return a, nil
	}
	var err error
	if a.stream, err = a.client.Attempt(ctx); err != nil {
		return nil, fmt.Errorf("open attempt stream: %w", err)
	}
	if err := a.send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Hello{
		Hello: &pluginv1.Hello{MaxResponseBody: maxResponse},
	}}); err != nil {
		return nil, err
	}
	timer := time.AfterFunc(startLimit, cancel)
	first, err := a.stream.Recv()
	if !timer.Stop() || err != nil {
		return nil, fmt.Errorf("receive welcome: %w%s", err, ses.ending())
	}
	if first.GetWelcome() == nil {
		return nil, fmt.Errorf("the first frame of the attempt stream is %T, want welcome", first.GetFrame())
	}
	a.credits = int(min(first.GetWelcome().GetCredits(), 1<<16))
	if a.credits == 0 {
		return nil, errors.New("the welcome grants no credits, so that no attempt can ever be sent")
	}
	a.free = a.credits
	return a, nil
}

func (a *attempts) send(req *pluginv1.AttemptRequest) error {
	a.sending.Lock()
	defer a.sending.Unlock()
	if err := a.stream.Send(req); err != nil {
		return fmt.Errorf("attempt stream: %w", a.cause(err))
	}
	return nil
}

// cause is the status behind the io.EOF that sending on a broken stream gives.
func (a *attempts) cause(err error) error {
	if !errors.Is(err, io.EOF) {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return a.err
	}
	return err
}

func (a *attempts) receive() {
	for {
		resp, err := a.stream.Recv()
		a.mu.Lock()
		if err != nil {
			a.end(err)
			a.mu.Unlock()
			return
		}
		if a.drained != nil {
			a.faults = append(a.faults, "a frame came after drained")
		}
		switch f := resp.GetFrame().(type) {
		case *pluginv1.AttemptResponse_Results:
			for _, r := range f.Results.GetResults() {
				a.settle(r)
			}
		case *pluginv1.AttemptResponse_Credit:
			a.free += int(f.Credit.GetAdd())
			a.wake()
		case *pluginv1.AttemptResponse_Drained:
			a.drained = f.Drained
		}
		a.mu.Unlock()
	}
}

// settle and what follows are called with mu held.
func (a *attempts) settle(r *pluginv1.AttemptResult) {
	p := a.waiting[r.GetSeq()]
	switch {
	case p == nil && a.done[r.GetSeq()]:
		a.faults = append(a.faults, fmt.Sprintf("seq %d was answered twice", r.GetSeq()))
		return
	case p == nil:
		a.faults = append(a.faults, fmt.Sprintf("seq %d was answered and never sent", r.GetSeq()))
		return
	case r.GetOutcome() == nil:
		a.faults = append(a.faults, fmt.Sprintf("the answer to seq %d has neither response nor failure", r.GetSeq()))
	}
	p.result, p.at = r, time.Now()
	close(p.answer)
	delete(a.waiting, r.GetSeq())
	a.done[r.GetSeq()] = true
	a.free++
	a.wake()
}

func (a *attempts) end(err error) {
	a.ended, a.err = true, err
	for _, p := range a.waiting {
		p.err = fmt.Errorf("the attempt stream ended without an answer to seq %d: %w", p.seq, err)
		close(p.answer)
	}
	clear(a.waiting)
	a.wake()
}

func (a *attempts) wake() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// broken lists what broke the protocol so far.
func (a *attempts) broken() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.faults)
}

// reserve waits until n attempts more may be unanswered.
func (a *attempts) reserve(n int) error {
	for {
		a.mu.Lock()
		if a.ended {
			defer a.mu.Unlock()
			return fmt.Errorf("the attempt stream has ended: %w", a.err)
		}
		if a.free >= n {
			a.free -= n
			a.mu.Unlock()
			return nil
		}
		changed := a.changed
		a.mu.Unlock()
		select {
		case <-changed:
		case <-a.ctx.Done():
			return fmt.Errorf("waiting for credits: %w", context.Cause(a.ctx))
		}
	}
}

// submit sends attempts as one batch, as many as credits allow at a time, and gives each its seq.
func (a *attempts) submit(contents []*pluginv1.Content, list ...*pluginv1.Attempt) ([]*pending, error) {
	var all []*pending
	for part := range slices.Chunk(list, min(batchMax, a.credits)) {
		if err := a.reserve(len(part)); err != nil {
			return all, err
		}
		batch := &pluginv1.AttemptBatch{Contents: contents, Attempts: part}
		sent := make([]*pending, len(part))
		a.mu.Lock()
		for i, at := range part {
			at.Seq = a.ses.nextSeq()
			sent[i] = &pending{
				seq: at.GetSeq(), sent: time.Now(), answer: make(chan struct{}),
				limit: time.Duration(at.GetTimeoutMs())*time.Millisecond + max(a.grace, answerGrace),
			}
			a.waiting[at.GetSeq()] = sent[i]
		}
		a.mu.Unlock()
		all = append(all, sent...)
		if a.stream == nil {
			for i, at := range part {
				go a.callOne(sent[i], at, contents[at.GetContent()])
			}
			continue
		}
		if err := a.send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Batch{Batch: batch}}); err != nil {
			return all, err
		}
	}
	return all, nil
}

// callOne is submit for AttemptOne.
func (a *attempts) callOne(p *pending, at *pluginv1.Attempt, c *pluginv1.Content) {
	single := &pluginv1.Attempt{
		Seq: at.GetSeq(), InstanceRef: at.GetInstanceRef(), AttemptNumber: at.GetAttemptNumber(), TimeoutMs: at.GetTimeoutMs(),
		CreatedUnixNano: at.GetCreatedUnixNano(), Traceparent: at.GetTraceparent(), SignHere: at.GetSignHere(),
		Headers: at.GetHeaders(), Uri: at.GetUri(), Nonce: at.GetNonce(), MaxResponseBody: at.GetMaxResponseBody(),
	}
	ctx, cancel := context.WithTimeout(a.ctx, p.limit)
	defer cancel()
	resp, err := a.client.AttemptOne(ctx, &pluginv1.AttemptOneRequest{Attempt: single, Content: c, MaxResponseBody: cmp.Or(at.GetMaxResponseBody(), maxResponse)})
	a.mu.Lock()
	defer a.mu.Unlock()
	if err != nil {
		p.err = fmt.Errorf("attempt: %w", err)
		close(p.answer)
		delete(a.waiting, p.seq)
		a.free++
		a.wake()
		return
	}
	a.settle(resp.GetResult())
}

// wait returns the answer to an attempt, or an error when none comes in time.
func (a *attempts) wait(p *pending) (*pluginv1.AttemptResult, error) { return a.waitFor(p, p.limit) }

// waitFor is wait with another limit, from the sending on.
func (a *attempts) waitFor(p *pending, limit time.Duration) (*pluginv1.AttemptResult, error) {
	timer := time.NewTimer(time.Until(p.sent.Add(limit)))
	defer timer.Stop()
	select {
	case <-p.answer:
		return p.result, p.err
	case <-timer.C:
		return nil, latef("an attempt was not answered within %v", limit.Round(time.Millisecond))
	case <-a.ctx.Done():
		return nil, context.Cause(a.ctx)
	}
}

// waitForAll waits until all have been answered, as long as an answer comes every so often.
func (a *attempts) waitForAll(all []*pending, silence time.Duration) error {
	timer := time.NewTimer(silence)
	defer timer.Stop()
	for i := 0; i < len(all); {
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		select {
		case <-all[i].answer:
			if all[i].err != nil {
				return all[i].err
			}
			i++
		case <-changed:
			timer.Reset(silence)
		case <-timer.C:
			return fmt.Errorf("%d of %d attempts were not answered, and none for %v", len(all)-i, len(all), silence)
		case <-a.ctx.Done():
			return fmt.Errorf("%d of %d attempts were not answered: %w", len(all)-i, len(all), context.Cause(a.ctx))
		}
	}
	return nil
}

// cancelSeqs sends a Cancel.
func (a *attempts) cancelSeqs(seqs ...uint64) error {
	return a.send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Cancel{Cancel: &pluginv1.Cancel{Seqs: seqs}}})
}

// drain asks the plugin to finish, half-closes as the server does, and waits for the end of the stream.
func (a *attempts) drain(grace, limit time.Duration) error {
	err := a.send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Drain{Drain: &pluginv1.Drain{Grace: durationpb.New(grace)}}})
	if err != nil {
		return err
	}
	if err := a.stream.CloseSend(); err != nil {
		return err
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		a.mu.Lock()
		ended, changed := a.ended, a.changed
		a.mu.Unlock()
		if ended {
			return nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return latef("the stream did not end within %v of a drain with a grace of %v", limit, grace)
		case <-a.ctx.Done():
			return context.Cause(a.ctx)
		}
	}
}

// one sends an attempt by itself and waits for the answer.
func (a *attempts) one(c *pluginv1.Content, at *pluginv1.Attempt) (*pluginv1.AttemptResult, error) {
	sent, err := a.submit([]*pluginv1.Content{c}, at)
	if err != nil {
		return nil, err
	}
	return a.wait(sent[0])
}

// newAttempt is an attempt of now at the instance.
func newAttempt(ref uint32, timeout time.Duration) *pluginv1.Attempt {
	return &pluginv1.Attempt{
		InstanceRef: ref, AttemptNumber: 1, TimeoutMs: uint32(timeout.Milliseconds()), CreatedUnixNano: time.Now().UnixNano(),
		Nonce: []byte("conformance-0123"), Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
	}
}

// newContent is an event with a body.
func newContent(id string, body []byte) *pluginv1.Content {
	return &pluginv1.Content{MessageId: id, Body: body, EventType: "conformance.case", Headers: []*pluginv1.Header{
		{Name: "content-type", Value: "application/json"}, {Name: "webhook-id", Value: id},
		{Name: "ce-id", Value: id}, {Name: "ce-source", Value: "/conformance"}, {Name: "ce-type", Value: "conformance.case"},
		{Name: "ce-specversion", Value: "1.0"},
	}}
}

func (s *suite) can(capability string) bool {
	return slices.Contains(s.described.GetCapabilities(), capability)
}

// sharedAttempts is one stream for all of a case's uses of it.
func (ses *session) sharedAttempts() (*attempts, error) {
	ses.mu.Lock()
	shared := ses.attempts
	ses.mu.Unlock()
	if shared != nil {
		return shared, nil
	}
	if ses.t.s.noWelcome {
		return nil, skipf("the attempt stream does not open (see FL-01)")
	}
	a, err := ses.openAttempts()
	if err == nil {
		ses.mu.Lock()
		ses.attempts = a
		ses.mu.Unlock()
	}
	return a, err
}
