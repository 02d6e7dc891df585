package delivery

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

//nolint:gochecknoglobals // test flags
var (
	modelSeeds = flag.Int("model.seeds", 100, "random lives of a journal that are held against the model")
	modelFirst = flag.Int("model.first", 0, "the first seed")
	modelSteps = flag.Int("model.steps", 60, "how long each life is")
)

// The journal does what a plain list of deliveries would do, whatever comes in which order: events, attempts that
// end in time or too late, callers' edits, namespaces that go, sweeps, refused commits, clocks that are wrong,
// restarts and power losses.
func TestJournalFollowsItsModel(t *testing.T) {
	seeds := *modelSeeds
	if testing.Short() {
		seeds = min(seeds, 2)
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(*modelFirst+seed), func(t *testing.T) {
			t.Parallel()
			newModel(t, uint64(*modelFirst+seed)).run(*modelSteps)
		})
	}
}

// standsAt is what the model knows of a delivery, or what the journal shows of it.
type standsAt struct {
	state    State
	attempts int
	max      int
	due      Instant
	epoch    uint32 // while open
	history  string // outcomes, first to last, a digit each
	waits    bool   // for the turn of its ordering key
	blocks   bool   // it has failed and keeps its turn
	gap      int
}

// version is how a delivery stood after a step.
type version struct {
	step int
	standsAt
}

type modelKey struct {
	ns NamespaceKey
	ID
}

func (k modelKey) lane() LaneKey { return LaneKey{k.ns, k.Subscription} }

// modelDelivery has versions since the last that is certainly durable.
type modelDelivery struct {
	key      modelKey
	event    *modelEvent
	order    OrderKey
	expire   Instant
	versions []version
	gone     bool
	// again: a replay has made it; made is when. replay has made or reopened it.
	again, wasAhead, mayGo bool
	attemptsMayGo          bool // it had ended, and was older than its namespace keeps attempts
	made                   Instant
	replay                 uint64
}

// may: a sweep has taken it for too old.
func (d *modelDelivery) may() bool { return d.mayGo || !d.again && d.event.mayGo }

func (d *modelDelivery) now() *standsAt { return &d.versions[len(d.versions)-1].standsAt }

func (d *modelDelivery) at(step int) standsAt {
	i := len(d.versions) - 1
	for i > 0 && d.versions[i].step > step {
		i--
	}
	return d.versions[i].standsAt
}

func (d *modelDelivery) open() bool { return !d.gone && !d.now().state.Final() }

// stays: retention leaves it alone.
func (d *modelDelivery) stays() bool { return d.open() || !d.gone && d.now().blocks }

// hasTurn: it keeps its ordering key busy.
func (d *modelDelivery) hasTurn() bool {
	return d.order != 0 && (d.open() && !d.now().waits || !d.gone && d.now().blocks)
}

// row is meaningless while the delivery waits for its ordering key.
func (d *modelDelivery) row() Row {
	s := d.now()
	r := Row{Seq: d.key.Seq, Epoch: s.epoch}
	if s.due != 0 {
		r.Kind, r.Due = Timer, s.due
	}
	return r
}

type modelEvent struct {
	*Event
	deliveries []*modelDelivery
	since      int  // the step that stored it
	wasAhead   bool // of the clock, at some start: retention has another measure for it
	mayGo      bool // a sweep has taken it for too old
	idMayGo    bool // and its id
	purged     bool // of its payload
	// mayBePurged: it has been older than its namespace keeps payloads
	mayBePurged bool
	kept        bool // a sweep has found it open
	gone        bool
}

type model struct {
	t     *testing.T
	b     *bench
	fs    *vfs.MemFS
	rng   *rand.Rand
	trace []string

	step, durable int
	events        []*modelEvent
	deliveries    map[modelKey]*modelDelivery
	held          map[modelKey]Job
	keep          map[NamespaceKey]time.Duration
	parts         map[NamespaceKey]Parts
	want          []told // what the follower is to be told of the current step
	nextID        int
	replays       []*modelReplay
	nextReplay    int
	watching      *modelWatch
	learns        *modelReplay // what it has done before a crash is to be seen
	lastSweep     time.Time    // of this process

	refuse atomic.Bool
	crash  atomic.Int32 // at which commit from now on the disk is copied
	clone  atomic.Pointer[vfs.MemFS]
}

func newModel(t *testing.T, seed uint64) *model {
	m := &model{
		t: t, fs: vfs.NewCrashableMem(), rng: rand.New(rand.NewPCG(seed, 11)),
		deliveries: map[modelKey]*modelDelivery{}, held: map[modelKey]Job{}, keep: map[NamespaceKey]time.Duration{}, parts: map[NamespaceKey]Parts{},
	}
	m.b = &bench{t: t, clock: newClock()}
	m.b.opts = Options{Dir: "journal", Partitions: 2, CacheBytes: 16 << 20, BallastBytes: -1, fs: m.fs, now: m.b.clock.now, refuse: m.log}
	m.open()
	return m
}

// log is the replicated log: it refuses, and it is where the power goes.
func (m *model) log(uint16) bool {
	if m.crash.Load() > 0 && m.crash.Add(-1) == 0 {
		m.clone.Store(m.b.opts.fs.(*vfs.MemFS).CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(uint64(m.step), 3))}))
	}
	return m.refuse.Swap(false)
}

func (m *model) fail(format string, args ...any) {
	m.t.Helper()
	m.t.Fatalf("%s\nafter:\n  %s", fmt.Sprintf(format, args...), strings.Join(m.trace[max(0, len(m.trace)-40):], "\n  "))
}

func (m *model) say(format string, args ...any) {
	m.trace = append(m.trace, fmt.Sprintf("%d %s: ", m.step, m.b.clock.now().Format(time.DateTime))+fmt.Sprintf(format, args...))
}

func (m *model) open() {
	m.b.open()
	m.b.hold = m.b.Hold
	m.lastSweep = time.Time{}
	now := m.b.clock.now()
	for _, e := range m.events {
		e.wasAhead = e.wasAhead || seqTime(e.Seq).After(now.Add(maxAhead))
	}
	for _, d := range m.deliveries {
		d.wasAhead = d.wasAhead || d.event.wasAhead || seqTime(d.key.Seq).After(now.Add(maxAhead))
	}
}

func (m *model) run(steps int) {
	defer func() { _ = m.b.Close() }()
	ops := []struct {
		weight int
		do     func()
	}{
		{30, m.publish},
		{35, m.settleSome},
		{12, m.edit},
		{8, m.readSome},
		{12, m.replay},
		{8, m.watch},
		{2, m.cancelLane},
		{2, m.unblock},
		{3, m.purge},
		{1, m.drop},
		{5, m.sweep},
		{4, m.refused},
		{6, m.wait},
		{4, m.restart},
		{5, m.lose},
		{3, m.loseMeanwhile},
	}
	total := 0
	for _, op := range ops {
		total += op.weight
	}
	for range steps {
		n := m.rng.IntN(total)
		for _, op := range ops {
			if n -= op.weight; n < 0 {
				op.do()
				break
			}
		}
		m.check(false)
	}
	m.restart()
	m.check(true)
}

