package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// task is one attempt on its way through a worker.
type task struct {
	attempt
	content  content
	received time.Time
	// maxBody is Hello.max_response_body, or the attempt's own.
	maxBody int
	// ctx is used on the stream only.
	ctx attemptContext
	// overrunOf is set when the attempt is given up: the instance that counts it.
	overrunOf *instance
}

// scratch is what a worker uses again for each attempt.
type scratch struct {
	request Request
	headers []Header
	signed  []Header // by earlier signers
}

// run signs and sends, and never panics. It does not touch t afterwards.
func (s *server) run(ctx context.Context, t *task, sc *scratch) (out result) {
	var r *Request
	var signing time.Duration
	defer func() {
		if p := recover(); p != nil {
			s.log().Error("panic in attempt", "stack", string(debug.Stack()))
			out = result{failure: failure{source: SourcePlugin, code: CodePanic, message: "the plugin panicked", wire: MaybeSent}}
		}
		out.seq = t.seq
		out.total = time.Since(t.received)
		if out.sign = signing; r != nil {
			out.timings = r.Timings
		}
	}()
	if ctx.Err() != nil {
		return result{failure: failure{source: SourcePlugin, code: CodeCancelled, message: "cancelled before it began", wire: NotSent}}
	}
	inst := s.instances.get(t.ref)
	if inst == nil || inst.built.attempt == nil || !inst.life.enter() {
		return stale(t.ref)
	}
	defer inst.life.leave()
	if inst.overruns.Load() >= maxOverruns {
		return result{failure: failure{source: SourcePlugin, code: CodeTimeout, wire: NotSent,
			message: fmt.Sprintf("%d earlier attempts go on although their time is up", maxOverruns)}}
	}
	// What it dials is read by goroutines that outlive the attempt: they bear the label, too.
	pprof.SetGoroutineLabels(inst.labels)
	r = sc.prepare(t, inst)
	var began time.Time
	if len(t.signHere) > 0 {
		began = time.Now()
	}
	for _, ref := range t.signHere {
		signer := s.instances.get(ref)
		if signer == nil || signer.built.sign == nil || !signer.life.enter() {
			return stale(ref)
		}
		if err := sc.sign(ctx, s, signer, r); err != nil {
			return result{failure: signFailure(err, signer.secrets)}
		}
	}
	if !began.IsZero() {
		signing = time.Since(began)
	}
	resp, err := inst.built.attempt(ctx, r)
	sc.headers = r.Headers
	if err == nil && resp == nil {
		err = errors.New("the transport returned neither response nor error")
	}
	if err != nil {
		f, peer := failureOf(ctx, err, inst.secrets)
		return result{failure: f, peer: peer, sent: r.added()}
	}
	out = result{response: resp, peer: resp.Peer, full: t.ownership, batch: r.Batch}
	if len(resp.Body) > t.maxBody {
		resp.Body, resp.Truncated = resp.Body[:t.maxBody], true
	}
	if resp.Status < 200 || resp.Status > 299 {
		out.sent = r.added()
	}
	return out
}

// sign has a signer that was entered sign r, after others.
func (sc *scratch) sign(ctx context.Context, s *server, signer *instance, r *Request) error {
	defer signer.life.leave()
	sc.signed = append(sc.signed[:0], r.Headers[r.base:]...)
	if err := s.turns.sign(ctx, signer, len(r.Body), func() error { return signer.built.sign(r) }); err != nil {
		return err
	}
	return r.clash(r.base, sc.signed, sc.signed)
}

