package subscription

import (
	"fmt"
	"net/url"
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Warnings lists what works but looks wrong, in sentences for the author of the subscription. It expects
// a message as stored, with defaults filled in.
func Warnings(p *grapnelv1.Subscription) []string {
	var out []string
	warn := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if u, err := url.Parse(p.GetUri()); err == nil && strings.EqualFold(u.Scheme, "http") {
		warn("uri is plain http: payloads can be read and changed on the way; use https")
	}
	if len(p.GetEventTypes()) == 0 && p.GetCondition() == "" {
		warn("event_types is empty and there is no condition: every event of the namespace matches")
	}
	for i, g := range p.GetEventTypes() {
		if strings.ContainsAny(g, " ,;") {
			warn("event_types: %q is one type with a blank or a comma in it; several are several entries", g)
		}
		for j, other := range p.GetEventTypes() {
			if i != j && g != other && strings.Contains(other, "*") && globCovers(other, g) {
				warn("event_types: %q is already covered by %q", g, other)
				break
			}
		}
	}
	out = append(out, shapeWarnings(p)...)
	out = append(out, batchingWarnings(p)...)
	for i, s := range p.GetSigners() {
		if s.GetPlugin() == noSigner && len(p.GetSigners()) > 1 {
			warn("signers[%d] is %s, which adds nothing to the other signers; leave it out", i, noSigner)
		}
		if len(s.GetSecrets()) == 0 && s.GetPlugin() == defaultSigner {
			warn("signers[%d] has no secret, and the signer refuses to sign without; name one in signers[%d].secrets", i, i)
		}
	}
	r := p.GetRetryPolicy()
	if total := span(unroll(r), int(r.GetMaxAttempts())); r.GetMaxAge() != nil && total > r.GetMaxAge().AsDuration() {
		warn("retry_policy: its attempts take %v in all, longer than max_age, %v: the last ones are never made",
			total.Round(time.Second), r.GetMaxAge().AsDuration())
	}
	if n := len(r.GetSchedule()); n > 0 && int(r.GetMaxAttempts()) <= n {
		warn("retry_policy: max_attempts is %d, so that only %d of the %d delays in schedule are used",
			r.GetMaxAttempts(), max(0, r.GetMaxAttempts()-1), n)
	}
	if d := p.GetFailurePolicy().GetDisableAfter(); d != nil && d.AsDuration() == 0 {
		warn("failure_policy.disable_after is 0s: a target that is gone for good is tried for ever")
	}
	return out
}

// span is how long a schedule takes from the first attempt to the last.
func span(schedule []time.Duration, attempts int) time.Duration {
	var total time.Duration
	for i := range attempts - 1 {
		if len(schedule) == 0 {
			break
		}
		total += schedule[min(i, len(schedule)-1)]
	}
	return total
}
