package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	// steadfast subscriptions are paused and changed, but never deleted, so that every event is owed to some.
	steadfast = 2
	meddled   = 6
	// meddlers are at work at the same time, each on subscriptions of its own.
	meddlers = 3
	// straggle is how long after a change an attempt that was under way may still arrive.
	straggle = 5 * time.Second
)

// generation is one life of a subscription's name, from its creation to its deletion. Each has a path of its own.
type generation struct {
	number int
	// asked is when its creation was first called for, born when it was first known to exist, dying when its deletion
	// was first called for and gone when that was answered; zero while it has not happened.
	asked, born, dying, gone time.Time
}

// meddling is a server that is killed, stopped and started again, while others change its subscriptions and
// deliveries. It knows what they did, and so what must have arrived and what may not.
type meddling struct {
	bin, dir  string
	flags     []string
	etcd      *etcdProcess // nil with the embedded one
	url       string
	ledger    *receiverLedger
	published *publisherLedger

	mu sync.Mutex // guards what follows
	p  *serverProcess
	// crashes counts the kills: what was not yet synced may be repeated after one.
	crashes int
	lives   [meddled][]generation
	// accepted is when an event last arrived at a generation, by the ledger's key.
	accepted map[string]time.Time
	// cancelled and retried are what was called for, answered or not, by the delivery's name; cancelled also by
	// laneEvent, for what a sweep has erased.
	cancelled map[string]bool
	retried   map[string]bool
	ended     map[string]ending // by the delivery's name
	wrong     []string
	done      map[string]int // edits by kind
	swept     int            // sweeps that erased history, or part of it
}

// ending is a final state that was seen.
type ending struct {
	state   grapnelv1.Delivery_State
	at      time.Time // its complete_time
	crashes int
}

func newMeddling(t *testing.T, external bool) *meddling {
	t.Helper()
	m := &meddling{
		bin: buildGrapnel(t), dir: filepath.Join(t.TempDir(), "data"), published: newPublisherLedger(0),
		accepted: map[string]time.Time{}, cancelled: map[string]bool{}, retried: map[string]bool{},
		ended: map[string]ending{}, done: map[string]int{},
	}
	m.flags = []string{"--grace", "3s", "--debug-sweep"}
	if external {
		m.etcd = startEtcd(t)
		m.flags = append(m.flags, "--etcd-endpoints", "http://"+m.etcd.addr)
	}
	m.published.pace = 200 * time.Millisecond
	m.ledger = newReceiverLedger(t)
	m.ledger.linger = lingering
	rcv := httptest.NewServer(http.HandlerFunc(m.receive))
	t.Cleanup(rcv.Close)
	m.url = rcv.URL
	return m
}