// prepare fills the worker's Request. The header slice is the worker's own; the strings in it are not.
func (sc *scratch) prepare(t *task, inst *instance) *Request {
	r := &sc.request
	*r = Request{
		MessageID: t.content.messageID, EventType: t.content.eventType, Created: time.Unix(0, t.created), Nonce: t.nonce,
		Method: inst.target.Method, URL: inst.target.URL, Body: t.content.body,
		AttemptNumber: int(t.number), Traceparent: t.traceparent, Tracestate: t.tracestate, MaxResponseBody: t.maxBody,
		Headers: append(sc.headers[:0], t.content.headers...), OwnershipCheck: t.ownership,
		Batch: t.maxAnswer > 0,
	}
	if t.uri != "" {
		r.URL = t.uri
	}
	for _, h := range inst.target.Headers {
		r.Set(h.Name, h.Value)
	}
	r.base = len(r.Headers)
	r.Headers = append(r.Headers, t.headers...)
	return r
}

// clash reports that a signer has changed one of the headers that stood at from, or has set one of signed, which
// earlier signers have set, once more.
func (r *Request) clash(from int, stood, signed []Header) error {
	for i, h := range stood {
		if from+i >= len(r.Headers) || r.Headers[from+i] != h {
			return fmt.Errorf("the signer changed the header %s, which was set before it", h.Name)
		}
	}
	if len(signed) == 0 {
		return nil
	}
	for _, h := range r.Headers[from+len(stood):] {
		if slices.ContainsFunc(signed, func(s Header) bool { return equalFold(s.Name, h.Name) }) {
			return fmt.Errorf("the signer set the header %s, which a signer before it has set", h.Name)
		}
	}
	return nil
}

// added are the headers that signers and transport put on top, without credentials. The copy is the
// result's: the worker goes on with its own slice.
func (r *Request) added() []Header {
	var out []Header
	for _, h := range r.Headers[min(r.base, len(r.Headers)):] {
		if !credential(h.Name) {
			out = append(out, h)
		}
	}
	return out
}

func credential(name string) bool {
	switch name {
	case "authorization", "proxy-authorization", "cookie", "set-cookie":
		return true
	}
	return slices.ContainsFunc([]string{"api-key", "apikey", "token", "secret", "password"}, func(part string) bool {
		return strings.Contains(name, part)
	})
}

func stale(ref uint32) result {
	return result{failure: failure{
		source: SourceConfig, code: CodeConfig, message: fmt.Sprintf("no instance with ref %d", ref), wire: NotSent,
	}}
}

func signFailure(err error, secrets [][]byte) failure {
	if errors.Is(err, errTurn) {
		return failure{source: SourcePlugin, code: CodeTimeout, message: err.Error(), wire: NotSent}
	}
	return failure{source: SourcePlugin, code: CodeSign, message: valid(redact.Text(err.Error(), secrets)), wire: NotSent}
}

// failureOf reads an AttemptFunc's error.
func failureOf(ctx context.Context, err error, secrets [][]byte) (failure, string) {
	var f *Failure
	if errors.As(err, &f) {
		out := failure{source: f.Source, code: f.Code, message: valid(redact.Text(f.Message, secrets)), wire: f.WireState}
		if out.source == 0 {
			out.source = SourcePlugin
		}
		return out, f.Peer
	}
	out := failure{source: SourcePlugin, message: valid(redact.Text(err.Error(), secrets)), wire: MaybeSent}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, context.DeadlineExceeded):
		out.source, out.code = SourceEndpoint, CodeTimeout
	case cause != nil:
		out.code = CodeCancelled
	}
	return out, ""
}

