package delivery

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// take reads up to so many changes, and reports whether Next returned each time.
func take(w *Watcher, most int, within time.Duration) (n int, returned bool, last error) {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	type res struct {
		n   int
		err error
	}
	out := make(chan res, 1)
	var count atomic.Int64
	go func() {
		for i := 0; i < most; i++ {
			if _, err := w.Next(ctx); err != nil {
				out <- res{i, err}
				return
			}
			count.Add(1)
		}
		out <- res{most, nil}
	}()
	select {
	case r := <-out:
		return r.n, true, r.err
	case <-time.After(within + 3*time.Second):
		return int(count.Load()), false, nil
	}
}

// A commit with more changes than are read at once is told whole, and holds nobody up.
func TestWatchOverALargeCommit(t *testing.T) {
	b := newBench(t, onePartition)
	w, err := b.Watch(t.Context(), WatchQuery{Namespace: acme})
	if err != nil {
		t.Fatal(err)
	}
	const subs = 8000
	var all []int
	for i := range subs {
		all = append(all, i+1)
	}
	b.append(publication("fan", all...))
	n, returned, err := take(w, subs, 5*time.Second)
	t.Logf("%d of %d, Next returned after its ctx ended: %v, err %v", n, subs, returned, err)
	if n != subs {
		t.Errorf("only %d of %d told; returned=%v", n, subs, returned)
	}
}

// A position that was made up ends in an error.
func TestWatchFromAMadeUpPosition(t *testing.T) {
	b := newBench(t, onePartition)
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	p := w.Position()
	for i := range 20 {
		var subs []int
		for k := range 500 {
			subs = append(subs, k+1)
		}
		b.append(publication(fmt.Sprint("e", i), subs...))
	}
	p.at[0].commit = ^Commit(0)
	p, err := ParsePosition(p.String())
	if err != nil {
		t.Fatal(err)
	}
	v, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: p})
	if err != nil {
		t.Logf("refused: %v", err)
		return
	}
	n, returned, err := take(v, 1, 2*time.Second)
	if !returned {
		t.Errorf("Next spins on, 3 s after its ctx ended; %d told, %v", n, err)
	}
}

// A watch that is up to date has positions that are valid, however little happens after a restart.
func TestWatchOfAQuietPartitionAfterARestart(t *testing.T) {
	b := newBench(t, onePartition)
	w, err := b.Watch(t.Context(), WatchQuery{Namespace: acme})
	if err != nil {
		t.Fatal(err)
	}
	b.append(publication("e1", 1))
	nextOf(t, w)
	p := w.Position()
	w.Close()
	beside := publication("x", 1)
	beside.Event.Namespace = other
	b.append(beside) // another namespace's commit
	b.reopen()
	w = watchOf(t, b.Journal, WatchQuery{Namespace: acme, After: p})
	if _, _, err := take(w, 1, 300*time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	for _, d := range []time.Duration{time.Minute, 5 * time.Minute, 10 * time.Minute, 12 * time.Minute} {
		if err := b.watches.trim(t.Context(), time.Now().Add(d)); err != nil {
			t.Fatal(err)
		}
	}
	v, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: w.Position()})
	if err != nil {
		t.Errorf("the token of this very moment: %v", err)
		return
	}
	v.Close()
}

// A record that was begun in some partitions only when the process ended, or that cannot be read, is begun anew.
func TestWatchOfAHalfBegunRecord(t *testing.T) {
	t.Run("begun in some partitions", func(t *testing.T) {
		watchAnew(t, func(b *bench) error { return b.db.Delete(appendSpace(nil, 2, tagWatched, acme), nil) })
	})
	t.Run("damaged", func(t *testing.T) {
		watchAnew(t, func(b *bench) error { return b.db.Set(appendSpace(nil, 0, tagWatched, acme), []byte{0xff}, nil) })
	})
}

func watchAnew(t *testing.T, damage func(*bench) error) {
	b := newBench(t)
	was := watchOf(t, b.Journal, WatchQuery{Namespace: acme}).Position()
	if err := damage(b); err != nil {
		t.Fatal(err)
	}
	b.reopen()
	if _, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: was}); !errors.Is(err, ErrExpired) {
		t.Errorf("from where it was: %v, want ErrExpired", err)
	}
	for range 3 {
		w, err := b.Watch(t.Context(), WatchQuery{Namespace: acme})
		if err != nil {
			t.Fatal(err)
		}
		b.append(publication(fmt.Sprint(time.Now().UnixNano()), 1))
		if _, _, err := take(w, 1, 2*time.Second); err != nil {
			t.Errorf("a new watch without a token: %v", err)
		}
		w.Close()
	}
}

