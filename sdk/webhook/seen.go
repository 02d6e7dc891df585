package webhook

import (
	"context"
	"sync"
	"time"
)

// Claim is what a SeenStore says about an event.
type Claim int

// Claims.
const (
	// ClaimNew means that the event is the caller's: it must Commit or Release it.
	ClaimNew Claim = iota + 1
	// ClaimDone means that the event was committed before.
	ClaimDone
	// ClaimBusy means that someone else has claimed it and not settled yet.
	ClaimBusy
)

// SeenStore remembers which events were handled. Its methods are called concurrently, and obey ctx. A store
// shared by several processes should let a claim expire when its process has died: after longer than any
// handler takes.
//
// A Handler whose Commit or Release fails calls it again: when the event is sent again, and when the store
// is seen to work. Both must therefore be harmless when they were done before.
type SeenStore interface {
	// Claim reserves id for the caller; of concurrent callers exactly one gets ClaimNew.
	Claim(ctx context.Context, id string) (Claim, error)
	// Commit makes a claim final, also one that has expired meanwhile: the event was handled.
	Commit(ctx context.Context, id string) error
	// Release gives a claim up, so that the next attempt can have it. It leaves committed ids alone.
	Release(ctx context.Context, id string) error
}

// Defaults of a MemoryStore. Four days is as long as Grapnel retries by default.
const (
	defaultSeenLimit = 100_000
	defaultSeenTTL   = 4 * 24 * time.Hour
)

// MemoryStore is a SeenStore for a receiver of one process. It forgets an id after its time to live, or
// sooner when it is full: then the oldest goes first. What is being handled is kept beside that. It forgets
// everything when the process ends.
type MemoryStore struct {
	limit int
	ttl   time.Duration

	mu sync.Mutex
	// seen holds claimed ids with a zero time, and committed ones with the time to forget them.
	seen map[string]time.Time
	// committed lists committed ids, oldest first from head on.
	committed []string
	head      int
}

// NewMemoryStore returns an empty store of up to limit committed ids (100,000 when zero) that are kept
// for ttl (four days when zero).
func NewMemoryStore(limit int, ttl time.Duration) *MemoryStore {
	if limit <= 0 {
		limit = defaultSeenLimit
	}
	if ttl <= 0 {
		ttl = defaultSeenTTL
	}
	return &MemoryStore{limit: limit, ttl: ttl, seen: map[string]time.Time{}}
}

// Claim reserves id. It never fails.
func (s *MemoryStore) Claim(_ context.Context, id string) (Claim, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(time.Now())
	switch expire, found := s.seen[id]; {
	case !found:
		s.seen[id] = time.Time{}
		return ClaimNew, nil
	case expire.IsZero():
		return ClaimBusy, nil
	}
	return ClaimDone, nil
}

// Commit makes a claim final. An id that is not claimed is left as it is. It never fails.
func (s *MemoryStore) Commit(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if expire, found := s.seen[id]; found && expire.IsZero() {
		s.seen[id] = time.Now().Add(s.ttl)
		s.committed = append(s.committed, id)
		s.forget(time.Now())
	}
	return nil
}

// Release gives a claim up. An id that is not claimed is left as it is. It never fails.
func (s *MemoryStore) Release(_ context.Context, id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if expire, found := s.seen[id]; found && expire.IsZero() {
		delete(s.seen, id)
	}
	return nil
}

// forget drops what is over the limit or past its time. Ids expire in the order of their commits.
func (s *MemoryStore) forget(now time.Time) {
	for s.head < len(s.committed) {
		id := s.committed[s.head]
		if len(s.committed)-s.head <= s.limit && now.Before(s.seen[id]) {
			break
		}
		delete(s.seen, id)
		s.committed[s.head] = ""
		s.head++
	}
	if s.head > 1024 && s.head > len(s.committed)/2 {
		s.committed = append([]string(nil), s.committed[s.head:]...)
		s.head = 0
	}
}
