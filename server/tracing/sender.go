package tracing

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/grapnel/grapnel/internal/redact"
)

// maxSaid is the most bytes of what is logged of a collector's refusal.
const maxSaid = 256

// sender is the exporter as the SDK's processor sees it, which hands it one batch at a time, and throws away what is too much
// meanwhile. What cannot be sent is told once, and counted.
type sender struct {
	sdktrace.SpanExporter
	log     *slog.Logger
	secrets redact.Set
	// over ends what is being sent.
	over context.Context //nolint:containedctx // its own life
	end  context.CancelFunc
	// failing is set while nothing is taken; told is when the log last said anything of it. The SDK exports one batch at a time.
	failing atomic.Bool
	told    time.Time
	// partly is what the exporters make of an answer that takes some spans: a type of their own that nobody else may name.
	partly *regexp.Regexp

	recorded, exported, failed prometheus.Counter
}

func newSender(to sdktrace.SpanExporter, secrets []string, o Options) *sender {
	spans := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "grapnel_trace_spans_total", Help: "Spans recorded, taken by the collector, and lost because it did not take them.",
	}, []string{"result"})
	if o.Registerer != nil {
		o.Registerer.MustRegister(spans)
	}
	s := &sender{
		SpanExporter: to, log: o.Logger.With("component", "tracing"),
		partly:   regexp.MustCompile(`(?s)OTLP partial success: .*\((-?\d+) spans rejected\)`),
		recorded: spans.WithLabelValues("recorded"), exported: spans.WithLabelValues("exported"), failed: spans.WithLabelValues("failed"),
	}
	s.over, s.end = context.WithCancel(context.Background())
	for _, secret := range secrets {
		if secret != "" {
			s.secrets.Add(secret)
		}
	}
	return s
}

// ExportSpans implements sdktrace.SpanExporter. It returns nil: what went wrong has been told.
func (s *sender) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.over, cancel)()
	err := s.SpanExporter.ExportSpans(ctx, spans)
	lost, answered := s.rejected(err, len(spans))
	s.exported.Add(float64(len(spans) - lost))
	s.failed.Add(float64(lost))
	switch {
	case !answered:
		if !s.failing.Swap(true) && s.due() {
			s.log.Warn("the collector does not take traces; what is recorded until it does is lost", "err", s.said(err))
		}
	case s.failing.Swap(false) && s.due():
		s.log.Info("traces are taken again")
	case err != nil && s.due():
		s.log.Warn("the collector has something to say about traces, of which it may have left some out", "rejected", lost, "err", s.said(err))
	}
	return nil
}

// rejected is how many of n spans the collector has not taken, and whether it has answered at all: also an answer that takes
// some, or all and says something, is an error of the exporters.
func (s *sender) rejected(err error, n int) (lost int, answered bool) {
	if err == nil {
		return 0, true
	}
	said := s.partly.FindStringSubmatch(err.Error())
	if said == nil {
		return n, false
	}
	lost, err = strconv.Atoi(said[1])
	if err != nil { // of more digits than there may be spans
		return n, true
	}
	return min(max(lost, 0), n), true
}

// due keeps a collector that takes some and refuses some from filling the log: it has a line a minute.
func (s *sender) due() bool {
	now := time.Now()
	if now.Sub(s.told) < time.Minute && !s.told.IsZero() {
		return false
	}
	s.told = now
	return true
}

// said is what may be logged of an error: without the URL, and without what the environment has as headers.
func (s *sender) said(err error) string {
	if at, ok := errors.AsType[*url.Error](err); ok {
		err = at.Err
	}
	return redact.Line(&s.secrets, err.Error(), maxSaid)
}
