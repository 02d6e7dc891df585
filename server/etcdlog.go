package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"syscall"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// exitBroken is the process's exit code when a store can no longer promise anything.
const exitBroken = 70

// etcdLogger is etcd's log as ours. Where etcd would end the process on its own, which it does after any write that
// failed, the log says what to do about dir.
func etcdLogger(log *slog.Logger, dir string) *zap.Logger {
	log = log.With("component", "etcd")
	end := lastWords{log: log, dir: dir}
	return zap.New(&slogCore{log: log}, zap.WithFatalHook(end), zap.WithPanicHook(end))
}

// lastWords ends the process in etcd's place.
type lastWords struct {
	log *slog.Logger
	dir string
}

// OnWrite is called instead of os.Exit or panic. It must not return: etcd would go on.
func (w lastWords) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	var cause error
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok {
			cause = err
		}
	}
	hint := "start again; if it ends like this once more, " + wayOut(w.dir)
	switch {
	case errors.Is(cause, syscall.ENOSPC):
		hint = "free space on the disk and start again; nothing that was acknowledged is lost"
	case errors.Is(cause, syscall.EIO):
		hint = "the disk reports errors: see the system's log, and start again or move the data directory to another disk; nothing that was acknowledged is lost"
	}
	attrs := []any{"reason", e.Message, "dir", w.dir, "hint", hint}
	if cause != nil {
		attrs = append(attrs, "err", cause.Error())
	}
	w.log.Error("the embedded etcd cannot go on", attrs...)
	os.Exit(exitBroken)
}

// slogCore hands etcd's log to slog one level lower: what etcd calls a warning (a slow disk, a missing
// peer address) is rarely one for our operator.
type slogCore struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), slogLevel(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log, fields: append(append([]zapcore.Field(nil), c.fields...), fields...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	// What is above an error is lastWords' to say.
	if c.Enabled(e.Level) && e.Level <= zapcore.ErrorLevel {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(append([]zapcore.Field(nil), c.fields...), fields...) {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	level := slogLevel(e.Level)
	switch e.Message {
	case "Failed to detect schema version", "failed to update storage version", // at a first start, before the first entry; etcd tries again
		"failed to update cluster version", // when a new one is closed at once
		"Running http and grpc server on single port. This is not recommended for production.", // on none
		"simple token is not cryptographically signed":                                         // nobody logs in
		level = slog.LevelDebug
	}
	c.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelWarn
	case l >= zapcore.WarnLevel:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}
