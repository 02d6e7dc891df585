package keyspace

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// identityKey says, below the prefix, whose keys these are.
const identityKey = "identity"

// StrangerError says that etcd is not the one it should be: what it holds belongs to somebody else, or
// nobody has said whose it is. Nothing of it is used. It matches ErrUnavailable.
type StrangerError struct {
	// Prefix is where the keys are, Want whose they should be, Found whose they are: empty when they do not
	// say.
	Prefix, Want, Found string
	// Keys counts what is there without saying whose it is; zero when there is nothing at all.
	Keys int64
	// Damaged is set when what says whose it is cannot be trusted.
	Damaged bool
	// WantCluster and FoundCluster are IDs of etcd clusters; zero unless it is they that differ.
	WantCluster, FoundCluster uint64
}

func (e *StrangerError) Error() string {
	switch {
	case e.FoundCluster != e.WantCluster:
		return fmt.Sprintf("this etcd is the cluster %x, the one known so far is %x: bring that one back, or restart Grapnel if it was replaced on purpose",
			e.FoundCluster, e.WantCluster)
	case e.Damaged:
		return fmt.Sprintf("what etcd holds below %s cannot say whose it is, %s%s is damaged, and this is %q: restore etcd from a backup",
			e.Prefix, e.Prefix, identityKey, e.Want)
	case e.Found != "":
		return fmt.Sprintf("what etcd holds below %s belongs to %q, and this is %q: start with the etcd and the data directory that belong together",
			e.Prefix, e.Found, e.Want)
	case e.Keys > 0:
		return fmt.Sprintf("what etcd holds below %s (%d keys) does not say whose it is, and this is %q: start with the etcd that belongs to the data directory, or with an empty one",
			e.Prefix, e.Keys, e.Want)
	}
	return fmt.Sprintf("etcd holds nothing below %s any more, where %q was: bring its data back; what is known stays in use until then",
		e.Prefix, e.Want)
}

// Unwrap makes it match ErrUnavailable: the right etcd cannot be reached.
func (e *StrangerError) Unwrap() error { return ErrUnavailable }

// Stranger says why etcd is not listened to, nil while it is the one it should be.
func (s *Space) Stranger() error {
	if e := s.stranger.Load(); e != nil {
		return e
	}
	return nil
}

// ClusterID is etcd's own ID, as it was at Open.
func (s *Space) ClusterID() uint64 { return s.cluster }

func (s *Space) identityValue() string { return string(AddSum(identityKey, []byte(s.identity))) }

// recognise checks the identity in an answer to a read of its key. The error is a *StrangerError.
func (s *Space) recognise(found *clientv3.GetResponse) error {
	if cluster := found.Header.GetClusterId(); s.cluster != 0 && cluster != s.cluster {
		return &StrangerError{Prefix: s.prefix, Want: s.identity, WantCluster: s.cluster, FoundCluster: cluster}
	}
	if s.identity == "" {
		return nil
	}
	if len(found.Kvs) == 0 {
		return &StrangerError{Prefix: s.prefix, Want: s.identity}
	}
	value, ok := CheckSum(identityKey, found.Kvs[0].Value)
	if !ok {
		return &StrangerError{Prefix: s.prefix, Want: s.identity, Damaged: true}
	}
	if string(value) != s.identity {
		return &StrangerError{Prefix: s.prefix, Want: s.identity, Found: string(value)}
	}
	return nil
}

// unclaimed reports whether etcd holds nothing at all below the prefix.
func (s *Space) unclaimed(err error) bool {
	var e *StrangerError
	return errors.As(err, &e) && e.Found == "" && e.Keys == 0 && e.FoundCluster == 0 && !e.Damaged
}

// claim says in an empty etcd whose it is. Who comes second leaves it as it is.
func (s *Space) claim(ctx context.Context) error {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	_, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(s.prefix), "=", 0).WithPrefix()).
		Then(clientv3.OpPut(s.prefix+identityKey, s.identityValue())).
		Commit()
	if err != nil {
		return unavailable(ctx, err)
	}
	return nil
}

// head reads the newest revision and makes sure that it is that of the right etcd.
func (s *Space) head(ctx context.Context) (*clientv3.GetResponse, error) {
	ctx, cancel := s.Bound(ctx)
	defer cancel()
	found, err := s.client.Get(ctx, s.prefix+identityKey)
	if err != nil {
		return nil, unavailable(ctx, err)
	}
	err = s.recognise(found)
	if s.unclaimed(err) {
		// Nothing at all, or keys of somebody who did not say whose they are?
		count, failed := s.client.Get(ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
		if failed != nil {
			return nil, unavailable(ctx, failed)
		}
		if count.Count > 0 {
			err = &StrangerError{Prefix: s.prefix, Want: s.identity, Keys: count.Count}
		}
	}
	return found, err
}
