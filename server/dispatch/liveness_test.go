package dispatch_test

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/dispatch/health"
	"github.com/grapnel/grapnel/server/subscription"
)

// Whatever has happened to hosts, plugins and subscriptions, and whatever callers have done: what is open of a receiver ends
// soon after it is well, and nothing is held by anybody when nothing is left.
func TestEveryDeliveryEndsOnceItsReceiverIsWell(t *testing.T) {
	seeds := uint64(40)
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newTown(t, rand.New(rand.NewPCG(seed, 7))).live() })
		})
	}
}

// town is some hosts, each with some receivers of several namespaces.
type town struct {
	*world
	rnd   *rand.Rand
	sick  map[string]answer // by host, and by plugin
	subs  []*subscription.Subscription
	hosts []string
}

// soon is how long it may take once all is well: a probe that hangs and the longest wait for the next one, a rest that a
// receiver has asked for, and a retry. One whose own breaker is open, because it was alone there or others were answered
// meanwhile, may wait longer for its probe.
const (
	soon    = 90 * time.Second
	longest = 16 * time.Minute
)

func newTown(t *testing.T, rnd *rand.Rand) *town {
	m := &town{rnd: rnd, sick: make(map[string]answer)}
	m.world = newWorld(t, func(o *dispatch.Options) {
		o.Slots = 16 << rnd.IntN(6)
		o.WindowBytes = 32 << (10 + rnd.IntN(10))
		o.Window = func(sub *subscription.Subscription) int {
			if plugin := sub.Proto().GetTransport().GetPlugin(); plugin != "" {
				return len(plugin) * 8
			}
			return 0
		}
	})
	synctest.Wait()
	delays := rand.New(rand.NewPCG(rnd.Uint64(), 2))
	m.receiver.set(func(sub *subscription.Subscription, job *delivery.Job) (time.Duration, *delivery.Result) {
		m.mu.Lock()
		defer m.mu.Unlock()
		u, _ := url.Parse(sub.Proto().GetUri())
		for _, of := range []string{sub.Proto().GetTransport().GetPlugin(), u.Host} {
			if sick := m.sick[of]; sick != nil {
				return sick(sub, job)
			}
		}
		return time.Duration(1+delays.IntN(50)) * time.Millisecond, ok()
	})
	for i := range 1 + rnd.IntN(4) {
		m.hosts = append(m.hosts, fmt.Sprint("host", i))
	}
	spaces := 1 + rnd.IntN(5)
	for i := range 2 + rnd.IntN(40) {
		s := m.settle(fmt.Sprint("s", i), inNamespace(fmt.Sprint("ns", rnd.IntN(spaces))))
		m.subs = append(m.subs, s)
	}
	return m
}

// settle makes a subscription at random, or another one of it.
func (m *town) settle(id string, change ...func(*subscription.Subscription)) *subscription.Subscription {
	rnd := m.rnd
	s := func(s *subscription.Subscription) {
		s.MaxAttempts, s.MaxAge, s.DisableAfter = 10_000, 1000*time.Hour, 0
		s.Schedule = []time.Duration{time.Duration(1+rnd.IntN(10)) * time.Second}
		s.MaxInFlight = 1 + rnd.IntN(16)
		on(m.hosts[rnd.IntN(len(m.hosts))])(s)
		if rnd.IntN(3) == 0 {
			s.Proto().Transport = &grapnelv1.PluginBinding{Plugin: []string{"a", "bb"}[rnd.IntN(2)]}
		}
		s.Ordered = rnd.IntN(3) == 0
		if rnd.IntN(4) == 0 {
			s.Batching = &subscription.Batching{MaxEvents: 2 + rnd.IntN(30), MaxBytes: 1 << 20, MaxWait: time.Duration(rnd.IntN(5000)) * time.Millisecond}
		}
		if s.Batching != nil && s.Ordered { // then each request carries one delivery of a key
			s.Batching.MaxWait /= 20
		}
		if rnd.IntN(8) == 0 {
			s.MaxRate = float64(5 + rnd.IntN(50))
		}
	}
	return m.sub(id, append([]func(*subscription.Subscription){s}, change...)...)
}

func (m *town) change(i int, change ...func(*subscription.Subscription)) {
	old := m.subs[i]
	keep := func(s *subscription.Subscription) {
		s.Namespace, s.NamespaceUID = old.Namespace, old.NamespaceUID
		s.Proto().Uri, s.Proto().Transport = old.Proto().GetUri(), old.Proto().GetTransport()
		s.Ordered, s.Batching, s.MaxRate = old.Ordered, old.Batching, old.MaxRate
	}
	m.subs[i] = m.settle(old.ID, append([]func(*subscription.Subscription){keep}, change...)...)
}

