package dispatch

import (
	"time"

	"github.com/grapnel/grapnel/server/dispatch/health"
)

// standing is how much a lane is trusted with of what all lanes share.
type standing = health.Standing

const (
	unknown   = health.Unknown
	proven    = health.Proven
	suspect   = health.Suspect
	standings = health.Standings

	slowAfter = health.SlowAfter
)

func laterOf(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
