package delivery

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sync/errgroup"
)

const (
	// newsKept is how long changes are kept for those who come back, and how long they are recorded when nobody watches any
	// more.
	newsKept = 10 * time.Minute
	// mostNews bounds what is kept of a namespace in a partition, in bytes; allNews of all namespaces in it.
	mostNews, allNews = 4 << 20, 64 << 20
	// maxWatched bounds the namespaces that are watched at a time, or have been lately.
	maxWatched = 4096
	// trimEvery is how often it is looked what of that is old or too much.
	trimEvery = 5 * time.Second
	// maxUntold bounds what waits to be told to those who watch, in bytes: beyond, they read it from the disk.
	maxUntold = 32 << 20
	// maxTold bounds the changes that wait in memory for one who watches.
	maxTold = 1024
	// allTold bounds them over all who watch, in bytes.
	allTold = 64 << 20
	// maxWide bounds those who watch everything in a namespace, of whom each costs something at every change.
	maxWide = 100
)

// Errors of Watch.
var (
	// ErrExpired says that changes since a position are not kept any more.
	ErrExpired = errors.New("changes since then are not kept any more")
	// ErrTooManyWatched says that too many namespaces are watched.
	ErrTooManyWatched = fmt.Errorf("more than %d namespaces are watched, or have been within %v", maxWatched, newsKept)
	// ErrTooManyWide says that too many watch everything in a namespace.
	ErrTooManyWide = fmt.Errorf("%d watch all deliveries of the namespace, which is all there may be: watch those of one subscription_uid, or those in other states than PENDING and SUCCEEDED", maxWide)
)

// watches knows which namespaces are watched, and by whom. Of those, and of no others, each commit records what it has
// changed (see change.go), so that a watch can go on where it was, also after a crash. Once that is durable it is told to
// those who are up to date; the others read it.
type watches struct {
	j *Journal
	// turn is had by who begins or ends to record.
	turn   chan struct{}
	spaces atomic.Pointer[map[NamespaceKey]*watchedSpace]

	mu     sync.Mutex
	untold []untold
	bytes  int64 // of untold
	// waiting: there is something untold.
	waiting atomic.Bool
	wake    chan struct{}

	told atomic.Int64 // bytes of changes that wait in memory for those who watch; one that several wait for counts for each
}

// watchedSpace is a namespace whose changes are recorded.
type watchedSpace struct {
	key  NamespaceKey
	line uint64
	logs []newsLog // by partition

	// watches rises only with the turn. until is, since nobody watches, when the record ends, in nanoseconds since 1970.
	watches, wide, until atomic.Int64
	broken               atomic.Bool // it has gaps, and begins anew

	mu    sync.Mutex
	told  []Commit                       // by partition: the last with changes that was told
	up    [Skipped + 1][]*Watcher        // who is told of all subscriptions, by the states that they want
	upFor map[SubscriptionKey][]*Watcher // who is told of one
}

// untold are the changes of a commit. They are durable once so many buffered commits are.
type untold struct {
	p      *partition
	commit Commit
	ticket uint64
	news   []news
}

func newWatches(j *Journal) *watches {
	w := &watches{j: j, turn: make(chan struct{}, 1), wake: make(chan struct{}, 1)}
	w.spaces.Store(&map[NamespaceKey]*watchedSpace{})
	j.syncs.told = func() {
		if w.waiting.Load() {
			w.signal()
		}
	}
	return w
}

func (w *watches) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// watched reports whether the changes of a namespace are to be recorded.
func (w *watches) watched(ns NamespaceKey) bool { return (*w.spaces.Load())[ns] != nil }

