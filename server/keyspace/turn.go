package keyspace

import (
	"context"
	"errors"
	"time"
)

// writers is how many edits of a Space are under way at most. Each is synced by etcd and taken in by everybody who follows:
// more at once take the disk and the processors from what is published meanwhile, and are hardly faster where the processors
// are what is short.
const writers = 3

// turns are the places of edits. A place rests, after each edit, for as long as that took, so that many writers together
// use about half of what they could; who writes one thing after the other goes from place to place and never waits.
type turns chan time.Time

// errCrowd is why an edit found no place in time.
var errCrowd = errors.New("more is written at once than there is time for; nothing was tried")

func newTurns() turns {
	t := make(turns, writers)
	for range writers {
		t <- time.Time{}
	}
	return t
}

// take waits for a place, and returns what gives it back.
func (t turns) take(ctx context.Context) (give func(), err error) {
	var free time.Time
	select {
	case free = <-t:
	case <-ctx.Done():
		return nil, errCrowd
	}
	if err := pause(ctx, time.Until(free)); err != nil {
		t <- free
		return nil, errCrowd
	}
	begin := time.Now()
	return func() {
		now := time.Now()
		t <- now.Add(min(now.Sub(begin), longestRest))
	}, nil
}

// longestRest keeps an edit that etcd did not answer from holding up others.
const longestRest = 20 * time.Millisecond