// set notes how a delivery stands from this step on.
func (m *model) set(d *modelDelivery, s standsAt) {
	m.step++
	d.versions = append(d.versions, version{m.step, s})
}

// firm notes that all so far is durable.
func (m *model) firm() {
	m.durable = m.step
	for _, d := range m.deliveries {
		d.versions = d.versions[len(d.versions)-1:]
	}
}

// also notes how another delivery stands from the same step on.
func (m *model) also(d *modelDelivery, s standsAt) {
	d.versions = append(d.versions, version{m.step, s})
}

// ofKey are the deliveries of an ordering key of a lane.
func (m *model) ofKey(lane LaneKey, key OrderKey) (all []*modelDelivery) {
	for _, d := range m.deliveries {
		if d.key.lane() == lane && d.order == key {
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(a, b *modelDelivery) int { return cmp.Compare(a.key.Seq, b.key.Seq) })
	return all
}

func (m *model) busy(lane LaneKey, key OrderKey) bool {
	return slices.ContainsFunc(m.ofKey(lane, key), (*modelDelivery).hasTurn)
}

// waiting is the first delivery of a key that waits for its turn, of those behind a sequence.
func (m *model) waiting(d *modelDelivery, behind uint64) *modelDelivery {
	for _, w := range m.ofKey(d.key.lane(), d.order) {
		if w != d && w.open() && w.now().waits && w.key.Seq > behind {
			return w
		}
	}
	return nil
}

// pass gives the turn that d has had to the next one, in the same step.
func (m *model) pass(d *modelDelivery, gap int) {
	next := m.waiting(d, 0)
	if d.order == 0 || next == nil {
		return
	}
	s, now := *next.now(), m.b.clock.now()
	s.waits, s.gap = false, s.gap+gap
	switch at := InstantOf(next.event.DeliverTime); {
	case s.state == Scheduled:
		s.due = InstantOf(now)
	case next.again:
		s.due = next.made
	case at > InstantOf(now) && next.event.DeliverTime.After(next.event.AcceptTime):
		s.due = at
	}
	m.also(next, s)
	m.tell("timed", next.key, next.row())
}

func (m *model) tell(what string, key modelKey, row Row) {
	if what == "edited" {
		row = Row{Seq: row.Seq, Epoch: row.Epoch}
	}
	m.want = append(m.want, told{what: what, lane: key.lane(), partition: key.Partition, row: row})
}

const modelSpaces, modelLanes = 2, 4

func (m *model) space() NamespaceKey { return acme + NamespaceKey(m.rng.IntN(modelSpaces)) }

// publish appends some events: new ones, known ones, others under a known id.
func (m *model) publish() {
	var pubs []Publication
	for range 1 + m.rng.IntN(3) {
		id := m.rng.IntN(m.nextID + 3)
		if m.rng.IntN(3) > 0 {
			m.nextID++
			id = m.nextID
		}
		pub := publication(fmt.Sprint("e", id))
		pub.Event.Namespace = m.space()
		if m.rng.IntN(5) == 0 {
			pub.Event.Source = "//elsewhere"
		}
		if m.rng.IntN(20) == 0 {
			pub.Event.ContentHash[3]++
		}
		if m.rng.IntN(2) == 0 {
			pub.Event.OrderingKey = fmt.Sprint("key-", m.rng.IntN(3))
		}
		if m.rng.IntN(4) == 0 {
			pub.Event.DeliverTime = m.b.clock.now().Add(time.Duration(m.rng.IntN(100)-10) * time.Hour)
		}
		name := ""
		if m.rng.IntN(3) == 0 {
			name = strings.Repeat("long", maxWithin/4) // the targets lie apart
		}
		for _, sub := range m.rng.Perm(modelLanes)[:m.rng.IntN(modelLanes+1)] {
			pub.Targets = append(pub.Targets, Target{
				Subscription: fmt.Sprint(name, "sub-", sub+1), UID: uid(sub + 1), MaxAttempts: 1 + m.rng.IntN(3), MaxAge: time.Duration(m.rng.IntN(50)) * time.Hour,
				Skip: m.rng.IntN(10) == 0, Ordered: m.rng.IntN(4) > 0,
			})
		}
		pubs = append(pubs, pub)
	}
	// In one round with them, perhaps.
	settles := m.rng.IntN(3) == 0
	if settles {
		m.queueSome(0)
		m.queueSome(1)
	}
	results := m.b.Append(context.Background(), pubs)
	for i, r := range results {
		m.published(&pubs[i], r)
	}
	if settles {
		m.b.flush()
		m.firm()
	}
}

func (m *model) published(pub *Publication, r AppendResult) {
	e, now := pub.Event, m.b.clock.now()
	m.say("publish %s %q to %d in %d: %v %v", e.ID, e.Source, len(pub.Targets), e.Namespace, r.Duplicate, r.Err)
	var known *modelEvent
	certain := true
	for _, k := range m.events {
		if k.Namespace == e.Namespace && k.ID == e.ID && k.Source == e.Source && k.OrderingKey == e.OrderingKey {
			known = k // the last accepted
			certain = certain && k.AcceptTime.Before(now.Add(dedupWindow)) && !k.wasAhead && !k.idMayGo
		}
	}
	taken := known != nil && now.Sub(known.AcceptTime) <= dedupWindow
	switch {
	case r.Err != nil:
		if !errors.Is(r.Err, ErrEventConflict) || known == nil || certain && (known.ContentHash == e.ContentHash || !taken) {
			m.fail("%s: %v", e.ID, r.Err)
		}
		return
	case r.Duplicate:
		if known == nil || certain && !taken || r.Event.ContentHash != e.ContentHash {
			m.fail("%s: a duplicate of %+v", e.ID, r.Event)
		}
		return
	case certain && taken:
		m.fail("%s is stored again, first accepted %v", e.ID, known.AcceptTime)
	}
	me := &modelEvent{Event: e}
	for _, k := range m.events {
		if k.Partition == e.Partition && k.Seq == e.Seq {
			m.fail("%s and %s have one sequence", k.ID, e.ID)
		}
	}
	m.events = append(m.events, me)
	start, deferred := now, e.DeliverTime.After(now)
	if deferred {
		start = e.DeliverTime
	}
	m.step++
	me.since = m.step
	for _, t := range pub.Targets {
		d := &modelDelivery{key: modelKey{e.Namespace, ID{e.Seq, e.Partition, t.UID.SubscriptionKey()}}, event: me, expire: InstantOf(start.Add(maxAge(t.MaxAge, 0)))}
		s := standsAt{state: Pending, max: t.MaxAttempts, epoch: 1}
		switch {
		case t.Skip:
			s.state, s.epoch = Skipped, 0
		case t.Ordered && e.OrderingKey != "" && m.busy(d.key.lane(), orderKeyOf(e.OrderingKey)):
			s.waits = true
		case deferred:
			s.due = InstantOf(start)
		}
		if t.Ordered {
			d.order = orderKeyOf(e.OrderingKey)
		}
		d.versions = []version{{m.step, s}}
		m.deliveries[d.key] = d
		me.deliveries = append(me.deliveries, d)
		if !t.Skip && !s.waits {
			what := "offer"
			if deferred {
				what = "timed"
			}
			m.tell(what, d.key, d.row())
		}
	}
	m.firm()
}

// take holds what was offered.
func (m *model) take() {
	for _, job := range m.b.jobs() {
		m.hold(job)
	}
}

// hold takes a job over whose event is held, unless the delivery has one already.
func (m *model) hold(job Job) {
	key := modelKey{job.Event.Namespace, job.ID}
	if _, held := m.held[key]; held || m.rng.IntN(10) == 0 {
		m.b.Release(job.Event)
		return
	}
	m.held[key] = job
}

// letGo gives a job up.
func (m *model) letGo(key modelKey) {
	m.b.Release(m.held[key].Event)
	delete(m.held, key)
}

// readSome takes jobs from the disk.
func (m *model) readSome() {
	lane, partition := LaneKey{m.space(), SubscriptionKey(1 + m.rng.IntN(modelLanes))}, uint16(m.rng.IntN(2))
	for _, kind := range []Kind{FIFO, Timer} {
		r, err := m.b.Read(lane, partition, kind, Pos{Some: true}, InstantOf(m.b.clock.now().Add(100*time.Hour)), 1+m.rng.IntN(20), 1+m.rng.IntN(5000))
		if err != nil || len(r.Aside) > 0 {
			m.fail("read: %v, %v", err, r.Aside)
		}
		for _, job := range r.Jobs {
			m.hold(job)
		}
	}
}

func (m *model) anyHeld(partition uint16) (keys []modelKey) {
	for key := range m.held {
		if key.Partition == partition {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b modelKey) int {
		return cmp.Or(cmp.Compare(a.ns, b.ns), cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.Subscription, b.Subscription))
	})
	m.rng.Shuffle(len(keys), func(a, b int) { keys[a], keys[b] = keys[b], keys[a] })
	return keys
}