// load finds what was recorded before the start, and goes on with it for those who come back.
func (w *watches) load() error {
	spaces := make(map[NamespaceKey]*watchedSpace)
	for _, p := range w.j.partitions {
		prefix := appendTag(nil, p.number, tagWatched)
		if err := w.j.scan(w.j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
			rec, err := decodeRecorded(value)
			if len(key) != bodyOffset+8 {
				w.j.log.Warn("a record of who watches is left alone", "err", w.j.corrupt(key, errBadKey))
				return nil
			}
			ns := NamespaceKey(binary.BigEndian.Uint64(key[bodyOffset:]))
			if err != nil { // of no line: those who watched begin anew
				w.j.log.Warn("those who watched a namespace have to begin anew", "err", w.j.corrupt(key, err))
				rec = recorded{line: rand.Uint64() | 1}
			}
			s := spaces[ns]
			if s == nil {
				s = w.newSpace(ns, rec.line)
				s.stayFor(newsKept)
				spaces[ns] = s
			}
			if rec.line != s.line {
				return nil
			}
			log := &s.logs[p.number]
			log.floor, log.last = rec.floor, rec.floor
			rows := appendSpace(nil, p.number, tagNews, ns)
			return w.j.lastKey(w.j.db, rows, prefixEnd(rows), func(key []byte) error {
				if _, commit, ok := splitNews(key); ok && commit > log.last {
					log.last, log.marks = commit, []newsMark{{at: time.Now(), last: commit}}
				}
				return nil
			})
		}); err != nil {
			return err
		}
	}
	for _, s := range spaces { // a crash while it began, or ended
		for i := range s.logs {
			if s.logs[i].floor == nothing {
				s.broken.Store(true)
			}
		}
	}
	w.spaces.Store(&spaces)
	return w.dropLost(spaces)
}

// dropLost erases changes that a crash has left of a record that had been given up: nobody would.
func (w *watches) dropLost(spaces map[NamespaceKey]*watchedSpace) error {
	b := w.j.db.NewBatch()
	defer b.Close()
	for _, p := range w.j.partitions {
		all := appendTag(nil, p.number, tagNews)
		if err := w.j.hop(w.j.db, all, prefixEnd(all), func(key []byte) ([]byte, error) {
			if len(key) < bodyOffset+8 {
				return append(slices.Clone(key), 0), nil
			}
			space := slices.Clone(key[:bodyOffset+8])
			if spaces[NamespaceKey(binary.BigEndian.Uint64(space[bodyOffset:]))] != nil {
				return prefixEnd(space), nil
			}
			return prefixEnd(space), b.DeleteRange(space, prefixEnd(space), nil)
		}); err != nil {
			return err
		}
	}
	if b.Empty() {
		return nil
	}
	if err := b.Commit(pebble.Sync); err != nil {
		return fmt.Errorf("drop changes that nobody watches: %w", err)
	}
	return nil
}

// ForgetWatches has those who watched the journal begin anew: it has gone back to an earlier state, whose commits are to come
// again and be others. Call it before Start.
func (j *Journal) ForgetWatches() error {
	if err := forgetWatches(j.db, len(j.partitions)); err != nil {
		return fmt.Errorf("journal %s: %w", j.dir, err)
	}
	j.watches.spaces.Store(&map[NamespaceKey]*watchedSpace{})
	return nil
}

func forgetWatches(db *pebble.DB, partitions int) error {
	b := db.NewBatch()
	defer b.Close()
	for p := range partitions {
		for _, tag := range []byte{tagNews, tagWatched} {
			prefix := appendTag(nil, uint16(p), tag)
			if err := b.DeleteRange(prefix, prefixEnd(prefix), nil); err != nil {
				return fmt.Errorf("forget who watched: %w", err)
			}
		}
	}
	if err := b.Commit(pebble.Sync); err != nil {
		return fmt.Errorf("forget who watched: %w", err)
	}
	return nil
}

func (w *watches) newSpace(ns NamespaceKey, line uint64) *watchedSpace {
	s := &watchedSpace{
		key: ns, line: line, logs: make([]newsLog, len(w.j.partitions)), told: make([]Commit, len(w.j.partitions)),
		upFor: make(map[SubscriptionKey][]*Watcher),
	}
	for i := range s.logs {
		s.logs[i].floor = nothing
	}
	return s
}

