package webhook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// defaultMaxBody is four times the largest event that Grapnel takes by default.
const defaultMaxBody = 1 << 20

// Event is a verified request.
type Event struct {
	// ID is the webhook-id: the same on every attempt and in a replay, so it is what to deduplicate by.
	ID string
	// Timestamp is the signed time of this attempt.
	Timestamp time.Time
	// Type, Source and Subject are the CloudEvents attributes of these names, or empty.
	Type    string
	Source  string
	Subject string
	// ContentType of Body.
	ContentType string
	// Attributes are the other CloudEvents attributes, by name without "ce-": id (the publisher's own),
	// time, specversion, dataschema and extensions.
	Attributes map[string]string
	// Body is the payload, byte for byte as it was published.
	Body []byte
}

// HandlerOption changes a Handler.
type HandlerOption func(*handler)

// MaxBody bounds the body; larger ones are answered with 413. 1 MiB when not set.
func MaxBody(bytes int64) HandlerOption { return func(h *handler) { h.maxBody = bytes } }

// Seen replaces the store that remembers which events were handled. A receiver of several processes
// needs one that they share.
func Seen(store SeenStore) HandlerOption { return func(h *handler) { h.seen = store } }

// Logger is told, at warn level, of handlers and stores that failed; nothing is logged when not set.
// Bodies, headers and keys are never logged.
func Logger(logger *slog.Logger) HandlerOption { return func(h *handler) { h.logger = logger } }

// Handler verifies requests and hands each event to handle once. When handle fails or panics, the event
// is released, the sender is answered 500 and handle gets the event again with the sender's next attempt;
// handle should therefore do its work in one transaction.
//
// Answers: 204 handled, now or before; 400 no webhook; 401 bad signature or timestamp; 405 method; 409
// being handled at this moment; 413 body too large; 500 handle or the store failed. Bodies of answers say
// nothing that helps an attacker.
//
// Slow senders are the http.Server's to bound, by ReadTimeout.
func Handler(v *Verifier, handle func(context.Context, Event) error, opts ...HandlerOption) http.Handler {
	h := &handler{verifier: v, handle: handle, maxBody: defaultMaxBody}
	for _, o := range opts {
		o(h)
	}
	if h.seen == nil {
		h.seen = NewMemoryStore(0, 0)
	}
	if h.logger == nil {
		h.logger = slog.New(slog.DiscardHandler)
	}
	return h
}

type handler struct {
	verifier *Verifier
	handle   func(context.Context, Event) error
	maxBody  int64
	seen     SeenStore
	logger   *slog.Logger
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
	default:
		w.Header().Set("Allow", "POST, PUT, PATCH")
		answer(w, http.StatusMethodNotAllowed)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, h.maxBody))
	if err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			answer(w, http.StatusRequestEntityTooLarge)
			return
		}
		answer(w, http.StatusBadRequest)
		return
	}
	at, err := h.verifier.verify(r.Header, body)
	switch {
	case errors.Is(err, ErrMissingHeader):
		answer(w, http.StatusBadRequest)
	case err != nil:
		answer(w, http.StatusUnauthorized)
	default:
		answer(w, h.once(r.Context(), newEvent(r.Header, at, body)))
	}
}

// once claims the event, hands it out and settles the claim. It returns the status to answer with.
func (h *handler) once(ctx context.Context, e Event) (status int) {
	claim, err := h.seen.Claim(ctx, e.ID)
	if err != nil {
		h.logger.WarnContext(ctx, "claim webhook event", "event_id", e.ID, "err", err)
		return http.StatusInternalServerError
	}
	switch claim {
	case ClaimDone:
		return http.StatusNoContent
	case ClaimBusy:
		return http.StatusConflict
	}
	// A sender that hangs up must not leave the claim unsettled.
	settle := context.WithoutCancel(ctx)
	handled := false
	defer func() {
		if handled {
			return
		}
		if err := h.seen.Release(settle, e.ID); err != nil { // also when handle panics
			h.logger.WarnContext(ctx, "release webhook event", "event_id", e.ID, "err", err)
		}
	}()
	if err := h.handle(ctx, e); err != nil {
		h.logger.WarnContext(ctx, "handle webhook event", "event_id", e.ID, "err", err)
		return http.StatusInternalServerError
	}
	handled = true
	if err := h.seen.Commit(settle, e.ID); err != nil {
		// The work is done; asking for another attempt would only do it twice.
		h.logger.WarnContext(ctx, "commit webhook event", "event_id", e.ID, "err", err)
	}
	return http.StatusNoContent
}

func answer(w http.ResponseWriter, status int) {
	if status == http.StatusNoContent {
		w.WriteHeader(status)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, strings.ToLower(http.StatusText(status)))
}

func newEvent(header http.Header, at time.Time, body []byte) Event {
	e := Event{
		ID:          header.Get(HeaderID),
		Timestamp:   at,
		ContentType: header.Get("Content-Type"),
		Attributes:  map[string]string{},
		Body:        body,
	}
	for name, values := range header {
		attribute, found := strings.CutPrefix(name, "Ce-")
		if !found || attribute == "" || len(values) == 0 {
			continue
		}
		value := attributeValue(values[0])
		switch attribute = strings.ToLower(attribute); attribute {
		case "type":
			e.Type = value
		case "source":
			e.Source = value
		case "subject":
			e.Subject = value
		default:
			e.Attributes[attribute] = value
		}
	}
	return e
}

// attributeValue undoes the percent-encoding that the CloudEvents HTTP binding puts on header values.
func attributeValue(value string) string {
	decoded, err := url.PathUnescape(value)
	if err != nil {
		return value
	}
	return decoded
}
