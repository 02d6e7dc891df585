package server

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/api"
)

// TestEtcdRecoversByDeletionAlone: even an etcd that has raised its alarm, which it keeps over a restart, takes
// writes again once what filled it is deleted.
func TestEtcdRecoversByDeletionAlone(t *testing.T) {
	o := Options{DataDir: t.TempDir(), EtcdQuota: minEtcdQuota, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
	ctx := t.Context()
	open := func() *configStore {
		t.Helper()
		c, err := openConfigStore(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		c.watchRoom(prometheus.NewRegistry())
		return c
	}
	free := func() uint64 { return math.MaxUint64 }
	c := open()
	n, err := 0, error(nil)
	for ; err == nil; n++ {
		_, err = c.client.Put(ctx, fmt.Sprint(configPrefix, n), strings.Repeat("x", 200<<10))
	}
	if !c.alarmed() || !errors.Is(c.Err(), api.ErrConfigFull) {
		t.Fatalf("full after %d values, %v: alarm %v, refusal %v", n, err, c.alarmed(), c.Err())
	}
	before := c.size()
	near := 0
	c.room.near = func(used, quota int64) (heard bool) {
		if near++; used < quota/5*4 || quota != minEtcdQuota {
			t.Errorf("%d of %d bytes is told as near", used, quota)
		}
		return near > 1
	}
	for range 3 {
		c.makeRoom(ctx, free)
	}
	if near != 2 {
		t.Errorf("told %d times that the quota is near, and the second was heard", near)
	}
	if c.Err() == nil || c.size() < before {
		t.Errorf("nothing was deleted, and it is %d bytes instead of %d, refusal %v", c.size(), before, c.Err())
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	c = open()
	if !c.alarmed() {
		t.Fatal("a restart takes the alarm back; this test is of no use any more")
	}
	if _, err := c.client.Delete(ctx, configPrefix, clientv3.WithPrefix()); err != nil {
		t.Fatalf("delete while full: %v", err)
	}
	for deadline := time.Now().Add(30 * time.Second); c.Err() != nil && time.Now().Before(deadline); {
		c.makeRoom(ctx, free) // the server does this once a second
	}
	if err := c.Err(); err != nil || c.alarmed() || c.size() > 1<<20 {
		t.Errorf("all is deleted, and it is still %d bytes, alarm %v, refusal %v", c.size(), c.alarmed(), err)
	}
	if _, err := c.client.Put(ctx, configPrefix+"small", "x"); err != nil {
		t.Errorf("a change now: %v", err)
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	c = open()
	defer c.close()
	if _, err := c.client.Put(ctx, configPrefix+"small", "y"); err != nil || c.Err() != nil {
		t.Errorf("a change after a restart: %v, %v", err, c.Err())
	}
}
