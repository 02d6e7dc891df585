package secret

import (
	"context"
	"iter"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// DefaultOverlap is how long an old version stays in use when a rotation does not say.
const DefaultOverlap = 24 * time.Hour

// Options for Open.
type Options struct {
	Client *clientv3.Client
	Prefix string
	Key    []byte
	Logger *slog.Logger
}

// Secret is the metadata of one secret. Immutable.
type Secret struct {
	Proto     *grapnelv1.Secret
	Namespace string
	ID        string
	Revision  int64
}

// Version is one live value.
type Version struct {
	Number int
	Value  []byte
	// ExpireTime is zero for the newest.
	ExpireTime time.Time
}

type Store struct{}

func Open(ctx context.Context, o Options) (*Store, error) { return nil, ErrUnavailable }
func (s *Store) Run(ctx context.Context) error            { return nil }
func (s *Store) OnChange(func(name string))               {}
func (s *Store) Healthy() bool                            { return false }
func (s *Store) Create(ctx context.Context, ns, id string, kind grapnelv1.Secret_Kind, value string) (*Secret, string, error) {
	return nil, "", ErrUnavailable
}
func (s *Store) Get(ns, id string) (*Secret, error)                    { return nil, ErrNotFound }
func (s *Store) List(ns, after string) iter.Seq[*Secret]               { return nil }
func (s *Store) Versions(name string) ([]Version, bool)                { return nil, false }
func (s *Store) Delete(ctx context.Context, ns, id, etag string) error { return ErrUnavailable }
func (s *Store) Rotate(ctx context.Context, ns, id, value string, overlap time.Duration, etag string) (*Secret, string, error) {
	return nil, "", ErrUnavailable
}

// LoadOrCreateKey reads the 32-byte key in path, or makes it.
func LoadOrCreateKey(path string) ([]byte, error) { return nil, ErrNotFound }