// settleSome has attempts end, in one round mostly.
func (m *model) settleSome() {
	m.queueSome(uint16(m.rng.IntN(2)))
	m.visible()
}

// visible has what is queued committed, not durably.
func (m *model) visible() {
	for _, p := range m.b.partitions {
		if err := p.do(context.Background(), func(*commit) error { return nil }); err != nil {
			m.fail("%v", err)
		}
	}
}

func (m *model) queueSome(partition uint16) {
	keys := m.anyHeld(partition)
	for _, key := range keys[:min(len(keys), 1+m.rng.IntN(6))] {
		m.settle(key)
	}
}

func (m *model) settle(key modelKey) {
	job, now := m.held[key], m.b.clock.now()
	var step Step
	outcome := OutcomeRetryable
	switch m.rng.IntN(6) {
	case 0, 1, 2:
		step, outcome = Step{State: Succeeded}, OutcomeSucceeded
	case 3, 4:
		step = Step{State: Scheduled, Due: now.Add(time.Duration(m.rng.IntN(7200)) * time.Second)}
	case 5:
		step = Step{State: Exhausted, Reason: "enough", Block: m.rng.IntN(2) == 0}
	}
	var a *Attempt
	if step.State == Succeeded || m.rng.IntN(8) > 0 {
		a = attemptAt(job.Attempts+1, outcome, 500, now)
	}
	m.say("settle %v epoch %d: %d, attempt %v", key, job.Epoch, step.State, a != nil)
	m.settled(key, &job, step, a)
	m.b.settle(job, step, a)
	m.letGo(key)
}

// settled is what a settle does to the model.
func (m *model) settled(key modelKey, job *Job, step Step, a *Attempt) {
	d := m.deliveries[key]
	done := func() { m.tell("settled", key, job.Row()) }
	if d == nil || d.gone {
		done()
		return
	}
	s := *d.now()
	count := func() {
		if a != nil {
			s.attempts++
			s.history += string('0' + rune(a.Outcome))
		}
	}
	row := d.row()
	current := d.open() && !s.waits && row == job.Row()
	switch {
	case current || a != nil && d.open() && step.State == Succeeded:
		if !current && !s.waits {
			m.tell("edited", key, row)
		}
		done()
		count()
		hadTurn := !s.waits
		s.waits = false
		if s.state, s.due = step.State, 0; step.State == Scheduled {
			s.epoch++
			s.due = InstantOf(step.Due)
			break
		}
		s.blocks = step.Block && d.order != 0
		m.set(d, s)
		switch {
		case !hadTurn || s.blocks:
		case s.state == Succeeded:
			m.pass(d, 0)
		default:
			m.pass(d, s.gap+1)
		}
		return
	case a == nil:
		done()
		return
	case !d.open() || s.waits:
		done()
		count()
		m.set(d, s)
		return
	default:
		m.tell("edited", key, row)
		done()
		count()
		s.epoch++
		s.state, s.due = Scheduled, max(row.Due+1, InstantOf(m.b.clock.now()))
	}
	m.set(d, s)
	if d.open() && s.epoch != row.Epoch {
		m.tell("timed", key, d.row())
	}
}

func (m *model) anyDelivery() *modelDelivery {
	keys := slices.SortedFunc(maps.Keys(m.deliveries), func(a, b modelKey) int {
		return cmp.Or(cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.Partition, b.Partition), cmp.Compare(a.ns, b.ns), cmp.Compare(a.Subscription, b.Subscription))
	})
	if len(keys) == 0 {
		return nil
	}
	if len(keys) > 20 && m.rng.IntN(2) == 0 {
		keys = keys[len(keys)-20:]
	}
	return m.deliveries[keys[m.rng.IntN(len(keys))]]
}

// edit has a caller cancel or retry a delivery.
func (m *model) edit() {
	d := m.anyDelivery()
	if d == nil {
		return
	}
	if m.rng.IntN(3) == 0 {
		m.queueSome(d.key.Partition) // in one round with it, perhaps
	}
	if m.rng.IntN(2) == 0 {
		m.cancel(d)
	} else {
		m.retry(d)
	}
	m.visible()
}

func (m *model) cancel(d *modelDelivery) {
	_, err := m.b.Cancel(context.Background(), d.key.lane(), d.key.ID, "no more")
	m.say("cancel %v: %v", d.key, err)
	s := *d.now()
	switch {
	case d.gone && errors.Is(err, ErrNotFound), !d.gone && s.state == Cancelled && err == nil,
		!d.gone && s.state != Cancelled && s.state.Final() && !s.blocks && errors.Is(err, ErrFinal):
		return
	case d.gone || err != nil || s.state.Final() && !s.blocks:
		m.fail("cancel of %+v: %v", s, err)
	}
	m.cancels(d)
}