// receive refuses a few requests for now, and enters the others in the ledger under the generation that they came for,
// whatever its address was at the time.
func (m *meddling) receive(w http.ResponseWriter, r *http.Request) {
	if rand.IntN(7) == 0 {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	r.URL.Path = path.Dir(r.URL.Path)
	m.mu.Lock()
	m.accepted[r.URL.Path+" "+r.Header.Get("Ce-Id")] = time.Now()
	m.mu.Unlock()
	m.ledger.ServeHTTP(w, r)
}

// start starts the server on what is there.
func (m *meddling) start(ctx context.Context) error {
	p, err := startServer(ctx, m.bin, m.dir, m.flags...)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.p = p
	return nil
}

func (m *meddling) server() (*serverProcess, int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.p, m.crashes
}

// crash is kill -9.
func (m *meddling) crash() {
	m.mu.Lock()
	m.crashes++
	p := m.p
	m.mu.Unlock()
	p.kill()
}

// insist repeats a call over crashes of the server until it has an answer, or ctx ends.
func (m *meddling) insist(ctx context.Context, call func(ctx context.Context, conn *grpc.ClientConn) error) error {
	for {
		p, _ := m.server()
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := call(attempt, p.conn)
		cancel()
		switch status.Code(err) {
		case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded, codes.Aborted, codes.Unknown:
		default:
			return err
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return err
		}
	}
}

func (m *meddling) complain(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wrong = append(m.wrong, fmt.Sprintf(format, args...))
}

func subName(i int) string { return fmt.Sprintf("namespaces/%s/subscriptions/sub-%d", namespace, i) }

// create begins a life of the i-th subscription.
func (m *meddling) create(ctx context.Context, i int) error {
	m.mu.Lock()
	g := generation{number: len(m.lives[i]), asked: time.Now()}
	m.mu.Unlock()
	sub := signed(namespace, m.address(i, g.number, 0), "bench.*")
	sub.MaxInFlight = 64
	if i%2 == 1 {
		sub.MaxInFlight = 4 // so that some wait
	}
	sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 100}
	for range 99 {
		sub.RetryPolicy.Schedule = append(sub.RetryPolicy.Schedule, durationpb.New(300*time.Millisecond))
	}
	sub.FailurePolicy = &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(0)}
	err := m.insist(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := grapnelv1.NewSubscriptionServiceClient(conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/" + namespace, SubscriptionId: fmt.Sprintf("sub-%d", i), Subscription: sub,
		})
		if status.Code(err) == codes.AlreadyExists {
			return nil // by a call that had no answer
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("create sub-%d: %w", i, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	g.born = time.Now()
	m.lives[i] = append(m.lives[i], g)
	return nil
}

// address is where a generation is sent; its last part changes with every update.
func (m *meddling) address(i, generation, revision int) string {
	return fmt.Sprintf("%s/sub-%d/%d/%d", m.url, i, generation, revision)
}

// meddle changes things at random until ctx ends; it keeps to every third subscription, from the first it is given.
func (m *meddling) meddle(ctx context.Context, rng *rand.Rand, first int) error {
	for ctx.Err() == nil {
		i := first + meddlers*rng.IntN(meddled/meddlers)
		var kind string
		var err error
		switch n := rng.IntN(24); {
		case n < 3:
			kind, err = "pause", m.pause(ctx, i)
		case n < 7:
			kind, err = "resume", m.resume(ctx, i)
		case n < 11:
			kind, err = "cancel", m.edit(ctx, rng, m.cancel)
		case n < 16:
			kind, err = "retry", m.edit(ctx, rng, m.retry)
		case n < 20:
			kind, err = "rush", m.rush(ctx, rng, i)
		case n < 22:
			kind, err = "update", m.update(ctx, i, rng.IntN(1_000_000))
		case n == 22 && first == 0:
			kind, err = "sweep asked for", m.sweep(ctx)
		case i >= steadfast:
			kind, err = "delete", m.recreate(ctx, i)
		default:
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
		m.mu.Lock()
		m.done[kind]++
		m.mu.Unlock()
		if err := sleep(ctx, time.Duration(rng.Int64N(int64(60*time.Millisecond)))); err != nil {
			return nil
		}
	}
	return nil
}

// rush has many waiting deliveries of one subscription retried or cancelled at the moment in which it is paused.
func (m *meddling) rush(ctx context.Context, rng *rand.Rand, i int) error {
	p, _ := m.server()
	client := grapnelv1.NewDeliveryServiceClient(p.conn)
	page, err := client.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{
		Parent: "namespaces/" + namespace, PageSize: 30, Filter: fmt.Sprintf(`subscription = "sub-%d" AND state = "PENDING"`, i),
	})
	if err != nil {
		return nil // a crash
	}
	change := m.retry
	if rng.IntN(4) == 0 {
		change = m.cancel
	}
	var calls sync.WaitGroup
	for k, d := range page.GetDeliveries() {
		if k%3 != 0 {
			continue // some are left to wait between them
		}
		calls.Go(func() { _ = change(ctx, client, d) })
	}
	err = m.pause(ctx, i)
	calls.Wait()
	return err
}

func (m *meddling) pause(ctx context.Context, i int) error {
	return m.insist(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := grapnelv1.NewSubscriptionServiceClient(conn).PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: subName(i), Reason: "meddling"})
		return err
	})
}

