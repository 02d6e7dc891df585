package pluginhost

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

const (
	maxRetryAfter = 24 * time.Hour
	maxResent     = 3
)

// settle turns a plugin's answer into a result, or sends the attempt again when the plugin does not know
// its instance.
func (c *conn) settle(p *pending, r *wire.Result, now time.Time) {
	c.overhead.observe(now.Sub(p.Created)-r.Total, now)
	c.host.metrics.phases.answered(p, r, now)
	p.told = r.Timings
	if !c.answered.Load() { // mostly set: a write would cost its cache line
		c.answered.Store(true)
	}
	if !r.Answered {
		c.failed(p, r.Failure, r, now)
		return
	}
	a := delivery.Attempt{
		Start: p.Created, Duration: r.Total, ResponseCode: r.Status, Peer: r.Peer, Outcome: delivery.OutcomeSucceeded,
	}
	var refused map[int]string
	if !p.Answer {
		r.Body = r.Body[:min(len(r.Body), wire.MaxResponse)]
	}
	if r.Status < 200 || r.Status > 299 {
		a.Outcome = outcomeOf(r.Status)
		a.Error = statusText(r.Status)
		a.ResponseHeaders, a.RequestHeaders = p.kept(r.Headers), p.kept(r.Sent)
		a.ResponseBody = p.keptBody(r.Body)
		a.RetryAfter = retryAfter(r.Headers, now)
	} else if p.Ownership {
		a.ResponseHeaders = p.kept(r.Headers)
	} else if p.Answer {
		refused = p.readAnswer(r, &a, now)
	}
	if r.Note != "" {
		a.Error = strings.TrimPrefix(a.Error+"; "+redact.Line(&p.plan.own, r.Note, maxSaid), "; ")
	}
	c.host.complete(p, delivery.Result{Attempt: a, Refused: refused})
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

// secondsOf takes more than RFC 9110 does, fractions and numbers without end, for what they mean is plain.
func secondsOf(value string) (float64, bool) {
	if strings.Trim(value, "0123456789.") != "" {
		return 0, false
	}
	seconds, err := strconv.ParseFloat(value, 64)
	return seconds, err == nil || errors.Is(err, strconv.ErrRange)
}

// retryAfter reads the header in its two forms. What makes no sense, or lies in the past, is no wish.
func retryAfter(headers []delivery.Header, now time.Time) time.Duration {
	for _, h := range headers {
		if h.Name != "retry-after" {
			continue
		}
		value := strings.TrimSpace(h.Value)
		if seconds, ok := secondsOf(value); ok {
			return time.Duration(min(seconds, maxRetryAfter.Seconds()) * float64(time.Second))
		}
		if at, err := http.ParseTime(value); err == nil {
			return min(max(at.Sub(now), 0), maxRetryAfter)
		}
	}
	return 0
}

// codeShortage is what a plugin says when the machine has nothing left to make an attempt with.
const codeShortage = "shortage"

// codeEgress is what a plugin says when the address is forbidden.
const codeEgress = "egress"

// shortWords are for those whose deliveries wait meanwhile.
const shortWords = "this machine is out of file descriptors, sockets or memory"

// short has fewer attempts made at a time by a process that has found the machine short.
func (c *conn) short() {
	c.host.metrics.shortages.Inc()
	if most, first := c.attempts.shortage(time.Now()); first {
		c.log.Warn(shortWords+"; fewer attempts are made at a time until that is over, and none is lost by it",
			"attempts", most, "hint", "raise the limit of open files (ulimit -n)")
	}
}

// failed ends an attempt without an answer from the receiver.
func (c *conn) failed(p *pending, f *pluginv1.Failure, r *wire.Result, now time.Time) {
	if f.GetSource() == pluginv1.Failure_SOURCE_CONFIG {
		c.host.plans.drop(c.host, p.plan)
		if p.resent++; p.resent <= maxResent {
			c.host.restart(p)
			return
		}
	}
	if f.GetCode() == codeShortage && f.GetSource() == pluginv1.Failure_SOURCE_PLUGIN && f.GetWireState() == pluginv1.Failure_WIRE_STATE_NOT_SENT && c.attempts != nil {
		c.short()
		c.host.unspent(p, shortWords)
		return
	}
	if len(p.jobs) > 1 && f.GetSource() == pluginv1.Failure_SOURCE_POLICY && f.GetCode() != codeEgress && f.GetWireState() == pluginv1.Failure_WIRE_STATE_NOT_SENT {
		c.host.complete(p, delivery.Result{Cause: delivery.CauseCrowded}) // one of them may be what is forbidden
		return
	}
	a := delivery.Attempt{
		Start: p.Created, Duration: r.Total, Peer: r.Peer, RequestHeaders: p.kept(r.Sent),
		Error: p.errorText(f),
	}
	if a.Duration <= 0 {
		a.Duration = now.Sub(p.Created)
	}
	var cause delivery.Cause
	a.Outcome, cause = failureOutcome(f)
	c.host.complete(p, delivery.Result{Attempt: a, Cause: cause})
}

func (p *pending) errorText(f *pluginv1.Failure) string {
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
	return redact.Line(&p.plan.own, text, maxSaid)
}

const (
	// maxHeaders and maxHeaderBytes bound what is kept of a request's or a response's headers, maxHeaderText each name
	// and value.
	maxHeaders     = 64
	maxHeaderBytes = 4096
	maxHeaderText  = 1024
)

// kept is what is stored of headers: the first ones, without the subscription's secrets.
func (p *pending) kept(in []delivery.Header) []delivery.Header {
	if len(in) == 0 {
		return nil
	}
	out := make([]delivery.Header, 0, min(len(in), maxHeaders))
	room := maxHeaderBytes
	for _, h := range in[:min(len(in), maxHeaders)] {
		h = delivery.Header{Name: redact.Line(&p.plan.own, h.Name, maxHeaderText), Value: redact.Line(&p.plan.own, h.Value, maxHeaderText)}
		if room -= len(h.Name) + len(h.Value); room < 0 {
			break
		}
		out = append(out, h)
	}
	return out
}

// keptBody is what is stored of a response's body, without the subscription's secrets: a receiver may say back what a
// transport has shown it.
func (p *pending) keptBody(in []byte) []byte {
	if len(in) == 0 {
		return nil
	}
	out := p.plan.own.Clean(string(in))
	return []byte(out[:min(len(out), wire.MaxResponse)])
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
		if f.GetCode() == codeEgress {
			return delivery.OutcomeUnreachable, delivery.CausePolicy
		}
		return delivery.OutcomeRetryable, delivery.CausePolicy
	default:
		return delivery.OutcomePluginError, delivery.CausePlugin
	}
}