// cancels is what becomes of a delivery that is open, or blocks its key, when it is cancelled.
func (m *model) cancels(d *modelDelivery) {
	s := *d.now()
	if d.open() && !s.waits {
		m.tell("edited", d.key, d.row())
	}
	waited := s.waits
	s.state, s.due, s.waits, s.blocks = Cancelled, 0, false, false
	m.set(d, s)
	if !waited {
		m.pass(d, s.gap+1)
	} else if next := m.waiting(d, d.key.Seq); next != nil {
		n := *next.now()
		n.gap += s.gap + 1
		m.also(next, n)
	}
	m.firm()
}

// purge takes the payload of an event away.
func (m *model) purge() {
	if len(m.events) == 0 {
		return
	}
	e := m.events[m.rng.IntN(len(m.events))]
	if m.rng.IntN(3) == 0 {
		m.queueSome(e.Partition) // in one round with it, perhaps
	}
	m.visible()
	n, err := m.b.PurgeEvent(context.Background(), e.Namespace, e.Partition, e.Seq)
	m.say("purge %s of %d: %+v %v", e.UID, e.Namespace, n, err)
	if e.gone {
		if !errors.Is(err, ErrNotFound) {
			m.fail("purge of %s, which is gone: %v", e.UID, err)
		}
		return
	}
	m.purged(e, n, err)
}

func (m *model) purged(e *modelEvent, n PurgeCounts, err error) {
	want := PurgeCounts{Events: 1, Bytes: int64(len(e.Payload))}
	all := slices.Clone(e.deliveries)
	slices.SortFunc(all, func(a, b *modelDelivery) int { // those that were made again last
		return cmp.Or(cmp.Compare(a.key.Seq, b.key.Seq), cmp.Compare(a.key.Subscription, b.key.Subscription))
	})
	for _, d := range all {
		if d.stays() {
			want.Cancelled++
			m.cancels(d)
		}
	}
	if e.purged {
		want = PurgeCounts{}
	}
	if e.purged = true; err != nil || n != want {
		m.fail("purge of %s: %+v, %v; want %+v", e.UID, n, err, want)
	}
	m.firm()
	m.visible()
}

// unblock lets go of the keys of a lane that deliveries block.
func (m *model) unblock() {
	lane := LaneKey{m.space(), SubscriptionKey(1 + m.rng.IntN(modelLanes))}
	n, err := m.b.Unblock(context.Background(), lane, nil)
	m.say("unblock %v: %d %v", lane, n, err)
	var blocking []*modelDelivery
	for _, d := range m.deliveries {
		if d.key.lane() == lane && d.now().blocks && !d.gone {
			blocking = append(blocking, d)
		}
	}
	slices.SortFunc(blocking, func(a, b *modelDelivery) int {
		return cmp.Or(cmp.Compare(a.key.Partition, b.key.Partition), cmp.Compare(a.order, b.order))
	})
	for _, d := range blocking {
		s := *d.now()
		s.blocks = false
		m.set(d, s)
		m.pass(d, s.gap+1)
		m.firm()
	}
	if n != len(blocking) || err != nil {
		m.fail("%d of %d keys unblocked, %v", n, len(blocking), err)
	}
}

func (m *model) retry(d *modelDelivery) {
	got, err := m.b.Retry(context.Background(), d.key.lane(), d.key.ID, -1)
	m.say("retry %v: %v", d.key, err)
	s, row, open := *d.now(), d.row(), d.open()
	switch {
	case d.gone && errors.Is(err, ErrNotFound), !d.gone && s.state == Succeeded && errors.Is(err, ErrInvalidState),
		!d.gone && d.event.purged && !d.event.gone && errors.Is(err, ErrPurged),
		d.event.gone && s.state.Final() && errors.Is(err, ErrInvalidState):
		return
	case d.gone || err != nil || s.state == Succeeded || d.event.purged && !d.event.gone:
		m.fail("retry of %+v: %v", s, err)
	case open && (s.waits || row.Kind == FIFO):
		return
	}
	m.reopened(d, InstantOf(m.b.clock.now()))
	m.firm()
	if s := d.now(); got.NextAttempt != s.due.Time() || got.State != Scheduled || got.Expire.Before(m.b.clock.now()) {
		m.fail("retried: %+v, want %+v", got, s)
	}
}

// reopened is what becomes of a delivery that is to be attempted now.
func (m *model) reopened(d *modelDelivery, now Instant) {
	s, row, open := *d.now(), d.row(), d.open()
	waits := !open && !s.blocks && d.order != 0 && m.busy(d.key.lane(), d.order)
	if open {
		m.tell("edited", d.key, row)
	} else if s.epoch == 0 {
		s.epoch = 1
	}
	s.state, s.due, s.epoch, s.max = Scheduled, now, s.epoch+1, max(s.max, s.attempts+1)
	if row.Kind == Timer && now == row.Due {
		s.due++
	}
	if s.blocks = false; waits {
		s.waits, s.due = true, 0
	}
	m.set(d, s)
	if !waits {
		m.tell("timed", d.key, d.row())
	}
}

func (m *model) cancelLane() {
	lane := LaneKey{m.space(), SubscriptionKey(1 + m.rng.IntN(modelLanes))}
	n, err := m.b.CancelLane(context.Background(), lane, "deleted", nil)
	m.say("cancel lane %v: %d %v", lane, n, err)
	if want := m.cancelled(lane); n != want || err != nil {
		m.fail("%d of %d cancelled, %v", n, want, err)
	}
}

func (m *model) cancelled(lane LaneKey) (n int) {
	var rows []*modelDelivery
	for _, d := range m.deliveries {
		if d.stays() && d.key.lane() == lane {
			rows = append(rows, d)
		}
	}
	slices.SortFunc(rows, func(a, b *modelDelivery) int {
		return cmp.Or(cmp.Compare(a.key.Partition, b.key.Partition), compareRows(a.row(), b.row()))
	})
	for _, d := range rows {
		s := *d.now()
		if d.open() {
			if n++; !s.waits {
				m.tell("edited", d.key, d.row())
			}
			s.state, s.due, s.waits = Cancelled, 0, false
		}
		s.blocks = false
		m.set(d, s)
	}
	if len(rows) > 0 {
		m.firm()
	}
	return n
}

func compareRows(a, b Row) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Due, b.Due), cmp.Compare(a.Seq, b.Seq))
}

func (m *model) drop() {
	ns := m.space()
	m.say("drop %d", ns)
	if err := m.b.DropNamespace(context.Background(), ns); err != nil {
		m.fail("%v", err)
	}
	m.dropped(ns)
}

func (m *model) dropped(ns NamespaceKey) {
	m.events = slices.DeleteFunc(m.events, func(e *modelEvent) bool { return e.Namespace == ns })
	maps.DeleteFunc(m.deliveries, func(k modelKey, _ *modelDelivery) bool { return k.ns == ns })
	m.replays = slices.DeleteFunc(m.replays, func(r *modelReplay) bool { return r.Namespace == ns })
	if v := m.watching; v != nil && v.space == ns {
		m.hangUp()
		m.watching = nil
	}
	m.step++
	m.firm()
}

