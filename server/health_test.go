package server

import (
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealthTellsWhileItLasts: a sync that hangs is told of while it hangs, takes the publish service away when it goes
// on, and gives it back at once.
func TestHealthTellsWhileItLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var began time.Time
		var told []bool
		etcd := ""
		h := newHealth(slog.New(slog.DiscardHandler), func(serving bool) { told = append(told, serving) },
			vital{name: "journal", publishing: true, grace: syncHangs - syncSlow, ail: func() string {
				if !began.IsZero() && time.Since(began) >= syncSlow {
					return "is at a sync"
				}
				return ""
			}},
			vital{name: "etcd", grace: -1, ail: func() string { return etcd }},
		)
		at := func(after time.Duration, ready bool, serving []bool, lines ...string) {
			t.Helper()
			for range after / healthEvery {
				time.Sleep(healthEvery) // of the bubble
				h.look(time.Now())
			}
			got, isReady := h.report()
			if isReady != ready || !slices.Equal(got, lines) || !slices.Equal(told, serving) {
				t.Fatalf("%q, ready %v, told %v; want %q, %v, %v", got, isReady, told, lines, ready, serving)
			}
		}
		at(10*time.Second, true, nil)
		began = time.Now()
		at(syncSlow-healthEvery, true, nil)
		at(healthEvery, true, nil, "journal: is at a sync")
		at(syncHangs-syncSlow-healthEvery, true, nil, "journal: is at a sync")
		at(healthEvery, false, []bool{false}, "journal: is at a sync")
		at(time.Minute, false, []bool{false}, "journal: is at a sync")
		began = time.Time{}
		at(healthEvery, true, []bool{false, true})
		etcd = "is away"
		at(time.Hour, true, []bool{false, true}, "etcd: is away")
		etcd = ""
		at(healthEvery, true, []bool{false, true})
	})
}