// What was taken out of a journal, or lost of it, is not passed over by those who watched.
func TestWatchAfterRecordsWereTakenOut(t *testing.T) {
	for name, mend := range map[string]func(dir string) error{
		"set aside": func(dir string) error {
			db, err := pebble.Open(dir, EngineOptions())
			if err != nil {
				return err
			}
			it, err := db.NewIter(nil)
			if err != nil {
				return err
			}
			var key string
			for ok := it.First(); ok && key == ""; ok = it.Next() {
				if len(it.Key()) > bodyOffset && it.Key()[tagOffset] == tagNews {
					key = hex.EncodeToString(it.Key())
				}
			}
			return errors.Join(it.Close(), db.Close(), SetAside(dir, key, io.Discard))
		},
		"salvaged": func(dir string) error {
			_, err := Complete(dir, "")
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "journal")
			b := newBench(t, func(o *Options) { o.Dir, o.fs = dir, nil })
			was := watchOf(t, b.Journal, WatchQuery{Namespace: acme}).Position()
			b.append(publication("e1", 1))
			b.close()
			if err := mend(dir); err != nil {
				t.Fatal(err)
			}
			b.open()
			if _, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: was}); !errors.Is(err, ErrExpired) {
				t.Errorf("from where it was: %v, want ErrExpired", err)
			}
		})
	}
}

// The first position of a watch is not of a commit that a loss of power takes back.
func TestWatchedPositionOutlivesPower(t *testing.T) {
	mem := vfs.NewCrashableMem()
	b := newBench(t, onePartition, func(o *Options) { o.fs = mem })
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	b.append(publication("e1", 1))
	nextOf(t, w)
	b.flush()
	job := b.jobs()[0]
	before := b.partitions[0].applied().Commit
	b.succeed(job)
	waitFor(t, func() bool { return b.partitions[0].applied().Commit > before })
	v := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	p := v.Position()
	clone := mem.CrashClone(vfs.CrashCloneCfg{})
	after := &bench{t: t, clock: b.clock, opts: b.opts}
	after.opts.fs = clone
	after.open()
	defer after.close()
	t.Logf("token of commit %d, the journal after the loss is at %d", p.at[0].commit, after.partitions[0].applied().Commit)
	v2, err := after.Watch(t.Context(), WatchQuery{Namespace: acme, After: p})
	if errors.Is(err, ErrExpired) {
		t.Log("expired, which is right")
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer v2.Close()
	after.append(publication("e2", 1))
	after.flush()
	n, _, err := take(v2, 1, 2*time.Second)
	if n != 1 {
		t.Errorf("a change after the restart is not told to one who resumed: %v", err)
	}
}

// gateFS holds syncs of the log.
type gateFS struct {
	vfs.FS
	shut atomic.Pointer[chan struct{}]
	held chan struct{} // has one for a sync that is held
}

type gateFile struct {
	vfs.File
	fs *gateFS
}

func (f *gateFS) wrap(name string, file vfs.File, err error) (vfs.File, error) {
	if err != nil || !strings.HasSuffix(name, ".log") {
		return file, err
	}
	return &gateFile{file, f}, nil
}
func (f *gateFS) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.Create(name, c)
	return f.wrap(name, file, err)
}
func (f *gateFS) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	file, err := f.FS.ReuseForWrite(from, to, c)
	return f.wrap(to, file, err)
}
func (f *gateFile) wait() {
	if c := f.fs.shut.Load(); c != nil {
		select {
		case f.fs.held <- struct{}{}:
		default:
		}
		<-*c
	}
}
func (f *gateFile) Sync() error     { f.wait(); return f.File.Sync() }
func (f *gateFile) SyncData() error { f.wait(); return f.File.SyncData() }
func (f *gateFile) SyncTo(n int64) (bool, error) {
	f.wait()
	return f.File.SyncTo(n)
}

