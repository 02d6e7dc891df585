package window

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

const longFlag = "window.for"

func TestMain(m *testing.M) {
	flag.Duration(longFlag, 0, "how long TestWindowForLong runs, for example 1h")
	flag.Parse()
	m.Run()
}

// model is a list of rows and everybody around a Window: a journal whose effects arrive late, a lane with too
// little room, readers, receivers and callers.
type model struct {
	fail   func(format string, args ...any)
	choose func(n int) int
	hook   hook

	w   Window
	mem []*entry
	// disk holds the open rows in no order.
	disk    []row
	blocked []uint64        // rows that wait for the end of another one
	final   map[uint64]bool // by sequence: has ended
	ends    []uint64        // in their order
	epochs  map[uint64]uint32
	effects []effect
	settles []settle

	commit   delivery.Commit
	lastEdit delivery.Commit
	read     read
	next     [2]delivery.Pos // as after the step before
	now      delivery.Instant
	paused   bool
	seq      uint64
}

type row struct {
	delivery.Row
	size    int
	corrupt bool
}

type entry struct {
	row    delivery.Row
	stage  Stage
	marked bool
	asOf   delivery.Commit
}

type what uint8

const (
	offered what = iota
	ended
	edited
)

type effect struct {
	commit delivery.Commit
	what   what
	row    delivery.Row
}

type settle struct {
	row   delivery.Row
	asOf  delivery.Commit
	retry bool
}

type read struct {
	on, taken bool
	kind      delivery.Kind
	from      delivery.Pos
	now       delivery.Instant
	rows      []row
	upTo      delivery.Commit
}

// hook may change a Window before a call of it, and, by what it returns, after it. It may also put another look-up
// in place of held.
type hook func(w *Window, call string, held Held) (Held, func())

func (m *model) around(call string, f func(Held)) {
	held, after := Held(m.held), func() {}
	if m.hook != nil {
		var done func()
		if held, done = m.hook(&m.w, call, held); done != nil {
			after = done
		}
	}
	f(held)
	after()
}

func (m *model) held(seq uint64) (delivery.Row, Stage, bool) {
	if x := m.entry(seq); x != nil {
		return x.row, x.stage, true
	}
	return delivery.Row{}, 0, false
}

func (m *model) entry(seq uint64) *entry {
	for _, x := range m.mem {
		if x.row.Seq == seq {
			return x
		}
	}
	return nil
}

func (m *model) forget(seq uint64) {
	m.mem = slices.DeleteFunc(m.mem, func(x *entry) bool { return x.row.Seq == seq })
}

func (m *model) hold(r delivery.Row, asOf delivery.Commit) {
	if m.entry(r.Seq) != nil {
		m.fail("%+v is taken a second time", r)
	}
	m.mem = append(m.mem, &entry{row: r, asOf: asOf})
}

func (m *model) onDisk(seq uint64) *row {
	for i := range m.disk {
		if m.disk[i].Seq == seq {
			return &m.disk[i]
		}
	}
	return nil
}

func (m *model) effect(w what, r delivery.Row) { m.effects = append(m.effects, effect{m.commit, w, r}) }

func (m *model) end(seq uint64) {
	if m.final[seq] {
		m.fail("%d has ended twice", seq)
	}
	m.final[seq] = true
	m.ends = append(m.ends, seq)
	m.disk = slices.DeleteFunc(m.disk, func(r row) bool { return r.Seq == seq })
}

// put makes a row and its effect.
func (m *model) put(seq uint64, kind delivery.Kind, due delivery.Instant) {
	m.epochs[seq]++
	r := delivery.Row{Kind: kind, Due: due, Seq: seq, Epoch: m.epochs[seq]}
	m.disk = slices.DeleteFunc(m.disk, func(r row) bool { return r.Seq == seq })
	m.disk = append(m.disk, row{Row: r, size: m.choose(5)})
	m.effect(offered, r)
}

func (m *model) soon(n int) delivery.Instant { return m.now + delivery.Instant(m.choose(n)) }

const roomFor = 7

