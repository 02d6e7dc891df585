package dispatch

import (
	"sync"

	"github.com/grapnel/grapnel/server/delivery"
)

const shards = 64

// index finds the jobs in memory by delivery.
type index struct {
	shards [shards]shard
}

type shard struct {
	mu      sync.Mutex
	entries map[delivery.ID]*entry
}

func (i *index) shard(id delivery.ID) *shard {
	h := (id.Seq ^ uint64(id.Partition)<<48 ^ uint64(id.Ordinal)<<32) * 0x9e3779b97f4a7c15
	return &i.shards[h>>58]
}

func (i *index) put(x *entry) {
	s := i.shard(x.id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.entries == nil {
		s.entries = make(map[delivery.ID]*entry)
	}
	s.entries[x.id] = x
}

func (i *index) remove(id delivery.ID) {
	s := i.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, id)
}

// get returns nil for a delivery that is not in memory.
func (i *index) get(id delivery.ID) *entry {
	s := i.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entries[id]
}

func (i *index) has(id delivery.ID) bool { return i.get(id) != nil }

func (i *index) each(visit func(*entry)) {
	for n := range i.shards {
		s := &i.shards[n]
		s.mu.Lock()
		for _, x := range s.entries {
			visit(x)
		}
		s.mu.Unlock()
	}
}
