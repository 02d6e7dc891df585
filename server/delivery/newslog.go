package delivery

import (
	"slices"
	"sync"
	"time"
)

// newsLog is what of a namespace's changes lies in a partition.
type newsLog struct {
	mu    sync.Mutex
	floor Commit // no changes up to here are kept
	last  Commit // with changes
	bytes int64
	marks []newsMark // rising
}

type newsMark struct {
	at    time.Time
	last  Commit
	bytes int64 // since the mark before
}

// nothing is the floor of a log that records nothing.
const nothing = ^Commit(0)

// trim moves the floor, and reports whether enough lies below it to be erased.
func (l *newsLog) trim(now time.Time, most int64) (floor Commit, due bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.floor == nothing {
		return 0, false
	}
	marked := int64(0)
	for _, m := range l.marks {
		marked += m.bytes
	}
	if n := len(l.marks); n == 0 && l.last > l.floor || n > 0 && l.last > l.marks[n-1].last {
		l.marks = append(l.marks, newsMark{now, l.last, l.bytes - marked})
	}
	n, left := 0, l.bytes
	for n < len(l.marks) && (now.Sub(l.marks[n].at) > newsKept || left > most) {
		left -= l.marks[n].bytes
		n++
	}
	if n == 0 || l.bytes-left < most/4 && now.Sub(l.marks[0].at) < newsKept+newsKept/8 {
		return 0, false
	}
	l.floor, l.bytes = l.marks[n-1].last, left
	l.marks = slices.Delete(l.marks, 0, n)
	return l.floor, true
}

// low is the floor of a log.
func (l *newsLog) low() Commit {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.floor
}
