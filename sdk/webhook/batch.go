package webhook

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
)

const (
	// maxBatch is how many events a request from Grapnel may carry.
	maxBatch = 1000
	// maxAnswer is how much of an answer it reads, and maxReason how much of a reason it keeps.
	maxAnswer, maxReason = 64 << 10, 256
)

// Media types of requests with several events.
const (
	mediaJSON       = "application/json"
	mediaLines      = "application/x-ndjson"
	mediaCloudEvent = "application/cloudevents-batch+json"
)

// Failed is one event of a batch that was not taken.
type Failed struct {
	// ID is the event's, a webhook-id.
	ID string `json:"id"`
	// Reason is shown to who operates the sender, 256 bytes of it at most, where there is room for those of all.
	Reason string `json:"reason,omitempty"`
}

// BatchHandler is Handler for subscriptions with batching, whose requests carry several events, in any of their forms. It hands
// out each event once, one after another and in their order, whichever requests it comes in. Those for which handle fails or
// panics, and those that are being handled elsewhere at this moment, are named in the answer, so that the sender repeats only
// them. An Event's Body is then its data, and ContentType that of the data.
//
// Answers: 204 all handled, now or before; 200 with the names of those that were not; and what Handler answers to a
// request that is none, 400 also when the body is no batch.
func BatchHandler(v *Verifier, handle func(context.Context, Event) error, opts ...HandlerOption) http.Handler {
	return &batchHandler{Handler(v, handle, opts...).(*handler)}
}

type batchHandler struct{ *handler }

func (h *batchHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.serve(w, r, func(whole Event) {
		events, err := ReadBatch(whole.ContentType, whole.Body)
		if err != nil {
			h.refuse(w, r, refusal(err), err)
			return
		}
		var failed []Failed
		for _, e := range events {
			e.Timestamp = whole.Timestamp
			if status := h.one(r.Context(), e); status != http.StatusNoContent {
				failed = append(failed, Failed{ID: e.ID})
			}
		}
		AnswerBatch(w, failed)
	})
}

// one is once for an event whose handler must not end others with its panic.
func (h *batchHandler) one(ctx context.Context, e Event) (status int) {
	defer func() {
		if p := recover(); p != nil {
			h.logger.WarnContext(ctx, "handle webhook event: panic", "event_id", e.ID, "stack", string(debug.Stack()))
			status = http.StatusInternalServerError
		}
	}()
	return h.once(ctx, e)
}

// AnswerBatch tells the sender of a batch which of its events were not taken: those it sends again, and no others. With none it
// answers 204.
func AnswerBatch(w http.ResponseWriter, failed []Failed) {
	if len(failed) == 0 {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	// What the sender cannot read to its end counts for all: rather no reasons, and none of them too long.
	body, err := namesOf(failed, maxReason)
	if len(body) > maxAnswer {
		body, err = namesOf(failed, 0)
	}
	if err != nil || len(body) > maxAnswer {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", mediaJSON)
	_, _ = w.Write(body)
}

// namesOf is the body that names events, with so much of each reason.
func namesOf(failed []Failed, reason int) ([]byte, error) {
	named := slices.Clone(failed)
	for i := range named {
		named[i].Reason = strings.ToValidUTF8(named[i].Reason[:min(len(named[i].Reason), reason)], "")
	}
	return json.Marshal(struct {
		Failed []Failed `json:"failed"`
	}{named})
}

// ReadBatch returns the events of a body that Verifier.Verify has found to be right, and that is decompressed. contentType is
// the request's. An Event's Body is its data, ContentType that of the data, and Timestamp zero.
func ReadBatch(contentType string, body []byte) ([]Event, error) {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return nil, fmt.Errorf("%w: media type %q", errBody, contentType)
	}
	var elements []json.RawMessage
	switch media {
	case mediaJSON, mediaCloudEvent:
		if err := json.Unmarshal(body, &elements); err != nil {
			return nil, fmt.Errorf("%w: no JSON array: %w", errBody, err)
		}
	case mediaLines:
		for d := json.NewDecoder(bytes.NewReader(body)); len(elements) <= maxBatch; {
			var element json.RawMessage
			if err := d.Decode(&element); err == io.EOF {
				break
			} else if err != nil {
				return nil, fmt.Errorf("%w: no JSON on a line: %w", errBody, err)
			}
			elements = append(elements, element)
		}
	default:
		return nil, fmt.Errorf("%w: %s is no form of a batch", errBody, media)
	}
	if len(elements) == 0 || len(elements) > maxBatch {
		return nil, fmt.Errorf("%w: a batch of %d events, want 1 to %d", errBody, len(elements), maxBatch)
	}
	events := make([]Event, len(elements))
	for i, element := range elements {
		if events[i], err = readElement(element, media == mediaCloudEvent); err != nil {
			return nil, fmt.Errorf("event %d of %d: %w", i+1, len(elements), err)
		}
	}
	return events, nil
}

// element is an event as a batch in JSON has it. A CloudEvent has its attributes beside its data.
type element struct {
	ID         string                     `json:"id"`
	Type       string                     `json:"type"`
	Attributes map[string]json.RawMessage `json:"attributes"`
	Media      string                     `json:"datacontenttype"`
	Data       json.RawMessage            `json:"data"`
	Base64     *string                    `json:"data_base64"`
}

func readElement(raw json.RawMessage, cloudEvent bool) (Event, error) {
	var in element
	if err := json.Unmarshal(raw, &in); err != nil {
		return Event{}, fmt.Errorf("%w: no event: %w", errBody, err)
	}
	e := Event{ID: in.ID, Type: in.Type, ContentType: in.Media, Attributes: map[string]string{}, Body: in.Data}
	if e.ContentType == "" {
		e.ContentType = mediaJSON
	}
	if in.Base64 != nil {
		var err error
		if e.Body, err = base64.StdEncoding.DecodeString(*in.Base64); err != nil {
			return Event{}, fmt.Errorf("%w: data_base64: %w", errBody, err)
		}
	}
	if cloudEvent {
		if err := e.addEnvelope(raw); err != nil {
			return Event{}, err
		}
		e.ID = e.Attributes["webhookid"]
		delete(e.Attributes, "webhookid")
	} else if err := e.addMembers(in.Attributes); err != nil {
		return Event{}, err
	}
	if e.ID == "" || len(e.ID) > maxIDBytes {
		return Event{}, fmt.Errorf("%w: a webhook-id of %d bytes, want 1 to %d", errBody, len(e.ID), maxIDBytes)
	}
	return e, nil
}
