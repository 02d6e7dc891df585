package ingest

import (
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"
)

// What has been idle for a minute is dropped, and starts as if it had not been.
func TestMetersOfIdleNamespacesGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all meters
		uid := func(n uint64) (uid [16]byte) {
			binary.BigEndian.PutUint64(uid[8:], n)
			return uid
		}
		busy, most := uid(1<<40), 0
		for n := range uint64(20_000) {
			all.use(uid(n), time.Now(), func(m *meter) { m.take(time.Now(), 1, 5) })
			all.use(busy, time.Now(), func(m *meter) { m.add(time.Now(), 1) })
			most = max(most, len(all.all))
			time.Sleep(time.Second)
		}
		if most > 4*leastMeters {
			t.Errorf("%d meters for 61 namespaces at a time", most)
		}
		if got := all.find(busy); got == nil || got.rate(time.Now()) < 0.9 {
			t.Error("one in use has forgotten")
		}
	})
}
