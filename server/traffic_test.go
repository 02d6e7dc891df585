package server_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// traffic publishes one event after the other until it is told to stop, and counts what was acknowledged.
type traffic struct {
	t     *testing.T
	acked atomic.Int64
	stop  context.CancelFunc
	ended sync.WaitGroup
}

func startTraffic(t *testing.T, s *servertest.Server, ns string) *traffic {
	ctx, stop := context.WithCancel(context.Background())
	tr := &traffic{t: t, stop: stop}
	client := grapnelv1.NewPublishServiceClient(s.Conn)
	for w := range 4 {
		tr.ended.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				_, err := client.Publish(ctx, &grapnelv1.PublishRequest{
					Parent: "namespaces/" + ns,
					Event: &grapnelv1.Event{
						Id: fmt.Sprintf("e-%d-%d", w, i), Type: "order.created",
						Payload: &grapnelv1.Event_Text{Text: fmt.Sprintf(`{"w":%d,"i":%d}`, w, i)},
					},
				})
				switch {
				case err == nil:
					tr.acked.Add(1)
				case ctx.Err() == nil:
					t.Errorf("publish: %v", err)
					return
				}
				pause := time.NewTimer(time.Millisecond)
				<-pause.C
			}
		})
	}
	t.Cleanup(func() { stop(); tr.ended.Wait() })
	return tr
}

// reach waits until n more events were acknowledged.
func (tr *traffic) reach(n int64) {
	tr.t.Helper()
	goal := tr.acked.Load() + n
	servertest.Await(tr.t, "events acknowledged", func() bool { return tr.acked.Load() >= goal })
}

// end stops publishing and returns how many events were acknowledged.
func (tr *traffic) end() int {
	tr.stop()
	tr.ended.Wait()
	return int(tr.acked.Load())
}

// open counts the deliveries that are not final.
func open(s *servertest.Server, ns string) int {
	return len(s.Deliveries(ns, "state = PENDING OR state = SCHEDULED OR state = IN_FLIGHT"))
}

// overBothEtcds runs a test with the embedded etcd and with one in a process of its own.
func overBothEtcds(t *testing.T, test func(*testing.T, *servertest.Server)) {
	t.Run("embedded", func(t *testing.T) { test(t, servertest.Start(t, servertest.Options{})) })
	t.Run("external", func(t *testing.T) {
		etcd := startEtcd(t)
		test(t, servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) {
			o.EtcdEndpoints = []string{"http://" + etcd.addr}
		}}))
	})
}

func TestDeliverSigned(t *testing.T) { overBothEtcds(t, deliverSigned) }

func deliverSigned(t *testing.T, s *servertest.Server) {
	rcv := servertest.NewReceiver(t, nil)
	key := s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL+"/hooks", nil)
	body := []byte(`{"order": 1001,  "note":"bytes stay as they are"}`)
	s.Publish("acme", "o-1", "order.created", body)
	servertest.Await(t, "the delivery", func() bool { return rcv.Accepted() == 1 })
	got := rcv.Requests()[0]
	if string(got.Body) != string(body) {
		t.Errorf("body %q, published %q", got.Body, body)
	}
	v, err := webhook.NewVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Verify(got.Header, got.Body); err != nil {
		t.Errorf("signature: %v", err)
	}
	for name, want := range map[string]string{
		"Content-Type": "application/json", "Ce-Id": "o-1", "Ce-Type": "order.created", "Ce-Source": "//grapnel/acme",
		"Ce-Specversion": "1.0", "User-Agent": "grapnel/test",
	} {
		if h := got.Header.Get(name); h != want {
			t.Errorf("header %s is %q, want %q", name, h, want)
		}
	}
	servertest.Await(t, "the record", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 1 })
}

// TestPauseHolds pauses in the middle of traffic: nothing is sent while paused, and nothing is lost.
func TestPauseHolds(t *testing.T) { overBothEtcds(t, pauseHolds) }

func pauseHolds(t *testing.T, s *servertest.Server) {
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	name := s.Subscribe("acme", "orders", rcv.URL, nil).GetName()
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	tr := startTraffic(t, s, "acme")
	tr.reach(50)
	if _, err := subs.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "attempts in flight to end", func() bool { return len(s.Deliveries("acme", "state = IN_FLIGHT")) == 0 })
	before := rcv.Accepted()
	tr.reach(50)
	if after := rcv.Accepted(); after != before {
		t.Errorf("%d deliveries were sent while paused", after-before)
	}
	if _, err := subs.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	n := tr.end()
	servertest.Await(t, "all deliveries", func() bool { return rcv.Accepted() >= n && open(s, "acme") == 0 })
}

