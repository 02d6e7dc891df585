package delivery

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

func TestTimersComeInPieces(t *testing.T) {
	b := newBench(t, onePartition)
	now := b.clock.now()
	for i := range 5 {
		b.append(publication(fmt.Sprint(i), 1))
	}
	for i, job := range b.jobs() {
		b.failed(job, time.Duration(5-i)*time.Second)
	}
	b.flush()
	read := func(from Pos, until time.Time, limit, maxBytes int) Read {
		t.Helper()
		r, err := b.Read(lane(1), 0, Timer, from, InstantOf(until), limit, maxBytes)
		if err != nil {
			t.Fatal(err)
		}
		for i := range r.Jobs {
			b.Release(r.Jobs[i].Event)
		}
		return r
	}
	first := Pos{Some: true}
	r := read(first, now.Add(3*time.Second), 2, 1<<20)
	if len(r.Jobs) != 2 || r.Jobs[0].Event.ID != "4" || r.Next.Due != InstantOf(now.Add(3*time.Second)) {
		t.Fatalf("%v next %v", ids(r.Jobs), r.Next)
	}
	if r = read(r.Next, now.Add(time.Hour), 2, 1<<20); len(r.Jobs) != 2 || r.Jobs[0].Event.ID != "2" {
		t.Errorf("on from there: %v", ids(r.Jobs))
	}
	if r = read(first, now.Add(3*time.Second), 10, 1<<20); len(r.Jobs) != 3 || r.Next.Due != InstantOf(now.Add(4*time.Second)) {
		t.Errorf("%v next %v", ids(r.Jobs), r.Next)
	}
	if r = read(first, now, 10, 1<<20); len(r.Jobs) != 0 || r.Next.Due != InstantOf(now.Add(time.Second)) {
		t.Errorf("nothing is due: %v next %v", ids(r.Jobs), r.Next)
	}
	if r = read(first, now.Add(time.Minute), 10, 1); len(r.Jobs) != 1 || !r.Next.Some {
		t.Errorf("%d jobs over the byte bound", len(r.Jobs))
	}
	if r = read(first, now.Add(time.Minute), 10, 1<<20); len(r.Jobs) != 5 || r.Next.Some {
		t.Errorf("all: %v next %v", ids(r.Jobs), r.Next)
	}
	if r = read(Pos{}, now.Add(time.Minute), 10, 1<<20); len(r.Jobs) != 0 || r.Next.Some {
		t.Errorf("from nowhere: %v next %v", ids(r.Jobs), r.Next)
	}
}

