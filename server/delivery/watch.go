package delivery

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

// WatchQuery says which changes a Watch is to tell.
type WatchQuery struct {
	Namespace NamespaceKey
	// Subscription narrows it to one; 0 means all.
	Subscription SubscriptionKey
	// States narrows it to deliveries that stand in one of them since the change; nil means all.
	States []State
	// After is where an earlier Watcher of the namespace was; the zero Position is now.
	After Position
}

// wide: most of what happens is wanted.
func (q *WatchQuery) wide() bool {
	return q.Subscription == 0 && (q.States == nil || slices.Contains(q.States, Pending) || slices.Contains(q.States, Succeeded))
}

// Watcher tells what becomes of the deliveries of a namespace: each change once it is durable, those of one delivery in their
// order. It holds at most 1,024 changes in memory; one that is read too slowly for that goes on from the disk, as long as
// the changes are kept there, and gets ErrExpired when they are not. It is for one goroutine, and is to be closed.
type Watcher struct {
	j     *Journal
	space *watchedSpace
	query WatchQuery
	line  uint64
	pos   Position // of what Next has returned
	// read are changes from the disk that are wanted, readTo is behind all that were read with them; zero when there are none.
	read   []*Change
	readTo Position

	up   bool // it is told
	wake chan struct{}

	mu     sync.Mutex
	ahead  []*Change
	behind bool // more was to be told than it holds: it is told no more
}

// Watch begins to tell changes, from query.After on. ErrExpired says that changes since then are not kept, or are another
// journal's; ErrTooManyWatched, that too many namespaces are watched; ErrTooManyWide, that too many watch most of what happens
// in this one.
func (j *Journal) Watch(ctx context.Context, query WatchQuery) (*Watcher, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	s, err := j.watches.begin(ctx, query.Namespace)
	if err != nil {
		return nil, fmt.Errorf("watch namespace %016x: %w", uint64(query.Namespace), err)
	}
	w := &Watcher{j: j, space: s, query: query, line: s.line, wake: make(chan struct{}, 1), pos: query.After.clone()}
	if query.wide() && s.wide.Add(1) > maxWide {
		w.Close()
		return nil, ErrTooManyWide
	}
	if w.pos.line == 0 {
		w.pos = Position{line: s.line, at: make([]seenTo, len(j.partitions))}
		for i, p := range j.partitions {
			w.pos.reach(uint16(i), p.shownIndex())
		}
		// A loss of power must not take back what a position names.
		if err := j.syncs.wait(ctx, j.syncs.written.Load()); err != nil {
			w.Close()
			return nil, err
		}
		return w, nil
	}
	err = w.kept()
	for i := range w.pos.at {
		if err == nil && w.pos.at[i].commit > j.partitions[i].shownIndex() { // of a journal that has gone on otherwise, or made up
			err = ErrExpired
		}
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// shownIndex is the newest commit that is visible, and durable if it is firm.
func (p *partition) shownIndex() Commit { return Commit(p.shown.Load()) }

// kept reports whether all changes since the position are there.
func (w *Watcher) kept() error {
	if w.pos.line != w.line || len(w.pos.at) != len(w.space.logs) {
		return ErrExpired
	}
	for i, at := range w.pos.at {
		if at.commit < w.space.logs[i].low() {
			return ErrExpired
		}
	}
	return nil
}

// Close ends the watch.
func (w *Watcher) Close() {
	w.halt()
	if w.query.wide() {
		w.space.wide.Add(-1)
	}
	w.space.end()
}

// Position is behind what Next has returned, and all that has happened meanwhile and was not wanted.
func (w *Watcher) Position() Position {
	w.space.mu.Lock()
	defer w.space.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.read) == 0 && w.readTo.line != 0 {
		w.pos, w.readTo = w.readTo, Position{}
	}
	if w.up && !w.behind && len(w.ahead) == 0 && len(w.read) == 0 {
		for i, c := range w.space.told {
			if c > w.pos.at[i].commit {
				w.pos.reach(uint16(i), c)
			}
		}
	}
	return w.pos.clone()
}

// Next waits for the next change. It returns an error when ctx has ended, the journal is closed (ErrClosed), or changes
// that have not been told are not kept any more (ErrExpired).
func (w *Watcher) Next(ctx context.Context) (*Change, error) {
	for {
		if ch := w.take(); ch != nil {
			return ch, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if !w.up {
			if err := w.catchUp(ctx); err != nil {
				return nil, err
			}
			continue
		}
		select {
		case <-w.wake:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-w.j.stop:
			return nil, ErrClosed
		}
	}
}

// take is the next change that is in memory, read before told.
func (w *Watcher) take() *Change {
	for len(w.read) > 0 {
		ch := w.read[0]
		w.read = w.read[1:]
		if !w.pos.seen(ch.at) {
			w.pos.pass(ch.at)
			return ch
		}
	}
	if w.readTo.line != 0 {
		w.pos, w.readTo = w.readTo, Position{}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.ahead) > 0 {
		ch := w.ahead[0]
		w.ahead[0], w.ahead = nil, w.ahead[1:]
		w.j.watches.told.Add(-ch.size)
		if !w.pos.seen(ch.at) {
			w.pos.pass(ch.at)
			return ch
		}
	}
	w.ahead = nil
	if w.behind {
		w.up, w.behind = false, false
	}
	return nil
}

func (w *Watcher) wants(sub SubscriptionKey, state State) bool {
	return (w.query.Subscription == 0 || w.query.Subscription == sub) && w.wantsState(state)
}

func (w *Watcher) wantsState(s State) bool {
	return w.query.States == nil || slices.Contains(w.query.States, s)
}

// offer tells a change. space.mu is held.
func (w *Watcher) offer(ch *Change) {
	if !w.wantsState(ch.State) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.behind:
	case len(w.ahead) >= maxTold || w.j.watches.told.Load() >= allTold:
		w.behind = true
	default:
		w.ahead = append(w.ahead, ch)
		w.j.watches.told.Add(ch.size)
	}
	w.signal()
}

// putOff has the watch read what it was to be told. space.mu is held.
func (w *Watcher) putOff() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.behind = true
	w.signal()
}