// take has the turn to begin or to end a record.
func (w *watches) take(ctx context.Context) (release func(), err error) {
	select {
	case w.turn <- struct{}{}:
		return func() { <-w.turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// begin has the changes of a namespace be recorded for one more who watches.
func (w *watches) begin(ctx context.Context, ns NamespaceKey) (*watchedSpace, error) {
	release, err := w.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	old := *w.spaces.Load()
	if s := old[ns]; s != nil {
		if s.broken.Load() {
			if err := w.record(ctx, s); err != nil {
				return nil, err
			}
		}
		s.watches.Add(1)
		return s, nil
	}
	if len(old) >= maxWatched {
		return nil, ErrTooManyWatched
	}
	s := w.newSpace(ns, 0)
	spaces := maps.Clone(old)
	spaces[ns] = s
	w.spaces.Store(&spaces)
	if err := w.record(ctx, s); err != nil {
		return nil, err
	}
	s.watches.Add(1)
	return s, nil
}

// record begins to record anew, which each partition notes.
func (w *watches) record(ctx context.Context, s *watchedSpace) error {
	s.line = rand.Uint64() | 1
	s.broken.Store(true)
	var all errgroup.Group
	for _, p := range w.j.partitions {
		all.Go(func() error {
			return p.do(ctx, func(c *commit) error {
				// All of this commit has been prepared since the namespace is watched.
				log := &s.logs[p.number]
				log.mu.Lock()
				log.floor, log.last = c.index-1, max(log.last, c.index-1)
				log.mu.Unlock()
				c.putRecorded(s, c.index-1)
				c.firm = true
				return nil
			})
		})
	}
	err := all.Wait()
	s.broken.Store(err != nil)
	return err
}

// end is begin's counterpart.
func (s *watchedSpace) end() {
	s.stayFor(newsKept)
	s.watches.Add(-1)
}

// stayFor has the record go on for a while when nobody watches any more.
func (s *watchedSpace) stayFor(d time.Duration) { s.until.Store(time.Now().Add(d).UnixNano()) }

// dropped has nobody go on with the record of a namespace that has been erased.
func (w *watches) dropped(ctx context.Context, ns NamespaceKey) error {
	release, err := w.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s := (*w.spaces.Load())[ns]; s != nil {
		s.broken.Store(true)
	}
	return nil
}

// recorded is a v record.
type recorded struct {
	line  uint64
	floor Commit
}

func (c *commit) putRecorded(s *watchedSpace, floor Commit) {
	p := c.p
	p.key = appendSpace(p.key[:0], p.number, tagWatched, s.key)
	w := newRecord(p.value[:0])
	w.uint(s.line)
	w.uint(uint64(floor))
	p.value = w
	c.set(p.key, p.value)
}

func decodeRecorded(value []byte) (r recorded, err error) {
	d := readRecord(value)
	r.line, r.floor = d.uint(), Commit(d.uint())
	return r, d.err
}

// applied takes the changes of a commit that has become visible. It is called by committers, one commit of a partition
// after the other.
func (w *watches) applied(c *commit) {
	if len(c.news) == 0 {
		return
	}
	size := int64(0)
	spaces := *w.spaces.Load()
	for i := range c.news {
		n := &c.news[i]
		size += n.size()
		if s := spaces[n.ns]; s != nil {
			log := &s.logs[c.p.number]
			log.mu.Lock()
			log.last = c.index
			log.bytes += n.size()
			log.mu.Unlock()
		}
	}
	w.mu.Lock()
	w.waiting.Store(true)
	w.untold = append(w.untold, untold{c.p, c.index, w.j.syncs.written.Load(), c.news})
	if c.firm { // and all that was written before it
		w.untold[len(w.untold)-1].ticket = 0
	}
	if w.bytes += size; w.bytes > maxUntold {
		w.putOff(spaces)
	}
	w.mu.Unlock()
	w.signal()
}

// putOff has all read from the disk what waits to be told, before anything later is: else they would pass over it. mu is held.
func (w *watches) putOff(spaces map[NamespaceKey]*watchedSpace) {
	late := make(map[*watchedSpace]bool)
	for i := range w.untold {
		for k := range w.untold[i].news {
			if s := spaces[w.untold[i].news[k].ns]; s != nil && !late[s] {
				late[s] = true
				s.putOff()
			}
		}
	}
	w.untold, w.bytes = nil, 0
}

// tellAll tells those who are up to date what has become durable.
func (w *watches) tellAll() {
	for {
		select {
		case <-w.j.stop:
			return
		case <-w.wake:
		}
		synced := w.j.syncs.synced.Load()
		w.mu.Lock()
		n := 0
		for n < len(w.untold) && w.untold[n].ticket <= synced {
			for i := range w.untold[n].news {
				w.bytes -= w.untold[n].news[i].size()
			}
			n++
		}
		told := w.untold[:n:n]
		if w.untold = w.untold[n:]; len(w.untold) == 0 {
			w.untold = nil
			w.waiting.Store(false)
		}
		w.mu.Unlock()
		spaces := *w.spaces.Load()
		for i := range told {
			u := &told[i]
			for k := range u.news {
				if s := spaces[u.news[k].ns]; s != nil {
					s.tell(u.p, u.commit, &u.news[k])
				}
			}
		}
	}
}

// tell gives changes to those who are up to date and want them.
func (s *watchedSpace) tell(p *partition, commit Commit, n *news) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told[p.number] = commit
	if !s.anyUp() {
		return
	}
	for i := range n.parts {
		part := &n.parts[i]
		changes, err := p.decodeChanges(s.key, changeAt{partition: p.number, commit: commit, n: part.first}, part.count, i == len(n.parts)-1, part.body, 0, s.wanted)
		if err != nil {
			p.j.die("changes that were just made: " + err.Error())
		}
		for _, ch := range changes {
			if int(ch.State) < len(s.up) {
				for _, w := range s.up[ch.State] {
					w.offer(ch)
				}
			}
			for _, w := range s.upFor[ch.ID.Subscription] {
				w.offer(ch)
			}
		}
	}
}

// wanted reports whether somebody who is told wants a change. mu is held.
func (s *watchedSpace) wanted(sub SubscriptionKey, state State) bool {
	return int(state) < len(s.up) && len(s.up[state]) > 0 || len(s.upFor[sub]) > 0
}

func (s *watchedSpace) anyUp() bool {
	return len(s.upFor) > 0 || slices.ContainsFunc(s.up[:], func(group []*Watcher) bool { return len(group) > 0 })
}

// add has a watch be told from now on.
func (s *watchedSpace) add(w *Watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sub := w.query.Subscription; sub != 0 {
		s.upFor[sub] = append(s.upFor[sub], w)
		return
	}
	for state := range s.up {
		if w.wantsState(State(state)) {
			s.up[state] = append(s.up[state], w)
		}
	}
}

func (s *watchedSpace) remove(w *Watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	without := func(all []*Watcher) []*Watcher {
		if i := slices.Index(all, w); i >= 0 {
			return slices.Delete(all, i, i+1)
		}
		return all
	}
	if sub := w.query.Subscription; sub != 0 {
		if s.upFor[sub] = without(s.upFor[sub]); len(s.upFor[sub]) == 0 {
			delete(s.upFor, sub)
		}
		return
	}
	for state := range s.up {
		s.up[state] = without(s.up[state])
	}
}

// putOff has all who are up to date read from the disk what they were to be told.
func (s *watchedSpace) putOff() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, group := range s.up {
		for _, w := range group {
			w.putOff()
		}
	}
	for _, group := range s.upFor {
		for _, w := range group {
			w.putOff()
		}
	}
}

// trimAll gives up changes that are old, or too many, and ends records that nobody needs.
func (w *watches) trimAll() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-w.j.stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := w.trim(ctx, time.Now()); err != nil && ctx.Err() == nil && !errors.Is(err, ErrClosed) {
			w.j.log.Warn("changes that are watched are not trimmed", "err", err)
		}
	}
}

