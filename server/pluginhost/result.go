package pluginhost

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

const (
	maxRetryAfter = 24 * time.Hour
	maxResent     = 3
	maxErrorText  = 512
)

// settle turns a plugin's answer into a result, or sends the attempt again when the plugin does not know
// its instance.
func (c *conn) settle(p *pending, r *result, now time.Time) {
	c.overhead.observe(now.Sub(p.created)-r.total, now)
	if !c.answered.Load() { // mostly set: a write would cost its cache line
		c.answered.Store(true)
	}
	if !r.answered {
		c.failed(p, r.failure, r, now)
		return
	}
	a := delivery.Attempt{
		Start: p.created, Duration: r.total, ResponseCode: r.status, Peer: r.peer, Outcome: delivery.OutcomeSucceeded,
	}
	if r.status < 200 || r.status > 299 {
		a.Outcome = outcomeOf(r.status)
		a.Error = statusText(r.status)
		a.ResponseHeaders, a.RequestHeaders = r.headers, r.sent
		a.ResponseBody = r.body
		a.RetryAfter = retryAfter(r.headers, now)
	} else if p.ownership {
		a.ResponseHeaders = r.headers
	}
	c.host.complete(p, delivery.Result{Attempt: a})
}

// outcomeOf a status that is not 2xx: all may pass, except that what is gone stays gone.
func outcomeOf(status int) delivery.Outcome {
	if status == http.StatusGone {
		return delivery.OutcomePermanent
	}
	return delivery.OutcomeRetryable
}

func statusText(status int) string {
	if text := http.StatusText(status); text != "" {
		return fmt.Sprintf("the receiver answered %d %s", status, text)
	}
	return fmt.Sprintf("the receiver answered %d", status)
}

// retryAfter reads the header in its two forms. What makes no sense, or lies in the past, is no wish.
func retryAfter(headers []delivery.Header, now time.Time) time.Duration {
	for _, h := range headers {
		if h.Name != "retry-after" {
			continue
		}
		value := strings.TrimSpace(h.Value)
		if seconds, err := strconv.ParseUint(value, 10, 63); err == nil {
			return time.Duration(min(seconds, uint64(maxRetryAfter/time.Second))) * time.Second
		}
		if at, err := http.ParseTime(value); err == nil {
			return min(max(at.Sub(now), 0), maxRetryAfter)
		}
	}
	return 0
}

// failed ends an attempt without an answer from the receiver.
func (c *conn) failed(p *pending, f *pluginv1.Failure, r *result, now time.Time) {
	if f.GetSource() == pluginv1.Failure_SOURCE_CONFIG {
		c.host.plans.drop(c.host, p.plan)
		if p.resent++; p.resent <= maxResent {
			c.host.restart(p)
			return
		}
	}
	a := delivery.Attempt{
		Start: p.created, Duration: r.total, Peer: r.peer, RequestHeaders: r.sent,
		Error: c.errorText(p, f),
	}
	if a.Duration <= 0 {
		a.Duration = now.Sub(p.created)
	}
	var cause delivery.Cause
	a.Outcome, cause = failureOutcome(f)
	c.host.complete(p, delivery.Result{Attempt: a, Cause: cause})
}

func (c *conn) errorText(p *pending, f *pluginv1.Failure) string {
	text := f.GetMessage()
	switch {
	case text == "":
		text = f.GetCode()
	case f.GetCode() != "":
		text = f.GetCode() + ": " + text
	}
	if text == "" {
		text = "the plugin gave no reason"
	}
	text = p.plan.redactor.clean(text)
	if len(text) > maxErrorText {
		text = strings.ToValidUTF8(text[:maxErrorText], "") + "…"
	}
	return text
}

// failureOutcome maps whose fault it was, and which, onto what dispatch and callers see.
func failureOutcome(f *pluginv1.Failure) (delivery.Outcome, delivery.Cause) {
	switch f.GetSource() {
	case pluginv1.Failure_SOURCE_ENDPOINT:
		switch f.GetCode() {
		case "timeout":
			return delivery.OutcomeTimedOut, delivery.CauseEndpoint
		case "dns", "connect", "tls":
			return delivery.OutcomeUnreachable, delivery.CauseEndpoint
		}
		return delivery.OutcomeRetryable, delivery.CauseEndpoint
	case pluginv1.Failure_SOURCE_POLICY:
		if f.GetCode() == "egress" {
			return delivery.OutcomeUnreachable, delivery.CausePolicy
		}
		return delivery.OutcomeRetryable, delivery.CausePolicy
	default:
		return delivery.OutcomePluginError, delivery.CausePlugin
	}
}
