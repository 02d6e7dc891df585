package conformance

import (
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// pump is a client of the attempt stream that batches as the server does: what is there goes, 64 at most.
type pump struct {
	ses    *session
	stream pluginv1.TransportService_AttemptClient
	window int
	body   []byte

	mu    sync.Mutex // guards what follows
	more  sync.Cond
	queue []*pumped
	open  map[uint64]*pumped
	seq   uint64
	ended bool
}

type pumped struct {
	ref      uint32
	signHere []uint32
	done     func(Sample)
	began    time.Time
}

func (ses *session) newPump(window int, body []byte) (*pump, error) {
	if !ses.t.s.can("attempt.stream") {
		return nil, errors.New("it takes attempts one by one: bench measures the attempt stream")
	}
	a, err := ses.dialAttempts()
	if err != nil {
		return nil, err
	}
	p := &pump{ses: ses, stream: a.stream, window: min(window, a.credits), body: body, open: map[uint64]*pumped{}}
	p.more.L = &p.mu
	ses.t.atEnd(p.end)
	go p.send()
	go p.receive()
	return p, nil
}

func (p *pump) attempt(ref uint32, signHere []uint32, done func(Sample)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = append(p.queue, &pumped{ref: ref, signHere: signHere, done: done, began: time.Now()})
	p.more.Signal()
}

func (p *pump) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = true
	p.more.Signal()
}

func (p *pump) send() {
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.ended {
			p.more.Wait()
		}
		if p.ended {
			p.mu.Unlock()
			return
		}
		n := min(batchMax, len(p.queue))
		batch := &pluginv1.AttemptBatch{Contents: make([]*pluginv1.Content, n), Attempts: make([]*pluginv1.Attempt, n)}
		for i, at := range p.queue[:n] {
			p.seq++
			p.open[p.seq] = at
			batch.Contents[i] = newContent("evt_0123456789abcdef", p.body)
			batch.Attempts[i] = newAttempt(at.ref, attemptTimeout)
			batch.Attempts[i].Seq, batch.Attempts[i].Content, batch.Attempts[i].SignHere = p.seq, uint32(i), at.signHere
		}
		p.queue = slices.Delete(p.queue, 0, n)
		p.mu.Unlock()
		if p.stream.Send(&pluginv1.AttemptRequest{Frame: &pluginv1.AttemptRequest_Batch{Batch: batch}}) != nil {
			return // receive says so
		}
	}
}

func (p *pump) receive() {
	for {
		resp, err := p.stream.Recv()
		if err != nil {
			p.end()
			return
		}
		now := time.Now()
		for _, r := range resp.GetResults().GetResults() {
			p.mu.Lock()
			at := p.open[r.GetSeq()]
			delete(p.open, r.GetSeq())
			p.mu.Unlock()
			if at == nil {
				continue
			}
			status := r.GetResponse().GetStatus()
			at.done(Sample{
				Overhead: now.Sub(at.began) - time.Duration(r.GetTotalUs())*time.Microsecond,
				// The bare hop's failure is what it is about.
				Failed: (status < 200 || status > 299) && r.GetFailure().GetSource() != pluginv1.Failure_SOURCE_CONFIG,
			})
		}
	}
}

// delivery configures the work's instances.
func (p *pump) delivery(w Work, s *suite) (*Running, error) {
	byID := map[string]*subject{}
	for _, u := range s.subjects {
		byID[u.kind.GetId()] = u
	}
	u, uri := byID[w.Transport], w.URI
	if plainHTTP(u) && strings.HasPrefix(uri, "http") {
		uri = u.uriOf(nil, uri)
	}
	in := p.ses.instance(u, uri)
	if err := p.ses.take(in); err != nil {
		return nil, err
	}
	var signHere []uint32
	if w.Signer != "" {
		signing := p.ses.instance(byID[w.Signer], w.URI)
		if err := p.ses.take(signing); err != nil {
			return nil, err
		}
		signHere = []uint32{signing.GetRef()}
	}
	return &Running{PID: p.ses.proc.pid(), Attempt: func(done func(Sample)) { p.attempt(in.GetRef(), signHere, done) }}, nil
}
