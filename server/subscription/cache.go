package subscription

import (
	"slices"
	"strings"
	"sync"
)

const (
	// maxCacheBytes bounds what is remembered of event types, over all namespaces: a publisher may invent as
	// many as it likes.
	maxCacheBytes = 4 << 20
	// maxMatchBytes bounds one answer that is remembered. Finding a longer one anew costs little beside what
	// is done with it.
	maxMatchBytes = maxCacheBytes / 16
	// matchOverhead is what an answer takes beside its names and pointers.
	matchOverhead = 160
)

// match is the answer of a namespace's globs for one event type. Immutable once it is in the cache.
type match struct {
	// version is the tenant's for which it holds.
	version uint64
	subs    []*Subscription
	// conditional is set when one of subs has a condition.
	conditional bool
}

func newMatch(version uint64, subs []*Subscription) match {
	if cap(subs) > len(subs) {
		subs = append(make([]*Subscription, 0, len(subs)), subs...) // so that its length is what it takes
	}
	return match{
		version: version, subs: subs,
		conditional: slices.ContainsFunc(subs, func(s *Subscription) bool { return s.condition != nil }),
	}
}

// follow makes an older answer one for the tenant as it is, by what has changed since.
func (s *Snapshot) follow(known match, ns, eventType string) []*Subscription {
	subs, copied := known.subs, false
	for _, step := range s.recent {
		if step.version <= known.version || step.sub().Namespace != ns {
			continue
		}
		was, is := step.old != nil && step.old.covers(eventType), step.now != nil && step.now.covers(eventType)
		if !was && !is {
			continue
		}
		if !copied {
			subs, copied = slices.Clone(subs), true
		}
		at, ok := slices.BinarySearchFunc(subs, step.sub().ID, func(s *Subscription, id string) int { return strings.Compare(s.ID, id) })
		switch {
		case ok && is:
			subs[at] = step.now
		case ok:
			subs = slices.Delete(subs, at, at+1)
		case is:
			subs = slices.Insert(subs, at, step.now)
		}
	}
	return subs
}

// covers reports whether one of its globs covers a type.
func (s *Subscription) covers(eventType string) bool {
	if len(s.globs) == 0 {
		return !Operational(eventType)
	}
	return slices.ContainsFunc(s.globs, func(g string) bool { return globCovers(g, eventType) })
}

// cache remembers answers: the latest in young, and what was there before in old until young is full. What
// is asked for goes on living, what is not goes by itself, and so do answers of what is deleted.
type cache struct {
	mu         sync.RWMutex // guards what follows
	young, old map[cacheKey]match
	// bytes is what young takes.
	bytes int
}

// age has what nobody asks for go when the second call comes: an answer keeps subscriptions in memory that
// may have changed or gone.
func (c *cache) age() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.old, c.young, c.bytes = c.young, nil, 0
}

type cacheKey struct{ ns, eventType string }

// get returns the latest answer, which may be older or newer than a snapshot.
func (c *cache) get(ns, eventType string) (match, bool) {
	key := cacheKey{ns, eventType}
	c.mu.RLock()
	m, ok := c.young[key]
	if ok {
		c.mu.RUnlock()
		return m, true
	}
	m, ok = c.old[key]
	c.mu.RUnlock()
	if ok {
		c.put(ns, eventType, m)
	}
	return m, ok
}

// put remembers an answer unless a newer one is known.
func (c *cache) put(ns, eventType string, m match) {
	size := m.size(ns, eventType)
	if size > maxMatchBytes {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := cacheKey{strings.Clone(ns), strings.Clone(eventType)}
	if known, ok := c.young[key]; ok {
		if known.version > m.version {
			return
		}
		c.bytes -= known.size(ns, eventType)
		delete(c.young, key)
	}
	if c.young == nil || c.bytes+size > maxCacheBytes/2 {
		c.old, c.young, c.bytes = c.young, make(map[cacheKey]match), 0
	}
	c.bytes += size
	c.young[key] = m
}

func (m match) size(ns, eventType string) int {
	return matchOverhead + len(ns) + len(eventType) + 8*len(m.subs)
}
