package plugin_test

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

type lifeConfig struct {
	Refuse bool          `json:"refuse"`
	Key    plugin.Secret `slot:"key"`
}

// lives counts what instances do at their ends.
type lives struct {
	ended chan string
	enter chan struct{}
	leave chan struct{}
}

func newLives() *lives {
	return &lives{ended: make(chan string, 16), enter: make(chan struct{}, 16), leave: make(chan struct{})}
}

func (l *lives) transport() plugin.Kind {
	return plugin.Transport("held", func(c lifeConfig, t plugin.Target) (plugin.AttemptFunc, error) {
		t.OnClose(func(ctx context.Context) {
			if _, bounded := ctx.Deadline(); !bounded {
				l.ended <- "unbounded"
			}
			l.ended <- t.URL
		})
		if c.Refuse {
			return nil, errors.New("refused")
		}
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			if r.MessageID == "slow" {
				l.enter <- struct{}{}
				<-l.leave
			}
			return &plugin.Response{Status: http.StatusOK}, nil
		}, nil
	})
}

// none fails the test when something has ended.
func (l *lives) none(t *testing.T, when string) {
	t.Helper()
	select {
	case url := <-l.ended:
		t.Fatalf("%s: %s was closed", when, url)
	default:
	}
}

func target(url string) plugin.Target { return plugin.Target{URL: url} }

func TestInstanceIsClosedOnceItIsRemovedAndNobodyUsesIt(t *testing.T) {
	l := newLives()
	h := plugintest.New(t, l.transport())
	in := h.Configure(plugintest.Instance{Kind: "held", Target: target("held:a")})
	done := make(chan error, 1)
	go func() {
		_, err := in.Attempt(t.Context(), plugin.Request{MessageID: "slow"})
		done <- err
	}()
	<-l.enter
	in.Remove()
	in.Remove()
	l.none(t, "while an attempt goes on")
	if _, err := in.Attempt(t.Context(), plugin.Request{MessageID: "late"}); err == nil {
		t.Error("a removed instance takes an attempt")
	}
	l.none(t, "while an attempt goes on")
	close(l.leave)
	if err := <-done; err != nil {
		t.Errorf("the attempt that was under way: %v", err)
	}
	if got := <-l.ended; got != "held:a" {
		t.Errorf("%s was closed, want held:a", got)
	}
	other := h.Configure(plugintest.Instance{Kind: "held", Target: target("held:b")})
	other.Remove()
	if got := <-l.ended; got != "held:b" { // not a second time the first
		t.Errorf("%s was closed, want held:b", got)
	}
}

func TestInstanceOfACheckOrOfARefusalIsClosedAtOnce(t *testing.T) {
	l := newLives()
	h := plugintest.New(t, l.transport())
	if problems := h.Validate(plugintest.Instance{Kind: "held", Target: target("held:checked")}); len(problems) > 0 {
		t.Fatal(problems)
	}
	if got := <-l.ended; got != "held:checked" {
		t.Errorf("%s was closed", got)
	}
	if in, _ := h.TryConfigure(plugintest.Instance{Kind: "held", Target: target("held:refused"), Config: map[string]any{"refuse": true}}); in != nil {
		t.Fatal("taken")
	}
	if got := <-l.ended; got != "held:refused" {
		t.Errorf("%s was closed", got)
	}
}

func TestInstancesLeftAreClosedAtTheEnd(t *testing.T) {
	l := newLives()
	t.Run("harness", func(t *testing.T) {
		h := plugintest.New(t, l.transport())
		h.Configure(plugintest.Instance{Kind: "held", Target: target("held:1")})
		h.Configure(plugintest.Instance{Kind: "held", Target: target("held:2")})
	})
	got := map[string]bool{}
	for len(l.ended) > 0 {
		got[<-l.ended] = true
	}
	if len(got) != 2 || !got["held:1"] || !got["held:2"] {
		t.Errorf("closed: %v, want both", got)
	}
}

func TestCloseThatPanicsSparesTheOthers(t *testing.T) {
	ended := make(chan int, 2)
	kind := plugin.Signer("panics", func(_ lifeConfig, t plugin.Target) (plugin.SignFunc, error) {
		t.OnClose(func(context.Context) { ended <- 1 })
		t.OnClose(func(context.Context) { panic("close") })
		t.OnClose(func(context.Context) { ended <- 3 })
		return func(*plugin.Request) error { return nil }, nil
	})
	h := plugintest.New(t, kind)
	h.Configure(plugintest.Instance{Kind: "panics"}).Remove()
	if first, second := <-ended, <-ended; first != 3 || second != 1 {
		t.Errorf("closed %d, then %d, want the last given first", first, second)
	}
	h.Configure(plugintest.Instance{Kind: "panics"})
}
