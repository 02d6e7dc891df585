package server

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestEndingIsBounded: whatever does not end, the time of a stop is that of its grace and a little more, and nothing of
// it runs before the stop begins.
func TestEndingIsBounded(t *testing.T) {
	for name, c := range map[string]struct {
		serving            bool
		grace              time.Duration
		abandon            time.Duration // after the begin; 0 is never
		wantGrace, wantAll time.Duration
	}{
		"during the start":               {false, 0, 0, 0, stopRest},
		"asked again during the start":   {false, 0, time.Second, 0, 2 * time.Second},
		"grace":                          {true, 30 * time.Second, 0, 30 * time.Second, 30*time.Second + stopRest},
		"no grace":                       {true, -1, 0, 0, stopRest},
		"asked again in the grace":       {true, 30 * time.Second, 3 * time.Second, 3 * time.Second, 3*time.Second + stopAtOnce},
		"asked again after the grace":    {true, time.Second, 2 * time.Second, time.Second, 2*time.Second + stopAtOnce},
		"asked again in the last moment": {true, time.Second, 5800 * time.Millisecond, time.Second, time.Second + stopRest},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, stop := context.WithCancel(t.Context())
				abandon := make(chan struct{})
				e := newEnding(ctx, abandon)
				defer e.release()
				if c.serving {
					e.allow(c.grace)
				}
				e.at("wait for a disk that does not answer")
				time.Sleep(time.Hour)
				if e.grace.Err() != nil || e.rest.Err() != nil {
					t.Fatal("it runs before it has begun")
				}
				began := time.Now()
				stop()
				if c.abandon > 0 {
					time.AfterFunc(c.abandon, func() { close(abandon) })
				}
				<-e.grace.Done()
				if took := time.Since(began); took != c.wantGrace {
					t.Errorf("the grace took %v, want %v", took, c.wantGrace)
				}
				<-e.rest.Done()
				if took := time.Since(began); took != c.wantAll-lastMoment {
					t.Errorf("the rest took %v, want %v", took, c.wantAll-lastMoment)
				}
				<-e.left
				if took := time.Since(began); took != c.wantAll {
					t.Errorf("all took %v, want %v", took, c.wantAll)
				}
				if err := e.err(); !errors.Is(err, errLeft) || !strings.Contains(err.Error(), "a disk that does not answer") || e.allowed() != c.serving {
					t.Errorf("left with %v, serving %v", err, e.allowed())
				}
			})
		})
	}
}

// TestEndingIsReleased: a stop that is over leaves nothing behind.
func TestEndingIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, begin := range []bool{false, true} {
			e := newEnding(t.Context(), nil)
			if begin {
				e.begin()
			}
			e.release()
			e.release()
			began := time.Now()
			<-e.left
			if time.Since(began) != 0 {
				t.Error("it went on")
			}
		}
	})
}
