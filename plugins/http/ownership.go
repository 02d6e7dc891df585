package httpplugin

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	originHeader = "webhook-request-origin"
	rateHeader   = "webhook-request-rate"
	// maxEcho is how much of the answer to a challenge is read.
	maxEcho = 16 << 10
	// challengeBytes keep a challenge from being guessed.
	challengeBytes = 16
)

// own asks the receiver whether it wants deliveries. Yes is a 2xx, no is the receiver's own status or a
// Failure that says what was missing.
func (i *instance) own(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	switch i.ownership.Check {
	case checkCloudEvents:
		return i.handshake(ctx, r)
	case checkChallenge:
		return i.challenge(ctx, r)
	}
	return &plugin.Response{Status: http.StatusNoContent}, nil
}

// asking is the instance as it asks: by another method, and keeping the header of every answer.
func (i *instance) asking(method string) *instance {
	out := *i
	out.method, out.allHeaders = method, true
	out.lead = out.appendLead(nil, out.wire)
	return &out
}

// handshake is the validation of CloudEvents' "HTTP 1.1 Web Hooks for Event Delivery" 1.0.2, section 4. The
// answer's headers grant, not its status; only a status that speaks of something else is left to speak.
func (i *instance) handshake(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	r.Body = nil
	if i.ownership.Rate > 0 {
		r.Set(rateHeader, strconv.Itoa(i.ownership.Rate))
	}
	resp, err := i.asking(http.MethodOptions).deliver(ctx, r)
	if err != nil {
		return nil, err
	}
	switch s := resp.Status; {
	case s/100 == 3, s == http.StatusGone, s == http.StatusTooManyRequests, s >= 500:
		return resp, nil
	}
	origin, rate := first(resp, "webhook-allowed-origin"), first(resp, "webhook-allowed-rate")
	switch {
	case origin == "" && resp.Status/100 != 2:
		return resp, nil
	case origin == "":
		return nil, denied(resp, fmt.Sprintf("the receiver answered %d without WebHook-Allowed-Origin, which means no", resp.Status))
	case origin != "*" && !strings.EqualFold(origin, i.ownership.Origin):
		return nil, denied(resp, fmt.Sprintf("the receiver's WebHook-Allowed-Origin names another origin; want %s or *", i.ownership.Origin))
	case rate == "" && i.ownership.Rate > 0:
		return nil, denied(resp, "the receiver granted no WebHook-Allowed-Rate although a rate was asked for")
	case rate != "" && !isRate(rate):
		return nil, denied(resp, "the receiver's WebHook-Allowed-Rate is neither * nor a positive number of requests per minute")
	}
	out := &plugin.Response{Status: http.StatusOK, Peer: resp.Peer, Headers: []plugin.Header{{Name: "webhook-allowed-origin", Value: origin}}}
	if rate != "" {
		out.Headers = append(out.Headers, plugin.Header{Name: "webhook-allowed-rate", Value: rate})
	}
	return out, nil
}

func isRate(text string) bool {
	n, err := strconv.ParseUint(text, 10, 64)
	return text == "*" || err == nil && n > 0
}

// challenge is Slack's url_verification: the receiver shows that it reads what it is sent.
func (i *instance) challenge(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
	// The host's nonce is for signers, of which there are none here.
	random := make([]byte, challengeBytes)
	_, _ = rand.Read(random) // it never fails
	word := hex.EncodeToString(random)
	r.Body = []byte(`{"type":"url_verification","challenge":"` + word + `"}`)
	r.Set("content-type", "application/json")
	r.MaxResponseBody = maxEcho
	resp, err := i.asking(http.MethodPost).deliver(ctx, r)
	if err != nil || resp.Status/100 != 2 {
		return resp, err
	}
	body := bytes.TrimSpace(resp.Body)
	switch {
	case resp.Truncated:
		return nil, denied(resp, "the receiver's answer to the challenge is broken off or longer than 16 KiB")
	case bytes.Equal(body, r.Body):
		return nil, denied(resp, "the receiver sends back whatever it is sent; want the challenge alone")
	case !echoes(body, word):
		return nil, denied(resp, "the receiver's answer is not the challenge, as plain text, as form field or as JSON field challenge")
	}
	return &plugin.Response{Status: http.StatusOK, Peer: resp.Peer}, nil
}

// echoes takes the three forms that Slack takes, whatever content type is stated.
func echoes(body []byte, word string) bool {
	if string(body) == word {
		return true
	}
	var object struct {
		Challenge string `json:"challenge"`
	}
	if json.Unmarshal(body, &object) == nil {
		return object.Challenge == word
	}
	form, err := url.ParseQuery(string(body))
	return err == nil && form.Get("challenge") == word
}

// denied is a no that the status does not say.
func denied(resp *plugin.Response, message string) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.SourceEndpoint, Code: "ownership", Message: message, WireState: plugin.Sent, Peer: resp.Peer,
	}
}

func first(resp *plugin.Response, name string) string {
	for _, h := range resp.Headers {
		if h.Name == name {
			return strings.TrimSpace(h.Value)
		}
	}
	return ""
}

func checkOwnership(o Ownership, headers []plugin.Header) []plugin.Problem {
	var problems []plugin.Problem
	add := func(pointer, code, summary string) {
		problems = append(problems, plugin.Problem{Pointer: pointer, Code: code, Summary: summary})
	}
	asks := o.Check == checkCloudEvents
	switch {
	case asks && o.Origin == "":
		add("/config/ownership/origin", "ownership.origin", "origin is empty; want the DNS name of the sender, such as events.example.com")
	case asks && (outbound.CheckHost(o.Origin) != nil || strings.ContainsRune(o.Origin, ':')):
		add("/config/ownership/origin", "ownership.origin", fmt.Sprintf("given %q, want the DNS name of the sender, such as events.example.com", o.Origin))
	case !asks && o.Origin != "":
		add("/config/ownership/origin", "ownership.field", "origin belongs to check cloudevents; clear it or set check")
	}
	if !asks && o.Rate != 0 {
		add("/config/ownership/rate", "ownership.field", "rate belongs to check cloudevents; clear it or set check")
	}
	for _, h := range headers {
		if asks && strings.EqualFold(h.Name, originHeader) {
			add(headerPointer(h.Name), "ownership.header_conflict", "ownership.origin sets this header; take it out of headers")
		}
	}
	return problems
}
