package gate_test

import (
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
)

// TestQuarterOfTheProcessors: however many wait, what they do takes half of the time of half of the processors, whether it
// comes in long pieces or in short ones.
func TestQuarterOfTheProcessors(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	for _, work := range []time.Duration{3 * time.Millisecond, 100 * time.Microsecond} {
		synctest.Test(t, func(t *testing.T) {
			g := gate.New()
			begin, turns := time.Now(), make(chan struct{})
			const workers, places = 200, 2
			for range workers {
				go func() {
					leave, entered := g.Enter(nil, 0, "")
					if !entered {
						t.Error("a gate that nobody closed")
					}
					time.Sleep(work)
					leave()
					leave()
					turns <- struct{}{}
				}()
			}
			for range workers {
				<-turns
			}
			took, all := time.Since(begin), 2*workers/places*work
			if took > all || took < all-2*max(work, time.Millisecond) {
				t.Errorf("%v for %d turns of %v, want about %v", took, workers, work, all)
			}
		})
	}
}

// TestTenantsTakeTurns: who has one thing to do does not wait behind all that another has.
func TestTenantsTakeTurns(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	synctest.Test(t, func(t *testing.T) {
		g := gate.New()
		hold, _ := g.Enter(nil, 0, "")
		const work = 5 * time.Millisecond
		var done []string
		ended := make(chan struct{})
		enter := func(given <-chan struct{}, tenant string) {
			if leave, entered := g.Enter(given, 0, tenant); entered {
				time.Sleep(work)
				done = append(done, tenant) // in its turn
				leave()
			}
			ended <- struct{}{}
		}
		given := make(chan struct{})
		for i := range 100 {
			if i%2 == 0 {
				go enter(given, "many") // gives up
			} else {
				go enter(nil, "many")
			}
		}
		synctest.Wait()
		for _, tenant := range []string{"one", "two"} {
			go enter(nil, tenant)
			synctest.Wait()
		}
		close(given)
		hold()
		for range 102 {
			<-ended
		}
		if len(done) != 52 || !slices.Contains(done[:3], "one") || !slices.Contains(done[:3], "two") {
			t.Errorf("%d turns, the first %v", len(done), done[:3])
		}
		if _, entered := g.Enter(nil, 0, ""); !entered {
			t.Error("the gate is not open at the end")
		}
	})
}

// TestWhoLeavesBeforeAndWhoStays: one that keeps its turn keeps others out for a moment only, and one that gives up does
// not get a turn.
func TestWhoLeavesBeforeAndWhoStays(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	synctest.Test(t, func(t *testing.T) {
		g := gate.New()
		if _, entered := g.Enter(nil, 10*time.Millisecond, ""); !entered {
			t.Fatal("not entered")
		}
		given := make(chan struct{})
		time.AfterFunc(time.Millisecond, func() { close(given) })
		if _, entered := g.Enter(given, 0, ""); entered {
			t.Error("entered although it was given up")
		}
		begin := time.Now()
		leave, entered := g.Enter(nil, 0, "")
		if took := time.Since(begin); !entered || took > 20*time.Millisecond {
			t.Errorf("entered %v after %v", entered, took)
		}
		leave()
	})
}
