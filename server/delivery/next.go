package delivery

import "time"

// Policy is a subscription's retry policy in the form Next needs.
type Policy struct {
	// Schedule holds the delays before attempt 2, 3, …; past its end the last one repeats.
	Schedule []time.Duration
	// Jitter is the half-width of the random spread as a fraction of the delay, 0 to 1.
	Jitter float64
	// IgnoreGone keeps the subscription enabled when the target answers 410.
	IgnoreGone bool
}

// Step is what follows an attempt.
type Step struct {
	State State
	// Due is set when State is Scheduled.
	Due time.Time
	// Reason is set for final states other than Succeeded.
	Reason string
	// Disable asks for the subscription to be disabled, with Reason.
	Disable bool
}