// Nothing is told while its sync is under way.
func TestWatchTellsWhatIsDurable(t *testing.T) {
	mem := vfs.NewCrashableMem()
	fs := &gateFS{FS: mem, held: make(chan struct{}, 1)}
	b := newBench(t, onePartition, func(o *Options) { o.fs = fs })
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	p := w.Position()
	w.Close()
	c := make(chan struct{})
	fs.shut.Store(&c)
	appended := make(chan struct{})
	go func() { b.Append(context.Background(), []Publication{publication("e1", 1)}); close(appended) }()
	<-fs.held
	select {
	case <-appended:
		t.Fatal("not held")
	default:
	}
	v, err := b.Watch(t.Context(), WatchQuery{Namespace: acme, After: p})
	if err != nil {
		t.Fatal(err)
	}
	n, _, err := take(v, 1, 1*time.Second)
	clone := mem.CrashClone(vfs.CrashCloneCfg{})
	fs.shut.Store(nil)
	close(c)
	<-appended
	v.Close()
	if n == 1 {
		after := &bench{t: t, clock: b.clock, opts: b.opts}
		after.opts.fs = clone
		after.open()
		defer after.close()
		t.Errorf("told of a delivery whose event is not durable; after a loss of power the journal is at commit %d", after.partitions[0].applied().Commit)
	} else {
		t.Logf("not told: %v", err)
	}
}

// Two committers may end their syncs at once while somebody waits for them.
func TestSyncsEndAtOnce(t *testing.T) {
	ending := make(chan struct{})
	s := &syncs{dirty: make(chan struct{}, 1), told: func() { ending <- struct{}{} }}
	go func() { _ = s.wait(t.Context(), 5) }()
	waitFor(t, s.awaited.Load)
	s.mu.Lock()
	var wg sync.WaitGroup
	for n := range uint64(2) {
		wg.Go(func() {
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("panic: %v", p)
				}
			}()
			s.done(n + 1)
		})
		<-ending
	}
	s.mu.Unlock()
	wg.Wait()
}

// Changes that are put off, since too many wait, are told before what follows them, also where another partition goes on meanwhile.
func TestPutOffChangesAreToldInTheirPlace(t *testing.T) {
	b := newBench(t, func(o *Options) { o.Partitions = 2 })
	in := func(ns NamespaceKey, p uint16, what string) Publication {
		for i := 0; ; i++ {
			pub := publication(fmt.Sprint(what, "-", i), 1)
			if pub.Event.Namespace = ns; partitionOf(ns, pub.Event.ID, 2) == p {
				return pub
			}
		}
	}
	w, others := watchOf(t, b.Journal, WatchQuery{Namespace: acme}), watchOf(t, b.Journal, WatchQuery{Namespace: other})
	ours, theirs, elsewhere := in(acme, 1, "ours"), in(other, 1, "theirs"), in(other, 0, "elsewhere")
	b.append(ours, theirs, elsewhere)
	nextOf(t, w)
	nextOf(t, others)
	nextOf(t, others)
	b.append(in(acme, 1, "up"), in(other, 1, "up too"))
	nextOf(t, w)
	nextOf(t, others)
	jobs := map[string]Job{}
	for _, job := range b.jobs() {
		jobs[job.Event.ID] = job
	}
	s := (*b.watches.spaces.Load())[other]
	s.mu.Lock() // who puts off, and begins with theirs, is held up
	shown := b.partitions[1].shownIndex()
	b.succeed(jobs[theirs.Event.ID])
	b.succeed(jobs[ours.Event.ID])
	waitFor(t, func() bool { return b.partitions[1].shownIndex() > shown })
	b.watches.mu.Lock()
	b.watches.bytes = maxUntold
	b.watches.mu.Unlock()
	shown = b.partitions[0].shownIndex()
	b.succeed(jobs[elsewhere.Event.ID])
	waitFor(t, func() bool { return b.partitions[0].shownIndex() > shown })
	later := in(acme, 1, "later")
	stored := make(chan []AppendResult, 1)
	go func() { stored <- b.Append(context.Background(), []Publication{later}) }()
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // by then it would have been told of what is later
	ch, err := w.Next(soon)
	cancel()
	s.mu.Unlock()
	if err != nil {
		ch = nextOf(t, w)
	}
	<-stored
	if want := idOf(ours.Event, 1); ch.ID != want || ch.State != Succeeded {
		t.Errorf("told of %v of %v, want %v", ch.State, ch.ID, want)
	}
	if ch := nextOf(t, w); ch.ID != idOf(later.Event, 1) {
		t.Errorf("then of %v", ch.ID)
	}
}