// sweep erases; what may have gone is looked at.
func (m *model) sweep() {
	keep := m.retention()
	m.say("sweep %v, parts %v", m.keep, m.parts)
	m.old()
	if err := m.b.Retain(context.Background(), keep); err != nil {
		m.fail("sweep: %v", err)
	}
	m.b.flush()
	m.firm()
	m.swept()
	m.overdue()
	m.eraseReplays()
}

func (m *model) retention() Retention {
	keep := Retention{Of: func(ns NamespaceKey) time.Duration { return m.keep[ns] }}
	for ns := acme; ns < acme+modelSpaces; ns++ {
		if m.rng.IntN(3) == 0 {
			m.keep[ns] = []time.Duration{0, time.Hour, 30 * time.Hour, 72 * time.Hour, 240 * time.Hour}[m.rng.IntN(5)]
		}
		if d := m.keep[ns]; d > 0 && (keep.Shortest == 0 || d < keep.Shortest) {
			keep.Shortest = d
		}
		if m.rng.IntN(3) == 0 {
			spans := []time.Duration{0, 0, time.Hour, 50 * time.Hour}
			m.parts[ns] = Parts{Payloads: spans[m.rng.IntN(4)], Attempts: spans[m.rng.IntN(4)]}
		}
	}
	keep.Parts = maps.Clone(m.parts)
	return keep
}

// old notes what a sweep of now may erase.
func (m *model) old() {
	now := m.b.clock.now()
	for _, e := range m.events {
		keep := m.keep[e.Namespace]
		if d := m.parts[e.Namespace].of(payloads, keep); d > 0 && (e.wasAhead || now.Sub(seqTime(e.Seq)) >= d) {
			e.mayBePurged = true
		}
		if keep <= 0 || !e.wasAhead && now.Sub(seqTime(e.Seq)) < keep {
			continue
		}
		e.mayGo = true
		e.idMayGo = e.idMayGo || e.wasAhead || now.Sub(seqTime(e.Seq)) >= dedupWindow
		e.kept = e.kept || e.open()
	}
	for _, d := range m.deliveries {
		keep := m.keep[d.key.ns]
		if parts := m.parts[d.key.ns].of(attempts, keep); parts > 0 && (d.wasAhead || now.Sub(seqTime(d.key.Seq)) >= parts) && !d.stays() {
			d.attemptsMayGo = true
		}
		d.mayGo = d.mayGo || d.again && keep > 0 && (d.wasAhead || now.Sub(seqTime(d.key.Seq)) >= keep)
	}
}

// matched is how many deliveries were made with the event.
func (e *modelEvent) matched() (n int) {
	for _, d := range e.deliveries {
		if !d.again {
			n++
		}
	}
	return n
}

func (e *modelEvent) open() bool {
	return slices.ContainsFunc(e.deliveries, (*modelDelivery).stays)
}

// swept has the model learn what sweeps have erased of what they may erase: never what is open, nor its event.
func (m *model) swept() {
	for _, d := range m.deliveries {
		if !d.gone && !d.open() && d.may() {
			_, there := m.look(d)
			if d.gone = !there; d.gone && d.now().blocks {
				m.fail("%v is gone and blocks its ordering key", d.key)
			}
		}
	}
	for _, e := range m.events {
		if got, err := m.b.EventByUID(e.Namespace, e.UID); err == nil && got.Purged != nil && !e.purged {
			if !e.mayBePurged || e.open() {
				m.fail("the payload of %s has gone, which is open (%v) or too young", e.ID, e.open())
			}
			e.purged = true
		}
		if !e.mayGo || e.gone {
			continue
		}
		if e.open() {
			if _, err := m.b.EventByUID(e.Namespace, e.UID); err != nil {
				m.fail("the event of what is open, %s: %v", e.ID, err)
			}
			continue
		}
		if _, err := m.b.EventByUID(e.Namespace, e.UID); errors.Is(err, ErrNotFound) {
			e.gone = true
		} else if err != nil {
			m.fail("%v", err)
		}
		for _, d := range e.deliveries {
			if e.gone && !d.gone && !d.again {
				m.fail("%v is there without its event", d.key)
			}
		}
	}
}

// overdue finds what a sweep should have erased: it is a day late at most, and a day is looked at once an hour.
func (m *model) overdue() {
	now := m.b.clock.now()
	for _, e := range m.events {
		keep := m.keep[e.Namespace]
		if keep > 0 && !e.wasAhead && !e.kept && !e.gone && !e.open() && now.Sub(m.lastSweep) > 3*time.Hour && now.Sub(seqTime(e.Seq)) > max(keep, dedupWindow)+25*time.Hour {
			m.fail("%s of %v, with %d deliveries, should have gone", e.ID, seqTime(e.Seq), len(e.deliveries))
		}
	}
	for _, e := range m.events {
		keep := m.parts[e.Namespace].of(payloads, m.keep[e.Namespace])
		if keep > 0 && !e.wasAhead && !e.gone && !e.purged && !e.open() && now.Sub(m.lastSweep) > 3*time.Hour && now.Sub(seqTime(e.Seq)) > max(keep, dedupWindow)+25*time.Hour {
			m.fail("the payload of %s of %v, with %d deliveries, should have gone", e.ID, seqTime(e.Seq), len(e.deliveries))
		}
	}
	m.lastSweep = now
}

// refused has a commit refused: nothing happens, settles are made later.
func (m *model) refused() {
	m.refuse.Store(true)
	ctx := context.Background()
	d := m.anyDelivery()
	r := m.anyReplay()
	switch n := m.rng.IntN(6); {
	case n == 4 && r != nil:
		if _, err := m.b.AdvanceReplay(ctx, r.Replay, 0, r.picker(), 3); err != nil && !errors.Is(err, ErrRefused) {
			m.fail("refused step: %v", err)
		}
		m.learn(r) // it may have had nothing left to do
	case n == 5 && r != nil:
		if _, err := m.b.EndReplay(ctx, r.Namespace, r.Key, ReplayFailed, ""); !errors.Is(err, ErrRefused) {
			m.fail("refused end of a replay: %v", err)
		}
	case n == 0 && d != nil:
		if _, err := m.b.Cancel(ctx, d.key.lane(), d.key.ID, "x"); !errors.Is(err, ErrRefused) {
			m.fail("refused cancel: %v", err)
		}
	case n == 1 && d != nil:
		if _, err := m.b.Retry(ctx, d.key.lane(), d.key.ID, -1); !errors.Is(err, ErrRefused) {
			m.fail("refused retry: %v", err)
		}
	case n == 2:
		if r := m.b.Append(ctx, []Publication{publication("refused", 1)})[0]; !errors.Is(r.Err, ErrRefused) {
			m.fail("refused append: %+v", r)
		}
	default:
		m.queueSome(uint16(m.rng.IntN(2)))
		for _, p := range m.b.partitions {
			if err := p.do(ctx, func(*commit) error { return nil }); err != nil && !errors.Is(err, ErrRefused) {
				m.fail("%v", err)
			}
		}
	}
	m.refuse.Store(false)
	m.visible()
	m.say("refused")
}

