// Package window holds what a lane knows of its open rows in one partition: which are in memory, and from where
// on the others are on disk. It is pure: no clock, no I/O, no locks, so that a model can hold it.
//
// The journal's effects reach a Window in the order of the commits, but late, and a read may have seen commits
// whose effects are still to come. Whatever the order, a Window keeps these invariants:
//
//  1. An open row that can be read is held, or at or behind the position of its kind, or its Offer is to come, or it
//     waits behind an older epoch of itself that is held.
//  2. A held row has the epoch on disk, or is marked, or its Ended or Edited is to come.
//  3. A position falls freely and rises only in Merge.
//  4. Merge takes nothing that is held, nor what was ended or edited after the read.
//  5. One row of a delivery is held, and each ends once.
//  6. A row of the FIFO that comes to memory passes none that is on disk and known.
//  7. Idle if and only if nothing is held, on disk or being read. Without faults every run gets there.
package window

import (
	"cmp"
	"slices"

	"github.com/grapnel/grapnel/server/delivery"
)

// Stage is how far a held row has come.
type Stage uint8

// Stages of a held row.
const (
	// Waiting rows may be tried, shed or dropped.
	Waiting Stage = iota
	// Flying rows are being tried.
	Flying
	// Settling rows are on their way to the disk, and held until Ended.
	Settling
)

// Held looks a sequence up among the rows that the lane holds of this partition.
type Held func(seq uint64) (delivery.Row, Stage, bool)

// Placed says where an offered row goes.
type Placed uint8

// Places of an offered row.
const (
	// Take: the caller holds it from now on, as Waiting.
	Take Placed = iota
	// Leave: it stays on disk and is read later.
	Leave
	// Known: a read has brought it to memory before its Offer came.
	Known
)

// Fate says what becomes of a held row that a caller has ended or replaced.
type Fate uint8

// Fates of an edited row.
const (
	// None: the row is not held.
	None Fate = iota
	// Drop: the row was waiting; the caller forgets it.
	Drop
	// Mark: the row is being tried or settled. It is held until Ended or Forget, and must not wait again.
	Mark
)

// Window is one lane's open rows in one partition. The zero Window has none. It holds no rows itself: the caller
// keeps those that it is told to take, and finds them by Held. A Window that is Idle may be thrown away.
type Window struct {
	// next lies, by kind, at or before every row that is not held.
	next [2]delivery.Pos
	held uint32
	// newest is at or above the sequence of each row that is held.
	newest uint64
	more   *more
}

// more is what a Window knows beside its positions while a read is under way, or a row waits behind an older epoch
// of itself.
type more struct {
	reading bool
	kind    delivery.Kind
	from    delivery.Pos
	left    []left
	gone    []gone
	// void: more has happened than gone can hold, and the read comes to nothing.
	void   bool
	behind []behind
}

// left is a row that stayed on disk, or went back there, while a read was under way: commit 0 if it was shed.
type left struct {
	pos    delivery.Pos
	commit delivery.Commit
}

// gone is a row that was ended or replaced while a read was under way.
type gone struct {
	seq    uint64
	epoch  uint32
	commit delivery.Commit
}

type behind struct {
	row    delivery.Row
	commit delivery.Commit
}

const (
	// maxLeft bounds left. Beyond it neighbours become one, which reads some rows twice and misses none.
	maxLeft = 64
	// maxGone bounds gone.
	maxGone = 1 << 16
)

// Found adds what was found on disk at the start: positions at or before the first rows.
func (w *Window) Found(fifo, timer delivery.Pos) {
	w.next[delivery.FIFO] = delivery.Least(w.next[delivery.FIFO], fifo)
	w.next[delivery.Timer] = delivery.Least(w.next[delivery.Timer], timer)
}

// Next is the position of a kind: nothing before it is on disk and not held.
func (w *Window) Next(k delivery.Kind) delivery.Pos { return w.next[k] }

