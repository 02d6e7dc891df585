package delivery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// What replays do to the model. Which of what they select a step makes is learnt from the journal, and judged: nothing
// that was not to be sent, nothing twice, and at the end all that has been as it was since the replay was made.

// Kinds of replays.
const (
	replayOwn = iota
	replayElsewhere
	replayAgain
	replayOfMissing
	replayKinds
)

// sentTo is an event that a replay has sent to a subscription.
type sentTo struct {
	event *modelEvent
	to    SubscriptionKey
}

type modelReplay struct {
	*Replay
	kind    int
	to      SubscriptionKey // of those that go elsewhere
	ordered bool
	// since is the step that the model was at when the replay was made.
	since int
	sent  map[sentTo]bool
	made  int64
	done  [2]bool
	ended time.Time
}

func (r *modelReplay) selects(s State) bool { return s == Exhausted || s == Skipped }

// target is whom the replay sends to; sub is whom a delivery that it selects was for.
func (r *modelReplay) target(name string, sub SubscriptionKey) Target {
	t := Target{Subscription: name, UID: uid(int(sub)), MaxAttempts: 2, MaxAge: time.Hour, Ordered: r.ordered}
	if r.to != 0 {
		t.Subscription, t.UID = fmt.Sprint("sub-", r.to), uid(int(r.to))
	}
	return t
}

func (r *modelReplay) picker() *Picker {
	p := &Picker{Namespace: r.Namespace, Until: r.Spec.Until, To: r.to, Again: r.kind == replayAgain}
	if r.kind == replayOfMissing {
		p.Missing = r.to
		p.Event = func(*Event) (Target, Verdict) { return r.target("", r.to), Take }
		return p
	}
	p.States = []State{Exhausted, Skipped}
	p.Delivery = func(d *Delivery) (Target, Verdict) { return r.target(d.Subscription, d.ID.Subscription), Take }
	return p
}

const modelReplaysAtOnce = 3

// replay has a replay made, step, be cancelled, or come to its end.
func (m *model) replay() {
	switch n := m.rng.IntN(8); {
	case n == 0 || len(m.replays) == 0:
		m.createReplay()
	case n == 1:
		if r := m.anyReplay(); r != nil {
			m.endReplay(r, ReplayCancelled)
		}
	case n == 2:
		if r := m.createReplay(); r != nil {
			m.countReplay(r)
		}
	default:
		if r := m.anyReplay(); r != nil {
			m.stepReplay(r)
		}
	}
}

// anyReplay is one that goes on.
func (m *model) anyReplay() *modelReplay {
	var going []*modelReplay
	for _, r := range m.replays {
		if r.ended.IsZero() {
			going = append(going, r)
		}
	}
	if len(going) == 0 {
		return nil
	}
	return going[m.rng.IntN(len(going))]
}

func (m *model) createReplay() *modelReplay {
	r := &modelReplay{kind: m.rng.IntN(replayKinds), ordered: m.rng.IntN(3) > 0, since: m.step, sent: map[sentTo]bool{}}
	if r.kind == replayElsewhere || r.kind == replayOfMissing {
		r.to = SubscriptionKey(1 + m.rng.IntN(modelLanes))
	}
	m.nextReplay++
	want := &Replay{Namespace: m.space(), ID: fmt.Sprint("job-", m.nextReplay), Spec: ReplaySpec{
		Filter: fmt.Sprint(r.kind), Until: m.b.clock.now().Add(time.Millisecond),
	}}
	going := 0
	for _, k := range m.replays {
		if k.Namespace == want.Namespace && k.ended.IsZero() {
			going++
		}
	}
	made, err := m.b.CreateReplay(context.Background(), want, modelReplaysAtOnce)
	m.say("replay %s of kind %d to %d of %d: %v", want.ID, r.kind, r.to, want.Namespace, err)
	if going >= modelReplaysAtOnce {
		if !errors.Is(err, ErrTooManyReplays) {
			m.fail("a replay beside %d: %v", going, err)
		}
		return nil
	}
	if err != nil {
		m.fail("%v", err)
	}
	r.Replay = made
	m.replays = append(m.replays, r)
	return r
}

