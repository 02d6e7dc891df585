//go:build unix

package natsplugin

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestServerKilledMidFlightAndRestarted(t *testing.T) {
	n := start(t, "")
	n.stream(orders("ORDERS"))
	p := newProxy(t, n.address)
	inst := newBench(t).instance("nats://"+p.addr+"/orders.x", nil, nil)
	first := event()
	first.MessageID = "evt_0"
	resp, err := deliverWithin(t, inst, 10*time.Second, first)
	wantAnswer(t, resp, err, http.StatusOK, "")

	killed := make(chan struct{})
	p.watch(func(sent []byte) {
		if bytes.Contains(sent, []byte("HPUB ")) {
			n.kill()
			close(killed)
		}
	})
	_, err = deliver(t, inst)
	wantFailure(t, err, endpoint(plugin.CodeReset, "the receiver closed the connection without an answer", plugin.MaybeSent))
	<-killed
	p.watch(nil)

	direct := newBench(t).instance("nats://"+n.addr+"/orders.x", nil, nil)
	_, err = deliver(t, direct)
	wantFailure(t, err, endpoint(plugin.CodeConnect, "connection refused", plugin.NotSent))
	n.run()
	for _, inst := range []*plugintest.Configured{inst, direct} {
		resp, err = deliver(t, inst)
		wantAnswer(t, resp, err, http.StatusOK, "")
	}
	if stored := n.stored("ORDERS"); stored != 2 {
		t.Errorf("%d messages stored, want evt_0 and evt_1 once each", stored)
	}
}

func TestEveryMessageOnceThroughRestarts(t *testing.T) {
	const messages, restarts = 300, 3
	n := start(t, "")
	n.stream(orders("ORDERS"))
	inst := newBench(t).instance("nats://"+n.addr+"/orders.x", nil, nil)
	var done atomic.Int64
	work := make(chan int)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for id := range work {
				req := event()
				req.MessageID = fmt.Sprint("evt_", id)
				for { // as the host would, only sooner
					resp, err := deliverWithin(t, inst, 5*time.Second, req)
					if err == nil && resp.Status == http.StatusOK {
						break
					}
					var f *plugin.Failure
					if err == nil && resp.Status < 500 && resp.Status != http.StatusNotFound || err != nil && (!errors.As(err, &f) || f.Source != plugin.SourceEndpoint) {
						t.Errorf("response %v, error %v", resp, err)
						return
					}
					if t.Context().Err() != nil {
						return
					}
				}
				done.Add(1)
			}
		})
	}
	for id := range messages {
		if id > 0 && id%(messages/(restarts+1)) == 0 {
			n.kill()
			n.run()
		}
		work <- id
	}
	close(work)
	wg.Wait()
	if stored := n.stored("ORDERS"); done.Load() != messages || stored != messages {
		t.Errorf("%d delivered, %d stored, want %d", done.Load(), stored, messages)
	}
}

func TestServerThatIsSilent(t *testing.T) {
	n := start(t, "")
	n.stream(orders("ORDERS"))
	p := newProxy(t, n.address)
	b := newBench(t)
	inst := b.instance("nats://"+p.addr+"/orders.x", nil, nil)
	resp, err := deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusOK, "")

	n.pause()
	_, err = deliverWithin(t, inst, 200*time.Millisecond, event())
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "no answer in time", plugin.MaybeSent))
	_, err = deliverWithin(t, inst, 200*time.Millisecond, event())
	wantFailure(t, err, endpoint(plugin.CodeTimeout, "no connection before the attempt's time was up", plugin.NotSent))
	_, err = deliver(t, b.instance("nats://"+p.addr+"/orders.x", map[string]any{"connect_timeout": "100ms"}, nil))
	wantFailure(t, err, endpoint(plugin.CodeConnect, "the server did not greet in time; it may want TLS first (config.tls.handshake_first)", plugin.NotSent))
	n.resume()
	resp, err = deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusOK, "")
	if got := p.connections(); got < 2 {
		t.Errorf("%d connections: the one that was silent is still used", got)
	}
}