// Operations, weighted by how often they stand here.
func (m *model) operations() []func() {
	return []func(){
		m.append, m.append, m.deliver, m.deliver, m.deliver, m.deliver, m.deliver, m.want, m.want, m.want,
		m.snapshot, m.snapshot, m.merge, m.merge, m.begin, m.begin, m.begin, m.begin, m.answer, m.answer, m.answer,
		m.settleAll, m.settleAll, m.settleAll, m.pass,
		m.cancel, m.retry, m.rare(m.redrive), m.rare(m.cancelAll), m.rare(m.pause), m.resume, m.shed,
		m.rare(m.corrupt), m.rare(m.rare(m.crash)), m.pass,
	}
}

// untroubled is how many of the operations bring a run to its end by themselves, from the third on.
const untroubled = 23

func (m *model) rare(f func()) func() {
	return func() {
		if m.choose(8) == 0 {
			f()
		}
	}
}

func (m *model) pass() { m.now += delivery.Instant(m.choose(10)) }

func (m *model) append() {
	if len(m.disk) > 24 {
		return
	}
	m.seq++
	seq := m.seq
	if m.choose(4) == 0 {
		seq = m.seq*2654435761%(1<<32) + 1<<32 // sequences in no order
	}
	if m.choose(10) == 0 {
		m.blocked = append(m.blocked, seq)
		return
	}
	m.commit++
	if m.choose(6) == 0 {
		m.put(seq, delivery.Timer, m.soon(40)+1)
	} else {
		m.put(seq, delivery.FIFO, 0)
	}
}

// deliver brings the oldest effect to the window.
func (m *model) deliver() {
	if len(m.effects) == 0 {
		return
	}
	e := m.effects[0]
	m.effects = m.effects[1:]
	r := e.row
	switch e.what {
	case offered:
		room := !m.paused && len(m.mem) < roomFor && (r.Kind == delivery.FIFO || r.Due <= m.now)
		placed := Leave
		m.around("offer", func(h Held) { placed = m.w.Offer(r, e.commit, room, h) })
		if placed == Take {
			if !room {
				m.fail("%+v is taken without room", r)
			}
			m.inOrder(r)
			m.hold(r, e.commit)
		}
	case ended:
		m.around("ended", func(Held) { m.w.Ended(r, e.commit) })
		m.forget(r.Seq)
	case edited:
		fate := None
		m.around("edited", func(h Held) { fate = m.w.Edited(r.Seq, r.Epoch, e.commit, h) })
		x := m.entry(r.Seq)
		if fate != None && (x == nil || (fate == Drop) != (x.stage == Waiting)) {
			m.fail("edited %+v, which is held as %+v: fate %d", r, x, fate)
		}
		switch fate {
		case Drop:
			m.forget(r.Seq)
		case Mark:
			x.marked = true
		}
	}
}

// inOrder: a row of the FIFO that comes to memory passes none that is on disk and known.
func (m *model) inOrder(r delivery.Row) {
	for _, d := range m.disk {
		if r.Kind == delivery.FIFO && d.Kind == delivery.FIFO && d.Seq < r.Seq && !d.corrupt && m.entry(d.Seq) == nil && !m.toCome(d.Row) {
			m.fail("6: %+v comes to memory before %+v", r, d)
		}
	}
}

func (m *model) toCome(r delivery.Row) bool {
	return slices.ContainsFunc(m.effects, func(e effect) bool { return e.what == offered && e.row == r })
}

func (m *model) want() {
	k := delivery.Kind(m.choose(2))
	if m.read.on || len(m.mem) > roomFor {
		return
	}
	m.around("want", func(Held) {
		if from, ok := m.w.Want(k, m.now); ok {
			m.read = read{on: true, kind: k, from: from, now: m.now}
		}
	})
}

func (m *model) snapshot() {
	r := &m.read
	if !r.on || r.taken {
		return
	}
	r.taken, r.upTo = true, m.commit
	for _, d := range m.disk {
		if d.Kind == r.kind && !d.Pos().Before(r.from) {
			r.rows = append(r.rows, d)
		}
	}
	slices.SortFunc(r.rows, func(a, b row) int {
		if a.Pos().Before(b.Pos()) {
			return -1
		}
		return 1
	})
}

