package delivery_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// deaf is a follower that does nothing.
type deaf struct{}

func (deaf) Offer(delivery.Commit, []delivery.Job)                            {}
func (deaf) Timed(delivery.Commit, delivery.LaneKey, uint16, delivery.Row)    {}
func (deaf) Edited(delivery.Commit, delivery.LaneKey, uint16, uint64, uint32) {}

// TestCheckpointUnderLoad copies a journal that is written to all the time. Each copy opens as any journal does, reaches
// its marks, has all that was acknowledged before it, and nothing that was appended after it.
func TestCheckpointUnderLoad(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(dir, "journal")
	j, err := delivery.Open(delivery.Options{Dir: at, Partitions: 4, HighWater: at + ".highwater", MinFreeBytes: -1, BallastBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	j.Start(deaf{})
	const writers, copies = 8, 6
	var mu sync.Mutex // guards what follows
	grown := sync.NewCond(&mu)
	var acknowledged []string
	next := 0
	over := make(chan struct{})
	var writing sync.WaitGroup
	for range writers {
		writing.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				mu.Lock()
				next++
				id := fmt.Sprint("e", next)
				mu.Unlock()
				if r := j.Append(context.Background(), []delivery.Publication{publicationOf(id)}); r[0].Err != nil {
					t.Errorf("append %s: %v", id, r[0].Err)
					return
				}
				mu.Lock()
				acknowledged = append(acknowledged, id)
				grown.Signal()
				mu.Unlock()
			}
		})
	}
	type copied struct {
		dir           string
		before, after int
	}
	var all []copied
	for i := range copies {
		mu.Lock()
		for known := len(acknowledged); len(acknowledged) < known+50; { // for more to copy, however fast this is
			grown.Wait()
		}
		c := copied{dir: filepath.Join(at, fmt.Sprint("copy", i)), before: len(acknowledged)}
		mu.Unlock()
		marks, err := j.Checkpoint(c.dir)
		if err != nil {
			t.Fatal(err)
		}
		mu.Lock()
		c.after = next
		mu.Unlock()
		all = append(all, c)
		if len(marks.Marks) != 4 || marks.Journal != j.ID() {
			t.Errorf("marks = %+v", marks)
		}
		moved := filepath.Join(dir, fmt.Sprint("copy", i))
		if err := os.Rename(c.dir, moved); err != nil {
			t.Fatal(err)
		}
		all[i].dir = moved
		copyOf, err := delivery.Open(delivery.Options{Dir: moved, MinFreeBytes: -1, BallastBytes: -1})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(copyOf.Check(marks, false), copyOf.Close()); err != nil {
			t.Error(err)
		}
	}
	close(over)
	writing.Wait()
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Checkpoint(filepath.Join(dir, "late")); !errors.Is(err, delivery.ErrClosed) {
		t.Errorf("of a closed journal: %v", err)
	}
	for _, c := range all {
		sum, err := delivery.Inspect(t.Context(), c.dir, func(d delivery.Damage) { t.Errorf("%s: %+v", c.dir, d) })
		if err != nil {
			t.Fatal(err)
		}
		if sum.Events < c.before || sum.Events > c.after {
			t.Errorf("%s: %d events; %d were acknowledged before it and %d begun when it was there", c.dir, sum.Events, c.before, c.after)
		}
	}
}

func publicationOf(id string) delivery.Publication {
	e := &delivery.Event{Namespace: 7, ID: id, Source: "//test", Type: "order.created", ContentType: "application/json", Payload: make([]byte, 3000)}
	copy(e.ContentHash[:], id)
	var uid delivery.UID
	uid[15] = 1
	return delivery.Publication{Event: e, Targets: []delivery.Target{{Subscription: "s", UID: uid, MaxAttempts: 3, MaxAge: time.Hour}}}
}