// TestRepoint changes the target in the middle of traffic: after the call returned no new attempt goes to
// the old one, and each event reaches one of the two.
func TestRepoint(t *testing.T) { overBothEtcds(t, repoint) }

func repoint(t *testing.T, s *servertest.Server) {
	first, second := servertest.NewReceiver(t, nil), servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	name := s.Subscribe("acme", "orders", first.URL, nil).GetName()
	tr := startTraffic(t, s, "acme")
	tr.reach(50)
	_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
		Subscription: &grapnelv1.Subscription{Name: name, Uri: second.URL},
	})
	if err != nil {
		t.Fatal(err)
	}
	repointed := time.Now()
	tr.reach(50)
	n := tr.end()
	servertest.Await(t, "all deliveries", func() bool { return first.Accepted()+second.Accepted() >= n && open(s, "acme") == 0 })
	for _, d := range s.Deliveries("acme", "") {
		a := d.GetLastAttempt()
		if a.GetStartTime().AsTime().After(repointed) && "http://"+a.GetPeer() == first.URL {
			t.Errorf("%s was attempted at the old target %v after the change", d.GetName(), a.GetStartTime().AsTime().Sub(repointed))
		}
	}
}

// TestDelete deletes a subscription in the middle of traffic: every delivery of it ends, by name, and
// nothing more is sent.
func TestDelete(t *testing.T) { overBothEtcds(t, delete) }

func delete(t *testing.T, s *servertest.Server) {
	var slow atomic.Bool
	rcv := servertest.NewReceiver(t, func(servertest.Request) int {
		if slow.Load() {
			return http.StatusServiceUnavailable
		}
		return http.StatusNoContent
	})
	s.Namespace("acme")
	name := s.Subscribe("acme", "orders", rcv.URL, nil).GetName()
	tr := startTraffic(t, s, "acme")
	tr.reach(50)
	slow.Store(true)
	tr.reach(50)
	_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "all deliveries to end", func() bool { return open(s, "acme") == 0 })
	sent := len(rcv.Requests())
	tr.reach(50)
	tr.end()
	if more := len(rcv.Requests()) - sent; more > 0 {
		t.Errorf("%d requests after the deletion had settled", more)
	}
	for _, d := range s.Deliveries("acme", "") {
		if st := d.GetState(); st != grapnelv1.Delivery_STATE_SUCCEEDED && st != grapnelv1.Delivery_STATE_CANCELLED {
			t.Errorf("%s ended as %v", d.GetName(), st)
		}
	}
}

// TestDeleteNamespace deletes a whole tenant whose receiver is down: its deliveries end by name.
func TestDeleteNamespace(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return http.StatusServiceUnavailable })
	s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, func(sub *grapnelv1.Subscription) { sub.RetryPolicy = fastRetries() })
	tr := startTraffic(t, s, "acme")
	tr.reach(20)
	tr.end()
	_, err := grapnelv1.NewNamespaceServiceClient(s.Conn).DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/acme", Force: true})
	if err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "all deliveries to end", func() bool { return open(s, "acme") == 0 })
	sent := len(rcv.Requests())
	for _, d := range s.Deliveries("acme", "") {
		if d.GetState() != grapnelv1.Delivery_STATE_CANCELLED {
			t.Errorf("%s ended as %v", d.GetName(), d.GetState())
		}
	}
	if more := len(rcv.Requests()) - sent; more > 0 {
		t.Errorf("%d requests after all had ended", more)
	}
}

// TestRotateSecret rotates in the middle of traffic: during the overlap everything verifies with the old
// key and with the new one.
func TestRotateSecret(t *testing.T) { overBothEtcds(t, rotateSecret) }

func rotateSecret(t *testing.T, s *servertest.Server) {
	rcv := servertest.NewReceiver(t, nil)
	old := s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, nil)
	tr := startTraffic(t, s, "acme")
	tr.reach(50)
	rotated, err := grapnelv1.NewSecretServiceClient(s.Conn).RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: "namespaces/acme/secrets/key"})
	if err != nil {
		t.Fatal(err)
	}
	at := len(rcv.Requests())
	tr.reach(100)
	n := tr.end()
	servertest.Await(t, "all deliveries", func() bool { return rcv.Accepted() >= n })
	verifyOld, err := webhook.NewVerifier(old)
	if err != nil {
		t.Fatal(err)
	}
	verifyNew, err := webhook.NewVerifier(rotated.GetGeneratedValue())
	if err != nil {
		t.Fatal(err)
	}
	newer := 0
	for i, q := range rcv.Requests() {
		if err := verifyOld.Verify(q.Header, q.Body); err != nil {
			t.Fatalf("request %d does not verify with the old key: %v", i, err)
		}
		if verifyNew.Verify(q.Header, q.Body) == nil {
			newer++
		} else if i > at+200 {
			t.Fatalf("request %d, long after the rotation, does not verify with the new key", i)
		}
	}
	if newer == 0 {
		t.Error("no request was signed with the new key")
	}
}