func (m *model) merge() {
	r := m.read
	if !r.on || !r.taken {
		return
	}
	m.read = read{}
	if m.choose(20) == 0 {
		m.around("failed", func(Held) { m.w.Failed() })
		return
	}
	var rows []delivery.Row
	limit, bytes := 1+m.choose(4), m.choose(12)
	if m.paused {
		limit = 1
	}
	next := delivery.Pos{}
	for _, d := range r.rows {
		if len(rows) == limit || bytes < 0 || d.Kind == delivery.Timer && d.Due > r.now {
			next = d.Pos()
			break
		}
		if d.corrupt {
			continue
		}
		bytes -= d.size
		rows = append(rows, d.Row)
	}
	if n := m.choose(4); n < len(rows) { // the room has gone meanwhile
		next, rows = rows[n].Pos(), rows[:n]
	}
	m.around("merge", func(h Held) {
		take := m.w.Merge(rows, next, r.upTo, h)
		for _, t := range take {
			m.hold(t, r.upTo)
		}
		for _, t := range take {
			m.inOrder(t)
		}
	})
}

func (m *model) pick(s Stage) *entry {
	n := 0
	for _, x := range m.mem {
		if x.stage == s {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	n = m.choose(n)
	for _, x := range m.mem {
		if x.stage == s {
			if n == 0 {
				return x
			}
			n--
		}
	}
	return nil
}

func (m *model) begin() {
	x := m.pick(Waiting)
	switch {
	case x == nil:
	case m.choose(10) == 0: // it has expired
		m.settle(x, false)
	case !m.paused:
		x.stage = Flying
	}
}

func (m *model) settle(x *entry, retry bool) {
	x.stage = Settling
	m.settles = append(m.settles, settle{x.row, x.asOf, retry})
}

func (m *model) answer() {
	x := m.pick(Flying)
	switch {
	case x == nil:
	case m.choose(8) != 0:
		m.settle(x, m.choose(3) == 0)
	case x.marked: // nothing was tried
		m.around("forget", func(Held) { m.w.Forget(x.row) })
		m.forget(x.row.Seq)
	default:
		x.stage = Waiting
	}
}

// settleAll is a round of settles, or a commit that was refused: they are queued again.
func (m *model) settleAll() {
	if len(m.settles) == 0 || m.choose(6) == 0 {
		return
	}
	m.commit++
	edit := m.lastEdit
	for _, s := range m.settles {
		r := m.onDisk(s.row.Seq)
		same := r != nil && r.Epoch == s.row.Epoch
		if s.asOf >= edit && !same {
			m.fail("%+v settles blind as of %d, the last edit is %d, on disk %+v", s.row, s.asOf, edit, r)
		}
		m.effect(ended, s.row)
		switch {
		case !same:
		case s.retry:
			m.put(s.row.Seq, delivery.Timer, m.soon(30)+1)
		default:
			m.end(s.row.Seq)
			m.release()
		}
	}
	m.settles = nil
}

// release makes a row of one that was blocked, within a commit.
func (m *model) release() {
	if len(m.blocked) > 0 {
		m.put(m.blocked[0], delivery.Timer, m.now+1)
		m.blocked = m.blocked[1:]
	}
}

func (m *model) anyRow() (row, bool) {
	if len(m.disk) == 0 {
		return row{}, false
	}
	return m.disk[m.choose(len(m.disk))], true
}

func (m *model) edit(f func()) {
	m.commit++
	m.lastEdit = m.commit
	f()
}

func (m *model) cancelRow(r delivery.Row) {
	m.end(r.Seq)
	m.effect(edited, r)
}

func (m *model) cancel() {
	if r, ok := m.anyRow(); ok && !r.corrupt {
		m.edit(func() { m.cancelRow(r.Row) })
	}
}

func (m *model) retry() {
	if r, ok := m.anyRow(); ok && !r.corrupt && r.Kind == delivery.Timer {
		m.edit(func() {
			m.effect(edited, r.Row)
			m.put(r.Seq, delivery.Timer, m.now+1)
		})
	}
}

// redrive brings back what has ended, perhaps while its attempt is still under way.
func (m *model) redrive() {
	for i := len(m.ends); i > 0; i-- {
		seq := m.ends[i-1]
		if m.final[seq] && (m.choose(4) == 0 || m.entry(seq) != nil) {
			m.edit(func() {
				m.final[seq] = false
				m.put(seq, delivery.Timer, m.now+1)
			})
			return
		}
	}
}

// cancelAll is the deletion of the lane's subscription, corrupt rows and all.
func (m *model) cancelAll() {
	m.edit(func() {
		for _, r := range slices.Clone(m.disk) {
			m.cancelRow(r.Row)
		}
	})
}

func (m *model) pause() {
	m.paused = true
	for m.pick(Waiting) != nil {
		m.shed()
	}
}

func (m *model) resume() { m.paused = false }

func (m *model) shed() {
	if x := m.pick(Waiting); x != nil {
		m.around("shed", func(Held) { m.w.Shed(x.row) })
		m.forget(x.row.Seq)
	}
}

func (m *model) corrupt() {
	if r, ok := m.anyRow(); ok && m.entry(r.Seq) == nil {
		m.onDisk(r.Seq).corrupt = true
	}
}

// crash loses all but the disk.
func (m *model) crash() {
	m.mem, m.effects, m.settles, m.w, m.read = nil, nil, nil, Window{}, read{}
	var first [2]delivery.Pos
	for _, r := range m.disk {
		first[r.Kind] = delivery.Least(first[r.Kind], r.Pos())
	}
	m.w.Found(first[delivery.FIFO], first[delivery.Timer])
	m.next = m.w.next
}

// check holds the invariants.
func (m *model) check(merged bool) {
	if m.w.Len() != len(m.mem) {
		m.fail("%d held, %d in memory", m.w.Len(), len(m.mem))
	}
	for _, d := range m.disk {
		if x := m.entry(d.Seq); x != nil && x.row.Epoch == d.Epoch || d.corrupt || m.toCome(d.Row) {
			continue
		}
		if n := m.w.next[d.Kind]; n.Some && !d.Pos().Before(n) || m.waitsBehind(d.Row) {
			continue
		}
		m.fail("1: %+v is nowhere: positions %+v, held %+v", d, m.w.next, m.entry(d.Seq))
	}
	for _, x := range m.mem {
		r := m.onDisk(x.row.Seq)
		if r != nil && r.Epoch == x.row.Epoch || x.marked {
			continue
		}
		if !slices.ContainsFunc(m.effects, func(e effect) bool {
			return e.what != offered && e.row.Seq == x.row.Seq && e.row.Epoch == x.row.Epoch
		}) {
			m.fail("2: held %+v, but on disk %+v", x, r)
		}
	}
	for k, n := range m.w.next {
		if !merged && delivery.Least(n, m.next[k]) != n {
			m.fail("3: position %d rose from %+v to %+v", k, m.next[k], n)
		}
		m.next[k] = n
	}
	if m.w.Idle() && (len(m.mem) > 0 || m.read.on) {
		m.fail("7: idle with %d rows", len(m.mem))
	}
}

func (m *model) waitsBehind(r delivery.Row) bool {
	return m.w.more != nil && slices.ContainsFunc(m.w.more.behind, func(b behind) bool {
		x := m.entry(r.Seq)
		return b.row == r && x != nil && x.row.Epoch < r.Epoch
	})
}

func (m *model) done() bool {
	open := slices.ContainsFunc(m.disk, func(r row) bool { return !r.corrupt })
	return !open && len(m.mem)+len(m.effects)+len(m.settles) == 0 && !m.read.on && m.w.Idle()
}

// run makes steps at random, and then brings everything to its end. It stops at the first failure.
func run(choose func(int) int, steps int, h hook) (failure string) {
	m := &model{choose: choose, hook: h, final: make(map[uint64]bool), epochs: make(map[uint64]uint32)}
	type failed struct{ text string }
	m.fail = func(format string, args ...any) { panic(failed{fmt.Sprintf(format, args...)}) }
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(failed)
			if !ok {
				panic(r)
			}
			failure = f.text
		}
	}()
	operations := m.operations()
	step := func(i int) {
		m.now++
		read := m.read.on
		operations[i]()
		m.check(read && !m.read.on)
	}
	for range steps {
		step(choose(len(operations)))
	}
	m.paused = false
	for i := 0; !m.done() && i < 50_000; i++ {
		if len(m.settles)+len(m.effects)+len(m.mem)+len(m.disk) == 0 && len(m.blocked) > 0 {
			m.commit++
			m.release()
		}
		step(2 + i%untroubled)
	}
	if !m.done() {
		m.fail("7: stuck with %+v on disk, %+v held, window %+v", m.disk, m.mem, m.w)
	}
	for seq, ended := range m.final {
		if !ended && m.onDisk(seq) == nil {
			m.fail("%d vanished", seq)
		}
	}
	return ""
}

