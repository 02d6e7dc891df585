package api

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// ownershipSlack is what an ownership check may take beyond the subscription's attempt_timeout, which the
// plugin host keeps to: when it passes, something is wrong with us and not with the receiver.
const ownershipSlack = 2 * time.Second

// allowedRate is the header in which a receiver says how many requests a minute it takes: a number, or * for
// any (CloudEvents HTTP 1.1 Web Hooks, section 4.2.2).
const allowedRate = "webhook-allowed-rate"

// askTarget asks a target whether it wants deliveries, where its transport can ask, and returns what is to be
// told although the answer is yes. No is an OWNERSHIP_REFUSED; a yes to fewer requests than max_rate allows is
// an INVALID_FIELD of max_rate.
func (s *Server) askTarget(ctx context.Context, p *grapnelv1.Subscription) (warnings []string, err error) {
	limit := p.GetAttemptTimeout().AsDuration() + ownershipSlack
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	attempt, err := s.Plugins.CheckOwnership(bounded, p)
	switch {
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		return nil, ownershipRefused(p.GetName(), "no answer within "+limit.String(), 0)
	case err != nil:
		return nil, err
	case attempt == nil:
		return nil, nil
	case attempt.Outcome == delivery.OutcomePluginError, attempt.Outcome == delivery.OutcomeInterrupted:
		// Nothing that the receiver could have said otherwise.
		return nil, pluginUnavailable(p.GetName(), p.GetTransport().GetPlugin()+" could not ask the receiver whether it wants deliveries: "+answerText(attempt))
	case attempt.Outcome != delivery.OutcomeSucceeded:
		return nil, ownershipRefused(p.GetName(), answerText(attempt), attempt.ResponseCode)
	}
	for _, h := range attempt.ResponseHeaders {
		if !strings.EqualFold(h.Name, allowedRate) {
			continue
		}
		fault, warning := holdToRate(p.GetMaxRate(), strings.TrimSpace(h.Value))
		if fault != "" {
			return nil, invalid(Violation{"subscription.max_rate", fault, "max_rate.allowed"})
		}
		if warning != "" {
			warnings = append(warnings, warning)
		}
	}
	return warnings, nil
}

// answerText says what came back.
func answerText(a *delivery.Attempt) string {
	switch {
	case a.Error != "":
		return strings.TrimPrefix(a.Error, "ownership: ")
	case a.ResponseCode != 0:
		return fmt.Sprintf("it answered %d", a.ResponseCode)
	}
	return "it did not say yes"
}

// holdToRate compares a rate in requests a second, 0 for no limit, with what a receiver allows a minute.
func holdToRate(rate float64, allowed string) (fault, warning string) {
	if allowed == "*" {
		return "", ""
	}
	perMinute, err := strconv.ParseUint(allowed, 10, 64)
	if err != nil || perMinute == 0 {
		return "", "the receiver's " + allowedRate + ", " + quote(allowed) + ", is no number of requests a minute and not *; it is not kept to"
	}
	if rate > 0 && rate*60 <= float64(perMinute)+1e-9 {
		return "", ""
	}
	// Rounded down, so that what is advised passes.
	most := strconv.FormatFloat(math.Floor(float64(perMinute)/60*1e4)/1e4, 'f', -1, 64)
	given := "0 is no limit"
	if rate > 0 {
		given = "given " + strconv.FormatFloat(rate, 'g', -1, 64) + " a second"
	}
	return fmt.Sprintf("%s, and the receiver takes %d requests a minute (%s); want more than 0 and at most %s", given, perMinute, allowedRate, most), ""
}

// approval makes what the registry asks before it stores a new target. warnings gets what the last answer
// brought.
func (s *Server) approval(warnings *[]string) subscription.Approve {
	return func(ctx context.Context, p *grapnelv1.Subscription) error {
		said, err := s.askTarget(ctx, p)
		*warnings = said
		return err
	}
}
