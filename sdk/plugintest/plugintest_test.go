package plugintest_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// A signer as an author writes it.

type signConfig struct {
	Prefix string        `json:"prefix" default:"v2=" doc:"Before the digest."`
	Key    plugin.Secret `slot:"key" doc:"Shared key" required:"true"`
}

func signer() plugin.Kind {
	return plugin.Signer("acme-v2", func(c signConfig, _ plugin.Target) (plugin.SignFunc, error) {
		return func(r *plugin.Request) error {
			mac := hmac.New(sha256.New, c.Key.Values()[0])
			fmt.Fprintf(mac, "%s.%d.%s", r.MessageID, r.Created.Unix(), r.Body)
			r.Set("acme-signature", c.Prefix+hex.EncodeToString(mac.Sum(nil)))
			return nil
		}, nil
	}, plugin.Emits("acme-signature"))
}

type carryConfig struct {
	Mode string `json:"mode" default:"ok" enum:"ok,wait,panic,fail,own,nil,big"`
}

func carrier(started chan<- string) plugin.Kind {
	return plugin.Transport("mem", func(c carryConfig, t plugin.Target) (plugin.AttemptFunc, error) {
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			switch c.Mode {
			case "wait":
				if started != nil {
					started <- r.MessageID
				}
				<-ctx.Done()
				return nil, context.Cause(ctx)
			case "panic":
				panic("boom")
			case "fail":
				return nil, errors.New("no idea")
			case "own":
				return nil, &plugin.Failure{Source: plugin.SourcePolicy, Code: plugin.CodeEgress, Message: "denied", WireState: plugin.NotSent, Peer: "x:1"}
			case "nil":
				return nil, nil
			case "big":
				return &plugin.Response{Status: 500, Body: make([]byte, 100_000)}, nil
			}
			return &plugin.Response{Status: 201, Body: []byte(r.Method + " " + r.URL + " " + r.Get("acme-signature") + " " + t.UserAgent)}, nil
		}, nil
	}, plugin.Schemes("mem"), plugin.Check(func(_ carryConfig, t plugin.Target) []plugin.Problem {
		if strings.HasSuffix(t.URL, "/warn") {
			return []plugin.Problem{{Pointer: "/target/uri", Summary: "ends in /warn", Warning: true}}
		}
		return nil
	}))
}

func TestSignAndAttempt(t *testing.T) {
	h := plugintest.New(t, signer(), carrier(nil))
	s := h.Configure(plugintest.Instance{Kind: "acme-v2", Secrets: map[string][]string{"key": {"new", "old"}}})
	req := plugin.Request{MessageID: "msg", Created: time.Unix(1700000000, 0), Body: []byte("hi"), Headers: []plugin.Header{{Name: "a", Value: "b"}}}
	signed, err := s.Sign(req)
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, []byte("new"))
	mac.Write([]byte("msg.1700000000.hi"))
	want := "v2=" + hex.EncodeToString(mac.Sum(nil))
	if diff := cmp.Diff([]plugin.Header{{Name: "a", Value: "b"}, {Name: "acme-signature", Value: want}}, signed.Headers); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	c := h.Configure(plugintest.Instance{Kind: "mem", Target: plugin.Target{URL: "mem://x", UserAgent: "ua/1"}})
	got, err := c.Attempt(t.Context(), req, s)
	if err != nil {
		t.Fatal(err)
	}
	if got.Status != 201 || string(got.Body) != "POST mem://x "+want+" ua/1" {
		t.Errorf("got %d %s", got.Status, got.Body)
	}
}

