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
	if testing.Short() {
		t.Skip("takes long")
	}
	dir := t.TempDir()
	o := Options{Dir: filepath.Join(dir, "a"), MinFreeBytes: -1}
	j, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	j.Start(&deaf{})
	start := time.Now()
	for n := 0; n < *backlogEvents; n += 1000 {
		for _, r := range j.Append(context.Background(), benchEvents(1000, n, 1)) {
			if r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	t.Logf("%d appended in %v, %s, %d bytes on disk", *backlogEvents, time.Since(start), rss(), j.db.Metrics().DiskSpaceUsage())
	if n := j.EventBytes(); n != 0 {
		t.Errorf("%d bytes of events that nobody holds", n)
	}
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
	j.Start(&deaf{})
	lanes := 0
	for state, err := range j.Lanes() {
		if err != nil {
			t.Fatal(err)
		}
		r, err := j.Read(state.Lane, state.Partition, FIFO, state.FIFO, 0, 64, 1<<20)
		if err != nil || len(r.Jobs) == 0 {
			t.Errorf("%d jobs, %v", len(r.Jobs), err)
		}
		release(j, r.Jobs)
		lanes++
	}
	if lanes != j.Partitions() {
		t.Errorf("%d lanes", lanes)
	}
	t.Logf("open, with a first read of every lane, after %v, %s", time.Since(start), rss())
	waitFor(t, j.Counted)
	if n := j.OpenIn(acme); n != int64(*backlogEvents) {
		t.Errorf("%d open", n)
	}
	t.Logf("counted after %v, %s", time.Since(start), rss())
	start = time.Now()
	read := 0
	for p := range uint16(j.Partitions()) {
		for from := (Pos{Some: true}); from.Some; {
			r, err := j.Read(lane(1), p, FIFO, from, 0, 256, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			read, from = read+len(r.Jobs), r.Next
			release(j, r.Jobs)
		}
	}
	t.Logf("%d read in %v, %s", read, time.Since(start), rss())
	if read != *backlogEvents || j.EventBytes() != 0 {
		t.Errorf("%d read, %d bytes held", read, j.EventBytes())
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// deaf is a follower that keeps nothing.
type deaf struct{}

func (deaf) Offer(Commit, []Job)                            {}
func (deaf) Timed(Commit, LaneKey, uint16, Row)             {}
func (deaf) Edited(Commit, LaneKey, uint16, uint64, uint32) {}

func release(j *Journal, jobs []Job) {
	for i := range jobs {
		j.Release(jobs[i].Event)
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
