package dispatch

import (
	"math"
	"time"
)

const (
	// burstShare is the part of a second's starts that may come together.
	burstShare = 10
	// slowest bounds the time between two starts.
	slowest = 10 * 365 * 24 * time.Hour
)

// pacer keeps the starts of a lane to a rate: in no second are there more than the rate, rounded up, and a tenth of that may
// come together. The zero pacer is ready.
type pacer struct {
	// due is when the next start would be if they came evenly.
	due int64
	// recent are the starts of the last second from first on, in their order, where some may come together.
	recent []int64
	first  int
	// until is the time before which there is no start to be had, as of the last one that was refused.
	until time.Time
}

// take takes a start, if there is one, and otherwise sets until.
func (p *pacer) take(rate float64, now time.Time) bool {
	n := now.UnixNano()
	even := int64(min(math.Ceil(float64(time.Second)/rate), float64(slowest)))
	together := max(1, int64(math.Ceil(rate/burstShare)))
	next := p.due - (together-1)*even
	if together > 1 {
		for p.first < len(p.recent) && p.recent[p.first] <= n-int64(time.Second) {
			p.first++
		}
		if most := int(math.Ceil(rate)); len(p.recent)-p.first >= most {
			next = max(next, p.recent[len(p.recent)-most]+int64(time.Second))
		}
	}
	if next > n {
		p.until = time.Unix(0, next)
		return false
	}
	p.due = max(p.due, n) + even
	if together > 1 {
		if p.first > len(p.recent)/2 {
			p.recent = append(p.recent[:0], p.recent[p.first:]...)
			p.first = 0
		}
		p.recent = append(p.recent, n)
	}
	return true
}