func (w *watches) trim(ctx context.Context, now time.Time) error {
	spaces := *w.spaces.Load()
	most := min(int64(mostNews), allNews/int64(max(len(spaces), 1)))
	for _, s := range spaces {
		if s.broken.Load() && s.watches.Load() > 0 { // its namespace is gone
			continue
		}
		if ended, err := w.giveUp(ctx, s, now); err != nil || ended {
			if err != nil {
				return err
			}
			continue
		}
		for _, p := range w.j.partitions {
			floor, due := s.logs[p.number].trim(now, most)
			if !due {
				continue
			}
			if err := p.do(ctx, func(c *commit) error {
				if (*w.spaces.Load())[s.key] != s || s.broken.Load() {
					return nil
				}
				c.deleteSpan(appendSpace(nil, p.number, tagNews, s.key), appendNewsKey(nil, p.number, s.key, floor+1, 0))
				c.putRecorded(s, floor)
				return nil
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

// giveUp ends the record of a namespace that nobody has watched for a while.
func (w *watches) giveUp(ctx context.Context, s *watchedSpace, now time.Time) (bool, error) {
	release, err := w.take(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	if s.watches.Load() > 0 || now.UnixNano() < s.until.Load() {
		return false, nil
	}
	// First that nobody goes on with it, for good, while it is still recorded.
	s.broken.Store(true)
	for _, p := range w.j.partitions {
		if err := p.do(ctx, func(c *commit) error {
			c.firm = true
			c.delete(appendSpace(nil, p.number, tagWatched, s.key))
			return nil
		}); err != nil {
			return false, err
		}
	}
	spaces := maps.Clone(*w.spaces.Load())
	delete(spaces, s.key)
	w.spaces.Store(&spaces)
	for _, p := range w.j.partitions {
		if err := p.do(ctx, func(c *commit) error {
			c.deletePrefix(appendSpace(nil, p.number, tagNews, s.key))
			return nil
		}); err != nil {
			return true, err
		}
	}
	return true, nil
}
