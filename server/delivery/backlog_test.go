package delivery

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

//nolint:gochecknoglobals // a test flag
var backlogEvents = flag.Int("backlog.events", 20_000, "waiting deliveries of the backlog test")

// Waiting deliveries cost disk, not memory, and a journal that was not closed is open again at once.
func TestBacklogStaysOnDisk(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dir: filepath.Join(dir, "a"), MinFreeBytes: -1}
	j, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	j.Start(func([]*Job) {})
	start := time.Now()
	for n := 0; n < *backlogEvents; n += 1000 {
		for _, r := range j.Append(context.Background(), benchEvents(1000, n)) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	t.Logf("%d appended in %v, %s, %d bytes on disk", *backlogEvents, time.Since(start), rss(), j.db.Metrics().DiskSpaceUsage())
	// A checkpoint is what a crash leaves: tables and a log to replay.
	o.Dir = filepath.Join(dir, "b")
	if err := j.db.Checkpoint(o.Dir); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	cpu := cpuTime()
	start = time.Now()
	if j, err = Open(o); err != nil {
		t.Fatal(err)
	}
	t.Logf("open after %v, of which %v processor time", time.Since(start), cpuTime()-cpu)
	j.Start(func([]*Job) {})
	lanes := 0
	for state, err := range j.Lanes() {
		if err != nil {
			t.Fatal(err)
		}
		if jobs, _, err := j.Backlog(state.Lane, state.Partition, state.From, 64, 1<<20); err != nil || len(jobs) == 0 {
			t.Errorf("%d jobs, %v", len(jobs), err)
		}
		lanes++
	}
	if took := time.Since(start); lanes != j.Partitions() || took > 10*time.Second {
		t.Errorf("%d lanes after %v", lanes, took)
	}
	t.Logf("open, with a first read of every lane, after %v, %s", time.Since(start), rss())
	waitFor(t, j.Counted)
	if n := j.OpenIn("acme"); n != int64(*backlogEvents) {
		t.Errorf("%d open", n)
	}
	t.Logf("counted after %v, %s", time.Since(start), rss())
	start = time.Now()
	read := 0
	for p := range uint16(j.Partitions()) {
		for from := uint64(1); from != 0; {
			jobs, next, err := j.Backlog(LaneKey{"acme", "orders"}, p, from, 256, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			read, from = read+len(jobs), next
		}
	}
	t.Logf("%d read in %v, %s", read, time.Since(start), rss())
	if read != *backlogEvents {
		t.Errorf("%d read", read)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// rss is the process's memory where the system tells.
func rss() string {
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmRSS:") {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return "VmRSS unknown"
}