func (w *Watcher) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// chunk is how many bytes of changes are read at once.
const chunk = 64 << 10

// catchUp reads the next changes that are on disk. When little is left there it is told what comes, and reads that little.
func (w *Watcher) catchUp(ctx context.Context) error {
	w.halt()
	more, err := w.readSome(ctx)
	if err != nil || more {
		return err
	}
	w.space.add(w)
	more, err = w.readSome(ctx)
	if err == nil && !more {
		w.up = true
		return nil
	}
	w.halt()
	return err
}

// halt has the watch be told no more.
func (w *Watcher) halt() {
	w.space.remove(w)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ch := range w.ahead {
		w.j.watches.told.Add(-ch.size)
	}
	w.ahead, w.behind = nil, false
}

// readSome reads changes behind the position, which are durable when it returns. more: it has not read all.
func (w *Watcher) readSome(ctx context.Context) (more bool, err error) {
	leave, err := w.j.enter()
	if err != nil {
		return false, err
	}
	defer leave()
	if err := w.kept(); err != nil {
		return false, err
	}
	// What is visible by now is durable after the wait; what comes later is told.
	upTo := make([]Commit, len(w.j.partitions))
	for i, p := range w.j.partitions {
		upTo[i] = p.shownIndex()
	}
	if err := w.j.syncs.wait(ctx, w.j.syncs.written.Load()); err != nil {
		return false, err
	}
	r := w.j.db.NewSnapshot()
	defer r.Close()
	ahead := w.readTo
	if ahead.line == 0 {
		ahead = w.pos.clone()
	}
	w.readTo = ahead // its places are shared, and move
	left := chunk
	for _, p := range w.j.partitions {
		if left <= 0 {
			return true, nil
		}
		from := appendNewsKey(nil, p.number, w.query.Namespace, ahead.at[p.number].commit+1, 0)
		err := w.j.iterate(r, from, prefixEnd(appendSpace(nil, p.number, tagNews, w.query.Namespace)), func(it *pebble.Iterator) error {
			for ok := it.First(); ok; ok = it.Next() {
				if left <= 0 {
					more = true
					return nil
				}
				_, commit, ok := splitNews(it.Key())
				value, err := it.ValueAndErr()
				if err != nil || !ok {
					return w.j.corrupt(it.Key(), cmp.Or(err, errBadKey))
				}
				if commit > upTo[p.number] {
					return nil
				}
				skip := uint32(0)
				if seen := ahead.at[p.number]; commit == seen.commit+1 {
					skip = seen.n
				}
				changes, end, err := p.decodeNews(w.query.Namespace, commit, value, skip, w.wants)
				if err != nil {
					return w.j.corrupt(it.Key(), err)
				}
				if !ahead.seen(end) { // else it is the beginning of a commit, whose end is wanted
					left -= len(value)
					ahead.pass(end)
				}
				w.read = append(w.read, changes...)
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	// Trimmed while it was read?
	return more, w.kept()
}
