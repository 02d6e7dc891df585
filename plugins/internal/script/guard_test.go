package script

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// TestEndless: who is in a step that nothing can stop ends the process, and the report of that names the instance.
func TestEndless(t *testing.T) {
	const inside = "GRAPNEL_TEST_ENDLESS"
	if os.Getenv(inside) != "" {
		g := NewGuard()
		g.endless = 5
		h := plugintest.New(t, plugin.Transformer("hangs", func(struct{}, plugin.Target) (plugin.TransformFunc, error) {
			return func(ctx context.Context, _ *plugin.Event) (*plugin.Transformed, error) {
				return nil, g.Do(ctx, func(context.Context) error { select {} })
			}, nil
		}))
		_, _ = h.Configure(plugintest.Instance{Kind: "hangs"}).Transform(t.Context(), plugin.Event{})
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestEndless$", "-test.timeout=1m")
	cmd.Env = append(os.Environ(), inside+"=1", "GODEBUG=tracebacklabels=1")
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("it ended well: %s", out)
	}
	_, report, _ := strings.Cut(string(out), "panic: a script is in a step that nothing can stop")
	_, report, _ = strings.Cut(report, "\ngoroutine ")
	if first, _, _ := strings.Cut(report, "\n"); !strings.Contains(first, plugin.InstanceLabel) {
		t.Errorf("the goroutine that is to blame has no label: %.1000s", out)
	}
}

// TestMemory: what takes too much has failed, by itself, and what is quick goes on all the while.
func TestMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(64 << 20))
	g := NewGuard()
	g.time = time.Minute
	takes := func(ctx context.Context) error {
		var all [][]byte
		for ctx.Err() == nil {
			all = append(all, make([]byte, 1<<20))
		}
		return errors.New("stopped with " + string(all[0]))
	}
	var failure *plugin.Failure
	took := make(chan error)
	go func() { took <- g.Do(t.Context(), takes) }()
	for over := false; !over; {
		select {
		case err := <-took:
			if over = true; !errors.As(err, &failure) || failure.Code != "memory" {
				t.Errorf("%v, want a failure for want of memory", err)
			}
		default:
			if err := g.Do(t.Context(), func(ctx context.Context) error { return ctx.Err() }); err != nil {
				t.Fatalf("a quick one: %v", err)
			}
		}
	}
	// One that is done again holds up nobody, and who waits for it waits no longer than its own time.
	g.alone <- struct{}{}
	if err := g.Do(t.Context(), func(context.Context) error { return nil }); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() { took <- g.Do(ctx, func(ctx context.Context) error { err := takes(ctx); cancel(); return err }) }()
	if err := <-took; !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want what its context says", err)
	}
}