func randomly(seed uint64) func(int) int {
	rnd := rand.New(rand.NewPCG(seed, 7))
	return func(n int) int { return rnd.IntN(n) }
}

const runSteps = 500

func TestWindowAgainstModel(t *testing.T) {
	for seed := range uint64(2000) { // a million steps
		if f := run(randomly(seed), runSteps, nil); f != "" {
			t.Fatalf("seed %d: %s", seed, f)
		}
	}
}

func TestWindowForLong(t *testing.T) {
	long := flag.Lookup(longFlag).Value.(flag.Getter).Get().(time.Duration)
	if long == 0 {
		t.Skip("without -" + longFlag)
	}
	until := time.Now().Add(long)
	seed := uint64(1 << 32)
	for ; time.Now().Before(until); seed++ {
		if f := run(randomly(seed), runSteps, cramped); f != "" {
			t.Fatalf("seed %d, cramped: %s", seed, f)
		}
		if f := run(randomly(seed), runSteps, nil); f != "" {
			t.Fatalf("seed %d: %s", seed, f)
		}
	}
	t.Logf("%d steps", (seed-1<<32)*2*runSteps)
}

// cramped is no fault: it has the bounds of left and gone reached often.
func cramped(w *Window, _ string, held Held) (Held, func()) {
	if m := w.more; m != nil && m.reading {
		if len(m.left) > 2 {
			m.halve()
		}
		if len(m.gone) > 2 {
			m.gone, m.void = nil, true
		}
	}
	return held, nil
}