// wait lets time pass; the clock may step while the process lives, but not far back.
func (m *model) wait() {
	d := []time.Duration{
		time.Millisecond, time.Minute, time.Hour, -time.Hour, 10 * time.Hour, 26 * time.Hour, 50 * time.Hour, 5 * 365 * 24 * time.Hour,
	}[min(m.rng.IntN(12), m.rng.IntN(9))%8]
	m.b.clock.add(d)
	m.say("wait %v", d)
}

// restart closes and opens, perhaps with another clock.
func (m *model) restart() {
	m.queueSome(uint16(m.rng.IntN(2)))
	m.visible()
	m.check(false)
	m.queueSome(uint16(m.rng.IntN(2))) // what is queued is made by Close
	for key := range m.held {
		m.letGo(key)
	}
	if n := m.b.EventBytes(); n != 0 {
		m.fail("%d bytes are held by nobody", n)
	}
	m.hangUp()
	if err := m.b.Close(); err != nil {
		m.fail("close: %v", err)
	}
	m.heard()
	m.firm()
	m.begin()
	m.say("restarted")
	m.check(true)
}

// begin opens the journal with an empty memory.
func (m *model) begin() {
	m.held = map[modelKey]Job{}
	if m.rng.IntN(3) == 0 {
		d := []time.Duration{time.Hour, -time.Hour, 48 * time.Hour, -48 * time.Hour, -100 * time.Hour, 5 * 365 * 24 * time.Hour, -5 * 365 * 24 * time.Hour}[m.rng.IntN(7)]
		m.b.clock.add(d)
		m.say("clock steps by %v", d)
	}
	m.open()
}

// lose pulls the plug between two steps: the disk shows the state after one of those since the last that is durable.
func (m *model) lose() {
	m.check(false)
	if diff := m.matches(m.observe(), m.step); diff != "" {
		m.fail("before the crash: %s", diff)
	}
	percent := []int{0, 30, 70, 100}[m.rng.IntN(4)]
	m.noteWatch()
	clone := m.fsNow().CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: m.rng})
	m.afterCrash(clone)
	m.say("power lost, %d%% kept", percent)
	actual := m.observe()
	for cut := m.step; cut >= m.durable; cut-- {
		if m.matches(actual, cut) == "" {
			m.cut(cut)
			m.swept()
			m.check(true)
			return
		}
	}
	m.fail("the disk shows no state between %d and %d: %s; %s", m.durable, m.step, m.matches(actual, m.step), m.matches(actual, m.durable))
}

func (m *model) fsNow() *vfs.MemFS { return m.b.opts.fs.(*vfs.MemFS) }

func (m *model) afterCrash(clone *vfs.MemFS) {
	if v := m.watching; v != nil {
		v.w = nil // what it knew when the disk was copied
	}
	if err := m.b.Close(); err != nil {
		m.fail("close: %v", err)
	}
	m.heard()
	m.want = nil
	m.b.opts.fs = clone
	m.begin()
}

// cut goes back to the state after a step.
func (m *model) cut(step int) {
	for _, d := range m.deliveries {
		d.versions = []version{{step, d.at(step)}}
	}
	m.step = step
	m.firm()
}

// loseMeanwhile pulls the plug while something long is under way, between two of its commits.
func (m *model) loseMeanwhile() {
	m.visible()
	m.check(false)
	before := map[modelKey]standsAt{}
	for k, d := range m.deliveries {
		before[k] = *d.now()
	}
	m.b.flush()
	m.firm()
	m.noteWatch()
	m.clone.Store(nil)
	m.crash.Store(int32(1 + m.rng.IntN(9)))
	ns, replay := NamespaceKey(0), m.anyReplay()
	switch m.rng.IntN(5) {
	case 0:
		m.cancelLane()
	case 4:
		if replay == nil {
			break
		}
		for p := range uint16(2) {
			a, err := m.b.AdvanceReplay(context.Background(), replay.Replay, p, replay.picker(), 1+m.rng.IntN(4))
			m.say("step of %s in %d: %+v %v", replay.ID, p, a, err)
			if err != nil {
				m.fail("%v", err)
			}
		}
		m.learns = replay
		m.b.follower.heard()
	case 1:
		ns = m.space()
		m.say("drop %d", ns)
		if err := m.b.DropNamespace(context.Background(), ns); err != nil {
			m.fail("%v", err)
		}
	default:
		keep := m.retention()
		m.say("sweep %v", m.keep)
		m.old()
		if err := m.b.Retain(context.Background(), keep); err != nil {
			m.fail("%v", err)
		}
	}
	m.crash.Store(0)
	clone := m.clone.Load()
	if clone == nil { // it was over before
		clone = m.fsNow().CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: m.rng})
	}
	m.afterCrash(clone)
	m.say("power lost meanwhile")
	if ns != 0 { // half dropped: the caller makes it again
		if err := m.b.DropNamespace(context.Background(), ns); err != nil {
			m.fail("%v", err)
		}
		m.dropped(ns)
	}
	if r := m.learns; r != nil {
		m.learns = nil
		m.learn(r)
		m.want = nil // those who were told are gone
	}
	m.swept()
	actual := m.observe()
	for k, d := range m.deliveries {
		if got, there := actual[k]; !d.gone && there && got == shown(before[k]) {
			d.versions = []version{{m.step, before[k]}} // not cancelled yet
		}
	}
	m.firm()
	m.check(true)
}

// shown is what can be seen of a standing.
func shown(s standsAt) standsAt {
	if s.state.Final() {
		s.epoch = 0
	}
	return s
}

// observe reads all deliveries that the model knows.
func (m *model) observe() map[modelKey]standsAt {
	rows := map[modelKey]Row{}
	for state, err := range m.b.Lanes() {
		if err != nil {
			m.fail("lanes: %v", err)
		}
		for kind, from := range []Pos{state.FIFO, state.Timer} {
			if !from.Some {
				continue
			}
			r, err := m.b.Read(state.Lane, state.Partition, Kind(kind), from, 1<<62, 1<<20, 1<<30)
			if err != nil || len(r.Aside) > 0 {
				m.fail("read: %v, %v", err, r.Aside)
			}
			for i := range r.Jobs {
				job := &r.Jobs[i]
				key := modelKey{state.Lane.Namespace, job.ID}
				if _, twice := rows[key]; twice {
					m.fail("%v has two rows", key)
				}
				rows[key] = job.Row()
				m.b.Release(job.Event)
			}
		}
	}
	seen := map[modelKey]standsAt{}
	for key, d := range m.deliveries {
		if s, ok := m.look(d); ok {
			row, open := rows[key]
			if s.waits {
				at, err := m.b.partitions[key.Partition].find(m.b.db, key.lane(), key.Seq)
				if err != nil || open || !at.waits {
					m.fail("%v waits for its turn as %+v, %v; its row is %+v, %v", key, at, err, row, open)
				}
				s.epoch = at.row.Epoch
				seen[key] = s
				continue
			}
			if open == s.state.Final() || open && row.Due != s.due {
				m.fail("%v is %+v and its row is %+v, %v", key, s, row, open)
			}
			s.epoch = row.Epoch
			seen[key] = s
			delete(rows, key)
		}
	}
	for key, row := range rows {
		m.fail("a row of nothing: %v %+v", key, row)
	}
	return seen
}

