package meter

import (
	"sync"
	"time"
)

// Gate is for work whose amount a stranger chooses: it lets one at a time through, and stays closed afterwards for as
// long as that took. So all of it together takes half a core, and what others do waits for one of them at the most, not
// for as many as there are. Those who wait are let in in their order.
type Gate struct{ one chan struct{} }

// NewGate returns an open Gate.
func NewGate() *Gate { return &Gate{one: make(chan struct{}, 1)} }

// longest is how long one that holds a gate keeps others out, where it may be waiting for something itself.
const longest = 10 * time.Millisecond

// Enter waits for its turn and returns how to end it, or false when given was closed before. leave may be called again,
// and concurrently. A turn that lasts longer than most, if that is not zero, ends by itself.
func (g *Gate) Enter(given <-chan struct{}, most time.Duration) (leave func(), entered bool) {
	select {
	case g.one <- struct{}{}:
	case <-given:
		return nil, false
	}
	var once sync.Once
	began := time.Now()
	end := func() {
		once.Do(func() { time.AfterFunc(time.Since(began), func() { <-g.one }) })
	}
	if most > 0 {
		late := time.AfterFunc(most, end)
		return func() { late.Stop(); end() }, true
	}
	return end, true
}
