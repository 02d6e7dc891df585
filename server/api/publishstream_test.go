package api_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// publisher is the caller's side of a publish stream.
type publisher struct {
	t      *testing.T
	stream grpc.BidiStreamingClient[grapnelv1.PublishStreamRequest, grapnelv1.PublishStreamResponse]
	// acks by sequence.
	acks     map[uint64]*grapnelv1.PublishResult
	draining bool
}

func (st *station) open(t *testing.T, ns string) *publisher {
	t.Helper()
	stream, err := st.publish.PublishStream(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := &publisher{t: t, stream: stream, acks: map[uint64]*grapnelv1.PublishResult{}}
	p.send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{
		Open: &grapnelv1.PublishStreamRequest_Open{Parent: "namespaces/" + ns, ClientId: "test"},
	}})
	return p
}

// window reads the first frame.
func (p *publisher) window() {
	p.t.Helper()
	first, err := p.stream.Recv()
	if err != nil {
		p.t.Fatal(err)
	}
	if w := first.GetWindow(); w.GetMaxOutstandingEvents() != 1000 || w.GetMaxOutstandingBytes() != 8<<20 || len(first.GetAcks()) > 0 {
		p.t.Fatalf("first frame = %v", first)
	}
}

func (p *publisher) send(r *grapnelv1.PublishStreamRequest) {
	p.t.Helper()
	if err := p.stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		p.t.Error(err)
	}
}

func (p *publisher) item(sequence uint64, id, text string) {
	p.t.Helper()
	p.send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{
		Item: &grapnelv1.PublishStreamRequest_Item{Sequence: sequence, Event: publishText("acme", id, text).Event},
	}})
}

// read takes frames until there are n acks, or the stream ends, whose error it returns.
func (p *publisher) read(n int) error {
	p.t.Helper()
	for len(p.acks) < n {
		frame, err := p.stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(frame.GetAcks()) > 256 {
			p.t.Errorf("a frame has %d acks", len(frame.GetAcks()))
		}
		for _, a := range frame.GetAcks() {
			if p.acks[a.GetSequence()] != nil {
				p.t.Errorf("%d is answered twice", a.GetSequence())
			}
			p.acks[a.GetSequence()] = a.GetResult()
		}
		if frame.GetDraining() {
			if p.draining {
				p.t.Error("draining is said twice")
			}
			p.draining = true
		}
	}
	return nil
}

// end reads to the end of the stream.
func (p *publisher) end() error {
	p.t.Helper()
	return p.read(1 << 30)
}

func (p *publisher) close() {
	p.t.Helper()
	if err := p.stream.CloseSend(); err != nil {
		p.t.Error(err)
	}
}

func TestPublishStream(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	p := st.open(t, "acme")
	p.window()
	p.item(1, "e1", "one")
	if err := p.read(1); err != nil { // one event alone is answered at once
		t.Fatal(err)
	}
	p.item(5, "e2", "two")
	p.item(6, "e1", "one")
	p.item(7, "e1", "other")
	p.item(8, "", "no id")
	p.send(&grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{Item: &grapnelv1.PublishStreamRequest_Item{Sequence: 9}}})
	p.item(10, "e3", strings.Repeat("x", 262145))
	p.close()
	if err := p.end(); err != nil {
		t.Fatal(err)
	}
	for sequence, want := range map[uint64]string{
		1:  "namespaces/acme/events/e1 false   ",
		5:  "namespaces/acme/events/e2 false   ",
		6:  "namespaces/acme/events/e1 true   ",
		7:  " false ALREADY_EXISTS EVENT_ID_CONFLICT event.id",
		8:  " false INVALID_ARGUMENT INVALID_FIELD event.id",
		9:  " false INVALID_ARGUMENT INVALID_FIELD event",
		10: " false INVALID_ARGUMENT INVALID_FIELD event.payload",
	} {
		r := p.acks[sequence]
		if got := fmt.Sprintf("%s %v %s %s %s", r.GetName(), r.GetDuplicate(), r.GetError().GetCode(), r.GetError().GetReason(), r.GetError().GetField()); got != want {
			t.Errorf("%d: got %q, want %q", sequence, got, want)
		}
	}
	if len(p.acks) != 7 {
		t.Errorf("%d acks", len(p.acks))
	}
	if jobs := st.takeJobs(t, 2); len(jobs) != 2 {
		t.Errorf("%d deliveries queued", len(jobs))
	}
}