func TestWindowAtItsBounds(t *testing.T) {
	for seed := range uint64(500) {
		if f := run(randomly(seed), runSteps, cramped); f != "" {
			t.Fatalf("seed %d: %s", seed, f)
		}
	}
}

// TestModelFindsFaults plants one fault after the other. The model must find each.
func TestModelFindsFaults(t *testing.T) {
	never := func(uint64) (delivery.Row, Stage, bool) { return delivery.Row{}, 0, false }
	for name, fault := range map[string]hook{
		"what ends during a read is not noted": func(w *Window, call string, h Held) (Held, func()) {
			return h, func() { keepGone(w, call == "ended") }
		},
		"what is edited during a read is not noted": func(w *Window, call string, h Held) (Held, func()) {
			return h, func() { keepGone(w, call == "edited") }
		},
		"what is left during a read is forgotten": func(w *Window, call string, h Held) (Held, func()) {
			if call == "merge" {
				w.more.left = nil
			}
			return h, nil
		},
		"what is shed is not left": func(w *Window, call string, h Held) (Held, func()) {
			next := w.next
			return h, func() {
				if call == "shed" {
					w.next = next
				}
			}
		},
		"what is shed during a read counts as seen": func(w *Window, call string, h Held) (Held, func()) {
			if call == "merge" {
				w.more.left = slices.DeleteFunc(w.more.left, func(l left) bool { return l.commit == 0 })
			}
			return h, nil
		},
		"a commit after the read counts as seen": func(w *Window, call string, h Held) (Held, func()) {
			if call == "merge" {
				for i := range w.more.left {
					w.more.left[i].commit = min(w.more.left[i].commit, 1)
				}
			}
			return h, nil
		},
		"what lies before a read counts as seen": func(w *Window, call string, h Held) (Held, func()) {
			if call == "merge" {
				w.more.from = delivery.Pos{Some: true}
			}
			return h, nil
		},
		"the FIFO passes what is on disk": func(w *Window, call string, h Held) (Held, func()) {
			next := w.next
			if call == "offer" {
				w.next[delivery.FIFO] = delivery.Pos{}
			}
			return h, func() { w.next[delivery.FIFO] = delivery.Least(w.next[delivery.FIFO], next[delivery.FIFO]) }
		},
		"an offer takes what a read has brought": func(_ *Window, call string, h Held) (Held, func()) {
			if call == "offer" {
				return never, nil
			}
			return h, nil
		},
		"a merge takes what is held": func(_ *Window, call string, h Held) (Held, func()) {
			if call == "merge" {
				return never, nil
			}
			return h, nil
		},
		"an edit does not find what is held": func(_ *Window, call string, h Held) (Held, func()) {
			if call == "edited" {
				return never, nil
			}
			return h, nil
		},
		"an edit drops what flies": func(_ *Window, call string, h Held) (Held, func()) {
			if call != "edited" {
				return h, nil
			}
			return func(seq uint64) (delivery.Row, Stage, bool) {
				r, _, ok := h(seq)
				return r, Waiting, ok
			}, nil
		},
		"what waits behind an older epoch is forgotten": func(w *Window, call string, h Held) (Held, func()) {
			if w.more != nil && (call == "ended" || call == "forget") {
				w.more.behind = nil
			}
			return h, nil
		},
		"a position rises with an end": func(w *Window, call string, h Held) (Held, func()) {
			return h, func() {
				if call == "ended" {
					w.next[delivery.FIFO] = delivery.Pos{}
				}
			}
		},
		"a failed read has read": func(w *Window, call string, h Held) (Held, func()) {
			if call == "failed" {
				w.next[w.more.kind] = delivery.Pos{}
			}
			return h, nil
		},
		"a read that is void counts": func(w *Window, call string, h Held) (Held, func()) {
			h, _ = cramped(w, call, h)
			if call == "merge" {
				w.more.void = false
			}
			return h, nil
		},
		"an end is not counted": func(w *Window, call string, h Held) (Held, func()) {
			held := w.held
			return h, func() {
				if call == "ended" {
					w.held = held
				}
			}
		},
		"a merge passes what is left": func(w *Window, call string, h Held) (Held, func()) {
			if call != "merge" || w.more.kind != delivery.FIFO {
				return h, nil
			}
			low := delivery.Pos{}
			for _, l := range w.more.left {
				low = delivery.Least(low, l.pos)
			}
			w.more.left = nil
			return h, func() { w.next[delivery.FIFO] = delivery.Least(w.next[delivery.FIFO], low) }
		},
		"a merge does not rise": func(w *Window, call string, h Held) (Held, func()) {
			next := w.next
			return h, func() {
				if call == "merge" {
					w.next = next
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(3000) {
				if run(randomly(seed), runSteps, fault) != "" {
					return
				}
			}
			t.Error("not found")
		})
	}
}

func keepGone(w *Window, drop bool) {
	if drop && w.more != nil {
		w.more.gone = nil
	}
}

func FuzzWindow(f *testing.F) {
	for seed := range uint64(8) {
		choose := randomly(seed)
		data := make([]byte, 400)
		for i := range data {
			data[i] = byte(choose(256))
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		rest := randomly(0) // for the way to the end
		choose := func(n int) int {
			if len(data) == 0 {
				return rest(n)
			}
			b := int(data[0])
			data = data[1:]
			return b % n
		}
		if failure := run(choose, len(data)/3, nil); failure != "" {
			t.Fatal(failure)
		}
	})
}
