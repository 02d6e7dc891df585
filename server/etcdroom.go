package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/api"
)

// At a quota of its own the embedded etcd refuses every write, deletions that note something included, and stays there
// until its history is compacted, its file made anew and its alarm taken back. So that quota lies some way above ours,
// at which new configuration is refused: deletions have room, and what they free is won back here.

const (
	// worthwhile is the part of the quota by which a file must shrink to be made anew: reads and writes wait meanwhile.
	worthwhile = 8
	roomEvery  = time.Second
)

// hardQuota is etcd's own quota.
func hardQuota(quota int64) int64 { return quota + max(quota/4, 16<<20) }

// etcdRoom is the state of keeping room in the embedded etcd.
type etcdRoom struct {
	recovered prometheus.Counter

	mu sync.Mutex // guards what follows
	// compacted is the revision up to which there is no history any more.
	compacted int64
	// rest is until when it is not tried again.
	rest time.Time
	full bool // told
	// near is told that four fifths of the quota are used until it is heard, then once until seven tenths are; nil is told
	// nothing.
	near   func(used, quota int64) (heard bool)
	nearly bool // told
}

func (c *configStore) size() int64 { return c.embedded.Server.Backend().Size() }

// Err is api.ErrConfigFull while the embedded etcd takes nothing new, else nil.
func (c *configStore) Err() error {
	if c.embedded == nil || c.size() < c.quota && !c.alarmed() {
		return nil
	}
	return fmt.Errorf("%w: the embedded etcd holds %d of %d bytes", api.ErrConfigFull, c.size(), c.quota)
}

// alarmed reports whether etcd has met its quota.
func (c *configStore) alarmed() bool {
	for _, a := range c.embedded.Server.Alarms() {
		if a.Alarm == etcdserverpb.AlarmType_NOSPACE {
			return true
		}
	}
	return false
}

// watchRoom registers what tells an operator that the embedded etcd fills up.
func (c *configStore) watchRoom(r prometheus.Registerer) {
	c.room.recovered = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "grapnel_config_store_recoveries_total", Help: "Times that a full embedded etcd was compacted and made writable again.",
	})
	if c.embedded == nil {
		return
	}
	r.MustRegister(
		c.room.recovered,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_config_store_bytes", Help: "Size of the embedded etcd's file.",
		}, func() float64 { return float64(c.size()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_config_store_quota_bytes", Help: "Size of the embedded etcd's file from which on new configuration is refused.",
		}, func() float64 { return float64(c.quota) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_config_store_full", Help: "1 while new configuration is refused because the embedded etcd has reached its quota.",
		}, func() float64 {
			if c.Err() != nil {
				return 1
			}
			return 0
		}),
	)
}

// keepRoom looks after the embedded etcd's size until ctx ends. free is what the disk has left.
func (c *configStore) keepRoom(ctx context.Context, free func() uint64) error {
	if c.embedded == nil {
		return nil
	}
	tick := time.NewTicker(roomEvery)
	defer tick.Stop()
	for {
		c.makeRoom(ctx, free)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// makeRoom wins back what deletions have freed, if etcd is full.
func (c *configStore) makeRoom(ctx context.Context, free func() uint64) {
	r := &c.room
	r.mu.Lock()
	defer r.mu.Unlock()
	switch used := c.size(); {
	case used < c.quota/10*7:
		r.nearly = false
	case used >= c.quota/5*4 && !r.nearly && r.near != nil:
		r.nearly = r.near(used, c.quota)
	}
	if c.Err() == nil {
		r.full = false
		return
	}
	if !r.full {
		r.full = true
		c.log.Warn("the embedded etcd has reached its quota: new configuration is refused; delete what is not needed, or give it a larger --etcd-quota",
			"bytes", c.size(), "quota_bytes", c.quota)
	}
	began := time.Now()
	if began.Before(r.rest) {
		return
	}
	before := c.size()
	won, err := c.compact(ctx, free())
	took := time.Since(began)
	r.rest = time.Now().Add(10 * took)
	switch {
	case err != nil && ctx.Err() == nil:
		r.rest = r.rest.Add(10 * time.Second)
		c.log.Error("room in the embedded etcd could not be won back; this is tried again", "err", err.Error())
	case won:
		r.recovered.Inc()
		c.log.Info("the embedded etcd takes new configuration again", "bytes", c.size(), "before_bytes", before, "took", took)
	}
}

// compact drops etcd's history, makes its file anew where that helps, and takes the alarm back. It reports whether
// there is room now.
func (c *configStore) compact(ctx context.Context, free uint64) (won bool, err error) {
	resp, err := c.client.Get(ctx, configPrefix, clientv3.WithCountOnly())
	if err != nil {
		return false, err
	}
	if revision := resp.Header.GetRevision(); revision > c.room.compacted {
		_, err = c.client.Compact(ctx, revision, clientv3.WithCompactPhysical())
		if err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
			return false, fmt.Errorf("compact: %w", err)
		}
		c.room.compacted = revision
	}
	backend := c.embedded.Server.Backend()
	backend.ForceCommit() // what was freed counts as free once no transaction sees it: now, or at the next turn
	inUse := backend.SizeInUse()
	if c.size() >= c.quota {
		if inUse > c.quota-c.quota/worthwhile {
			return false, nil
		}
		if free < uint64(inUse) {
			return false, fmt.Errorf("making the file anew takes %d bytes, the disk has %d", inUse, free)
		}
		if err := c.embedded.Server.Defragment(); err != nil {
			return false, fmt.Errorf("make the file anew: %w", err)
		}
	}
	if c.alarmed() {
		if _, err := c.client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: uint64(c.embedded.Server.MemberID()), Alarm: etcdserverpb.AlarmType_NOSPACE}); err != nil {
			return false, fmt.Errorf("take the alarm back: %w", err)
		}
	}
	return c.Err() == nil, nil
}
