package plugin

import (
	"context"
	"log/slog"
	"os"
	"sync/atomic"

	"golang.org/x/time/rate"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	logRate  = 200
	logBurst = 500
	logQueue = 256
)

// logSink carries slog records to the host over Control, at a bounded rate; what is too much is counted
// and thrown away. While no Control is up, records go to stderr.
type logSink struct {
	records  chan *pluginv1.LogRecord
	dropped  atomic.Uint64
	limit    *rate.Limiter
	level    slog.LevelVar
	attached atomic.Bool
	stderr   slog.Handler
}

func newLogSink() *logSink {
	l := &logSink{records: make(chan *pluginv1.LogRecord, logQueue), limit: rate.NewLimiter(logRate, logBurst)}
	l.stderr = slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: &l.level})
	return l
}

func (l *logSink) attach() { l.attached.Store(true) }
func (l *logSink) detach() { l.attached.Store(false) }

func (l *logSink) setLevel(name string) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(name)); err == nil {
		l.level.Set(level)
	}
}

// Enabled is part of slog.Handler.
func (l *logSink) Enabled(_ context.Context, level slog.Level) bool { return level >= l.level.Level() }

// Handle is part of slog.Handler. It never blocks.
func (l *logSink) Handle(ctx context.Context, r slog.Record) error {
	return (&logHandler{sink: l}).Handle(ctx, r)
}

// WithAttrs is part of slog.Handler.
func (l *logSink) WithAttrs(attrs []slog.Attr) slog.Handler {
	return (&logHandler{sink: l}).WithAttrs(attrs)
}

// WithGroup is part of slog.Handler.
func (l *logSink) WithGroup(name string) slog.Handler { return (&logHandler{sink: l}).WithGroup(name) }

// batch is first and what else waits.
func (l *logSink) batch(first *pluginv1.LogRecord) *pluginv1.LogBatch {
	b := &pluginv1.LogBatch{Records: []*pluginv1.LogRecord{first}, Dropped: l.dropped.Swap(0)}
	for len(b.Records) < batchMax {
		select {
		case r := <-l.records:
			b.Records = append(b.Records, r)
		default:
			return b
		}
	}
	return b
}

// logHandler is a logSink with attributes and groups.
type logHandler struct {
	sink   *logSink
	attrs  []slog.Attr // their keys already carry the groups
	prefix string
}

func (h *logHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.sink.Enabled(ctx, level)
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := &logHandler{sink: h.sink, prefix: h.prefix, attrs: h.attrs[:len(h.attrs):len(h.attrs)]}
	for _, a := range attrs {
		next.attrs = append(next.attrs, slog.Attr{Key: h.prefix + a.Key, Value: a.Value})
	}
	return next
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return &logHandler{sink: h.sink, attrs: h.attrs, prefix: h.prefix + name + "."}
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	if !h.sink.limit.Allow() {
		h.sink.dropped.Add(1)
		return nil
	}
	if !h.sink.attached.Load() {
		r = r.Clone()
		r.AddAttrs(h.attrs...)
		return h.sink.stderr.Handle(ctx, r)
	}
	rec := &pluginv1.LogRecord{
		Time: timestamppb.New(r.Time), Level: r.Level.String(), Message: valid(r.Message),
		Attributes: make(map[string]string, len(h.attrs)+r.NumAttrs()),
	}
	for _, a := range h.attrs {
		flatten(rec.Attributes, "", a)
	}
	r.Attrs(func(a slog.Attr) bool {
		flatten(rec.Attributes, h.prefix, a)
		return true
	})
	select {
	case h.sink.records <- rec:
	default:
		h.sink.dropped.Add(1)
	}
	return nil
}

func flatten(to map[string]string, prefix string, a slog.Attr) {
	v := a.Value.Resolve()
	if v.Kind() != slog.KindGroup {
		to[valid(prefix+a.Key)] = valid(v.String())
		return
	}
	if a.Key != "" {
		prefix += a.Key + "."
	}
	for _, g := range v.Group() {
		flatten(to, prefix, g)
	}
}
