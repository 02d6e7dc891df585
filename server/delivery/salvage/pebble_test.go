package salvage_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2"

	"github.com/grapnel/grapnel/server/delivery/salvage"
)

// Pebble takes damage in the middle of a synced log for the end of the log, as its log writer leaves full blocks out of
// the offset that tells what had been synced: docs/upstream/pebble-wal-sync-offset.md. When this fails because the
// start is refused, Pebble has been mended: the document and this test can go, salvage and high-water marks stay.
func TestPebbleTakesDamageForTheEndOfTheLog(t *testing.T) {
	s := newStore(t, 1)
	s.close()
	o := options(s.gate)
	o.MemTableSize = 16 << 20 // all of it stays in one log
	db, err := pebble.Open(s.dir, o)
	check(t, err)
	const rows, group = 1600, 64
	value := make([]byte, 3000)
	for i := range rows {
		durable := pebble.NoSync // a group of publishers shares a sync
		if i%group == group-1 {
			durable = pebble.Sync
		}
		check(t, db.Set(fmt.Appendf(nil, "%05d", i), value, durable))
	}
	check(t, db.Close())

	logs := neededLogs(t, s.dir)
	l := logs[len(logs)-1]
	flip(t, l.Path, l.End/2)
	report, err := salvage.Check(context.Background(), s.dir)
	check(t, err)
	if len(report.Logs) == 0 || !report.Damaged() || report.Rows < rows-1 {
		t.Errorf("check says\n%s", text(t, report))
	}
	copied := filepath.Join(t.TempDir(), "journal")
	check(t, os.CopyFS(copied, os.DirFS(s.dir)))
	db, err = pebble.Open(copied, options(s.gate))
	if err != nil {
		t.Fatalf("Pebble refuses the damaged log, as it should: %v", err)
	}
	defer db.Close()
	if _, _, err := db.Get(fmt.Appendf(nil, "%05d", rows-1)); err == nil {
		t.Error("Pebble has the last row, as it should")
	}
}