// Read sees exactly the commits up to what it says: what it does not return has not come or has gone by then.
func TestReadSeesExactlyTheCommitsItSays(t *testing.T) {
	b := newBench(t, onePartition)
	var writers sync.WaitGroup
	var done atomic.Bool
	writers.Go(func() {
		defer done.Store(true)
		for i := range 300 {
			b.append(publication(fmt.Sprint(i), 1))
			for _, job := range b.jobs() {
				if i%3 > 0 {
					b.succeed(job)
				}
			}
		}
	})
	type sight struct {
		upTo Commit
		seqs map[uint64]bool
	}
	var sights []sight
	for !done.Load() {
		r, err := b.Read(lane(1), 0, FIFO, Pos{Some: true}, 0, 1<<20, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		s := sight{r.UpTo, map[uint64]bool{}}
		for i := range r.Jobs {
			s.seqs[r.Jobs[i].ID.Seq] = true
			if r.Jobs[i].AsOf != r.UpTo {
				t.Fatal("a job of another time")
			}
			b.Release(r.Jobs[i].Event)
		}
		sights = append(sights, s)
		runtime.Gosched()
	}
	writers.Wait()
	b.flush()
	made, ended := map[uint64]Commit{}, map[uint64]Commit{}
	for _, c := range b.calls {
		switch c.what {
		case "offer":
			made[c.row.Seq] = c.commit
		case "settled":
			ended[c.row.Seq] = c.commit
		}
	}
	for _, s := range sights {
		for seq, c := range made {
			end, over := ended[seq]
			if want := c <= s.upTo && (!over || end > s.upTo); want != s.seqs[seq] {
				t.Fatalf("up to %d: row made by %d and ended by %d (%v) is seen: %v", s.upTo, c, end, over, s.seqs[seq])
			}
		}
	}
}

// turnstile is a lane that turns fresh jobs away now and then and reads them back, as dispatch does.
type turnstile struct {
	mu    sync.Mutex
	next  Pos    // where to read; Nowhere while fresh jobs are taken
	left  uint64 // lowest sequence turned away since the read began
	read  uint64 // highest sequence taken
	taken []string
}

func (l *turnstile) take(job *Job) {
	l.taken, l.read = append(l.taken, job.Event.ID), job.ID.Seq
}

func (l *turnstile) Offer(_ Commit, jobs []Job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range jobs {
		switch job := &jobs[i]; {
		case job.ID.Seq <= l.read: // the read was quicker
		case !l.next.Some && i%4 != 3:
			l.take(job)
		default: // the window is full
			l.next = Least(l.next, job.Row().Pos())
			if l.left == 0 {
				l.left = job.ID.Seq
			}
		}
	}
}

func (l *turnstile) Timed(Commit, LaneKey, uint16, Row)             {}
func (l *turnstile) Edited(Commit, LaneKey, uint16, uint64, uint32) {}

// refill reads on, and reports whether anything may be left.
func (l *turnstile) refill(j *Journal, partition uint16) (bool, error) {
	l.mu.Lock()
	from := l.next
	l.left = 0
	l.mu.Unlock()
	if !from.Some {
		return false, nil
	}
	r, err := j.Read(lane(1), partition, FIFO, from, 0, 16, 1<<20)
	if err != nil {
		return false, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range r.Jobs {
		if r.Jobs[i].ID.Seq > l.read {
			l.take(&r.Jobs[i])
		}
		j.Release(r.Jobs[i].Event)
	}
	l.next = r.Next
	if l.left != 0 { // turned away during the read, which may have seen the first of them
		l.next = Least(l.next, Pos{Seq: max(l.left, l.read+1), Some: true})
	}
	return true, nil
}

func TestOffersAndReadsNeitherLoseNorDouble(t *testing.T) {
	j, err := Open(Options{Dir: "journal", Partitions: 1, CacheBytes: 8 << 20, fs: vfs.NewMem(), BallastBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	l := &turnstile{}
	j.Start(l)
	const total = 3000
	var writers, readers sync.WaitGroup
	var written atomic.Bool
	readers.Go(func() {
		for {
			ended := written.Load()
			more, err := l.refill(j, 0)
			if err != nil {
				t.Error(err)
			}
			if err != nil || ended && !more {
				return
			}
			runtime.Gosched()
		}
	})
	for w := range 3 {
		writers.Go(func() {
			for i := range total / 30 {
				var batch []Publication
				for k := range 10 {
					batch = append(batch, publication(fmt.Sprintf("%d-%d-%d", w, i, k), 1))
				}
				j.Append(context.Background(), batch)
			}
		})
	}
	writers.Wait()
	written.Store(true)
	readers.Wait()
	seen := map[string]int{}
	for _, id := range l.taken {
		seen[id]++
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s came %d times", id, n)
		}
	}
	if len(seen) != total {
		t.Errorf("%d of %d came", len(seen), total)
	}
	if err := j.Close(); err != nil {
		t.Error(err)
	}
}

// A lane is found as long as it has something open, and no longer.
func TestLanesAreThoseWithOpenRows(t *testing.T) {
	b := newBench(t)
	for i := range 200 {
		b.append(publication(fmt.Sprint(i), i%50+1))
	}
	open := map[LaneKey]bool{}
	for i, job := range b.jobs() {
		switch {
		case job.ID.Subscription%5 != 0:
			b.succeed(job)
		case i%2 == 0:
			b.failed(job, time.Hour)
			open[job.Lane()] = true
		default:
			open[job.Lane()] = true
		}
	}
	b.flush()
	for range 2 {
		got := map[LaneKey]bool{}
		for _, state := range b.lanes() {
			got[state.Lane] = true
			if state.FIFO.Some == state.Timer.Some {
				t.Errorf("%+v", state)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(open) {
			t.Errorf("%v, want %v", got, open)
		}
		b.reopen()
	}
	for range b.Lanes() { // who stops early may go on with the journal
		b.append(publication("late", 5))
		break
	}
}