// TestKillPlugin kills the plugin's process again and again in the middle of traffic.
func TestKillPlugin(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, func(sub *grapnelv1.Subscription) {
		sub.RetryPolicy = fastRetries()
	})
	tr := startTraffic(t, s, "acme")
	for range 3 {
		tr.reach(50)
		for name, pid := range s.PluginPids() {
			p, err := os.FindProcess(pid)
			if err != nil {
				t.Fatalf("plugin %s: %v", name, err)
			}
			if err := p.Kill(); err != nil {
				t.Fatalf("kill plugin %s: %v", name, err)
			}
		}
	}
	tr.reach(50)
	n := tr.end()
	servertest.Await(t, "all deliveries", func() bool { return rcv.Accepted() >= n && open(s, "acme") == 0 })
	if bad := s.Deliveries("acme", "state != SUCCEEDED"); len(bad) > 0 {
		t.Errorf("%d deliveries did not succeed, the first: %v", len(bad), bad[0])
	}
	assertSameBytes(t, rcv)
}

// TestKillEtcd kills an external etcd in the middle of traffic: deliveries go on, changes of configuration
// say UNAVAILABLE, and after its return all is as before.
func TestKillEtcd(t *testing.T) {
	etcd := startEtcd(t)
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.EtcdEndpoints = []string{"http://" + etcd.addr} }})
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	name := s.Subscribe("acme", "orders", rcv.URL, nil).GetName()
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	pause := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := subs.PauseSubscription(ctx, &grapnelv1.PauseSubscriptionRequest{Name: name})
		return err
	}
	tr := startTraffic(t, s, "acme")
	tr.reach(50)
	etcd.kill()
	before := rcv.Accepted()
	tr.reach(100)
	servertest.Await(t, "deliveries without etcd", func() bool { return rcv.Accepted() >= before+50 })
	if err := pause(); status.Code(err) != codes.Unavailable {
		t.Errorf("a change without etcd gave %v, want UNAVAILABLE", err)
	}
	if _, err := subs.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name}); err != nil {
		t.Errorf("reading without etcd: %v", err)
	}
	etcd.start()
	servertest.Await(t, "changes to be possible again", func() bool { return pause() == nil })
	if _, err := subs.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	n := tr.end()
	servertest.Await(t, "all deliveries", func() bool { return rcv.Accepted() >= n && open(s, "acme") == 0 })
}

// TestRestart stops the server in the orderly way in the middle of traffic and starts it again.
func TestRestart(t *testing.T) {
	rcv := servertest.NewReceiver(t, nil)
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	name := s.Subscribe("acme", "orders", rcv.URL, nil).GetName()
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	if _, err := subs.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	tr := startTraffic(t, s, "acme")
	tr.reach(200)
	n := tr.end()
	s.Stop()
	again := servertest.Start(t, servertest.Options{Dir: s.Dir})
	// A publish that was cut off when the traffic ended may have been accepted without an answer.
	waiting := open(again, "acme")
	if waiting < n {
		t.Errorf("%d deliveries wait after the restart, %d events were acknowledged", waiting, n)
	}
	subs = grapnelv1.NewSubscriptionServiceClient(again.Conn)
	if _, err := subs.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "all deliveries", func() bool { return rcv.Accepted() == waiting && open(again, "acme") == 0 })
}

// fastRetries keeps tests with failures short.
func fastRetries() *grapnelv1.RetryPolicy {
	return &grapnelv1.RetryPolicy{MaxAttempts: 50, Schedule: seconds(1, 1, 1)}
}

// assertSameBytes checks that what came more than once came the same.
func assertSameBytes(t *testing.T, rcv *servertest.Receiver) {
	t.Helper()
	first := map[string]servertest.Request{}
	for _, q := range rcv.Requests() {
		event := q.Header.Get("Ce-Id")
		before, ok := first[event]
		if !ok {
			first[event] = q
			continue
		}
		if before.ID != q.ID || string(before.Body) != string(q.Body) {
			t.Errorf("event %s came as %s and again as %s", event, before.ID, q.ID)
		}
	}
}
