package pluginhost

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/grapnel/grapnel/internal/redact"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

// An answer of 2xx to a batch may name deliveries that were not taken:
//
//	{"failed": [{"id": "evt_…", "reason": "no such customer"}, "evt_…"]}
//	webhook-failed-ids: evt_…, evt_…
//
// What is not named was taken. A list that cannot be read to its end fails all, since anybody may stand in the rest, and so
// does an answer that breaks off where there may be one.

// maxReason is the most bytes of a reason that a receiver gives for one delivery.
const maxReason = 256

// naming is one delivery that an answer names.
type naming struct{ id, reason string }

var (
	errNoList = errors.New(`"failed" is no list; want [{"id": WEBHOOK-ID, "reason": TEXT}, …]`)
	errCut    = errors.New("the list of what failed is not to be read to its end")
	errBroken = errors.New("the answer broke off before it was known whether it names what failed")
)

// readAnswer returns which of the batch the answer names, with why. Where its list cannot be read, all have failed, which it
// notes in the attempt, as it does names that are none of the batch.
func (p *pending) readAnswer(r *wire.Result, a *delivery.Attempt, now time.Time) map[int]string {
	named, err := failedIn(r.Body)
	if err == nil && len(named) == 0 && brokeOff(r) {
		err = errBroken
	}
	if err != nil {
		a.Outcome, a.Error = delivery.OutcomeRetryable, fmt.Sprintf("the receiver answered %d, but %v", r.Status, err)
		a.ResponseBody = p.keptBody(r.Body)
		return nil
	}
	for _, h := range r.Headers {
		if h.Name != wire.FailedIDs {
			continue
		}
		for id := range strings.SplitSeq(h.Value, ",") {
			if id = strings.TrimSpace(id); id != "" {
				named = append(named, naming{id: id})
			}
		}
	}
	if len(named) == 0 {
		if r.Truncated && len(r.Body) == wire.MaxAnswer && r.Body[0] == '{' {
			a.Error = fmt.Sprintf("the answer is longer than %d KiB; no failed delivery is named in what was read of it", wire.MaxAnswer>>10)
		}
		return nil
	}
	places := make(map[string][]int, max(1, len(p.jobs))) // an event that was sent again has the id that it had
	for i, ev := range p.events() {
		places[ev.UID] = append(places[ev.UID], i)
	}
	refused := make(map[int]string)
	strangers, first := 0, ""
	for _, n := range named {
		ours := places[n.id]
		for _, i := range ours {
			refused[i] = p.reason(r.Status, n.reason)
		}
		switch {
		case len(ours) > 0:
		case strangers == 0:
			first = n.id
			fallthrough
		default:
			strangers++
		}
	}
	if strangers > 0 {
		a.Error = fmt.Sprintf("the answer names %d as failed that are not in the batch, such as %q", strangers, redact.Line(&p.plan.own, first, maxReason))
	}
	if len(refused) > 0 {
		a.RetryAfter = retryAfter(r.Headers, now)
	}
	return refused
}

// reason is what is recorded of a delivery that was named.
func (p *pending) reason(status int, given string) string {
	text := fmt.Sprintf("the receiver answered %d and named it as failed", status)
	if given != "" {
		text += ": " + redact.Line(&p.plan.own, given, maxReason)
	}
	return text
}

// brokeOff reports whether an answer ended too early, other than by its length, where it might have named somebody: before
// its body, which headers may have been lost with, or in a JSON object.
func brokeOff(r *wire.Result) bool {
	body := jsonText(r.Body)
	return r.Truncated && len(r.Body) < wire.MaxAnswer && (len(body) == 0 || body[0] == '{')
}

// jsonText is a body without what may stand in front of JSON.
func jsonText(body []byte) []byte {
	return bytes.TrimLeft(bytes.TrimPrefix(body, []byte("\uFEFF")), " \t\r\n")
}

// failedIn reads the members failed of a JSON object. A body that is none, or has none, names nobody.
func failedIn(body []byte) (named []naming, err error) {
	if body = jsonText(body); len(body) == 0 || body[0] != '{' {
		return nil, nil
	}
	d := json.NewDecoder(bytes.NewReader(body))
	_, _ = d.Token() // the brace
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return named, nil //nolint:nilerr // what is no JSON names nobody
		}
		if key != "failed" {
			var other json.RawMessage
			if d.Decode(&other) != nil {
				return named, nil
			}
			continue
		}
		list, err := failedList(d)
		if err != nil {
			return nil, err
		}
		named = append(named, list...)
	}
	return named, nil
}

func failedList(d *json.Decoder) (named []naming, err error) {
	begin, err := d.Token()
	switch {
	case err != nil:
		return nil, errCut
	case begin == nil, begin == false, begin == float64(0), begin == "":
		return nil, nil
	case begin != json.Delim('['):
		return nil, errNoList
	}
	for d.More() {
		var element any
		if d.Decode(&element) != nil {
			return nil, errCut
		}
		switch v := element.(type) {
		case string:
			named = append(named, naming{id: v})
		case map[string]any:
			id, _ := v["id"].(string)
			reason, _ := v["reason"].(string)
			named = append(named, naming{id, reason})
		default:
			named = append(named, naming{})
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, errCut
	}
	return named, nil
}
