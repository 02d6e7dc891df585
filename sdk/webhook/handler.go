package webhook

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
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
	// Type, Source and Subject are the CloudEvents attributes of these names, or empty. They come from the
	// ce- headers, or from the body when that is a CloudEvent in JSON (application/cloudevents+json).
	Type    string
	Source  string
	Subject string
	// ContentType of Body.
	ContentType string
	// Attributes are the other CloudEvents attributes, by name without "ce-": id (the publisher's own),
	// time, specversion, dataschema and extensions.
	Attributes map[string]string
	// Body is what was sent, decompressed when the content encoding is gzip. From Grapnel that is the payload
	// byte for byte as it was published, unless the subscription asks for another payload shape: then it is
	// the envelope of Standard Webhooks or the CloudEvent, with the payload in its member data.
	Body []byte
}

// Bounds on the CloudEvents attributes of an event, which a signature does not cover when they are headers.
const (
	maxAttributes     = 64
	maxAttributeBytes = 64 << 10
)

// HandlerOption changes a Handler.
type HandlerOption func(*handler)

// MaxBody bounds the body, as it is sent and again as it is when decompressed; larger ones are answered with
// 413. 1 MiB when not set or not positive.
func MaxBody(bytes int64) HandlerOption {
	return func(h *handler) {
		if bytes > 0 {
			h.maxBody = bytes
		}
	}
}

// Seen replaces the store that remembers which events were handled. A receiver of several processes
// needs one that they share.
func Seen(store SeenStore) HandlerOption { return func(h *handler) { h.seen = store } }

// Logger is told, at warn level, of handlers and stores that failed, and at debug level why a request was
// refused; nothing is logged when not set. Bodies, headers and keys are never logged.
func Logger(logger *slog.Logger) HandlerOption { return func(h *handler) { h.logger = logger } }

// Handler verifies requests and hands each event to handle once. When handle fails or panics, the event
// is released, the sender is answered 500 and handle gets the event again with the sender's next attempt;
// handle should therefore do its work in one transaction. When handle succeeds and the store cannot record
// it, the sender is answered 204 all the same, and this handler, as long as its process lives, remembers it in
// the store's place: the event is not handled twice, and the record is made when the store can be reached again.
//
// Answers: 204 handled, now or before; 400 no webhook, or a body that is not what its headers say; 401 bad
// signature or timestamp; 405 method; 409 being handled at this moment; 413 body too large; 415 a content
// encoding other than gzip; 431 too many or too large CloudEvents attributes; 500 handle or the store failed.
// Bodies of answers say nothing that helps an attacker. Headers are judged before the body is read, and a body
// is decompressed after it is verified.
//
// Slow senders are the http.Server's to bound, by ReadTimeout, and so is the size of all headers.
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
	unsaid   unsaid
	catching sync.Mutex
	logger   *slog.Logger
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.serve(w, r, func(e Event) { answer(w, h.once(r.Context(), e)) })
}

// serve hands on a request that is verified.
func (h *handler) serve(w http.ResponseWriter, r *http.Request, verified func(Event)) {
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
	default:
		w.Header().Set("Allow", "POST, PUT, PATCH")
		answer(w, http.StatusMethodNotAllowed)
		return
	}
	e, status, err := h.read(w, r)
	if err != nil {
		h.refuse(w, r, status, err)
		return
	}
	verified(e)
}

func (h *handler) refuse(w http.ResponseWriter, r *http.Request, status int, err error) {
	h.logger.DebugContext(r.Context(), "refuse webhook", "status", status, "err", err)
	answer(w, status)
}

// read returns the verified event of a request, or the status to refuse it with and why.
func (h *handler) read(w http.ResponseWriter, r *http.Request) (Event, int, error) {
	at, err := h.verifier.plausible(r.Header)
	if err != nil {
		return Event{}, refusal(err), err
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, h.maxBody))
	if err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			return Event{}, http.StatusRequestEntityTooLarge, err
		}
		return Event{}, http.StatusBadRequest, err
	}
	if err := h.verifier.Verify(r.Header, body); err != nil {
		return Event{}, refusal(err), err
	}
	body, err = h.decompress(r.Header.Values("Content-Encoding"), body)
	if err != nil {
		return Event{}, refusal(err), err
	}
	e := Event{ID: r.Header.Get(HeaderID), Timestamp: at, ContentType: r.Header.Get("Content-Type"), Attributes: map[string]string{}, Body: body}
	if structured(e.ContentType) {
		err = e.addEnvelope(body)
	} else {
		err = e.addHeaders(r.Header)
	}
	if err != nil {
		return Event{}, refusal(err), err
	}
	return e, 0, nil
}