// Len is how many rows are held.
func (w *Window) Len() int { return int(w.held) }

// Reading reports whether a read is under way, and of which kind.
func (w *Window) Reading() (delivery.Kind, bool) {
	if w.more == nil || !w.more.reading {
		return 0, false
	}
	return w.more.kind, true
}

// Idle reports whether nothing is open, as far as the window knows.
func (w *Window) Idle() bool {
	return w.held == 0 && w.more == nil && !w.next[delivery.FIFO].Some && !w.next[delivery.Timer].Some
}

// Offer says where a row goes that commit c made. With room it is taken, unless others of its kind that come
// before it are on disk. A row whose older epoch is still held waits behind that.
func (w *Window) Offer(r delivery.Row, c delivery.Commit, room bool, held Held) Placed {
	if r.Seq <= w.newest {
		if x, _, ok := held(r.Seq); ok {
			if x.Epoch >= r.Epoch {
				return Known
			}
			m := w.extend()
			m.behind = append(m.behind, behind{r, c})
			return Leave
		}
	}
	if n := w.next[r.Kind]; room && (!n.Some || r.Kind == delivery.Timer && r.Pos().Before(n)) {
		w.hold(r.Seq)
		return Take
	}
	w.leave(r, c)
	return Leave
}

func (w *Window) hold(seq uint64) {
	w.held++
	w.newest = max(w.newest, seq)
}

// Want begins a read: it says where to read a kind from, of Timer only when something may be due by now. The read
// must take its snapshot after this call. One read is under way at a time; it ends with Merge or Failed.
func (w *Window) Want(k delivery.Kind, now delivery.Instant) (delivery.Pos, bool) {
	n := w.next[k]
	if _, reading := w.Reading(); reading || !n.Some || k == delivery.Timer && n.Due > now {
		return delivery.Pos{}, false
	}
	m := w.extend()
	m.reading, m.kind, m.from = true, k, n
	return n, true
}

// Merge ends the read. rows are what was read, in order, as of commit upTo, and next is the place of the first
// open row that was read no more. A caller without room for all cuts rows short and passes the first of the
// rest as next. Merge returns the rows to hold, as Waiting; the slice is the caller's, cut.
func (w *Window) Merge(rows []delivery.Row, next delivery.Pos, upTo delivery.Commit, held Held) []delivery.Row {
	m := w.more
	low := next
	for _, l := range m.left {
		seen := l.commit != 0 && l.commit <= upTo && !l.pos.Before(m.from)
		if !seen {
			low = delivery.Least(low, l.pos)
		}
	}
	if m.void {
		rows, low = rows[:0], delivery.Least(low, m.from)
	}
	if m.kind == delivery.FIFO {
		// What comes after a row that is left stays with it, or it would be tried first.
		n, _ := slices.BinarySearchFunc(rows, low, func(r delivery.Row, low delivery.Pos) int {
			if r.Pos().Before(low) {
				return -1
			}
			return 1
		})
		rows = rows[:n]
	}
	slices.SortFunc(m.gone, func(a, b gone) int { return cmp.Compare(a.seq, b.seq) })
	take := rows[:0]
	for _, r := range rows {
		// A row whose older epoch is held waits behind it already, or its Offer is to come.
		if _, _, ok := held(r.Seq); ok || m.hasGone(r, upTo) {
			continue
		}
		w.hold(r.Seq)
		take = append(take, r)
	}
	w.next[m.kind] = low
	w.endRead()
	return take
}

// Failed ends a read that came to nothing.
func (w *Window) Failed() { w.endRead() }

// Ended tells that commit c has done with a held row: it was settled, or too late. The caller forgets it; what
// follows comes by Offer.
func (w *Window) Ended(r delivery.Row, c delivery.Commit) {
	w.held--
	if m := w.more; m != nil && m.reading && m.kind == r.Kind && !r.Pos().Before(m.from) {
		m.note(r.Seq, r.Epoch, c)
	}
	w.follow(r.Seq)
}

