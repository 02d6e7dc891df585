package delivery

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
)

func TestDiskFullRefusesAppendsOnly(t *testing.T) {
	fs := vfs.NewMem()
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30})
	b := newBench(t, func(o *Options) { o.fs, o.MinFreeBytes = fs, 1<<30 })
	b.append(publication("e", 1))
	job := b.jobs()[0]
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1 << 20, TotalBytes: 20 << 30})
	b.space.check()
	for _, r := range b.Append(t.Context(), []Publication{publication("f", 1), publication("g", 1)}) {
		if !errors.Is(r.Err, ErrDiskFull) {
			t.Errorf("%+v", r)
		}
	}
	b.succeed(job)
	b.flush()
	if d := b.delivery(job.ID); d.State != Succeeded {
		t.Errorf("settles stand still: %+v", d)
	}
	if err := b.DropNamespace(t.Context(), acme); err != nil {
		t.Errorf("deletions stand still: %v", err)
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1<<30 + 1, TotalBytes: 20 << 30})
	b.space.check()
	if !b.space.low() {
		t.Error("let in again at the very watermark")
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 5 << 30, TotalBytes: 20 << 30})
	b.space.check()
	b.append(publication("f", 1))
}

// faultFS fails writes with an error while there is one.
type faultFS struct {
	vfs.FS
	err atomic.Pointer[error]
	// logs limits the failure to Pebble's write-ahead log.
	logs bool
}

func (f *faultFS) fault(name string) error {
	if err := f.err.Load(); err != nil && (!f.logs || strings.HasSuffix(name, ".log")) {
		return *err
	}
	return nil
}

func (f *faultFS) wrap(name string, file vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &faultFile{File: file, fs: f, name: name}, nil
}

func (f *faultFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	if err := f.fault(name); err != nil {
		return nil, err
	}
	file, err := f.FS.Create(name, c)
	return f.wrap(name, file, err)
}

func (f *faultFS) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(from, to, c)
	return f.wrap(to, file, err)
}

func (f *faultFS) Remove(name string) error {
	if strings.HasSuffix(name, ballastName) {
		f.err.Store(nil) // room again
	}
	return f.FS.Remove(name)
}

type faultFile struct {
	vfs.File
	fs   *faultFS
	name string
}

func (f *faultFile) Write(p []byte) (int, error) {
	if err := f.fs.fault(f.name); err != nil {
		return 0, err
	}
	return f.File.Write(p)
}

func (f *faultFile) Sync() error {
	if err := f.fs.fault(f.name); err != nil {
		return err
	}
	return f.File.Sync()
}

func (f *faultFile) SyncData() error {
	if err := f.fs.fault(f.name); err != nil {
		return err
	}
	return f.File.SyncData()
}

func TestBallastMakesRoomForWhatIsUnderWay(t *testing.T) {
	mem := vfs.NewMem()
	mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30})
	fs := &faultFS{FS: mem}
	b := newBench(t, func(o *Options) {
		o.fs, o.MinFreeBytes, o.BallastBytes = fs, 1<<30, 1<<20
		o.Fatal = func(reason string) { t.Errorf("died: %s", reason) }
	})
	if _, err := mem.Stat("journal/" + ballastName); err != nil {
		t.Fatal("no ballast:", err)
	}
	b.append(publication("e", 1))
	var full error = syscall.ENOSPC
	fs.err.Store(&full)
	b.append(publication("f", 1)) // finds no room, gives the ballast up, goes on
	if _, err := mem.Stat("journal/" + ballastName); err == nil {
		t.Error("ballast is still there")
	}
	if r := b.Append(t.Context(), []Publication{publication("g", 1)})[0]; !errors.Is(r.Err, ErrDiskFull) {
		t.Errorf("after that: %+v", r)
	}
}

// An error of the log ends the process, and nothing is acknowledged or told any more.
func TestFailedSyncIsFatal(t *testing.T) {
	mem := vfs.NewMem()
	fs := &faultFS{FS: mem, logs: true}
	died := make(chan string, 64) // several goroutines may find out
	j, err := Open(Options{Dir: "journal", Partitions: 2, CacheBytes: 1 << 20, BallastBytes: -1, fs: fs, Fatal: func(r string) { died <- r }})
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{}
	j.Start(f)
	if r := j.Append(t.Context(), []Publication{publication("e", 1)})[0]; r.Err != nil {
		t.Fatal(r.Err)
	}
	broken := errors.New("input/output error")
	fs.err.Store(&broken)
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan AppendResult, 1)
	go func() { answer <- j.Append(ctx, []Publication{publication("f", 1)})[0] }()
	if reason := <-died; !strings.Contains(reason, broken.Error()) {
		t.Errorf("died of %q", reason)
	}
	cancel()
	if r := <-answer; !errors.Is(r.Err, context.Canceled) {
		t.Errorf("acknowledged after a failed sync: %+v", r)
	}
	if jobs := f.jobs(); len(jobs) != 1 {
		t.Errorf("offered after a failed sync: %v", ids(jobs))
	}
	// The journal cannot be closed: its goroutines stand still for good, as they must.
}

