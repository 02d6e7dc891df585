package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

//nolint:gochecknoglobals // a test flag
var transformCycles = flag.Int("kill.transform", 1, "how often TestKillTransformed kills the server")

// refuses is of how many requests the receiver refuses one.
const refuses = 20

// bodies are what a receiver has got of each webhook-id.
type bodies struct {
	mu       sync.Mutex
	of       map[string]string
	accepted map[string]bool // by the publisher's id
	arrived  int
	other    []string
}

func (b *bodies) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.arrived++
	id := r.Header.Get("Webhook-Id")
	if before, seen := b.of[id]; seen && before != string(body) {
		b.other = append(b.other, fmt.Sprintf("%s: %s, and before that %s", id, body, before))
	}
	b.of[id] = string(body)
	if b.arrived%refuses == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	b.accepted[r.Header.Get("Ce-Id")] = true
}

// TestKillTransformed kills the real server again and again while a transformer makes something else each time that it runs:
// whatever moment that is, also between storing and sending, all requests of one event carry the same bytes, and none is missing.
func TestKillTransformed(t *testing.T) {
	bin := buildGrapnel(t)
	dir := filepath.Join(t.TempDir(), "data")
	rng := seeded(t)
	rcv := &bodies{of: map[string]string{}, accepted: map[string]bool{}}
	web := httptest.NewServer(rcv)
	t.Cleanup(web.Close)
	ctx := t.Context()
	p, err := startServer(ctx, bin, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	if err := p.prepare(ctx, namespace); err != nil {
		t.Fatal(err)
	}
	config, err := structpb.NewStruct(map[string]any{"script": `function transform(event) { return {id: event.id, at: Math.random()}; }`})
	if err != nil {
		t.Fatal(err)
	}
	sub := signed(namespace, web.URL, "bench.*")
	sub.Transformer = &grapnelv1.PluginBinding{Plugin: "plugins/javascript", Config: config}
	sub.MaxInFlight = 200
	sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 100, Schedule: []*durationpb.Duration{durationpb.New(5 * time.Millisecond), durationpb.New(50 * time.Millisecond)}}
	sub.FailurePolicy = &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(0)}
	if _, err := p.subscribeTo(ctx, namespace, 1, func(int) *grapnelv1.Subscription { return sub }); err != nil {
		t.Fatal(err)
	}
	published := map[string]bool{}
	for cycle := range *transformCycles {
		run, cancel := context.WithCancel(ctx)
		var publishing sync.WaitGroup
		publishing.Go(func() {
			for n := 0; run.Err() == nil; n++ {
				id := strconv.Itoa(cycle) + "-" + strconv.Itoa(n)
				if _, err := grapnelv1.NewPublishServiceClient(p.conn).Publish(run, &grapnelv1.PublishRequest{
					Parent: "namespaces/" + namespace, Event: &grapnelv1.Event{Id: id, Type: "bench.event", Payload: &grapnelv1.Event_Text{Text: "{}"}},
				}); err == nil {
					published[id] = true
				}
			}
		})
		life := time.NewTimer(50*time.Millisecond + time.Duration(rng.Int64N(int64(time.Second))))
		<-life.C
		p.kill()
		cancel()
		publishing.Wait()
		if p, err = startServer(ctx, bin, dir); err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
	}
	if err := p.recorded(ctx, namespace); err != nil {
		t.Error(err)
	}
	rcv.mu.Lock()
	defer rcv.mu.Unlock()
	for _, other := range rcv.other[:min(len(rcv.other), 5)] {
		t.Error(other)
	}
	missing := 0
	for id := range published {
		if !rcv.accepted[id] {
			missing++
		}
	}
	if missing > 0 || len(published) == 0 {
		t.Errorf("%d of %d events are missing", missing, len(published))
	}
	t.Logf("%d cycles, %d events, %d arrivals, %d with other bytes", *transformCycles, len(published), rcv.arrived, len(rcv.other))
}