// Faults of requests whose signature is right.
var (
	errTooLarge   = errors.New("the body is too large when decompressed")
	errEncoding   = errors.New("the content encoding is neither gzip nor identity")
	errBody       = errors.New("the body is not what its headers say")
	errAttributes = errors.New("too many or too large CloudEvents attributes")
)

// refusal is the status that tells the sender of a fault.
func refusal(err error) int {
	switch {
	case errors.Is(err, ErrMissingHeader), errors.Is(err, errBody):
		return http.StatusBadRequest
	case errors.Is(err, errTooLarge):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, errEncoding):
		return http.StatusUnsupportedMediaType
	case errors.Is(err, errAttributes):
		return http.StatusRequestHeaderFieldsTooLarge
	}
	return http.StatusUnauthorized
}

// decompress undoes a content encoding.
func (h *handler) decompress(encodings []string, body []byte) ([]byte, error) {
	switch strings.ToLower(strings.TrimSpace(strings.Join(encodings, ","))) {
	case "", "identity":
		return body, nil
	case "gzip", "x-gzip":
	default:
		return nil, errEncoding
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("%w: gzip: %w", errBody, err)
	}
	plain, err := io.ReadAll(io.LimitReader(z, h.maxBody+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: gzip: %w", errBody, err)
	case int64(len(plain)) > h.maxBody:
		return nil, errTooLarge
	}
	return plain, nil
}

// once claims the event, hands it out and settles the claim. It returns the status to answer with.
func (h *handler) once(ctx context.Context, e Event) (status int) {
	if done, left := h.unsaid.find(e.ID); left {
		// An earlier attempt was handled, or failed, and the store could not be told.
		err := h.settle(ctx, e.ID, done)
		switch {
		case done:
			return http.StatusNoContent
		case err != nil:
			return http.StatusInternalServerError
		}
	}
	claim, err := h.seen.Claim(ctx, e.ID)
	if err != nil {
		h.logger.WarnContext(ctx, "claim webhook event", "event_id", e.ID, "err", err)
		return http.StatusInternalServerError
	}
	defer h.catchUp(ctx) // the store answers, so it may be told what it could not be told before
	switch claim {
	case ClaimDone:
		return http.StatusNoContent
	case ClaimBusy:
		return http.StatusConflict
	}
	handled := false
	defer func() { _ = h.settle(ctx, e.ID, handled) }() // also when handle panics
	if err := h.handle(ctx, e); err != nil {
		h.logger.WarnContext(ctx, "handle webhook event", "event_id", e.ID, "err", err)
		return http.StatusInternalServerError
	}
	handled = true
	return http.StatusNoContent
}

// settleTimeout bounds a Commit or Release.
const settleTimeout = 5 * time.Second

// settle tells the store how an event ended, or remembers to.
func (h *handler) settle(ctx context.Context, id string, done bool) error {
	// A sender that hangs up must not leave the claim unsettled, nor a store that hangs the sender waiting.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	tell, what := h.seen.Release, "release webhook event"
	if done {
		tell, what = h.seen.Commit, "commit webhook event"
	}
	err := tell(ctx, id)
	if err != nil {
		h.logger.WarnContext(ctx, what, "event_id", id, "err", err)
		if !h.unsaid.keep(id, done) {
			h.logger.WarnContext(ctx, "too many webhook events are waiting for the store; one is forgotten", "event_id", id)
		}
	} else if done {
		h.unsaid.forget(id)
	}
	return err
}

// catchUp tells the store of one event that it could not be told of before. One request at a time does, so that
// a store that hangs holds up one.
func (h *handler) catchUp(ctx context.Context) {
	if !h.catching.TryLock() {
		return
	}
	defer h.catching.Unlock()
	if id, done, left := h.unsaid.any(); left {
		_ = h.settle(ctx, id, done)
	}
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
