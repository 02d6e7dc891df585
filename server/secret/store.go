package secret

import (
	"context"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

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
	// Key is the key-encryption key, 32 bytes; see LoadOrCreateKey.
	Key []byte
	// Expiring is told of each version that goes out of use within ExpiresSoon until it says that this is done, and again after
	// a start. It must not block. Nil is told nothing.
	Expiring func(Expiring) (done bool)
	// Logger defaults to none.
	Logger *slog.Logger
}

// Store is all secrets: read from memory, written to etcd. Its methods may be called from any goroutine.
// Writes wait until memory shows them, and so need Run.
type Store struct {
	space    *keyspace.Space
	prefix   string
	keys     *keyring
	log      *slog.Logger
	tellSoon func(Expiring) (done bool)
	onChange []func(string)

	// telling makes calls of onChange one at a time. It is never taken while mu is held.
	telling sync.Mutex
	// expiring wakes the eraser when what expires first may have changed.
	expiring chan struct{}

	mu      sync.RWMutex // guards secrets and ids
	secrets map[string]*Secret
	// ids are sorted, by namespace.
	ids map[string][]string
}

// Open reads everything once. ctx bounds that only. It returns a *StrangerError for an etcd of somebody else, and ErrWrongKey when there are secrets and not
// one of them was sealed under the key given.
func Open(ctx context.Context, o Options) (*Store, error) {
	if o.Prefix == "" {
		o.Prefix = "/grapnel/v1/"
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	keys, err := newKeyring(o.Key)
	if err != nil {
		return nil, err
	}
	s := &Store{
		prefix:   o.Prefix,
		keys:     keys,
		tellSoon: o.Expiring,
		log:      o.Logger.With("component", "secret"),
		expiring: make(chan struct{}, 1),
		secrets:  make(map[string]*Secret),
		ids:      make(map[string][]string),
	}
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
	if other, foreign := keys.foreign(s.all()); foreign {
		return nil, fmt.Errorf("%w: none of the %d secrets in etcd was sealed under this key (%s), but under %s: is it the right key file? Restore the one from the time of these secrets",
			ErrWrongKey, len(s.secrets), keys.id, other)
	}
	return s, nil
}

// Run keeps memory up to date and erases expired versions until ctx ends, and then returns nil.
func (s *Store) Run(ctx context.Context) error {
	var erasing sync.WaitGroup
	defer erasing.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	erasing.Go(func() { s.eraseExpired(ctx) })
	return s.space.Run(ctx)
}

// Healthy reports whether etcd has been heard within the last seconds, and is the right one.
func (s *Store) Healthy() bool { return s.space.Healthy() }

// Stranger says why etcd is not listened to, a *StrangerError; nil while it is the one it should be.
func (s *Store) Stranger() error { return s.space.Stranger() }

// Broken lists the full names of secrets whose stored values are damaged, sorted.
func (s *Store) Broken() []string {
	names := s.space.Broken()
	for i, key := range names {
		names[i] = strings.TrimPrefix(key, keyPrefix)
	}
	return names
}

// OnChange registers a function that is told the name of a secret after any change of it: new, rotated,
// expired, deleted. One call at a time, from the goroutines of Run; a name may be told more often than
// it changed. Register before Run. The function must not block and must not write to the Store.
func (s *Store) OnChange(f func(name string)) { s.onChange = append(s.onChange, f) }

// Get returns one secret, a *NotFoundError when it does not exist.
func (s *Store) Get(ns, id string) (*Secret, error) {
	if sec := s.find(secretName(ns, id)); sec != nil {
		return sec.at(time.Now()), nil
	}
	return nil, &NotFoundError{Name: secretName(ns, id)}
}

// List goes through a namespace's secrets in the order of their IDs, beginning behind after.
func (s *Store) List(ns, after string) iter.Seq[*Secret] {
	return func(yield func(*Secret) bool) {
		s.mu.RLock()
		ids := s.ids[ns]
		s.mu.RUnlock()
		from, found := slices.BinarySearch(ids, after)
		if found {
			from++
		}
		for _, id := range ids[from:] {
			// Deleted since, perhaps.
			if sec := s.find(secretName(ns, id)); sec != nil && !yield(sec.at(time.Now())) {
				return
			}
		}
	}
}

// Versions returns the live values of a secret, by full name, newest first. False means that there is none
// that could be used: it does not exist, or none of its versions could be opened.
func (s *Store) Versions(name string) ([]Version, bool) {
	sec := s.find(name)
	if sec == nil {
		return nil, false
	}
	live := sec.live(time.Now())
	return live, len(live) > 0
}

func (s *Store) find(name string) *Secret {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.secrets[name]
}

func (s *Store) all() []*Secret {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]*Secret, 0, len(s.secrets))
	for _, sec := range s.secrets {
		out = append(out, sec)
	}
	return out
}

// apply takes stored changes into memory. What cannot be read is not used: a record that was replaced by
// something unreadable must not go on with its old values as if nothing had happened.
func (s *Store) apply(_ int64, stored []keyspace.Change) {
	names := make([]string, 0, len(stored))
	expires := false
	for _, c := range stored {
		name := strings.TrimPrefix(c.Key, keyPrefix)
		names = append(names, name)
		var sec *Secret
		var err error
		if !c.Deleted {
			if sec, err = decode(name, c.Value, c.Revision, s.keys); err == nil {
				err = sec.Fault
			}
		}
		if err != nil {
			s.log.Error("stored secret cannot be used", "key", s.prefix+c.Key, "revision", c.Revision, "err", err)
		}
		s.set(name, sec)
		expires = expires || sec != nil && !sec.nextExpiry().IsZero()
	}
	if expires {
		s.wakeEraser()
	}
	s.tell(names)
}

// set replaces one secret; nil removes it.
func (s *Store) set(name string, sec *Secret) {
	ns, id, ok := splitName(name)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	at, known := slices.BinarySearch(s.ids[ns], id)
	switch {
	case sec == nil && known:
		delete(s.secrets, name)
		// Lists that are being gone through keep the old slice.
		s.ids[ns] = slices.Delete(slices.Clone(s.ids[ns]), at, at+1)
		if len(s.ids[ns]) == 0 {
			delete(s.ids, ns)
		}
	case sec != nil:
		s.secrets[name] = sec
		if !known {
			s.ids[ns] = slices.Insert(slices.Clip(s.ids[ns]), at, id)
		}
	}
}

func (s *Store) tell(names []string) {
	s.telling.Lock()
	defer s.telling.Unlock()
	for _, name := range names {
		for _, f := range s.onChange {
			f(name)
		}
	}
}