func (m *meddling) resume(ctx context.Context, i int) error {
	return m.insist(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := grapnelv1.NewSubscriptionServiceClient(conn).ResumeSubscription(ctx, &grapnelv1.ResumeSubscriptionRequest{Name: subName(i)})
		return err
	})
}

// update points a subscription elsewhere.
func (m *meddling) update(ctx context.Context, i, revision int) error {
	m.mu.Lock()
	g := len(m.lives[i]) - 1
	m.mu.Unlock()
	return m.insist(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := grapnelv1.NewSubscriptionServiceClient(conn).UpdateSubscription(ctx, &grapnelv1.UpdateSubscriptionRequest{
			Subscription: &grapnelv1.Subscription{Name: subName(i), Uri: m.address(i, g, revision)},
			UpdateMask:   &fieldmaskpb.FieldMask{Paths: []string{"uri"}},
		})
		return err
	})
}

// recreate deletes a subscription and makes one of the same name; it is not left half done when ctx ends.
func (m *meddling) recreate(ctx context.Context, i int) error {
	ctx = context.WithoutCancel(ctx)
	last := func(change func(*generation)) {
		m.mu.Lock()
		defer m.mu.Unlock()
		change(&m.lives[i][len(m.lives[i])-1])
	}
	last(func(g *generation) { g.dying = time.Now() })
	err := m.insist(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := grapnelv1.NewSubscriptionServiceClient(conn).DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: subName(i), AllowMissing: true})
		return err
	})
	if err != nil {
		return err
	}
	last(func(g *generation) { g.gone = time.Now() })
	return m.create(ctx, i)
}

// sweep has all history erased that is older than some seconds.
func (m *meddling) sweep(ctx context.Context) error {
	p, _ := m.server()
	if err := p.sweep(ctx, 5*time.Second); errors.Is(err, errNoSweep) {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.swept++ // also when it was cut short by a crash: what was erased until then is erased
	return nil
}

// edit has one of the latest deliveries changed, now and then by a caller who does not wait for the answer.
func (m *meddling) edit(ctx context.Context, rng *rand.Rand, change func(context.Context, grapnelv1.DeliveryServiceClient, *grapnelv1.Delivery) error) error {
	filters := []string{`state = "PENDING"`, `state = "SCHEDULED"`, `state = "CANCELLED"`, ""}
	p, _ := m.server()
	client := grapnelv1.NewDeliveryServiceClient(p.conn)
	page, err := client.ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{
		Parent: "namespaces/" + namespace, PageSize: 200, Filter: filters[rng.IntN(len(filters))],
	})
	if err != nil || len(page.GetDeliveries()) == 0 {
		return nil // a crash, or nothing to change
	}
	d := page.GetDeliveries()[rng.IntN(len(page.GetDeliveries()))]
	if rng.IntN(3) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.Int64N(int64(3*time.Millisecond))))
		defer cancel()
	}
	switch err := change(ctx, client, d); status.Code(err) {
	case codes.InvalidArgument, codes.Internal, codes.DataLoss:
		return err
	default:
		return nil // not possible in its state, or without an answer
	}
}

func (m *meddling) cancel(ctx context.Context, client grapnelv1.DeliveryServiceClient, d *grapnelv1.Delivery) error {
	m.mu.Lock()
	m.cancelled[d.GetName()] = true
	m.cancelled[laneEvent(lane(d), path.Base(d.GetEvent()))] = true
	m.mu.Unlock()
	_, err := client.CancelDelivery(ctx, &grapnelv1.CancelDeliveryRequest{Name: d.GetName()})
	return err
}