func (m *town) publishSome(i int) {
	s := m.subs[i]
	for range 1 + m.rnd.IntN(20) {
		key := delivery.OrderKey(m.rnd.IntN(4))
		m.journal.addKeyed(uint16(key%3), 1024, time.Time{}, key, s)
	}
}

func (m *town) illness() answer {
	mild, rest := m.rnd.IntN(2) == 0, time.Duration(1+m.rnd.IntN(20))*time.Second
	switch m.rnd.IntN(5) {
	case 0:
		return always(time.Millisecond, unreachable)
	case 1, 2:
		return always(15*time.Second, timedOut)
	case 3:
		return func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) {
			r := refused(503)
			if r.RetryAfter = rest; mild {
				r.ResponseCode = 429
			}
			return 5 * time.Millisecond, r
		}
	}
	r := rand.New(rand.NewPCG(m.rnd.Uint64(), 1))
	return func(*subscription.Subscription, *delivery.Job) (time.Duration, *delivery.Result) { // m.mu is held
		switch r.IntN(16) {
		case 0:
			return 15 * time.Second, timedOut()
		case 1:
			return time.Millisecond, unreachable()
		case 2, 3:
			return 3 * time.Second, ok()
		}
		return time.Millisecond, ok()
	}
}

func (m *town) fall(what string, ill answer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sick[what] = ill
}

func (m *town) live() {
	for range 3 {
		for range 150 {
			m.step()
		}
		m.recover()
	}
	m.stop()
}

func (m *town) step() {
	rnd := m.rnd
	i := rnd.IntN(len(m.subs))
	switch op := rnd.IntN(100); {
	case op < 45:
		m.publishSome(i)
	case op < 52:
		m.change(i, inState(grapnelv1.Subscription_STATE_PAUSED))
	case op < 58:
		m.change(i)
	case op < 62:
		m.change(i, on(m.hosts[rnd.IntN(len(m.hosts))]))
	case op < 63:
		old := m.registry.swap(laneOf(m.subs[i]), nil, true)
		m.engine.Changed([]subscription.Change{{Old: old}})
	case op < 64:
		_ = m.kill()
		m.start()
		synctest.Wait()
	case op < 66:
		if _, err := m.engine.CancelLane(m.t.Context(), laneOf(m.subs[i]), "asked for", nil); err != nil {
			m.t.Error(err)
		}
	case op < 73:
		m.fall(m.hosts[rnd.IntN(len(m.hosts))], m.illness())
	case op < 77:
		m.fall(m.hosts[rnd.IntN(len(m.hosts))], nil)
	case op < 78:
		m.fall([]string{"a", "bb"}[rnd.IntN(2)], always(0, unspent))
	case op < 80:
		m.fall([]string{"a", "bb"}[rnd.IntN(2)], nil)
	case op < 95:
		time.Sleep(time.Duration(rnd.IntN(3000)) * time.Millisecond)
	default:
		time.Sleep(time.Duration(rnd.IntN(60)) * time.Second)
	}
}

// recover has all be well, and all that is open must end.
func (m *town) recover() {
	m.mu.Lock()
	clear(m.sick)
	m.mu.Unlock()
	for i, s := range m.subs {
		if is := m.registry.Subscription(laneOf(s)); is == nil || is.State != grapnelv1.Subscription_STATE_ACTIVE {
			m.change(i)
		}
	}
	time.Sleep(soon)
	m.wantEnded(func(st dispatch.Status) bool { return st.Breaker == health.BreakerClosed })
	time.Sleep(longest)
	m.wantEnded(func(dispatch.Status) bool { return true })
	if n := m.engine.InFlightNow(); n != 0 {
		m.t.Errorf("%d slots are held", n)
	}
	if n := m.journal.EventBytes(); n != 0 {
		m.t.Errorf("%d bytes are held", n)
	}
}

// wantEnded checks that nothing is open of those that stand in a certain way.
func (m *town) wantEnded(of func(dispatch.Status) bool) {
	for _, s := range m.subs {
		if n, st := m.journal.OpenOf(laneOf(s)), m.engine.Status(laneOf(s)); n > 0 && of(st) {
			m.t.Errorf("%d are open of %s of %s at %s with %v: %+v", n, s.ID, s.Namespace, s.Proto().GetUri(), s.Batching, st)
		}
	}
}
