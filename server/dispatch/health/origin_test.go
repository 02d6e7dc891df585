package health_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch/health"
)

// guest is an attempt of a lane at the host, which was let in unless the lane passes by.
type guest struct {
	lane          delivery.LaneKey
	entry         health.Entry
	era           uint32
	started, ends time.Time
	signal        health.Signal
}

// host does at random what lanes of several namespaces may do at one, and keeps apart what has happened to judge the Origin
// by.
type host struct {
	t        *testing.T
	rnd      *rand.Rand
	o        health.Origin
	now      time.Time
	flying   []guest
	mode     int
	answered time.Time // last, by anybody
	ever     bool
	failed   []guest // since, of those that started after it
	down     bool
	risen    int // answers since it was last down; -1: it never was
	entries  []time.Time
}

// TestOriginOnRandomTraces holds the promises of Origin.
func TestOriginOnRandomTraces(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 60
	}
	for seed := range seeds {
		h := &host{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), risen: -1}
		for step := range 2000 {
			h.step()
			h.check()
			if t.Failed() {
				t.Fatalf("seed %d, step %d: %+v", seed, step, h.o)
			}
		}
		if h.heal(); t.Failed() {
			t.Fatalf("seed %d, afterwards: %+v", seed, h.o)
		}
	}
}

func (h *host) step() {
	switch op := h.rnd.IntN(1000); {
	case op < 5:
		h.mode = h.rnd.IntN(6)
	case op < 8:
		h.o.Open(h.now)
	case op < 60:
		h.now = h.now.Add(time.Duration(h.rnd.Int64N(int64(5 * second))))
		h.end(false)
	case op < 450:
		h.start(h.rnd.IntN(20) == 0)
	default:
		h.end(true)
	}
}

func (h *host) lane() delivery.LaneKey {
	ns := 1 + h.rnd.IntN(5)
	if h.mode == 5 {
		ns = 1 // one of them alone
	}
	return delivery.LaneKey{Namespace: delivery.NamespaceKey(ns), Subscription: delivery.SubscriptionKey(1 + h.rnd.IntN(10))}
}

func (h *host) party(ns delivery.NamespaceKey) health.Party {
	p := health.Party{Space: ns}
	spaces := make(map[delivery.NamespaceKey]bool)
	for _, g := range h.flying {
		if g.entry == health.Stay {
			continue
		}
		p.Flying++
		spaces[g.lane.Namespace] = true
		if g.lane.Namespace == ns {
			p.Own++
		}
	}
	p.Spaces = len(spaces)
	return p
}

// start has a lane start an attempt, if it is let in or passes by.
func (h *host) start(passes bool) {
	g := guest{lane: h.lane(), started: h.now}
	if !passes {
		p := h.party(g.lane.Namespace)
		g.entry = h.o.Admit(p, h.now)
		h.judgeEntry(g, p)
		if g.entry == health.Stay {
			return
		}
		g.era = h.o.Started(g.entry, h.now)
		h.entries = append(h.entries, h.now)
		if h.rnd.IntN(30) == 0 { // it was not made
			h.o.Returned(g.era)
			return
		}
	}
	soon := h.now.Add(time.Duration(h.rnd.Int64N(int64(200 * time.Millisecond))))
	pick := func(s ...health.Signal) health.Signal { return s[h.rnd.IntN(len(s))] }
	g.signal, g.ends = health.Taken, soon
	switch h.mode {
	case 1, 5:
		g.signal, g.ends = health.TimedOut, h.now.Add(15*second)
	case 2:
		g.signal = health.Unreachable
	case 3:
		g.signal = pick(health.Taken, health.Unreachable, health.Failed, health.Unreachable, health.TimedOut)
	case 4:
		g.signal = pick(health.Ignored, health.Forbidden, health.Unreachable)
	}
	h.flying = append(h.flying, g)
}

func (h *host) judgeEntry(g guest, p health.Party) {
	state, _, probe := h.o.State(h.now)
	heeds := h.down && h.believes(g.lane.Namespace)
	if heeds != h.o.Down(g.lane.Namespace) {
		h.t.Errorf("down for %d: %v, want %v", g.lane.Namespace, !heeds, heeds)
	}
	switch {
	case heeds && g.entry == health.Enter:
		h.t.Error("let in while it is down")
	case heeds && g.entry == health.Probe && (state != health.BreakerHalfOpen || probe.After(h.now)):
		h.t.Errorf("a probe before its time %v", probe)
	case !heeds && g.entry == health.Probe:
		h.t.Error("a probe without need")
	case !heeds && g.entry == health.Stay && h.risen < 0 && h.ever && len(h.failed) == 0:
		h.t.Error("held up although it answers")
	case !heeds && g.entry == health.Stay && p.Own == 0 && p.Spaces < 2:
		h.t.Error("a namespace with nothing in flight is held up")
	}
}

// believes reports whether a namespace must take the host for down.
func (h *host) believes(ns delivery.NamespaceKey) bool {
	seen := make(map[delivery.NamespaceKey]bool)
	for _, f := range h.failed {
		seen[f.lane.Namespace] = true
	}
	return seen[ns] || len(seen) >= 3
}