// look reads one delivery; without its epoch.
func (m *model) look(d *modelDelivery) (standsAt, bool) {
	got, err := m.b.Delivery(d.key.ns, d.key.ID)
	if errors.Is(err, ErrNotFound) {
		return standsAt{}, false
	}
	if err != nil {
		m.fail("%v", err)
	}
	attempts, err := m.b.Attempts(d.key.ns, d.key.ID)
	if err != nil {
		m.fail("%v", err)
	}
	s := standsAt{state: got.State, attempts: got.Attempts, max: got.MaxAttempts, due: InstantOf(got.NextAttempt), waits: got.WaitsForKey, gap: got.OrderingGap}
	if got.State.Final() && d.order != 0 {
		t, err := m.b.partitions[d.key.Partition].turnOf(m.b.db, d.key.lane(), d.order)
		if err != nil {
			m.fail("%v", err)
		}
		s.blocks = t.blocks && t.seq == d.key.Seq
	}
	if s.waits != strings.HasPrefix(got.StateReason, "waits for its ordering key: ") {
		m.fail("%v: %+v", d.key, got)
	}
	missing := got.Attempts
	if len(attempts) > 0 {
		missing = attempts[0].Number - 1
	}
	if known := d.now().history; missing > 0 && d.attemptsMayGo {
		s.history = known[:min(missing, len(known))]
	} else {
		missing = 0
	}
	for i, a := range attempts {
		if a.Number != missing+i+1 {
			m.fail("attempt %d of %v has the number %d", missing+i+1, d.key, a.Number)
		}
		s.history += string('0' + rune(a.Outcome))
	}
	if got.EventID != d.event.ID || got.SubscriptionUID.SubscriptionKey() != d.key.Subscription || got.EventUID != d.event.UID ||
		got.State.Final() == got.CompleteTime.IsZero() || len(attempts) > 0 && (got.Last == nil || got.Last.Number != got.Attempts) {
		m.fail("%v: %+v", d.key, got)
	}
	return s, true
}

// matches compares what was read with the model as of a step; empty when they agree.
func (m *model) matches(actual map[modelKey]standsAt, step int) string {
	for key, d := range m.deliveries {
		got, there := actual[key]
		if want := shown(d.at(step)); !d.gone && there && got != want {
			return fmt.Sprintf("%v is %+v, want %+v", key, got, want)
		}
		if !there && !d.gone && !(d.may() && d.at(step).state.Final()) {
			return fmt.Sprintf("%v is lost", key)
		}
	}
	return ""
}

// heard compares what the follower was told since the last time: in each partition all of it, in order.
func (m *model) heard() {
	f := m.b.follower
	f.mu.Lock()
	calls := f.calls
	f.calls = nil
	f.mu.Unlock()
	last := map[uint16]Commit{}
	for _, c := range calls {
		if c.commit < last[c.partition] {
			m.fail("commit %d is told of after %d", c.commit, last[c.partition])
		}
		last[c.partition] = c.commit
	}
	short := func(calls []told, offers bool) []string {
		by := map[uint16][]string{}
		for _, c := range calls {
			if (c.what == "offer") == offers {
				by[c.partition] = append(by[c.partition], fmt.Sprintf("%s %v %d %+v", c.what, c.lane, c.partition, c.row))
			}
		}
		return append(by[0], by[1]...)
	}
	for _, offers := range []bool{false, true} {
		if got, want := short(calls, offers), short(m.want, offers); !slices.Equal(got, want) {
			m.fail("told\n    %s\n  want\n    %s", strings.Join(got, "\n    "), strings.Join(want, "\n    "))
		}
	}
	m.want = nil
}

// check compares what the journal shows with the model: a sample, or everything.
func (m *model) check(everything bool) {
	m.take()
	m.heard()
	m.checkCounts()
	m.checkTurns()
	m.checkReplays()
	if everything {
		if diff := m.matches(m.observe(), m.step); diff != "" {
			m.fail("%s", diff)
		}
		m.checkWatch()
		for ns := acme; ns < acme+modelSpaces; ns++ {
			m.checkLists(ns, Query{})
			for sub := range SubscriptionKey(modelLanes) {
				m.checkLists(ns, Query{Subscription: sub + 1})
				m.checkRows(LaneKey{ns, sub + 1})
			}
		}
		return
	}
	for range 3 {
		if d := m.anyDelivery(); d != nil {
			m.checkDelivery(d)
		}
	}
	m.checkLists(m.space(), m.query())
	m.checkRows(LaneKey{m.space(), SubscriptionKey(1 + m.rng.IntN(modelLanes))})
	if len(m.events) > 0 {
		m.checkEvent(m.events[m.rng.IntN(len(m.events))])
	}
}

func (m *model) checkDelivery(d *modelDelivery) {
	got, there := m.look(d)
	want := *d.now()
	want.epoch = 0
	if there == d.gone || there && got != want {
		m.fail("%v is %+v, %v; want %+v, gone %v", d.key, got, there, want, d.gone)
	}
}

// checkTurns: of each ordering key of a lane one delivery has the turn, as long as there is one that is open, and the
// rest of them wait.
func (m *model) checkTurns() {
	for _, p := range m.b.partitions {
		has, waits := map[laneOrder]uint64{}, map[modelKey]bool{}
		for _, d := range m.deliveries {
			at := laneOrder{d.key.lane(), d.order}
			if d.key.Partition != p.number {
				continue
			}
			if d.hasTurn() {
				if has[at] != 0 {
					m.fail("%v and %x have the turn of one ordering key", d.key, has[at])
				}
				has[at] = d.key.Seq
			}
			if d.open() && d.now().waits {
				waits[d.key] = true
			}
		}
		for key := range waits {
			if d := m.deliveries[key]; has[laneOrder{key.lane(), d.order}] == 0 {
				m.fail("%v waits for nobody", key)
			}
		}
		prefix := appendTag(nil, p.number, tagTurn)
		if err := m.b.scan(m.b.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
			lane, order, ok := splitTurn(key)
			t, err := decodeTurn(value)
			if err != nil || !ok || has[laneOrder{lane, order}] != t.seq {
				m.fail("the turn of %v %x is %+v, want %x", lane, order, t, has[laneOrder{lane, order}])
			}
			delete(has, laneOrder{lane, order})
			return nil
		}); err != nil || len(has) > 0 {
			m.fail("turns are missing: %v, %v", has, err)
		}
		prefix = appendTag(nil, p.number, tagBlocked)
		if err := m.b.scan(m.b.db, prefix, prefixEnd(prefix), func(key, _ []byte) error {
			lane, _, seq, ok := splitBlocked(key)
			at := modelKey{lane.Namespace, ID{seq, p.number, lane.Subscription}}
			if !ok || !waits[at] {
				m.fail("%v does not wait", at)
			}
			delete(waits, at)
			return nil
		}); err != nil || len(waits) > 0 {
			m.fail("rows that wait are missing: %v, %v", waits, err)
		}
	}
}

