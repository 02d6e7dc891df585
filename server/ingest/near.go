package ingest

import (
	"time"

	"github.com/grapnel/grapnel/server/subscription"
)

// The quotas that are met here.
const (
	rateQuota = "max_publish_rate"
	openQuota = "max_open_deliveries"
)

// nearEvery is how often it is told that a namespace is near a quota.
const nearEvery = time.Hour

// isNear reports whether four fifths of a limit are used.
func isNear(used, limit int64) bool { return used > 0 && used >= limit-limit/5 }

// near tells that a quota is near, unless that was told within the hour or nobody listens.
func (i *Ingest) near(ns *subscription.Namespace, quota string, used, limit int64, now time.Time) {
	if i.tellNear == nil || !i.registry.Snapshot().Listens(ns.ID) {
		return
	}
	due := false
	i.meters.use(ns.UID, now, func(m *meter) { due = m.tell(quota, now) })
	if due {
		i.tellNear(Near{Namespace: ns, Quota: quota, Used: used, Limit: limit, Time: now})
	}
}

// tell reports whether it is time to tell that a quota is near, and takes it for told.
func (m *meter) tell(quota string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used = now
	if last, ok := m.near[quota]; ok && now.Sub(last) < nearEvery {
		return false
	}
	if m.near == nil {
		m.near = make(map[string]time.Time)
	}
	m.near[quota] = now
	return true
}
