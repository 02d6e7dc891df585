package health

const (
	// each first attempt earns a quarter of a repeat, so that repeats are a fifth of all.
	earned = 0.25
	// burst is how many repeats may start that are not earned yet.
	burst = 10
	// beyond is the share of the limit that repeats hold beyond what is earned, while no first attempt waits.
	beyond = 5
)

// budget is what repeats have spent and first attempts not earned yet, 0 to burst.
type budget struct{ spent float32 }

// allows reports whether a repeat may start. Beyond what is earned first attempts come first; where none waits, repeats go
// on, a few at a time.
func (b *budget) allows(first bool, retrying, limit int) bool {
	if b.spent <= burst-1 {
		return true
	}
	return !first && retrying < max(1, limit/beyond)
}

func (b *budget) spend(retry bool) {
	if retry {
		b.spent = min(b.spent+1, burst)
	} else {
		b.spent = max(b.spent-earned, 0)
	}
}

func (b *budget) refund() { b.spent = max(b.spent-1, 0) }