func (m *meddling) retry(ctx context.Context, client grapnelv1.DeliveryServiceClient, d *grapnelv1.Delivery) error {
	m.mu.Lock()
	m.retried[d.GetName()] = true
	m.mu.Unlock()
	_, err := client.RetryDelivery(ctx, &grapnelv1.RetryDeliveryRequest{Name: d.GetName()})
	return err
}

// watch reads the newest deliveries again and again until ctx ends.
func (m *meddling) watch(ctx context.Context) {
	for sleep(ctx, 100*time.Millisecond) == nil {
		p, crashes := m.server()
		page, err := grapnelv1.NewDeliveryServiceClient(p.conn).ListDeliveries(ctx, &grapnelv1.ListDeliveriesRequest{
			Parent: "namespaces/" + namespace, PageSize: 1000,
		})
		if err == nil {
			m.observe(page.GetDeliveries(), crashes)
		}
	}
}

// observe notes which deliveries have ended, and complains of those that end a second time. A kill may take back what
// was not yet synced.
func (m *meddling) observe(all []*grapnelv1.Delivery, crashes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range all {
		before, was := m.ended[d.GetName()]
		now := ending{d.GetState(), d.GetCompleteTime().AsTime(), crashes}
		if was && before.crashes == crashes && before != now && !m.retried[d.GetName()] {
			m.wrong = append(m.wrong, fmt.Sprintf("ended twice: %s of %s was %v at %v and is %v at %v",
				d.GetName(), d.GetSubscription(), before.state, before.at, now.state, now.at))
		}
		if final(d) {
			m.ended[d.GetName()] = now
		} else {
			delete(m.ended, d.GetName())
		}
	}
}

func final(d *grapnelv1.Delivery) bool {
	switch d.GetState() {
	case grapnelv1.Delivery_STATE_PENDING, grapnelv1.Delivery_STATE_SCHEDULED, grapnelv1.Delivery_STATE_IN_FLIGHT:
		return false
	}
	return true
}

// cycle is one life of the server under load, ended by a kill or, now and then, as an operator ends it.
func (m *meddling) cycle(t *testing.T, rng *rand.Rand) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var publishers sync.WaitGroup
	p, _ := m.server()
	for range 2 {
		publishers.Go(func() { m.published.publish(ctx, p.conn, m.ledger) })
	}
	life := 50*time.Millisecond + time.Duration(rng.Int64N(int64(time.Second)))
	if m.etcd != nil && rng.IntN(3) == 0 {
		_ = sleep(ctx, life/2)
		m.etcd.kill()
		_ = sleep(ctx, time.Duration(rng.Int64N(int64(300*time.Millisecond))))
		if err := m.etcd.start(); err != nil {
			t.Fatal(err)
		}
		life /= 2
	}
	_ = sleep(ctx, life)
	if rng.IntN(3) == 0 {
		if err := p.stop(); err != nil {
			t.Error(err)
		}
	} else {
		m.crash()
	}
	cancel()
	publishers.Wait()
	if err := m.start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// settle resumes everything and waits until no delivery is open any more; it returns all of them. What stays open
// although its subscription is active, and none ends for half a minute, is stuck.
func (m *meddling) settle(t *testing.T) []*grapnelv1.Delivery {
	t.Helper()
	p, crashes := m.server()
	for i := range meddled {
		if err := m.resume(t.Context(), i); err != nil {
			t.Fatal(err)
		}
	}
	m.published.settle(t, p.conn)
	const open = `state = "PENDING" OR state = "SCHEDULED" OR state = "IN_FLIGHT"`
	left, since := -1, time.Now()
	for left != 0 && time.Since(since) < 30*time.Second {
		if now := len(p.deliveries(t, open)); now != left {
			left, since = now, time.Now()
		}
		pause := time.NewTimer(200 * time.Millisecond)
		<-pause.C
	}
	all := p.deliveries(t, "")
	m.observe(all, crashes)
	if left == 0 {
		if err := p.recorded(t.Context(), namespace); err != nil {
			t.Errorf("no delivery is open, and yet: %v", err)
		}
	}
	return all
}