// TestPublishStreamMisuse: what breaks the rules ends the stream, and what was read before is answered.
func TestPublishStreamMisuse(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	item := func(sequence uint64) *grapnelv1.PublishStreamRequest {
		return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Item_{
			Item: &grapnelv1.PublishStreamRequest_Item{Sequence: sequence, Event: publishText("acme", "x", "").Event},
		}}
	}
	for _, c := range []struct {
		name  string
		wrong *grapnelv1.PublishStreamRequest
		field string
	}{
		{"sequence repeated", item(7), "item.sequence"},
		{"sequence falls", item(6), "item.sequence"},
		{"opened again", &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{Open: &grapnelv1.PublishStreamRequest_Open{Parent: "namespaces/acme"}}}, "open"},
		{"empty frame", &grapnelv1.PublishStreamRequest{}, "item"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := st.open(t, "acme")
			p.window()
			p.item(7, "before", "x")
			p.send(c.wrong)
			refused(t, p.end(), codes.InvalidArgument, "INVALID_FIELD").names(t, c.field)
			if p.acks[7].GetName() == "" || len(p.acks) != 1 {
				t.Errorf("what came before is not answered: %v", p.acks)
			}
		})
	}
	first := func(t *testing.T, r *grapnelv1.PublishStreamRequest) error {
		stream, err := st.publish.PublishStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if r != nil {
			if err := stream.Send(r); err != nil {
				t.Fatal(err)
			}
		} else if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		return err
	}
	opening := func(parent, client string) *grapnelv1.PublishStreamRequest {
		return &grapnelv1.PublishStreamRequest{Frame: &grapnelv1.PublishStreamRequest_Open_{Open: &grapnelv1.PublishStreamRequest_Open{Parent: parent, ClientId: client}}}
	}
	refused(t, first(t, item(1)), codes.InvalidArgument, "INVALID_FIELD").names(t, "open")
	refused(t, first(t, nil), codes.InvalidArgument, "INVALID_FIELD").names(t, "open")
	refused(t, first(t, opening("acme", "")), codes.InvalidArgument, "INVALID_FIELD").names(t, "open.parent")
	refused(t, first(t, opening("namespaces/acme", "a\nb")), codes.InvalidArgument, "INVALID_FIELD").names(t, "open.client_id")
	refused(t, first(t, opening("namespaces/none", "")), codes.NotFound, "RESOURCE_NOT_FOUND")

	p := st.open(t, "acme")
	p.window()
	p.item(1, "large", strings.Repeat("x", 5<<20))
	p.item(2, "small", "x")
	if err := p.read(2); err != nil || p.acks[1].GetError().GetReason() != "MESSAGE_TOO_LARGE" || p.acks[2].GetName() == "" {
		t.Errorf("acks %v, %v", p.acks, err)
	}
	p.item(3, "larger", strings.Repeat("x", 9<<20))
	if err := p.end(); status.Code(err) != codes.ResourceExhausted { // by grpc, before we see it
		t.Errorf("got %v", err)
	}

	st.ingest.Drain()
	refused(t, first(t, opening("namespaces/acme", "")), codes.Unavailable, "DRAINING")
}

func TestPublishStreamDrains(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	p := st.open(t, "acme")
	p.window()
	p.item(1, "e1", "x")
	if err := p.read(1); err != nil {
		t.Fatal(err)
	}
	st.server.Drain()
	for !p.draining {
		frame, err := p.stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		p.draining = frame.GetDraining()
	}
	st.ingest.Drain()
	p.item(2, "e2", "x") // was on its way
	p.close()
	if err := p.end(); err != nil {
		t.Fatal(err)
	}
	if e := p.acks[2].GetError(); e.GetReason() != "DRAINING" || e.GetCode() != "UNAVAILABLE" || !e.GetRetryable() {
		t.Errorf("got %v", p.acks[2])
	}
}

// TestPublishStreamRate: a refusal for the rate is of the item, which may be sent again.
func TestPublishStreamRate(t *testing.T) {
	st := startStation(t)
	if _, err := st.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{
		NamespaceId: "acme", Namespace: &grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxPublishRate: 1}},
	}); err != nil {
		t.Fatal(err)
	}
	p := st.open(t, "acme")
	p.window()
	for i := range uint64(30) {
		p.item(i+1, fmt.Sprint("e", i), "x")
	}
	p.close()
	if err := p.end(); err != nil {
		t.Fatal(err)
	}
	accepted, limited := 0, 0
	for _, r := range p.acks {
		switch e := r.GetError(); {
		case e == nil:
			accepted++
		case e.GetReason() == "RATE_LIMITED" && e.GetRetryable():
			limited++
		default:
			t.Error(e)
		}
	}
	if accepted < 10 || accepted > 12 || accepted+limited != 30 {
		t.Errorf("%d accepted, %d limited", accepted, limited)
	}
}

// TestPublishStreamPastWindow: callers that do not count are held back, not refused, and nothing is lost.
// Several streams publish the same ids.
func TestPublishStreamPastWindow(t *testing.T) {
	st := startStation(t)
	if _, err := st.namespaces.CreateNamespace(t.Context(), &grapnelv1.CreateNamespaceRequest{
		NamespaceId: "acme", Namespace: &grapnelv1.Namespace{Quota: &grapnelv1.Quota{MaxPublishRate: 1_000_000}},
	}); err != nil {
		t.Fatal(err)
	}
	const streams, events = 3, 3000
	text := strings.Repeat("x", 8000)
	var publishers sync.WaitGroup
	fresh := make([]int, streams)
	for s := range streams {
		p := st.open(t, "acme")
		p.window()
		publishers.Go(func() {
			for i := range uint64(events) {
				p.item(i+1, fmt.Sprint("e", i), text)
			}
			p.close()
		})
		publishers.Go(func() {
			if err := p.end(); err != nil {
				t.Error(err)
			}
			for sequence, r := range p.acks {
				if r.GetError() != nil || r.GetName() != fmt.Sprint("namespaces/acme/events/e", sequence-1) {
					t.Errorf("%d: %v", sequence, r)
				}
				if !r.GetDuplicate() {
					fresh[s]++
				}
			}
			if len(p.acks) != events {
				t.Errorf("%d acks", len(p.acks))
			}
		})
	}
	publishers.Wait()
	if sum := fresh[0] + fresh[1] + fresh[2]; sum != events {
		t.Errorf("%d events are new, want %d", sum, events)
	}
}