// put writes a record behind the journal's back.
func put(t testing.TB, fs vfs.FS, key, value []byte) {
	t.Helper()
	db, err := pebble.Open("journal", &pebble.Options{FS: fs, FormatMajorVersion: pebble.FormatNewest, Logger: discard{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Set(key, value, pebble.Sync), db.Close()); err != nil {
		t.Fatal(err)
	}
}

type discard struct{}

func (discard) Infof(string, ...any)  {}
func (discard) Errorf(string, ...any) {}
func (discard) Fatalf(string, ...any) {}

func TestOpenRefusesWhatItDoesNotKnow(t *testing.T) {
	for name, record := range map[string][]byte{
		"format 1":       {1, 0x08, 1, 0x10, 4, 0x1a, 5, 1, 2, 3, 4, 5},
		"a later format": encodeMeta(nil, meta{format: 3, partitions: 4}),
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.close()
			put(t, b.fs, metaKey(), record)
			if _, err := Open(b.opts); err == nil || !strings.Contains(err.Error(), "this release knows 2") || !strings.Contains(err.Error(), "journal") {
				t.Errorf("got %v", err)
			}
			put(t, b.fs, metaKey(), encodeMeta(nil, meta{format: layoutFormat, partitions: 4}))
			b.open()
		})
	}
	t.Run("meta record", func(t *testing.T) {
		for _, record := range [][]byte{{}, {recordVersion}, {recordVersion + 1, 2, 4}, encodeMeta(nil, meta{format: layoutFormat})} {
			b := newBench(t)
			b.close()
			good := encodeMeta(nil, meta{format: layoutFormat, partitions: 4})
			put(t, b.fs, metaKey(), record)
			_, err := Open(b.opts)
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) || corrupt.Dir != "journal" || corrupt.Key != "meta" {
				t.Errorf("%x: %v", record, err)
			}
			put(t, b.fs, metaKey(), good)
			b.open()
		}
	})
	t.Run("partitions", func(t *testing.T) {
		b := newBench(t)
		b.close()
		o := b.opts
		o.Partitions = 5
		if _, err := Open(o); err == nil || !strings.Contains(err.Error(), "4 partitions") {
			t.Errorf("got %v", err)
		}
		o.Partitions = 0
		j, err := Open(o)
		if err != nil || j.Partitions() != 4 {
			t.Fatal(err)
		}
		b.Journal = j
	})
	t.Run("another database", func(t *testing.T) {
		fs := vfs.NewMem()
		put(t, fs, []byte("something"), []byte("else"))
		if _, err := Open(Options{Dir: "journal", fs: fs}); err == nil {
			t.Error("opened")
		}
	})
}

// A flipped bit in a table is found, and the error names the file.
func TestCorruptTableIsReported(t *testing.T) {
	b := newBench(t)
	for i := range 50 {
		b.append(publication(strings.Repeat("x", i+1), 1))
	}
	if err := b.db.Flush(); err != nil {
		t.Fatal(err)
	}
	b.close()
	names, err := b.fs.List("journal")
	if err != nil {
		t.Fatal(err)
	}
	flipped := 0
	for _, name := range names {
		if !strings.HasSuffix(name, ".sst") {
			continue
		}
		flip(t, b.fs, "journal/"+name, 100)
		flipped++
	}
	if flipped == 0 {
		t.Fatal("no table to spoil")
	}
	j, err := Open(b.opts)
	if err == nil {
		b.Journal = j
		j.Start(&follower{})
		page, readErr := j.Events(EventQuery{Namespace: acme})
		if err = readErr; err == nil && len(page.Events) != 50 {
			t.Error("served a short list without a word")
		}
	}
	if err == nil || !pebble.IsCorruptionError(err) || !strings.Contains(err.Error(), "0000") {
		t.Errorf("got %v", err)
	}
}

// flip changes a bit of a file.
func flip(t testing.TB, fs vfs.FS, path string, offset int64) {
	t.Helper()
	file, err := fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		t.Fatal(err)
	}
	var one [1]byte
	_, err = file.ReadAt(one[:], offset)
	one[0] ^= 0x10
	_, werr := file.WriteAt(one[:], offset)
	if err := errors.Join(err, werr, file.Close()); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

