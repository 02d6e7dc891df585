package keyspace

import (
	"context"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// A change that comes as the wait for it ends, as it may at each heartbeat, is told by this Next or by the next one.
func TestNextKeepsWhatComesAsTheWaitEnds(t *testing.T) {
	for range 100 {
		watch := make(chan clientv3.WatchResponse, 1)
		watch <- clientv3.WatchResponse{
			Header: &etcdserverpb.ResponseHeader{ClusterId: 1, Revision: 7},
			Events: []*clientv3.Event{{Type: clientv3.EventTypeDelete, Kv: &mvccpb.KeyValue{Key: []byte("/p/a"), ModRevision: 7}}},
		}
		w := &Watcher{s: &Space{prefix: "/p/", cluster: 1}, watch: watch, ctx: t.Context(), cancel: func() {}, revision: 6}
		ended, cancel := context.WithDeadline(t.Context(), time.Now().Add(time.Microsecond))
		seen, err := w.Next(ended)
		cancel()
		if err != nil {
			seen, err = w.Next(t.Context())
		}
		if err != nil || len(seen) != 1 || w.Revision() != 7 {
			t.Fatalf("told %v up to revision %d, %v", seen, w.Revision(), err)
		}
	}
}