func TestServerThatStopsReadingHoldsNobodyUp(t *testing.T) {
	n := start(t, "")
	n.stream(orders("ORDERS"))
	inst := newBench(t).instance("nats://"+n.addr+"/orders.x", nil, nil)
	resp, err := deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusOK, "")
	n.pause()
	large := event()
	large.Body = bytes.Repeat([]byte("x"), 1_000_000)
	var wg sync.WaitGroup
	var maybe atomic.Int64
	began := time.Now()
	for range 20 { // more than the kernel takes
		wg.Go(func() {
			_, err := deliverWithin(t, inst, 500*time.Millisecond, large)
			var f *plugin.Failure
			if !errors.As(err, &f) || f.Source != plugin.SourceEndpoint {
				t.Errorf("%#v, want a failure of the endpoint", err)
			} else if f.WireState == plugin.MaybeSent {
				maybe.Add(1)
			}
		})
	}
	wg.Wait()
	if maybe.Load() == 0 {
		t.Error("no attempt says that it may have arrived")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %s for attempts of half a second", took)
	}
	n.resume()
	resp, err = deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusOK, "")
}

func TestAdvertisedServersAreNotUsed(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	route := lis.Addr().String()
	_ = lis.Close()
	one := start(t, fmt.Sprintf("%s\ncluster { name: test, listen: %q }\n", noJetStream, route))
	advertised := make(chan struct{}, 1)
	client := one.admin(nats.DiscoveredServersHandler(func(*nats.Conn) { advertised <- struct{}{} })).Conn()
	other := start(t, fmt.Sprintf("%s\ncluster { name: test, listen: \"127.0.0.1:-1\", routes: [ \"nats://%s\" ] }\n", noJetStream, route))
	select {
	case <-advertised:
	case <-time.After(10 * time.Second):
		t.Fatal("the servers have not found each other")
	}
	client.Close()
	heard, err := other.admin().Conn().SubscribeSync("orders.>")
	if err != nil {
		t.Fatal(err)
	}

	inst := newBench(t).instance("nats://"+one.addr+"/orders.x", map[string]any{"require_jetstream": false}, nil)
	resp, err := deliver(t, inst)
	wantAnswer(t, resp, err, http.StatusAccepted, "")
	one.kill()
	for range 3 {
		_, err = deliver(t, inst)
		var f *plugin.Failure
		if !errors.As(err, &f) || f.Source != plugin.SourceEndpoint {
			t.Errorf("%#v, want a failure: the one server of the URI is down", err)
		}
	}
	if n, _, err := heard.Pending(); err != nil || n > 1 {
		t.Errorf("%d messages came by way of the other server (error %v), want that of before at most", n, err)
	}
}

func TestEgressIsAskedAboutTheResolvedAddress(t *testing.T) {
	p := newProxy(t, func() string { return "127.0.0.1:1" })
	_, port, err := net.SplitHostPort(p.addr)
	if err != nil {
		t.Fatal(err)
	}
	inst := newBench(t).Configure(plugintest.Instance{Kind: "nats", Target: plugin.Target{
		URL: "nats://localhost:" + port + "/orders.x", Egress: plugin.NewEgress(nil),
	}})
	_, err = deliver(t, inst)
	wantFailure(t, err, plugin.Failure{
		Source: plugin.SourceEndpoint, Code: plugin.CodeDNS, Message: "the host name does not exist, or egress policy forbids every address it has",
		WireState: plugin.NotSent,
	})
	if n := p.connections(); n != 0 {
		t.Errorf("%d connections in spite of the policy", n)
	}
}

func TestServerThatSpeaksSomethingElse(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.9\r\n")
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = lis.Close(); wg.Wait() })
	_, err = deliver(t, newBench(t).instance("nats://"+lis.Addr().String()+"/orders.x", nil, nil))
	var f *plugin.Failure
	if !errors.As(err, &f) || f.Source != plugin.SourceEndpoint || f.WireState != plugin.NotSent {
		t.Errorf("%#v, want an endpoint failure before anything was sent", err)
	}
}