func (m *model) checkCounts() {
	if !m.b.Counted() {
		return
	}
	lanes, spaces := map[LaneKey]int64{}, map[NamespaceKey]int64{}
	for _, d := range m.deliveries {
		if d.open() {
			lanes[d.key.lane()]++
			spaces[d.key.ns]++
		}
	}
	for ns := acme; ns < acme+modelSpaces; ns++ {
		if got := m.b.OpenIn(ns); got != spaces[ns] {
			m.fail("%d open in %d, want %d", got, ns, spaces[ns])
		}
		for sub := range SubscriptionKey(modelLanes) {
			if got := m.b.OpenOf(LaneKey{ns, sub + 1}); got != lanes[LaneKey{ns, sub + 1}] {
				m.fail("%d open of %d in %d, want %d", got, sub+1, ns, lanes[LaneKey{ns, sub + 1}])
			}
		}
	}
}

// checkRows reads a lane's rows piece by piece, and where recovery would begin.
func (m *model) checkRows(lane LaneKey) {
	for partition := range uint16(2) {
		var rows [2][]Row
		for _, d := range m.deliveries {
			if r := d.row(); d.open() && !d.now().waits && d.key.lane() == lane && d.key.Partition == partition {
				rows[r.Kind] = append(rows[r.Kind], r)
			}
		}
		limit := 1 + m.rng.IntN(4)
		for kind := range rows {
			slices.SortFunc(rows[kind], compareRows)
			var got []Row
			for from := (Pos{Some: true}); from.Some; {
				r, err := m.b.Read(lane, partition, Kind(kind), from, 1<<62, limit, 1<<20)
				if err != nil || len(r.Aside) > 0 {
					m.fail("read: %v, %v", err, r.Aside)
				}
				for i := range r.Jobs {
					job := &r.Jobs[i]
					d := m.deliveries[modelKey{lane.Namespace, job.ID}]
					if d == nil || job.Attempts != d.now().attempts || job.MaxAttempts != d.now().max || job.Event.UID != d.event.UID || string(job.Event.Payload) != string(d.event.Payload) {
						m.fail("read %+v, want %+v", job, d)
					}
					got = append(got, job.Row())
					m.b.Release(job.Event)
				}
				from = r.Next
			}
			if !slices.Equal(got, rows[kind]) {
				m.fail("rows of %v in %d: %v, want %v", lane, partition, got, rows[kind])
			}
		}
		var first [2]Pos
		for state, err := range m.b.LanesOf(partition) {
			if err != nil {
				m.fail("lanes: %v", err)
			}
			if state.Lane == lane {
				first = [2]Pos{Least(first[FIFO], state.FIFO), Least(first[Timer], state.Timer)}
			}
		}
		for kind := range rows {
			want := Pos{}
			if len(rows[kind]) > 0 {
				want = rows[kind][0].Pos()
			}
			if first[kind] != want {
				m.fail("lane %v in %d begins at %v, want %v", lane, partition, first[kind], want)
			}
		}
	}
}

// query is any of those that callers make.
func (m *model) query() (q Query) {
	if m.rng.IntN(2) == 0 {
		q.Subscription = SubscriptionKey(1 + m.rng.IntN(modelLanes))
	}
	switch m.rng.IntN(6) {
	case 0:
		q.States = []State{Cancelled, Exhausted, Skipped}
	case 1:
		q.States = []State{[]State{Pending, Scheduled, Succeeded, Exhausted, Cancelled}[m.rng.IntN(5)]}
	case 2:
		if len(m.events) > 0 {
			q.EventID = m.events[m.rng.IntN(len(m.events))].ID
		}
	case 3:
		if len(m.events) > 0 {
			q.EventUID = m.events[m.rng.IntN(len(m.events))].UID
		}
	case 4:
		if len(m.events) > 0 {
			q.Since = seqTime(m.events[m.rng.IntN(len(m.events))].Seq)
			q.Until = q.Since.Add(time.Duration(m.rng.IntN(100)) * time.Hour)
		}
	}
	return q
}

func (m *model) checkLists(ns NamespaceKey, q Query) {
	var want []ID
	for key, d := range m.deliveries {
		if key.ns == ns && !d.gone && (q.Subscription == 0 || q.Subscription == key.Subscription) &&
			(len(q.States) == 0 || slices.Contains(q.States, d.now().state)) &&
			(q.EventID == "" || q.EventID == d.event.ID) && (q.EventUID == "" || q.EventUID == d.event.UID) &&
			(q.EventID+q.EventUID == "" || !d.event.gone) && // what was made again may outlive its event, by which it is not found then
			(q.Since.IsZero() || key.Seq >= seqAt(q.Since) && key.Seq < seqAt(q.Until)) {
			want = append(want, key.ID)
		}
	}
	slices.SortFunc(want, func(a, b ID) int {
		if comesBefore(a, b) {
			return -1
		}
		return 1
	})
	q.Namespace, q.Limit = ns, []int{1, 3, 1000}[m.rng.IntN(3)]
	if len(want) > 30 {
		q.Limit = 1000
	}
	var got []ID
	for _, d := range all(m.t, m.b, q) {
		got = append(got, d.ID)
	}
	if !slices.Equal(got, want) {
		m.fail("list %+v: %v, want %v", q, got, want)
	}
}

func (m *model) checkEvent(e *modelEvent) {
	var want *modelEvent
	for _, k := range m.events {
		if k.Namespace == e.Namespace && k.ID == e.ID && !k.gone && (want == nil || cmp.Or(cmp.Compare(k.Seq, want.Seq), cmp.Compare(k.Partition, want.Partition)) > 0) {
			want = k
		}
	}
	got, err := m.b.Event(e.Namespace, e.ID)
	payload := ""
	if want != nil && !want.purged {
		payload = string(want.Payload)
	}
	if want == nil && !errors.Is(err, ErrNotFound) || want != nil && (err != nil || got.UID != want.UID || string(got.Payload) != payload || want.purged != (got.Purged != nil)) {
		m.fail("event %s: %+v, %v; want %+v", e.ID, got, err, want)
	}
	got, err = m.b.EventByUID(e.Namespace, e.UID)
	if e.gone != errors.Is(err, ErrNotFound) || !e.gone && (err != nil || got.ID != e.ID || got.Source != e.Source || got.Matched != e.matched()) {
		m.fail("event %s: %+v, %v; gone %v", e.UID, got, err, e.gone)
	}
}
