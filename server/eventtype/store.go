package eventtype

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/tidwall/btree"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/keyspace"
)

// Options for Open.
type Options struct {
	// Client is required; the Store does not close it.
	Client *clientv3.Client
	// Prefix of all keys, ending in a slash. Default /grapnel/v1/.
	Prefix string
	// Identity says whose etcd it must be; empty does not ask. See keyspace.Options.
	Identity string
	// CacheBytes is about what compiled schemas may take. Default 32 MiB.
	CacheBytes int
	// Logger defaults to none.
	Logger *slog.Logger
}

// Store is all event types: read from memory, written to etcd. Its methods may be called from any goroutine. Writes wait
// until memory shows them, and so need Run.
type Store struct {
	space    *keyspace.Space
	prefix   string
	log      *slog.Logger
	programs *programs
	// catalogs are by namespace; nil while nobody has registered anything.
	catalogs atomic.Pointer[btree.Map[string, *Catalog]]
	// next are the catalogs that will be shown next, and types what is in them. They belong to Open and then to Run.
	next  *btree.Map[string, *Catalog]
	types map[string]*btree.Map[string, *Type]

	mu sync.Mutex // guards what follows
	// writing is how many bytes are about to be added, by namespace.
	writing map[string]int
	// unread are the names of types whose stored values are whole and cannot be read all the same.
	unread map[string]bool
}

// keyPrefix stands before the name of a type in its key, so that who wants all types reads nothing else, and those who
// follow other things do not read these.
const keyPrefix = "eventtypes/"

// treeDegree is half of what a node of a tree holds at most. Small nodes make small copies.
const treeDegree = 16

// Open reads everything once. ctx bounds that only. It returns a *StrangerError for an etcd of somebody else.
func Open(ctx context.Context, o Options) (*Store, error) {
	if o.Prefix == "" {
		o.Prefix = "/grapnel/v1/"
	}
	if o.CacheBytes <= 0 {
		o.CacheBytes = 32 << 20
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{
		prefix:   o.Prefix,
		log:      o.Logger.With("component", "eventtype"),
		programs: newPrograms(o.CacheBytes),
		next:     btree.NewMap[string, *Catalog](treeDegree),
		types:    make(map[string]*btree.Map[string, *Type]),
		writing:  make(map[string]int),
		unread:   make(map[string]bool),
	}
	var err error
	s.space, err = keyspace.Open(ctx, keyspace.Options{
		Client:   o.Client,
		Prefix:   o.Prefix,
		Watch:    []string{keyPrefix},
		Identity: o.Identity,
		Apply:    s.apply,
		Logger:   s.log,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Run keeps memory up to date until ctx ends, and then returns nil.
func (s *Store) Run(ctx context.Context) error { return s.space.Run(ctx) }

// Healthy reports whether etcd has been heard within the last seconds, and is the right one.
func (s *Store) Healthy() bool { return s.space.Healthy() }

// Broken lists the full names of types whose stored values are damaged or cannot be read, sorted. What was known of them
// before is still in use.
func (s *Store) Broken() []string {
	names := s.space.Broken()
	for i, key := range names {
		names[i] = strings.TrimPrefix(key, keyPrefix)
	}
	s.mu.Lock()
	for name := range s.unread {
		names = append(names, name)
	}
	s.mu.Unlock()
	slices.Sort(names)
	return slices.Compact(names)
}

// In returns what a namespace has registered, nil when nothing. It never blocks.
func (s *Store) In(ns string) *Catalog {
	all := s.catalogs.Load()
	if all == nil {
		return nil
	}
	c, _ := all.Get(ns)
	return c
}

// Damaged reports whether a type that In does not show is stored all the same, in a value that cannot be read.
func (s *Store) Damaged(ns, id string) bool {
	if s.In(ns).Get(id) != nil {
		return false
	}
	return slices.Contains(s.Broken(), Name(ns, id))
}

// note keeps in mind whether the value of a name can be read.
func (s *Store) note(name string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if delete(s.unread, name); err != nil {
		s.unread[name] = true
	}
}

// apply takes stored changes into the next catalogs. A value that cannot be read is skipped: what was known before stays.
func (s *Store) apply(_ int64, stored []keyspace.Change) {
	sizes := make(map[string]int) // by namespace, of those that change
	for _, c := range stored {
		name := strings.TrimPrefix(c.Key, keyPrefix)
		ns, ok := namespaceIn(name)
		var t *Type
		var err error
		if ok && !c.Deleted {
			t, err = decode(s, name, c.Value, c.Revision)
		}
		s.note(name, err)
		if !ok || err != nil {
			s.log.Error("stored value skipped", "key", s.prefix+c.Key, "revision", c.Revision, "err", err)
			continue
		}
		if _, begun := sizes[ns]; !begun {
			sizes[ns] = 0
			if c, ok := s.next.Get(ns); ok {
				sizes[ns] = c.size
			}
		}
		sizes[ns] += s.set(ns, name, t)
	}
	if len(sizes) == 0 {
		return
	}
	for ns, size := range sizes {
		if types := s.types[ns]; types != nil && types.Len() > 0 {
			s.next.Set(ns, &Catalog{types: types.Copy(), size: size})
			continue
		}
		delete(s.types, ns)
		s.next.Delete(ns)
	}
	if s.next.Len() == 0 {
		s.catalogs.Store(nil)
		return
	}
	s.catalogs.Store(s.next.Copy())
}

// set replaces one type by the next; nil removes it. It returns by how much the namespace has grown.
func (s *Store) set(ns, name string, t *Type) int {
	types := s.types[ns]
	if types == nil {
		types = btree.NewMap[string, *Type](treeDegree)
		s.types[ns] = types
	}
	var old *Type
	grown := 0
	if t != nil {
		old, _ = types.Set(t.ID, t)
		grown = t.size
	} else if id, ok := unescape(name[strings.LastIndexByte(name, '/')+1:]); ok {
		old, _ = types.Delete(id)
	}
	if old != nil {
		s.programs.forget(old)
		grown -= old.size
	}
	return grown
}
