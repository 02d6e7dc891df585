package tracing

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
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
	if err == nil {
		s.exported.Add(float64(len(spans)))
		if s.failing.Swap(false) && s.due() {
			s.log.Info("traces are taken again")
		}
		return nil
	}
	s.failed.Add(float64(len(spans)))
	if !s.failing.Swap(true) && s.due() {
		s.log.Warn("the collector does not take traces; what is recorded until it does is lost", "err", s.said(err))
	}
	return nil
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
