package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

const (
	// patience bounds each wait of the start.
	patience = 10 * time.Second
	// silence is how long a step of the start may take before it says what it is about.
	silence = time.Second
)

// step runs one step of the start, which says what it does once it takes long.
func step(log *slog.Logger, what string, run func() error) error {
	began := time.Now()
	slow := time.AfterFunc(silence, func() { log.Info("still starting", "step", what) })
	slower := time.AfterFunc(patience/2, func() { log.Warn("still starting", "step", what, "for", patience/2) })
	defer func() {
		if !slow.Stop() {
			log.Info("took a while", "step", what, "took", time.Since(began).Round(time.Millisecond))
		}
		slower.Stop()
	}()
	return run()
}

// wait is a step that waits for something outside of the process's power, and so gives up after a while. What run
// returns when its context has ended is the cause that it knows, or the context's own error.
func wait(ctx context.Context, log *slog.Logger, what string, run func(context.Context) error) error {
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := step(log, what, func() error { return run(bounded) })
	switch {
	case err == nil || ctx.Err() != nil || bounded.Err() == nil:
		return err
	case err == bounded.Err(): //nolint:errorlint // only the bare one says nothing
		return fmt.Errorf("gave up after %v: %s", patience, what)
	default:
		return fmt.Errorf("gave up after %v: %s: %w", patience, what, err)
	}
}