func (h *host) end(next bool) {
	slices.SortStableFunc(h.flying, func(a, b guest) int { return a.ends.Compare(b.ends) })
	for len(h.flying) > 0 && (next || !h.flying[0].ends.After(h.now)) {
		g := h.flying[0]
		h.flying = h.flying[1:]
		if g.ends.After(h.now) {
			h.now = g.ends
		}
		next = false
		h.ended(g)
	}
}

func (h *host) ended(g guest) {
	was := h.down
	down, up := h.o.Ended(&health.Meeting{
		Lane: g.lane, Entry: g.entry, Era: g.era, Signal: g.signal, Started: g.started, Random: h.rnd.Float64(),
	}, h.now)
	silent := g.signal == health.TimedOut || g.signal == health.Unreachable
	switch {
	case g.signal == health.Ignored || g.signal == health.Forbidden:
		if down || up {
			h.t.Errorf("%d says something: down %v, up %v", g.signal, down, up)
		}
		return
	case !silent:
		h.answered, h.ever, h.failed, h.down = h.now, true, nil, false
		if was {
			h.risen = 0
		} else if h.risen >= 0 {
			if h.risen++; h.risen >= 64 {
				h.risen = -1
			}
		}
	case g.started.After(h.answered):
		h.failed = append(h.failed, g)
		lanes := make(map[delivery.LaneKey]bool)
		for _, f := range h.failed {
			lanes[f.lane] = true
		}
		h.down = h.down || len(h.failed) >= 5 && len(lanes) >= 2
	}
	if down != (h.down && !was) || up != (was && !h.down) {
		h.t.Errorf("told down %v and up %v after %d failures in a row; was down: %v", down, up, len(h.failed), was)
	}
}

func (h *host) check() {
	state, since, probe := h.o.State(h.now)
	if (state == health.BreakerClosed) == h.down || since.IsZero() == h.down {
		h.t.Errorf("state %d since %v, want down: %v", state, since, h.down)
	}
	if h.down && probe.Sub(h.now) > 32*second {
		h.t.Errorf("the next probe is in %v", probe.Sub(h.now))
	}
	probes := 0
	for _, g := range h.flying {
		if g.entry == health.Probe && h.down && !g.started.Before(since) {
			probes++
		}
	}
	if probes > 1 {
		h.t.Errorf("%d probes at once", probes)
	}
	if h.down && h.o.Calm() {
		h.t.Error("calm while it is down")
	}
	// While it has answered nobody: eight, one for each other namespace, and one each quarter of a second.
	if !h.ever && !h.down && len(h.entries) > 0 {
		most := 8 + 4 + int(h.now.Sub(h.entries[0])/(250*time.Millisecond)) + 1
		if n := h.party(1).Flying; n > most {
			h.t.Errorf("%d attempts at a host that has not answered anybody, in %v", n, h.now.Sub(h.entries[0]))
		}
	}
	if h.party(1).Flying == 0 {
		until := h.now
		if h.down {
			until = laterOf(until, probe)
		}
		for ns := range delivery.NamespaceKey(5) {
			if h.o.Admit(h.party(ns+1), until) == health.Stay {
				h.t.Errorf("stuck for %d at %v: nothing is in flight, and nothing may start", ns+1, until)
			}
		}
	}
}

func laterOf(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// heal has the host be well.
func (h *host) heal() {
	h.mode = 0
	for range 2000 {
		h.start(false)
		h.end(true)
		if _, _, probe := h.o.State(h.now); probe.After(h.now) && len(h.flying) == 0 {
			h.now = probe
		}
	}
	if !h.o.Calm() {
		h.t.Error("it is well, and something is held against it")
	}
}

func TestOneNamespaceClosesNoHostForOthers(t *testing.T) {
	var o health.Origin
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	fail := func(ns delivery.NamespaceKey, lane delivery.SubscriptionKey) {
		now = now.Add(second)
		o.Ended(&health.Meeting{
			Lane: delivery.LaneKey{Namespace: ns, Subscription: lane}, Signal: health.TimedOut, Started: now.Add(-time.Millisecond), Random: 0.5,
		}, now)
	}
	for i := range 100 {
		fail(1, delivery.SubscriptionKey(1+i%10))
	}
	if !o.Down(1) || o.Down(2) {
		t.Errorf("down for who has seen it fail: %v, for another: %v", o.Down(1), o.Down(2))
	}
	fail(3, 1)
	if !o.Down(3) || o.Down(2) {
		t.Errorf("after two namespaces, down for the second: %v, for another: %v", o.Down(3), o.Down(2))
	}
	if fail(4, 1); !o.Down(2) {
		t.Error("three namespaces have seen it fail, and others do not believe it")
	}
	o.Ended(&health.Meeting{Lane: delivery.LaneKey{Namespace: 2, Subscription: 1}, Signal: health.Failed, Started: now}, now)
	if o.Down(1) || o.Down(2) {
		t.Error("it has answered somebody, and is down")
	}
}

func TestOneLaneClosesNoHost(t *testing.T) {
	var o health.Origin
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for range 1000 {
		now = now.Add(second)
		o.Ended(&health.Meeting{
			Lane: delivery.LaneKey{Namespace: 1, Subscription: 1}, Signal: health.Unreachable, Started: now.Add(-time.Millisecond), Random: 0.5,
		}, now)
	}
	if o.Down(1) {
		t.Error("down, and only one lane has seen it fail")
	}
}