// stepReplay makes one step.
func (m *model) stepReplay(r *modelReplay) {
	p := uint16(m.rng.IntN(2))
	m.visible()
	at, err := m.b.partitions[p].cursor(m.b.db, r.Namespace, r.Key) // it may have got there just before a crash
	if err != nil {
		m.fail("%v", err)
	}
	a, err := m.b.AdvanceReplay(context.Background(), r.Replay, p, r.picker(), 1+m.rng.IntN(4))
	m.say("step of %s in %d: %+v %v", r.ID, p, a, err)
	if err != nil {
		m.fail("%v", err)
	}
	before := r.made
	if m.learn(r); !at.done {
		m.firm()
	}
	if a.Created != r.made-before {
		m.fail("%s says that it has made %d, and has made %d", r.ID, a.Created, r.made-before)
	}
	if r.done[p] = a.Done; r.done[0] && r.done[1] {
		m.complete(r)
		m.endReplay(r, ReplaySucceeded)
	}
}

// countReplay compares what a new replay is said to make with what it makes.
func (m *model) countReplay(r *modelReplay) {
	count, err := m.b.count(r.picker())
	if err != nil {
		m.fail("count of %s: %v", r.ID, err)
	}
	for r.ended.IsZero() {
		m.stepReplay(r)
	}
	if got, err := m.b.Replay(r.Namespace, r.Key); err != nil || got.Counts != count {
		m.fail("%s was counted as %+v, and is %+v, %v", r.ID, count, got, err)
	}
}

func (m *model) endReplay(r *modelReplay, state ReplayState) {
	got, err := m.b.EndReplay(context.Background(), r.Namespace, r.Key, state, "")
	m.say("%s ends: %+v %v", r.ID, got, err)
	if err != nil || got.State != state || got.Counts.Created != r.made {
		m.fail("end of %s, which has made %d: %+v, %v", r.ID, r.made, got, err)
	}
	r.ended = m.b.clock.now()
}

// learn has the model know what a replay has made, or opened again, since it was asked last.
func (m *model) learn(r *modelReplay) {
	if r.kind == replayAgain {
		m.learnReopened(r)
	} else {
		m.learnMade(r)
	}
	got, err := m.b.Replay(r.Namespace, r.Key)
	if err != nil || got.State.Ended() || got.Counts.Created != r.made {
		m.fail("%s has made %d: %+v, %v", r.ID, r.made, got, err)
	}
}

func (m *model) learnMade(r *modelReplay) {
	var made []*Delivery
	for _, d := range all(m.t, m.b, Query{Namespace: r.Namespace, Limit: 1000}) {
		if d.ReplayJob == r.ID && m.deliveries[modelKey{r.Namespace, d.ID}] == nil {
			made = append(made, d)
		}
	}
	slices.SortFunc(made, func(a, b *Delivery) int {
		return cmp.Or(cmp.Compare(a.ID.Partition, b.ID.Partition), cmp.Compare(a.ID.Seq, b.ID.Seq))
	})
	m.step++
	for _, got := range made {
		i := slices.IndexFunc(m.events, func(e *modelEvent) bool { return e.UID == got.EventUID })
		if i < 0 || m.events[i].gone {
			m.fail("%s has sent %+v of no event", r.ID, got)
		}
		e := m.events[i]
		key := sentTo{e, got.ID.Subscription}
		if r.sent[key] || r.to != 0 && key.to != r.to || got.Trigger != ByReplay || !m.mayHaveSent(r, key) {
			m.fail("%s has sent %+v", r.ID, got)
		}
		r.sent[key] = true
		r.made++
		d := &modelDelivery{
			key: modelKey{r.Namespace, got.ID}, event: e, again: true, replay: r.Key, made: InstantOf(got.CreateTime),
			expire: InstantOf(got.Expire),
		}
		s := standsAt{state: Pending, max: 2, epoch: 1}
		if d.wasAhead = e.wasAhead; r.ordered {
			d.order = orderKeyOf(e.OrderingKey)
		}
		if s.waits = d.order != 0 && m.busy(d.key.lane(), d.order); !s.waits {
			s.due = d.made
		}
		d.versions = []version{{m.step, s}}
		m.deliveries[d.key] = d
		e.deliveries = append(e.deliveries, d)
		if !s.waits {
			m.tell("timed", d.key, d.row())
		}
	}
}