func TestFailures(t *testing.T) {
	h := plugintest.New(t, carrier(nil))
	for mode, want := range map[string]plugin.Failure{
		"panic": {Source: plugin.SourcePlugin, Code: plugin.CodePanic, Message: "the plugin panicked", WireState: plugin.MaybeSent},
		"fail":  {Source: plugin.SourcePlugin, Message: "no idea", WireState: plugin.MaybeSent},
		"own":   {Source: plugin.SourcePolicy, Code: plugin.CodeEgress, Message: "denied", WireState: plugin.NotSent, Peer: "x:1"},
		"nil":   {Source: plugin.SourcePlugin, Message: "the transport returned neither response nor error", WireState: plugin.MaybeSent},
	} {
		c := h.Configure(plugintest.Instance{Kind: "mem", Config: map[string]any{"mode": mode}})
		_, err := c.Attempt(t.Context(), plugin.Request{MessageID: "m"})
		var got *plugin.Failure
		if !errors.As(err, &got) {
			t.Errorf("%s: %v", mode, err)
			continue
		}
		if diff := cmp.Diff(want, *got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", mode, diff)
		}
	}
	big := h.Configure(plugintest.Instance{Kind: "mem", Config: map[string]any{"mode": "big"}})
	if got, err := big.Attempt(t.Context(), plugin.Request{}); err != nil || len(got.Body) != plugintest.MaxResponseBody || !got.Truncated {
		t.Errorf("big: %v %v", got, err)
	}
	gone := h.Configure(plugintest.Instance{Kind: "mem"})
	gone.Remove()
	_, err := gone.Attempt(t.Context(), plugin.Request{})
	var f *plugin.Failure
	if !errors.As(err, &f) || f.Source != plugin.SourceConfig {
		t.Errorf("removed: %v", err)
	}
}

func TestTimeoutAndCancel(t *testing.T) {
	started := make(chan string, 1)
	h := plugintest.New(t, carrier(started))
	c := h.Configure(plugintest.Instance{Kind: "mem", Config: map[string]any{"mode": "wait"}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := c.Attempt(ctx, plugin.Request{})
	var f *plugin.Failure
	if !errors.As(err, &f) || f.Code != plugin.CodeTimeout || f.Source != plugin.SourceEndpoint {
		t.Errorf("timeout: %v", err)
	}
	<-started
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		<-started
		cancel()
	}()
	_, err = c.Attempt(ctx, plugin.Request{})
	if !errors.As(err, &f) || f.Code != plugin.CodeCancelled {
		t.Errorf("cancel: %v", err)
	}
}

func TestSlowAttemptsDoNotHoldUpOthers(t *testing.T) {
	h := plugintest.New(t, carrier(nil))
	slow := h.Configure(plugintest.Instance{Kind: "mem", Config: map[string]any{"mode": "wait"}})
	fast := h.Configure(plugintest.Instance{Kind: "mem"})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() { _, _ = slow.Attempt(ctx, plugin.Request{}) })
	}
	for range 200 {
		if _, err := fast.Attempt(t.Context(), plugin.Request{}); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	wg.Wait()
}

func TestValidate(t *testing.T) {
	h := plugintest.New(t, signer(), carrier(nil))
	for _, tt := range []struct {
		in   plugintest.Instance
		want []plugin.Problem
	}{
		{plugintest.Instance{Kind: "acme-v2"}, nil}, // secrets absent: only the shape
		{plugintest.Instance{Kind: "acme-v2", Config: map[string]any{"x": 1}}, []plugin.Problem{
			{Pointer: "/config/x", Code: "config.unknown_field", Summary: `there is no field "x"; there is only prefix`}}},
		{plugintest.Instance{Kind: "acme-v2", Secrets: map[string][]string{"kee": {"v"}}}, []plugin.Problem{
			{Pointer: "/secrets/kee", Code: "secret.unknown_slot", Summary: `there is no secret slot "kee"; there is only key`}}},
		{plugintest.Instance{Kind: "none"}, []plugin.Problem{
			{Code: "config.unknown_kind", Summary: `plugintest offers no kind "none"`}}},
		{plugintest.Instance{Kind: "mem", Target: plugin.Target{URL: "mem://x/warn"}}, []plugin.Problem{
			{Pointer: "/target/uri", Code: "config.invalid", Summary: "ends in /warn", Warning: true}}},
	} {
		if diff := cmp.Diff(tt.want, h.Validate(tt.in)); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", tt.in, diff)
		}
	}
	if c, problems := h.TryConfigure(plugintest.Instance{Kind: "acme-v2"}); c != nil || len(problems) != 1 || problems[0].Code != "secret.missing" {
		t.Errorf("configure without its secret: %v", problems)
	}
}

func TestHarnessLeavesNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := plugintest.New(t, carrier(nil))
		c := h.Configure(plugintest.Instance{Kind: "mem"})
		if _, err := c.Attempt(t.Context(), plugin.Request{}); err != nil {
			t.Error(err)
		}
	})
}
