package delivery

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// erasure stores an erasure of acme.
func (b *bench) erasure(id string) *Replay {
	b.t.Helper()
	r, err := b.CreateReplay(context.Background(), &Replay{Namespace: acme, ID: id, Spec: ReplaySpec{
		Erase: true, Filter: "it is kept with the job",
	}}, 3)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func quotesCanary(e *Event) bool { return e.Subject == canary }

func (b *bench) erase(r *Replay) {
	b.t.Helper()
	if err := b.BeginErasure(context.Background(), r); err != nil {
		b.t.Fatal(err)
	}
	for p := range uint16(b.Partitions()) {
		for done := false; !done; {
			a, err := b.AdvanceErasure(context.Background(), r, p, quotesCanary, func() {})
			if err != nil {
				b.t.Fatal(err)
			}
			done = a.Done
		}
	}
}

// filesWith are the files of a directory, and what is below it, that hold a text: as they are, and tables also entry by entry,
// with all versions that there are.
func filesWith(t *testing.T, dir, text string) (found []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, f os.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) { // the engine's files come and go
			return nil
		}
		if err != nil || f.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		holds := bytes.Contains(raw, []byte(text))
		if strings.HasSuffix(path, ".sst") {
			holds = tableWith(t, path, text) || holds
		}
		if holds {
			found = append(found, filepath.Base(path))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

func tableWith(t *testing.T, path, text string) bool {
	t.Helper()
	f, err := vfs.Default.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		t.Fatal(err)
	}
	reader, err := sstable.NewReader(t.Context(), readable, new(pebble.Options).MakeReaderOptions())
	if pebble.IsCorruptionError(err) { // it is being written
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	it, err := reader.NewIter(sstable.NoTransforms, nil, nil, sstable.AssertNoBlobHandles)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	for kv := it.First(); kv != nil; kv = it.Next() {
		value, _, err := kv.Value(nil)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(value, []byte(text)) || bytes.Contains(kv.K.UserKey, []byte(text)) {
			return true
		}
	}
	return false
}

func onDisk(t *testing.T) (dir string, change func(*Options)) {
	dir = filepath.Join(t.TempDir(), "journal")
	return dir, func(o *Options) { o.fs, o.Dir, o.MemTableBytes, o.MinFreeBytes = vfs.Default, dir, 256<<10, -1 }
}

// After an erasure no file of the journal holds anything of what it was to erase: no table, with all versions that it has, no
// log, and none that is kept to be written over. What was not selected is all there.
func TestErasureLeavesNothingOnDisk(t *testing.T) {
	dir, change := onDisk(t)
	b := newBench(t, change)
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	to := Target{Subscription: "sub-7", UID: uid(7), MaxAttempts: 2, MaxAge: time.Hour}
	for round := range 4 {
		for i := range 40 {
			pub := publication(fmt.Sprintf("other-%d-%d", round, i), 1)
			pub.Event.Payload = bytes.Repeat([]byte("all right "), 400)
			b.append(carrying(fmt.Sprintf("e-%d-%d", round, i), 1, 2, 3), pub)
		}
		for i, job := range b.jobs() {
			if job.Event.Subject != canary {
				continue
			}
			switch i % 5 {
			case 0:
				b.keepMade(&job, canary)
				b.settle(job, Step{State: Scheduled, Due: b.clock.now().Add(time.Minute)}, quoting(1, OutcomeRetryable, b.clock.now()))
			case 1:
				b.settle(job, Step{State: Rejected, Reason: "permanent failure: " + canary, DeadLetter: &DeadLetter{From: "sub-2", To: to}}, quoting(1, OutcomePermanent, b.clock.now()))
			case 2:
				b.settle(job, Step{State: Succeeded}, quoting(1, OutcomeSucceeded, b.clock.now()))
			case 3:
				b.settle(job, Step{State: Exhausted, Reason: "permanent failure: " + canary}, quoting(1, OutcomeRetryable, b.clock.now()))
			}
		}
		b.flush()
		b.clock.add(time.Hour)
	}
	if n := len(filesWith(t, dir, canary)); n < 3 {
		t.Fatalf("%d files hold it before", n)
	}
	r := b.erasure("person-1")
	old := b.db.NewSnapshot() // somebody reads what is old
	b.erase(r)
	if _, err := b.Scrub(t.Context(), r, quotesCanary); !errors.Is(err, ErrStale) {
		t.Errorf("while it is read: %v", err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	var proof Proof
	waitFor(t, func() bool {
		var err error
		if proof, err = b.Scrub(t.Context(), r, quotesCanary); err != nil && !errors.Is(err, ErrStale) {
			t.Fatal(err)
		}
		return err == nil
	})
	if found := filesWith(t, dir, canary); len(found) > 0 {
		t.Errorf("still held by %q", found)
	}
	w.Close()
	ended, err := b.EndErasure(t.Context(), acme, r.Key, proof)
	if err != nil || ended.State != ReplaySucceeded || ended.Purged.Events != 160 || ended.Purged.Bytes == 0 || ended.Purged.Cancelled == 0 ||
		ended.Counts.Scanned != 320 || ended.Proof.Bytes == 0 || ended.Proof.Time.IsZero() {
		t.Errorf("%+v, %v", ended, err)
	}
	b.append(publication("after", 1))
	b.reopen() // the logs that were emptied are no loss
	if found := filesWith(t, dir, canary); len(found) > 0 {
		t.Errorf("after a restart held by %q", found)
	}
	all, err := b.Replays(acme)
	if err != nil || len(all) != 1 || all[0].Purged != ended.Purged || !all[0].Proof.Time.Equal(proof.Time) || !all[0].Spec.Erase {
		t.Errorf("%+v, %v", all, err)
	}
	for round := range 4 {
		if e, err := b.Event(acme, fmt.Sprintf("other-%d-7", round)); err != nil || len(e.Payload) != 4000 || e.Purged != nil {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if n := len(b.backlog(1)); n != 161 { // and nothing of what was purged
		t.Errorf("%d wait", n)
	}
}

// Power that is lost at any commit of an erasure costs nothing: it goes on where it was, purges what was half purged, and
// counts each event once.
func TestErasureGoesOnAfterACrash(t *testing.T) {
	for at := range 6 {
		cut := powerCut{at: at + 2}
		b := newBench(t, onePartition, cut.options)
		for i := range 100 {
			b.append(carrying(fmt.Sprint("e", i), 1, 2), publication(fmt.Sprint("other", i), 1))
		}
		r := b.erasure("person-1")
		disk := cut.during(t, func() { b.erase(r) })
		after := newBench(t, onePartition, func(o *Options) { o.fs = disk })
		after.erase(r)
		if found := after.quoted(); len(found) > 0 {
			t.Errorf("%d: quoted by %q", at, found)
		}
		if got, err := after.Replay(acme, r.Key); err != nil || got.Purged.Events != 100 || got.Purged.Cancelled != 200 || got.Counts.Scanned != 200 {
			t.Errorf("%d: %+v, %v", at, got, err)
		}
		if _, err := after.Scrub(t.Context(), r, quotesCanary); err != nil {
			t.Errorf("%d: %v", at, err)
		}
	}
}

// powerCut is a loss of power before the commit at, counted from 1, of what is done during it.
type powerCut struct {
	at, commits int
	counting    bool
	fs, clone   *vfs.MemFS
}

// options are those of the journal that it befalls.
func (p *powerCut) options(o *Options) {
	p.fs = vfs.NewCrashableMem()
	o.fs = p.fs
	o.refuse = func(uint16) bool {
		if p.counting {
			if p.commits++; p.commits == p.at {
				p.clone = p.fs.CrashClone(vfs.CrashCloneCfg{})
			}
		}
		return false
	}
}

// during returns the disk as it was then.
func (p *powerCut) during(t *testing.T, do func()) *vfs.MemFS {
	t.Helper()
	p.counting = true
	do()
	p.counting = false
	if p.clone == nil {
		t.Fatalf("%d commits", p.commits)
	}
	return p.clone
}

// TestErasureReachesWhatAWrongClockHasAhead: what was accepted while the clock was ahead, and after it was set right, was
// accepted before the erasure.
func TestErasureReachesWhatAWrongClockHasAhead(t *testing.T) {
	for _, ahead := range []time.Duration{2 * time.Hour, 48 * time.Hour} {
		b := newBench(t, onePartition)
		b.append(publication("before", 1))
		b.clock.add(ahead)
		b.append(carrying("ahead", 1))
		b.clock.add(-ahead)
		b.reopen()
		b.append(carrying("now", 1))
		b.clock.add(time.Minute)
		r := b.erasure("person")
		b.erase(r)
		if _, err := b.Scrub(t.Context(), r, quotesCanary); err != nil {
			t.Errorf("%v: %v", ahead, err)
		}
		for _, id := range []string{"ahead", "now"} {
			if e, err := b.Event(acme, id); err != nil || e.Purged == nil {
				t.Errorf("%v: %s is not purged: %+v %v", ahead, id, e, err)
			}
		}
	}
}

// TestStepOfAnErasureIsBoundedByDeliveries: events with many deliveries are purged a few at a time, and others have their turn
// between the commits of one.
func TestStepOfAnErasureIsBoundedByDeliveries(t *testing.T) {
	b := newBench(t, onePartition)
	var many []int
	for i := range eraseTargets / 2 {
		many = append(many, i+1)
	}
	for i := range 5 {
		b.append(carrying(fmt.Sprint("e", i), many...))
	}
	r := b.erasure("person")
	if err := b.BeginErasure(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	var steps []int64
	rests := 0
	for done := false; !done; {
		a, err := b.AdvanceErasure(t.Context(), r, 0, quotesCanary, func() { rests++ })
		if err != nil {
			t.Fatal(err)
		}
		steps, done = append(steps, a.Created), a.Done
	}
	if !slices.Equal(steps, []int64{2, 2, 1}) && !slices.Equal(steps, []int64{2, 2, 1, 0}) {
		t.Errorf("events by step: %v", steps)
	}
	if want := 5 * len(many) / purgeBatch; rests < want {
		t.Errorf("%d rests, want %d", rests, want)
	}
	got, err := b.Replay(acme, r.Key)
	if err != nil || got.Purged.Events != 5 || got.Purged.Cancelled != int64(5*len(many)) || got.Counts.Scanned != 5 {
		t.Errorf("purged %+v, %+v, %v", got.Purged, got.Counts, err)
	}
	if found := b.quoted(); len(found) > 0 {
		t.Errorf("quoted by %q", found)
	}
}

// TestErasureNamesWhatItCannotRead: one event whose deliveries cannot be told is counted as unread, and the others are purged
// as a whole.
func TestErasureNamesWhatItCannotRead(t *testing.T) {
	b := newBench(t, onePartition)
	var many []int
	for i := range 40 {
		many = append(many, i+1)
	}
	b.append(carrying("many", many...), carrying("few", 1))
	b.flush()
	e, err := b.Event(acme, "many")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.db.Set(appendTargetsKey(nil, 0, dayOf(e.Seq), acme, e.Seq), []byte{1, 2}, pebble.Sync); err != nil {
		t.Fatal(err)
	}
	r := b.erasure("person")
	b.erase(r)
	got, err := b.Replay(acme, r.Key)
	if err != nil || got.Counts.Skipped != 1 || got.Purged.Events != 1 {
		t.Errorf("purged %+v, %+v, %v", got.Purged, got.Counts, err)
	}
	if few, err := b.Event(acme, "few"); err != nil || few.Purged == nil || !few.Purged.done {
		t.Errorf("the other one: %+v, %v", few, err)
	}
	if _, err := b.PurgeEvent(t.Context(), acme, e.Partition, e.Seq); err == nil {
		t.Error("an event whose deliveries cannot be read was purged")
	}
}

// TestCopiesWhileLogsAreEmptied: a copy of the journal has all that was acknowledged, also when logs are emptied meanwhile.
func TestCopiesWhileLogsAreEmptied(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	b := newBench(t, func(o *Options) {
		o.fs, o.Dir, o.MinFreeBytes, o.HighWater, o.Partitions = vfs.Default, dir, -1, dir+".highwater", 4
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var busy sync.WaitGroup
	busy.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			b.Append(ctx, []Publication{publication(fmt.Sprint("e", i), 1)})
		}
	})
	busy.Go(func() {
		for ctx.Err() == nil {
			if err := (&scrub{j: b.Journal}).emptyLogs(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	for i := range 10 {
		to := filepath.Join(dir, fmt.Sprint("copy", i))
		marks, err := b.Checkpoint(to)
		if err != nil {
			t.Fatal(err)
		}
		c, err := Open(Options{Dir: to, MinFreeBytes: -1, BallastBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.Check(marks, false), c.Close()); err != nil {
			t.Errorf("copy %d: %v", i, err)
		}
	}
	cancel()
	busy.Wait()
}

// TestScrubWaitsForFilesThatNobodyNeeds: a table that a compaction has taken the place of before it was looked through is still
// a file that holds what was purged.
func TestScrubWaitsForFilesThatNobodyNeeds(t *testing.T) {
	dir, change := onDisk(t)
	b := newBench(t, onePartition, change)
	b.append(carrying("e", 1))
	if err := b.db.Flush(); err != nil {
		t.Fatal(err)
	}
	r := b.erasure("person")
	b.erase(r)
	s := newScrub(b.Journal, r, quotesCanary)
	if err := errors.Join(s.begin(), s.flush(t.Context())); err != nil {
		t.Fatal(err)
	}
	reads, err := b.db.NewIter(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.db.Compact(t.Context(), []byte{0}, []byte{0xff}, false); err != nil {
		t.Fatal(err)
	}
	if err := s.look(t.Context()); err != nil || len(s.found) > 0 || !slices.ContainsFunc(filesWith(t, dir, canary), isTable) {
		t.Fatalf("%d places, %v, and %q hold it", len(s.found), err, filesWith(t, dir, canary))
	}
	if left, err := s.left(t.Context()); err != nil || !left {
		t.Errorf("none is left: %v, and %q hold it", err, filesWith(t, dir, canary))
	}
	if err := reads.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool {
		left, err := s.left(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return !left
	})
	if found := filesWith(t, dir, canary); slices.ContainsFunc(found, isTable) {
		t.Errorf("%q hold it", found)
	}
}

// TestScrubRestsWithinALargeTable: also where all there is lies in one table, others have their turn.
func TestScrubRestsWithinALargeTable(t *testing.T) {
	b := newBench(t, onePartition, func(o *Options) { o.MemTableBytes = 64 << 20 })
	for i := range 16 {
		pub := publication(fmt.Sprint("e", i), 1)
		pub.Event.Payload = incompressible(512 << 10)
		b.append(pub)
	}
	s := newScrub(b.Journal, b.erasure("person"), quotesCanary)
	if err := errors.Join(s.begin(), s.flush(t.Context()), b.db.Compact(t.Context(), []byte{0}, []byte{0xff}, false)); err != nil {
		t.Fatal(err)
	}
	all, err := s.tables()
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range all {
		before := s.rests
		if _, err := s.lookInto(t.Context(), at, nil); err != nil {
			t.Fatal(err)
		}
		if n := s.rests - before; n < int(at.size>>20) {
			t.Errorf("%d rests in a table of %d bytes", n, at.size)
		}
	}
	if s.bytes < 8<<20 {
		t.Errorf("%d bytes were looked through", s.bytes)
	}
}

// TestScrubCompactsWhatItFinds: what is purged of a large namespace does not have all of it written anew.
func TestScrubCompactsWhatItFinds(t *testing.T) {
	dir, change := onDisk(t)
	b := newBench(t, onePartition, change, func(o *Options) { o.MemTableBytes = 8 << 20 })
	for i := range 48 {
		pub := publication(fmt.Sprint("e", i), 1)
		if i == 0 || i == 47 {
			pub = carrying(pub.Event.ID, 1)
		}
		pub.Event.Payload = append(pub.Event.Payload, incompressible(512<<10)...)
		b.append(pub)
	}
	everything := span{[]byte{0}, []byte{0xff}}
	if err := errors.Join(b.db.Flush(), b.db.Compact(t.Context(), everything.start, everything.end, false)); err != nil {
		t.Fatal(err)
	}
	total, err := b.db.EstimateDiskUsage(everything.start, everything.end)
	if err != nil || total < 24<<20 {
		t.Fatalf("%d bytes, %v", total, err)
	}
	r := b.erasure("person")
	b.erase(r)
	s := newScrub(b.Journal, r, quotesCanary)
	if err := errors.Join(s.begin(), s.flush(t.Context()), s.look(t.Context())); err != nil {
		t.Fatal(err)
	}
	spans, err := s.spans()
	if err != nil || len(spans) == 0 {
		t.Fatalf("%d spans, %v", len(spans), err)
	}
	var some uint64
	for _, at := range spans {
		n, err := b.db.EstimateDiskUsage(at.start, at.end)
		if err != nil {
			t.Fatal(err)
		}
		some += n
	}
	if some > total/2 {
		t.Errorf("%d of %d bytes are to be compacted, in %d spans", some, total, len(spans))
	}
	read := s.bytes
	if err := s.look(t.Context()); err != nil || s.bytes != read || len(s.found) == 0 {
		t.Errorf("%d bytes are read again of tables that have not changed, %v", s.bytes-read, err)
	}
	waitFor(t, func() bool {
		if _, err = b.Scrub(t.Context(), r, quotesCanary); err != nil && !errors.Is(err, ErrStale) {
			t.Fatal(err)
		}
		return err == nil
	})
	if found := filesWith(t, dir, canary); len(found) > 0 {
		t.Errorf("still held by %q", found)
	}
}

// TestManyStalePlacesAreJoined: however much is purged, what is remembered of it is bounded, and spans it all.
func TestManyStalePlacesAreJoined(t *testing.T) {
	var all []stale
	for i := range 5 * maxStale {
		key := appendEventKey(nil, 0, dayKey(i%(4*maxStale)/maxStale), NamespaceKey(7), uint64(i))
		all = coarser(append(all, stale{uint64(i / (2 * maxStale)), key, key}))
		if len(all) > maxStale {
			t.Fatalf("%d are remembered", len(all))
		}
	}
	for i, at := range all {
		if bytes.Compare(at.first, at.last) > 0 || !bytes.Equal(spaceOf(at.first), spaceOf(at.last)) {
			t.Errorf("place %d spans %x to %x", i, at.first, at.last)
		}
		if i > 0 && at.table == all[i-1].table && bytes.Compare(all[i-1].last, at.first) >= 0 {
			t.Errorf("place %d begins at %x, before the end of the one before", i, at.first)
		}
	}
}

// incompressible are bytes that a table holds as they are.
func incompressible(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func isTable(file string) bool { return strings.HasSuffix(file, ".sst") }

// What a wrong clock has put into the future was accepted before, and is purged; what is accepted later is not, wherever the
// present has come to.
func TestErasureWhereAClockWasAhead(t *testing.T) {
	_, change := onDisk(t)
	b := newBench(t, onePartition, change)
	b.wasAhead(20 * 24 * time.Hour)
	b.append(carrying("healed", 1))
	r := b.erasure("gdpr")
	if err := b.BeginErasure(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	b.clock.add(time.Second)
	b.append(carrying("after", 1))
	b.reopen()
	b.erase(r)
	b.clock.add(time.Minute)
	b.append(carrying("later", 1))
	if proof, err := b.Scrub(t.Context(), r, quotesCanary); err != nil || proof.Bytes == 0 {
		t.Errorf("%+v, %v", proof, err)
	}
	for id, purged := range map[string]bool{"now": true, "ahead": true, "healed": true, "after": false, "later": false} {
		if e, err := b.Event(acme, id); err != nil || purged != (e.Purged != nil) {
			t.Errorf("%s: %+v, %v", id, e, err)
		}
	}
}

// TestErasureReachesWhatRetentionTakesMeanwhile: what is left in files of events that retention has taken since they were purged is
// found, too, although nothing says any more whose it was.
func TestErasureReachesWhatRetentionTakesMeanwhile(t *testing.T) {
	dir, change := onDisk(t)
	b := newBench(t, onePartition, change)
	w := watchOf(t, b.Journal, WatchQuery{Namespace: acme})
	to := Target{Subscription: "sub-7", UID: uid(7), MaxAttempts: 2, MaxAge: time.Hour}
	for i := range 20 {
		b.append(carrying(fmt.Sprint("e", i), 1), carrying(fmt.Sprint("letter", i), 2))
	}
	for _, job := range b.jobs() {
		step := Step{State: Rejected, Reason: "permanent failure: " + canary}
		if job.ID.Subscription == 2 {
			step.DeadLetter = &DeadLetter{From: "sub-2", To: to}
		}
		b.keepMade(&job, canary)
		b.settle(job, step, quoting(1, OutcomePermanent, b.clock.now()))
	}
	b.flush()
	if err := b.db.Flush(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	held := map[string][]byte{}
	if err := b.scan(b.db, nil, nil, func(key, value []byte) error {
		if key[tagOffset] == tagRecord && bytes.Contains(value, []byte(canary)) {
			held[string(key)] = bytes.Clone(value)
		}
		return nil
	}); err != nil || len(held) < 120 {
		t.Fatalf("%d records hold it, %v", len(held), err)
	}
	b.clock.add(100 * time.Hour)
	r := b.erasure("person")
	b.erase(r)
	b.retain(72 * time.Hour)
	if page, err := b.Events(EventQuery{Namespace: acme}); err != nil || len(page.Events) > 0 {
		t.Fatalf("%d events, %v", len(page.Events), err)
	}
	s := newScrub(b.Journal, r, quotesCanary)
	if err := s.begin(); err != nil {
		t.Fatal(err)
	}
	for key, value := range held { // as they are in tables, unless these have been compacted
		if holds, err := s.holds([]byte(key), value); err != nil || !holds {
			t.Errorf("%s is passed over: %v", keyText([]byte(key)), err)
		}
	}
	waitFor(t, func() bool {
		_, err := b.Scrub(t.Context(), r, quotesCanary)
		if err != nil && !errors.Is(err, ErrStale) {
			t.Fatal(err)
		}
		return err == nil
	})
	if found := filesWith(t, dir, canary); len(found) > 0 {
		t.Errorf("still held by %q", found)
	}
}

// TestErasureOfATimeGoesByWhenEventsWereAccepted: where a clock was ahead and was set back, what is accepted then has sequences of a
// time that is still to come.
func TestErasureOfATimeGoesByWhenEventsWereAccepted(t *testing.T) {
	b := newBench(t, onePartition)
	b.clock.add(10 * time.Hour)
	b.append(carrying("ahead", 1))
	b.clock.add(-10 * time.Hour)
	b.reopen()
	b.append(carrying("before", 1))
	b.clock.add(time.Hour)
	since := b.clock.now()
	b.clock.add(time.Minute)
	b.append(carrying("within", 1))
	b.clock.add(time.Minute)
	until := b.clock.now()
	b.append(carrying("after", 1))
	r, err := b.CreateReplay(t.Context(), &Replay{Namespace: acme, ID: "time", Spec: ReplaySpec{Erase: true, Since: since, Until: until}}, 3)
	if err != nil {
		t.Fatal(err)
	}
	b.erase(r)
	if _, err := b.Scrub(t.Context(), r, quotesCanary); err != nil {
		t.Error(err)
	}
	for id, purged := range map[string]bool{"ahead": false, "before": false, "within": true, "after": false} {
		if e, err := b.Event(acme, id); err != nil || purged != (e.Purged != nil) {
			t.Errorf("%s: %+v, %v", id, e, err)
		}
	}
	if got, err := b.Replay(acme, r.Key); err != nil || got.Counts.Scanned != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}