// mayHaveSent reports whether there is what a replay selects for what it has sent.
func (m *model) mayHaveSent(r *modelReplay, k sentTo) bool {
	if k.event.purged {
		return false
	}
	if r.kind == replayOfMissing {
		return !slices.ContainsFunc(k.event.deliveries, func(d *modelDelivery) bool {
			return d.key.Subscription == k.to && (d.again || d.now().state != Skipped)
		})
	}
	return slices.ContainsFunc(k.event.deliveries, func(d *modelDelivery) bool {
		return !d.gone && r.selects(d.now().state) && (r.to != 0 || d.key.Subscription == k.to)
	})
}

func (m *model) learnReopened(r *modelReplay) {
	var ended []*modelDelivery
	for _, d := range m.deliveries {
		if d.key.ns == r.Namespace && !d.gone && r.selects(d.now().state) {
			ended = append(ended, d)
		}
	}
	slices.SortFunc(ended, func(a, b *modelDelivery) int {
		return cmp.Or(cmp.Compare(a.key.Partition, b.key.Partition), cmp.Compare(a.key.Seq, b.key.Seq), cmp.Compare(a.key.Subscription, b.key.Subscription))
	})
	for _, d := range ended {
		if got, there := m.look(d); there && got.state == Scheduled {
			d.replay = r.Key
			m.reopened(d, got.due)
			r.made++
		}
	}
}

// complete reports what a replay has left out that was to be sent since it was made.
func (m *model) complete(r *modelReplay) {
	for _, e := range m.events {
		if e.Namespace != r.Namespace || e.gone || e.purged || e.wasAhead || e.since > r.since || e.Seq >= seqAt(r.Spec.Until) {
			continue
		}
		had := false
		for _, d := range e.deliveries {
			unchanged := !d.gone && !d.wasAhead && d.key.Seq < seqAt(r.Spec.Until) && len(d.versions) == 1 && d.versions[0].step <= r.since
			to := cmp.Or(r.to, d.key.Subscription)
			had = had || d.key.Subscription == r.to && (!unchanged || d.again || d.now().state != Skipped)
			if r.kind != replayOfMissing && unchanged && r.selects(d.now().state) && (r.kind == replayAgain || !r.sent[sentTo{e, to}]) {
				m.fail("%s has left out %v, which is %+v", r.ID, d.key, *d.now())
			}
		}
		if r.kind == replayOfMissing && !had {
			m.fail("%s has left out %s", r.ID, e.ID)
		}
	}
}

// checkReplays compares what of replays is on record, and open.
func (m *model) checkReplays() {
	for ns := acme; ns < acme+modelSpaces; ns++ {
		known, err := m.b.Replays(ns)
		if err != nil {
			m.fail("%v", err)
		}
		var want []*modelReplay
		for _, r := range m.replays {
			if r.Namespace == ns {
				want = append(want, r)
			}
		}
		if !slices.EqualFunc(known, want, func(a *Replay, b *modelReplay) bool {
			return a.ID == b.ID && a.State.Ended() == !b.ended.IsZero() && (!a.State.Ended() || a.Counts.Created == b.made)
		}) {
			m.fail("replays of %d: %v, want %v", ns, known, want)
		}
	}
	if !m.b.Counted() {
		return
	}
	open := map[jobKey]int64{}
	for _, d := range m.deliveries {
		if d.replay != 0 && d.open() {
			open[jobKey{d.key.ns, d.replay}]++
		}
	}
	for _, r := range m.replays {
		if got, want := m.b.ReplayOpen(r.Namespace, r.Key), open[jobKey{r.Namespace, r.Key}]; got != want {
			m.fail("%d deliveries of %s are open, want %d", got, r.ID, want)
		}
	}
}

// eraseReplays is what a sweep does to replays.
func (m *model) eraseReplays() {
	before := func(ns NamespaceKey) time.Time {
		if m.keep[ns] <= 0 {
			return time.Time{}
		}
		return m.b.clock.now().Add(-m.keep[ns])
	}
	if err := m.b.EraseReplays(context.Background(), before); err != nil {
		m.fail("%v", err)
	}
	m.b.flush()
	m.firm()
	m.replays = slices.DeleteFunc(m.replays, func(r *modelReplay) bool {
		return !r.ended.IsZero() && r.ended.Before(before(r.Namespace))
	})
}
