//go:build linux

package pluginhost

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// transformed is newSub with a transformer.
func transformed(t testing.TB, id byte, plugin string, config map[string]any) *subscription.Subscription {
	t.Helper()
	s, err := structpb.NewStruct(config)
	if err != nil {
		t.Fatal(err)
	}
	sub := newSub(t, id, nil)
	sub.Proto().Transformer = &grapnelv1.PluginBinding{Plugin: "plugins/" + plugin, Config: s}
	return sub
}

// shelf keeps what is made, or fails.
type shelf struct {
	mu    sync.Mutex
	kept  map[delivery.ID]*delivery.Made
	reads int
	fails error
	// stalls, when set, is what KeepMade waits for, once it has said so to waits.
	stalls, waits chan struct{}
}

func (s *shelf) Made(job *delivery.Job) (*delivery.Made, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	return s.kept[job.ID], nil
}

func (s *shelf) KeepMade(_ context.Context, job *delivery.Job, made *delivery.Made) (*delivery.Made, error) {
	if s.stalls != nil {
		s.waits <- struct{}{}
		<-s.stalls
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fails != nil {
		return nil, s.fails
	}
	if s.kept == nil {
		s.kept = map[delivery.ID]*delivery.Made{}
	}
	if s.kept[job.ID] == nil {
		s.kept[job.ID] = made
	}
	return s.kept[job.ID], nil
}

// Nothing is sent that could not be stored, what was stored before is what is sent, and a transformer that makes what cannot be
// sent has failed by itself.
func TestMadeIsStoredBeforeItIsSent(t *testing.T) {
	bodies := &shelf{fails: errors.New("journal's disk is full")}
	f := start(t, nil, self("plugin-all"), self("plugin-scripts")).ready(t)
	f.opts.Bodies = bodies
	sub := transformed(t, 1, "jq", map[string]any{"program": `{n: .data.n}`})
	if r := f.attempt(t, sub, newJob(1, "x")); r.Cause != delivery.CauseUnspent || !strings.Contains(r.Error, "disk is full") {
		t.Errorf("not stored: %+v", r)
	}
	bodies.fails = nil
	if r := f.attempt(t, sub, newJob(1, "x")); r.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("%+v", r)
	}
	if made := bodies.kept[newJob(1, "x").ID]; made == nil || string(made.Body) != `{"n":1}` || made.ContentType != "application/json" {
		t.Errorf("%+v", made)
	}
	bodies.kept[newJob(2, "x").ID] = &delivery.Made{Body: []byte("before"), ContentType: "text/plain"}
	broken := transformed(t, 2, "jq", map[string]any{"program": `error("it is not to run")`})
	if r := f.attempt(t, broken, newJob(2, "x")); r.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("stored before: %+v", r)
	}
	for id, c := range map[byte]struct{ program, want string }{
		3: {`{body: 1, headers: {"webhook-id": "x"}}`, "webhook-id"},
		4: {`{body: 1, headers: {"Content-Encoding": "gzip"}}`, "content-encoding"},
		5: {`{body: 1, headers: {"x a": "b"}}`, "not a header name"},
		6: {`{body: 1, headers: {"x-a": "b\r\nc: d"}}`, "control character"},
		7: {`{body: 1, headers: ([range(40)] | map({key: "x-\(.)", value: "y"}) | from_entries)}`, "at most 32"},
		8: {`{body: 1, content_type: "no type"}`, "media type"},
	} {
		r := f.attempt(t, transformed(t, id, "jq", map[string]any{"program": c.program, "returns": "request"}), newJob(int(id), "x"))
		if r.Outcome != delivery.OutcomePluginError || r.Cause != delivery.CausePlugin || !strings.Contains(r.Error, c.want) {
			t.Errorf("%s: %+v, want %s", c.program, r, c.want)
		}
	}
	if used := f.made.used.Load(); used != 0 {
		t.Errorf("%d bytes are held by nobody", used)
	}
	reads := bodies.reads
	if r := f.attempt(t, newSub(t, 9, nil), newJob(9, "x")); r.Outcome != delivery.OutcomeSucceeded || bodies.reads != reads {
		t.Errorf("without a transformer: %+v, %d reads", r, bodies.reads-reads)
	}
}

// TestMadeIsBoundedWhileTheDiskStalls: what waits to be stored counts, so that it does not pile up.
func TestMadeIsBoundedWhileTheDiskStalls(t *testing.T) {
	bodies := &shelf{stalls: make(chan struct{}), waits: make(chan struct{}, 1)}
	f := start(t, nil, self("plugin-all"), self("plugin-scripts")).ready(t)
	f.opts.Bodies = bodies
	f.made.limit = 5
	sub := transformed(t, 1, "jq", map[string]any{"program": `{n: .data.n}`})
	s := newSink()
	first := newJob(1, "x")
	f.Attempt(sub, first, s)
	<-bodies.waits
	if r := f.attempt(t, sub, newJob(2, "x")); r.Cause != delivery.CauseUnspent || !strings.Contains(r.Error, "no memory for what transformers make") {
		t.Errorf("beside what waits for the disk: %+v", r)
	}
	close(bodies.stalls)
	s.wait(t, 1)
	if r := s.of(first); r.Outcome != delivery.OutcomeSucceeded || f.made.used.Load() != 0 {
		t.Errorf("%+v, and %d bytes are held", r, f.made.used.Load())
	}
}

// BenchmarkTransform is what goes through the process of scripts and then that of a transport in a second.
func BenchmarkTransform(b *testing.B) {
	payload := []byte(`{"order":1001,"customer":{"name":"Ada <ada@example.com>"},"items":[{"sku":"a","n":2},{"sku":"b","n":1}],"vip":true,"total":12.5}`)
	subs := map[string]*subscription.Subscription{
		"none": newSub(b, 1, nil),
		"cel": transformed(b, 2, "cel", map[string]any{"expression": `{
  "text": "Order " + string(event.data.order) + " of " + event.data.customer.name,
  "kind": event.type,
  "region": has(event.attributes.region) ? event.attributes.region : "none",
  "vip": event.data.vip,
  "skus": event.data.items.map(i, i.sku),
  "many": event.data.items.exists(i, i.n > 1),
  "total": event.data.total * 1.19,
  "at": event.time
}`}),
		"jq": transformed(b, 3, "jq", map[string]any{"program": `{
  text: "Order \(.data.order) of \(.data.customer.name)",
  kind: .type,
  region: (.attributes.region // "none"),
  vip: .data.vip,
  skus: [.data.items[].sku],
  many: any(.data.items[]; .n > 1),
  total: (.data.total * 1.19),
  at: .time
}`}),
	}
	f := start(b, nil, self("plugin-all"), self("plugin-scripts")).ready(b)
	for _, name := range []string{"none", "cel", "jq"} {
		b.Run(name, func(b *testing.B) {
			const window = 512
			sink := &tokenSink{free: make(chan *delivery.Job, window)}
			for i := range window {
				job := newJob(i, "order.created")
				job.Event.ID, job.Event.Payload = "ev-"+strconv.Itoa(i), payload
				sink.free <- job
			}
			f.attempt(b, subs[name], newJob(0, "order.created"))
			b.ResetTimer()
			for range b.N {
				f.Attempt(subs[name], <-sink.free, sink)
			}
			for range window {
				<-sink.free
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "deliveries/s")
		})
	}
}