// verdict counts what may not be.
type verdict struct{ lost, stuck, twice int }

// judge holds what was done, what arrived and what the server says against each other, and says what is wrong.
func (m *meddling) judge(all []*grapnelv1.Delivery) (v verdict, wrong []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	complain := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, w := range m.wrong {
		if strings.HasPrefix(w, "ended twice") {
			v.twice++
		}
		complain("%s", w)
	}
	newest := map[string]*grapnelv1.Delivery{} // by laneEvent
	for _, d := range all {
		i := lane(d)
		if e := laneEvent(i, path.Base(d.GetEvent())); newest[e] == nil {
			newest[e] = d
		}
		switch now := m.lives[i][len(m.lives[i])-1]; {
		case !final(d):
			v.stuck++
			complain("stuck: %s of %s is %v after %d attempts, next %v; cancelled %v, retried %v", d.GetName(), d.GetSubscription(), d.GetState(),
				d.GetAttemptCount(), d.GetNextAttemptTime(), m.cancelled[d.GetName()], m.retried[d.GetName()])
		case d.GetState() == grapnelv1.Delivery_STATE_SUCCEEDED:
		case d.GetState() != grapnelv1.Delivery_STATE_CANCELLED:
			complain("%s of %s is %v: %s %v", d.GetName(), d.GetSubscription(), d.GetState(), d.GetStateReason(), d.GetLastAttempt())
		case d.GetCreateTime().AsTime().After(now.born) && !m.cancelled[d.GetName()]: // older ones may have gone with an earlier life
			complain("cancelled by nobody: %s of %s: %s", d.GetName(), d.GetSubscription(), d.GetStateReason())
		}
	}
	for id := range m.published.all() {
		for i, lives := range m.lives {
			d := newest[laneEvent(i, id)]
			for _, g := range lives {
				fault, lost := m.fault(id, i, g, d)
				if lost {
					v.lost++
				}
				if fault != "" {
					complain("/sub-%d/%d %s %s", i, g.number, id, fault)
				}
			}
		}
	}
	return v, append(wrong, m.ledger.faults(m.published.all())...)
}

// fault says what is wrong with an event at one generation, of whose lane the server says d.
func (m *meddling) fault(id string, i int, g generation, d *grapnelv1.Delivery) (fault string, lost bool) {
	first, acked := m.published.times(id)
	at, arrived := m.accepted[fmt.Sprintf("/sub-%d/%d %s", i, g.number, id)]
	switch {
	case arrived && acked.Before(g.asked):
		return "arrived at a subscription that was made after it was published", false
	case arrived && !g.gone.IsZero() && at.Sub(g.gone) > straggle:
		return fmt.Sprintf("arrived %v after its subscription was deleted", at.Sub(g.gone)), false
	case arrived, !g.dying.IsZero(), !g.born.Before(first):
		return "", false // as it should, or it may be missing
	case d == nil && m.swept > 0 && m.cancelled[laneEvent(i, id)]:
		return "", false
	case d != nil && !final(d):
		return "", false // it is counted as stuck
	case d.GetState() == grapnelv1.Delivery_STATE_CANCELLED && m.cancelled[d.GetName()]:
		return "", false
	}
	return fmt.Sprintf("is lost; the server says %v", d), true
}

func laneEvent(lane int, event string) string { return fmt.Sprintf("%d %s", lane, event) }

// lane is the number of a delivery's subscription.
func lane(d *grapnelv1.Delivery) int {
	i, err := strconv.Atoi(strings.TrimPrefix(path.Base(d.GetSubscription()), "sub-"))
	if err != nil || i < 0 || i >= meddled {
		return 0
	}
	return i
}
