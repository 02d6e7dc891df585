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

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
)

func TestDiskFullRefusesAppendsOnly(t *testing.T) {
	fs := vfs.NewMem()
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30})
	b := newBench(t, func(o *Options) { o.fs, o.MinFreeBytes = fs, 1<<30 })
	b.append(event("e", "s"))
	job := b.jobs()[0]
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1 << 20, TotalBytes: 20 << 30})
	b.space.check()
	for _, r := range b.Append(t.Context(), []*Event{event("f", "s"), event("g", "s")}) {
		if !errors.Is(r.Err, ErrDiskFull) {
			t.Errorf("%+v", r)
		}
	}
	b.Settle(job, Step{State: Succeeded}, attemptAt(1, OutcomeSucceeded, 200, b.clock.now()))
	b.flush()
	if d := b.delivery(job.ID); d.State != Succeeded {
		t.Errorf("settles stand still: %+v", d)
	}
	if err := b.DropNamespace(t.Context(), "acme"); err != nil {
		t.Errorf("deletions stand still: %v", err)
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 1<<30 + 1, TotalBytes: 20 << 30})
	b.space.check()
	if !b.space.low() {
		t.Error("let in again at the very watermark")
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 5 << 30, TotalBytes: 20 << 30})
	b.space.check()
	b.append(event("f", "s"))
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
	b.append(event("e", "s"))
	var full error = syscall.ENOSPC
	fs.err.Store(&full)
	b.append(event("f", "s")) // finds no room, gives the ballast up, goes on
	if _, err := mem.Stat("journal/" + ballastName); err == nil {
		t.Error("ballast is still there")
	}
	if r := b.Append(t.Context(), []*Event{event("g", "s")})[0]; !errors.Is(r.Err, ErrDiskFull) {
		t.Errorf("after that: %+v", r)
	}
}

// An error of the log ends the process, and nothing is acknowledged any more.
func TestFailedSyncIsFatal(t *testing.T) {
	mem := vfs.NewMem()
	fs := &faultFS{FS: mem, logs: true}
	died := make(chan string, 64) // several goroutines may find out
	j, err := Open(Options{Dir: "journal", Partitions: 2, CacheBytes: 1 << 20, BallastBytes: -1, fs: fs, Fatal: func(r string) { died <- r }})
	if err != nil {
		t.Fatal(err)
	}
	j.Start(func([]*Job) {})
	if r := j.Append(t.Context(), []*Event{event("e", "s")})[0]; r.Err != nil {
		t.Fatal(r.Err)
	}
	broken := errors.New("input/output error")
	fs.err.Store(&broken)
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan AppendResult, 1)
	go func() { answer <- j.Append(ctx, []*Event{event("f", "s")})[0] }()
	if reason := <-died; !strings.Contains(reason, broken.Error()) {
		t.Errorf("died of %q", reason)
	}
	cancel()
	if r := <-answer; !errors.Is(r.Err, context.Canceled) {
		t.Errorf("acknowledged after a failed sync: %+v", r)
	}
	// The journal cannot be closed: its goroutines stand still for good, as they must.
}

func TestOpenRefusesWhatItDoesNotKnow(t *testing.T) {
	put := func(t *testing.T, fs vfs.FS, key, value []byte) {
		t.Helper()
		db, err := pebble.Open("journal", &pebble.Options{FS: fs, FormatMajorVersion: pebble.FormatNewest, Logger: discard{}})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Set(key, value, pebble.Sync), db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("format", func(t *testing.T) {
		b := newBench(t)
		b.close()
		put(t, b.fs, metaKey(), []byte{recordVersion, 0x08, 9, 0x10, 4, 0x1a, 5, 1, 2, 3, 4, 5})
		_, err := Open(b.opts)
		var corrupt *CorruptError
		if !errors.As(err, &corrupt) || corrupt.Dir != "journal" || corrupt.Key != "meta" {
			t.Errorf("got %v", err)
		}
		put(t, b.fs, metaKey(), []byte{recordVersion, 0x08, 1, 0x10, 4, 0x1a, 5, 1, 2, 3, 4, 5})
		b.open()
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
	t.Run("record", func(t *testing.T) {
		b := newBench(t)
		e := event("e", "s")
		b.append(e)
		b.close()
		put(t, b.fs, appendDeliveryKey(nil, e.Partition, lane("s"), e.Seq), []byte{recordVersion + 1, 8, 1})
		b.open()
		var corrupt *CorruptError
		if _, _, err := b.Backlog(lane("s"), e.Partition, 1, 10, 1); !errors.As(err, &corrupt) || !strings.Contains(err.Error(), "version 2") {
			t.Errorf("backlog: %v", err)
		}
		if _, err := b.Deliveries(Query{Namespace: "acme"}); !errors.As(err, &corrupt) || !strings.Contains(corrupt.Key, "acme") {
			t.Errorf("list: %v", err)
		}
	})
}

type discard struct{}

func (discard) Infof(string, ...any)  {}
func (discard) Errorf(string, ...any) {}
func (discard) Fatalf(string, ...any) {}

// A flipped bit in a table is found, and the error names the file.
func TestCorruptTableIsReported(t *testing.T) {
	b := newBench(t)
	for i := range 50 {
		b.append(event(strings.Repeat("x", i+1), "s"))
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
		path := "journal/" + name
		file, err := b.fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
		if err != nil {
			t.Fatal(err)
		}
		var one [1]byte
		_, err = file.ReadAt(one[:], 100)
		one[0] ^= 0x10
		_, werr := file.WriteAt(one[:], 100)
		if err := errors.Join(err, werr, file.Close()); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		flipped++
	}
	if flipped == 0 {
		t.Fatal("no table to spoil")
	}
	j, err := Open(b.opts)
	if err == nil {
		b.Journal = j
		j.Start(func([]*Job) {})
		page, readErr := j.Events(EventQuery{Namespace: "acme"})
		if err = readErr; err == nil && len(page.Events) != 50 {
			t.Error("served a short list without a word")
		}
	}
	if err == nil || !pebble.IsCorruptionError(err) || !strings.Contains(err.Error(), "0000") {
		t.Errorf("got %v", err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	registry := prometheus.NewRegistry()
	b := newBench(t, func(o *Options) { o.Registerer = registry })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if r := b.Append(context.Background(), []*Event{event(strings.Repeat("y", i%200+1), "s")}); r[0].Err != nil {
					if !errors.Is(r[0].Err, ErrClosed) {
						t.Error(r[0].Err)
					}
					return
				}
				_, _ = b.Deliveries(Query{Namespace: "acme", Limit: 5})
			}
		})
	}
	waitFor(t, func() bool { return b.metrics.stored.Load() > 20 })
	if _, err := registry.Gather(); err != nil {
		t.Error(err)
	}
	b.close()
	wg.Wait()
	b.close() // again
	if _, err := b.Event("acme", "y"); !errors.Is(err, ErrClosed) {
		t.Errorf("event: %v", err)
	}
	if _, err := b.Cancel(context.Background(), ID{}, ""); !errors.Is(err, ErrClosed) {
		t.Errorf("cancel: %v", err)
	}
	for _, err := range b.Lanes() {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("lanes: %v", err)
		}
	}
	b.open() // the metrics' names are free again
}
