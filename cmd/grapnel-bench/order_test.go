package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

//nolint:gochecknoglobals // a test flag
var orderCycles = flag.Int("kill.order", 4, "how often TestKillOrdered kills the server")

// TestKillOrdered kills the real server again and again while events with ordering keys pour in, to receivers that refuse
// some attempts, and while its subscription is paused and changed. Of each key no event may be accepted before the one
// that was published before it has been, and none may be missing in the end.
func TestKillOrdered(t *testing.T) {
	bin := buildGrapnel(t)
	dir := filepath.Join(t.TempDir(), "data")
	rng := seeded(t)
	rcv := &orderLedger{accepted: map[string]int{}, rng: rand.New(rand.NewPCG(rng.Uint64(), 1))}
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
	sub := signed(namespace, web.URL, "bench.*")
	sub.Ordered, sub.OnExhausted = true, grapnelv1.Subscription_ON_EXHAUSTED_BLOCK
	sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 100, Schedule: []*durationpb.Duration{durationpb.New(5 * time.Millisecond), durationpb.New(50 * time.Millisecond)}}
	sub.FailurePolicy = &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(0)}
	if _, err := p.subscribeTo(ctx, namespace, 1, func(int) *grapnelv1.Subscription { return sub }); err != nil {
		t.Fatal(err)
	}
	const publishers = 3
	var published [publishers]keyPublisher
	for cycle := range *orderCycles {
		run, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for i := range published {
			wg.Go(func() { published[i].publish(run, p.conn, i, rcv) })
		}
		wg.Go(func() { meddleInOrder(run, p.conn) })
		life := time.NewTimer(50*time.Millisecond + time.Duration(rng.Int64N(int64(time.Second))))
		<-life.C
		p.kill()
		cancel()
		wg.Wait()
		if p, err = startServer(ctx, bin, dir); err != nil {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
	}
	if _, err := grapnelv1.NewSubscriptionServiceClient(p.conn).ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: orderedName}); err != nil {
		t.Fatal(err)
	}
	want := map[string]int{}
	for i := range published {
		published[i].finish(t, p.conn, i)
		for key, n := range published[i].next {
			want[key] = n
		}
	}
	if err := p.recorded(ctx, namespace); err != nil {
		t.Error(err)
	}
	total := rcv.judge(t, want)
	t.Logf("%d cycles, %d events of %d keys, %d arrivals, %d refused", *orderCycles, total, len(want), rcv.arrived, rcv.refused)
}

const orderedName = "namespaces/" + namespace + "/subscriptions/sub-0"

// meddleInOrder pauses, resumes and changes the subscription until the server is gone.
func meddleInOrder(ctx context.Context, conn *grpc.ClientConn) {
	subs := grapnelv1.NewSubscriptionServiceClient(conn)
	for i := 0; ctx.Err() == nil; i++ {
		pause := time.NewTimer(30 * time.Millisecond)
		<-pause.C
		var err error
		switch i % 3 {
		case 0:
			_, err = subs.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: orderedName})
		case 1:
			_, err = subs.ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: orderedName})
		default:
			_, err = subs.UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{
				Subscription: &grapnelv1.Subscription{Name: orderedName, MaxInFlight: int32(1 + i%100)},
			})
		}
		if err != nil {
			return
		}
	}
}

// keyPublisher publishes numbered events of some keys. A batch without an answer is sent again before anything else, so
// that the events of a key are accepted in the order of their numbers.
type keyPublisher struct {
	next   map[string]int // by key
	unsure *grapnelv1.BatchPublishRequest
}

const keysOfOne = 20

func (k *keyPublisher) publish(ctx context.Context, conn *grpc.ClientConn, who int, rcv *orderLedger) {
	client := grapnelv1.NewPublishServiceClient(conn)
	for ctx.Err() == nil {
		if k.ahead(rcv) > 300 {
			pause := time.NewTimer(time.Millisecond)
			<-pause.C
			continue
		}
		if k.unsure == nil {
			k.unsure = k.batch(who)
		}
		if err := batchErr(client.BatchPublish(ctx, k.unsure)); err != nil {
			return
		}
		k.unsure = nil
	}
}

// ahead is how many events the receiver has not accepted yet.
func (k *keyPublisher) ahead(rcv *orderLedger) (n int) {
	rcv.mu.Lock()
	defer rcv.mu.Unlock()
	for key, next := range k.next {
		n += next - rcv.accepted[key]
	}
	return n
}

func (k *keyPublisher) batch(who int) *grapnelv1.BatchPublishRequest {
	if k.next == nil {
		k.next = map[string]int{}
	}
	req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + namespace}
	for range 30 {
		key := fmt.Sprintf("%d-%d", who, rand.IntN(keysOfOne))
		e := event(0, []byte("{}"))
		e.Id, e.Subject, e.OrderingKey = fmt.Sprintf("%s-%d", key, k.next[key]), strconv.Itoa(k.next[key]), key
		e.Attributes = map[string]string{"key": key}
		k.next[key]++
		req.Events = append(req.Events, e)
	}
	return req
}

func (k *keyPublisher) finish(t *testing.T, conn *grpc.ClientConn, who int) {
	t.Helper()
	if k.unsure == nil {
		k.unsure = k.batch(who)
	}
	if err := batchErr(grapnelv1.NewPublishServiceClient(conn).BatchPublish(t.Context(), k.unsure)); err != nil {
		t.Fatal(err)
	}
}

// orderLedger is a receiver that refuses some attempts, and notes what it accepts.
type orderLedger struct {
	mu               sync.Mutex
	rng              *rand.Rand
	accepted         map[string]int // by key: how many, which are the first ones
	wrong            []string
	arrived, refused int
}

func (l *orderLedger) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return // cut off by the kill; not an arrival
	}
	n, err := strconv.Atoi(r.Header.Get("Ce-Subject"))
	key := r.Header.Get("Ce-Key")
	l.mu.Lock()
	defer l.mu.Unlock()
	l.arrived++
	if err != nil || key == "" {
		l.wrong = append(l.wrong, "a request without key or number")
	}
	if l.rng.IntN(5) == 0 {
		l.refused++
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	switch next := l.accepted[key]; {
	case n == next:
		l.accepted[key]++
	case n > next:
		l.wrong = append(l.wrong, fmt.Sprintf("%d of key %s came when %d was the next", n, key, next))
	}
	w.WriteHeader(http.StatusNoContent)
}

func (l *orderLedger) judge(t *testing.T, want map[string]int) (total int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, w := range l.wrong[:min(len(l.wrong), 20)] {
		t.Error(w)
	}
	for key, n := range want {
		if total += n; l.accepted[key] != n {
			t.Errorf("%d of %d events of key %s were accepted", l.accepted[key], n, key)
		}
	}
	return total
}
