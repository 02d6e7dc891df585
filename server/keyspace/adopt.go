package keyspace

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Adopt says in an etcd, whosever it was, that what it holds below prefix belongs to identity from now on. It is for
// before Open, and for an operator who means it.
func Adopt(ctx context.Context, client *clientv3.Client, prefix, identity string) error {
	if _, err := client.Put(ctx, prefix+identityKey, string(AddSum(identityKey, []byte(identity)))); err != nil {
		return fmt.Errorf("adopt what etcd holds below %s: %w", prefix, unavailable(ctx, err))
	}
	return nil
}

// Owner is whose etcd says that what it holds below prefix is; empty when it does not say.
func Owner(ctx context.Context, client *clientv3.Client, prefix string) (string, error) {
	found, err := client.Get(ctx, prefix+identityKey)
	if err != nil {
		return "", unavailable(ctx, err)
	}
	if len(found.Kvs) == 0 {
		return "", nil
	}
	value, ok := CheckSum(identityKey, found.Kvs[0].Value)
	if !ok {
		return "", &BrokenError{Key: prefix + identityKey}
	}
	return string(value), nil
}