// Close does what has been queued: who was answered finds it made, and nobody waits for ever.
func TestCloseEndsEverything(t *testing.T) {
	registry := prometheus.NewRegistry()
	b := newBench(t, func(o *Options) { o.Registerer = registry })
	var wg sync.WaitGroup
	var mu sync.Mutex
	stored, cancelled := map[ID]bool{}, map[ID]bool{}
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				pub := publication(strings.Repeat("y", i+1)+string(rune('a'+w)), 1)
				r := b.Append(context.Background(), []Publication{pub})[0]
				if r.Err != nil {
					if !errors.Is(r.Err, ErrClosed) {
						t.Error(r.Err)
					}
					return
				}
				id := idOf(r.Event, 1)
				mu.Lock()
				stored[id] = true
				mu.Unlock()
				if i%3 == 0 {
					_, err := b.Cancel(context.Background(), lane(1), id, "x")
					if err != nil && !errors.Is(err, ErrClosed) {
						t.Error(err)
					}
					mu.Lock()
					cancelled[id] = err == nil
					mu.Unlock()
				}
				_, _ = b.Deliveries(Query{Namespace: acme, Limit: 5})
			}
		})
	}
	wg.Go(func() {
		for {
			for _, job := range b.jobs() {
				b.failed(job, time.Hour)
			}
			if _, err := b.Event(acme, "?"); errors.Is(err, ErrClosed) {
				return
			}
		}
	})
	waitFor(t, func() bool { return b.metrics.stored.Load() > 100 })
	if _, err := registry.Gather(); err != nil {
		t.Error(err)
	}
	b.close()
	wg.Wait()
	b.close() // again
	if _, err := b.Event(acme, "y"); !errors.Is(err, ErrClosed) {
		t.Errorf("event: %v", err)
	}
	if _, err := b.Cancel(context.Background(), lane(1), ID{Subscription: 1}, ""); !errors.Is(err, ErrClosed) {
		t.Errorf("cancel: %v", err)
	}
	if err := b.Retain(context.Background(), keepFor(time.Hour)); !errors.Is(err, ErrClosed) {
		t.Errorf("retain: %v", err)
	}
	if err := b.Flush(context.Background()); !errors.Is(err, ErrClosed) {
		t.Errorf("flush: %v", err)
	}
	for _, err := range b.Lanes() {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("lanes: %v", err)
		}
	}
	b.open() // the metrics' names are free again
	for id := range stored {
		d, err := b.Delivery(acme, id)
		if err != nil || cancelled[id] && d.State != Cancelled {
			t.Errorf("%v: %+v, %v", id, d, err)
		}
	}
}

// A commit that the log refuses leaves no trace; callers are told, settles are made again.
func TestRefusedCommitLeavesNoTrace(t *testing.T) {
	var refuse atomic.Bool
	b := newBench(t, onePartition, func(o *Options) { o.refuse = func(uint16) bool { return refuse.Load() } })
	b.hold = b.Hold
	b.append(publication("e", 1), publication("f", 1))
	jobs := b.jobs()
	b.heard()
	refuse.Store(true)
	for _, r := range b.Append(t.Context(), []Publication{publication("g", 1), publication("g", 1)}) {
		if !errors.Is(r.Err, ErrRefused) {
			t.Errorf("%+v", r)
		}
	}
	if _, err := b.Cancel(t.Context(), lane(1), jobs[0].ID, "x"); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if n, err := b.CancelLane(t.Context(), lane(1), "x", nil); n != 0 || !errors.Is(err, ErrRefused) {
		t.Error(n, err)
	}
	if err := b.DropNamespace(t.Context(), acme); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	b.succeed(jobs[1])
	if err := b.Flush(t.Context()); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if got := b.heard(); len(got) != 0 {
		t.Errorf("told %v", got)
	}
	for _, id := range []ID{jobs[0].ID, jobs[1].ID} {
		if d := b.delivery(id); d.State != Pending {
			t.Errorf("%+v", d)
		}
	}
	if _, err := b.Event(acme, "g"); !errors.Is(err, ErrNotFound) || b.OpenIn(acme) != 2 {
		t.Error(err, b.OpenIn(acme))
	}
	refuse.Store(false)
	if r := b.append(publication("g", 1))[0]; r.Duplicate {
		t.Error("the id is taken by a refused event")
	}
	b.flush()
	if d := b.delivery(jobs[1].ID); d.State != Succeeded {
		t.Errorf("the settle is lost: %+v", d)
	}
	for _, job := range append(jobs, b.jobs()...) {
		b.Release(job.Event)
	}
	if n := b.EventBytes(); n != 0 {
		t.Errorf("%d bytes are held", n)
	}
}

// A journal whose log refuses everything can be closed, and what was settled meanwhile is settled after the next
// start.
func TestCloseWhileCommitsAreRefused(t *testing.T) {
	var refuse atomic.Bool
	b := newBench(t, onePartition, func(o *Options) { o.refuse = func(uint16) bool { return refuse.Load() } })
	b.append(publication("e", 1))
	job := b.jobs()[0]
	refuse.Store(true)
	b.succeed(job)
	b.close()
	refuse.Store(false)
	b.open()
	if got := b.backlog(1); len(got) != 1 || got[0].Attempts != 0 {
		t.Errorf("%+v", got)
	}
}