func valid(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// AttemptOne is one attempt by itself.
func (s *server) AttemptOne(ctx context.Context, req *pluginv1.AttemptOneRequest) (*pluginv1.AttemptOneResponse, error) {
	a, c := req.GetAttempt(), req.GetContent()
	t := &task{
		attempt: attempt{
			seq: a.GetSeq(), ref: a.GetInstanceRef(), number: a.GetAttemptNumber(),
			timeout: time.Duration(a.GetTimeoutMs()) * time.Millisecond, created: a.GetCreatedUnixNano(),
			traceparent: a.GetTraceparent(), signHere: a.GetSignHere(), headers: headersOf(a.GetHeaders()),
			uri: a.GetUri(), nonce: a.GetNonce(), ownership: a.GetOwnershipCheck(),
			maxAnswer: a.GetMaxResponseBody(), tracestate: a.GetTracestate(),
		},
		content: content{
			messageID: c.GetMessageId(), body: c.GetBody(), headers: headersOf(c.GetHeaders()), eventType: c.GetEventType(),
		},
		received: time.Now(), maxBody: int(cmp.Or(a.GetMaxResponseBody(), req.GetMaxResponseBody())),
	}
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	ctx = withTrace(ctx, t.traceparent, t.tracestate)
	return &pluginv1.AttemptOneResponse{Result: s.runOne(ctx, t).pb()}, nil
}

// runOne gives an attempt up when it goes on long after its time.
func (s *server) runOne(ctx context.Context, t *task) *result {
	var overdue <-chan time.Time
	if t.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, t.received.Add(t.timeout))
		defer cancel()
		timer := time.NewTimer(t.timeout + overrunGrace)
		defer timer.Stop()
		overdue = timer.C
	}
	done := make(chan result, 1)
	go func() { done <- s.run(ctx, t, &scratch{}) }()
	var res result
	select {
	case res = <-done:
	case <-overdue:
		res = overrun(t)
		if t.overrunOf = s.instances.get(t.ref); t.overrunOf != nil {
			t.overrunOf.overruns.Add(1)
		}
		s.log().Error("attempt ignores its context", "overruns", s.overruns.Add(1))
		go func() {
			<-done
			t.returned(s)
		}()
	}
	return &res
}

func headersOf(in []*pluginv1.Header) []Header {
	out := make([]Header, len(in))
	for i, h := range in {
		out[i] = Header{Name: lower(h.GetName()), Value: h.GetValue()}
	}
	return out
}

func wireHeaders(in []Header) []*pluginv1.Header {
	out := make([]*pluginv1.Header, len(in))
	for i, h := range in {
		out[i] = &pluginv1.Header{Name: valid(lower(h.Name)), Value: valid(h.Value)}
	}
	return out
}

// wire is the result as a message, off the hot path.
func (r *result) pb() *pluginv1.AttemptResult {
	out := &pluginv1.AttemptResult{
		Seq: r.seq, TotalUs: r.total.Microseconds(), Peer: valid(r.peer), SentHeaders: wireHeaders(r.sent),
	}
	if t := &r.timings; r.sign != 0 || *t != (Timings{}) {
		out.Timings = &pluginv1.Timings{
			SignUs: micros(r.sign), DnsUs: micros(t.DNS), ConnectUs: micros(t.Connect), TlsUs: micros(t.TLS),
			FirstByteUs: micros(t.FirstByte), BodyUs: micros(t.Body),
		}
	}
	if r.response == nil {
		out.Outcome = &pluginv1.AttemptResult_Failure{Failure: r.failure.pb()}
		return out
	}
	resp := &pluginv1.Response{
		Status: uint32(r.response.Status), Body: r.response.Body, BodyTruncated: r.response.Truncated,
		Headers: wireHeaders(r.response.Headers), Note: valid(r.response.Note),
	}
	out.Outcome = &pluginv1.AttemptResult_Response{Response: resp}
	return out
}

func (f *failure) pb() *pluginv1.Failure {
	return &pluginv1.Failure{
		Source: pluginv1.Failure_Source(f.source), Code: f.code, Message: f.message,
		WireState: pluginv1.Failure_WireState(f.wire),
	}
}

// results collects what workers have finished until the sender takes it.
type results struct {
	mu    sync.Mutex
	ready []result
	wake  chan struct{} // capacity 1: one signal stands for all that is ready
}

func newResults() *results { return &results{wake: make(chan struct{}, 1)} }

func (q *results) put(r result) {
	q.mu.Lock()
	q.ready = append(q.ready, r)
	first := len(q.ready) == 1
	q.mu.Unlock()
	if first {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
}

// take swaps what is ready for an empty slice to be filled.
func (q *results) take(empty []result) []result {
	q.mu.Lock()
	defer q.mu.Unlock()
	ready := q.ready
	q.ready = empty[:0]
	return ready
}