// Forget gives up a held row that is marked and has nothing to settle.
func (w *Window) Forget(r delivery.Row) {
	w.held--
	w.follow(r.Seq)
}

// Edited tells that commit c ended or replaced, for a caller, the row of a sequence with this epoch.
func (w *Window) Edited(seq uint64, epoch uint32, c delivery.Commit, held Held) Fate {
	if m := w.more; m != nil && m.reading {
		m.note(seq, epoch, c)
	}
	x, stage, ok := held(seq)
	switch {
	case !ok || x.Epoch > epoch:
		return None
	case stage == Waiting:
		w.held--
		w.follow(seq)
		return Drop
	}
	return Mark
}

// Shed gives a waiting row that is not marked back to the disk. Rows may be shed in any order; to keep the order
// of the FIFO the last ones go first.
func (w *Window) Shed(r delivery.Row) {
	w.held--
	w.leave(r, 0)
}

// leave notes a row that is on disk and not held.
func (w *Window) leave(r delivery.Row, c delivery.Commit) {
	p := r.Pos()
	w.next[r.Kind] = delivery.Least(w.next[r.Kind], p)
	if m := w.more; m != nil && m.reading && m.kind == r.Kind {
		m.leave(left{p, c})
	}
}

// leave adds to left. Of two rows the later one, in time, with the lesser place says all: where the read has not
// seen the other, it has not seen this.
func (m *more) leave(l left) {
	if l.commit != 0 {
		for n := len(m.left); n > 0 && m.left[n-1].saidBy(l); n-- {
			m.left = m.left[:n-1]
		}
	}
	m.left = append(m.left, l)
	if len(m.left) == maxLeft {
		m.halve()
	}
}

func (l left) saidBy(later left) bool {
	return l.commit != 0 && l.commit <= later.commit && !l.pos.Before(later.pos)
}

func (m *more) halve() {
	n := len(m.left) / 2
	for i := range n {
		a, b := m.left[2*i], m.left[2*i+1]
		both := left{delivery.Least(a.pos, b.pos), max(a.commit, b.commit)}
		if a.commit == 0 || b.commit == 0 {
			both.commit = 0
		}
		m.left[i] = both
	}
	m.left = append(m.left[:n], m.left[2*n:]...)
}

func (m *more) note(seq uint64, epoch uint32, c delivery.Commit) {
	if len(m.gone) == maxGone {
		m.gone, m.void = nil, true
	}
	if !m.void {
		m.gone = append(m.gone, gone{seq, epoch, c})
	}
}

// hasGone reports whether a row that was read as of commit upTo was ended or replaced after it. gone is sorted.
func (m *more) hasGone(r delivery.Row, upTo delivery.Commit) bool {
	i, _ := slices.BinarySearchFunc(m.gone, r.Seq, func(g gone, seq uint64) int { return cmp.Compare(g.seq, seq) })
	for ; i < len(m.gone) && m.gone[i].seq == r.Seq; i++ {
		if m.gone[i].epoch >= r.Epoch && m.gone[i].commit > upTo {
			return true
		}
	}
	return false
}

// follow puts what waited behind a row of a sequence on the disk's account, now that it is not held any more.
func (w *Window) follow(seq uint64) {
	if w.more == nil || len(w.more.behind) == 0 {
		return
	}
	m := w.more
	rest := m.behind[:0]
	for _, b := range m.behind {
		if b.row.Seq == seq {
			w.leave(b.row, b.commit)
		} else {
			rest = append(rest, b)
		}
	}
	m.behind = rest
	w.shrink()
}

func (w *Window) extend() *more {
	if w.more == nil {
		w.more = &more{}
	}
	return w.more
}

func (w *Window) endRead() {
	*w.more = more{behind: w.more.behind}
	w.shrink()
}

func (w *Window) shrink() {
	if m := w.more; m != nil && !m.reading && len(m.behind) == 0 {
		w.more = nil
	}
}
