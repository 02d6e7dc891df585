//go:build linux

package pluginhost

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// seen is a request as a receiver has it.
type seen struct {
	Method, URL string
	Headers     [][2]string
	Body        []byte
}

func (s seen) get(name string) string {
	for _, h := range s.Headers {
		if h[0] == name {
			return h[1]
		}
	}
	return ""
}

type platformConfig struct {
	Ask    bool `json:"ask"`
	Refuse bool `json:"refuse"`
	Die    bool `json:"die"`
}

const platformMaxBody = 3000

func platformKinds() []plugin.Kind {
	return []plugin.Kind{
		plugin.Transport("mem", func(c platformConfig, t plugin.Target) (plugin.AttemptFunc, error) {
			return func(_ context.Context, r *plugin.Request) (*plugin.Response, error) {
				if r.OwnershipCheck {
					return c.answer(r)
				}
				out := seen{Method: r.Method, URL: r.URL, Body: r.Body}
				for _, h := range r.Headers {
					out.Headers = append(out.Headers, [2]string{h.Name, h.Value})
				}
				body, err := json.Marshal(out)
				return &plugin.Response{Status: 400, Body: body}, err
			}, nil
		}, plugin.Schemes("mem"), plugin.MaxBody(platformMaxBody), plugin.OwnershipCheck(), plugin.Batches()),
		plugin.Transport("mute", func(struct{}, plugin.Target) (plugin.AttemptFunc, error) {
			return func(context.Context, *plugin.Request) (*plugin.Response, error) {
				return &plugin.Response{Status: 200}, nil
			}, nil
		}, plugin.Schemes("mute")),
		chainSigner("beta", "x-beta"), chainSigner("gamma", "x-gamma"),
		keyKind[oneKey]("one", "key"), keyKind[oneKey]("leaky", "key"),
		plugin.Signer("two", func(twoKeys, plugin.Target) (plugin.SignFunc, error) { return nil, nil }),
		plugin.Signer("three", func(twoKeysOneRequired, plugin.Target) (plugin.SignFunc, error) { return nil, nil }),
	}
}

func (c platformConfig) answer(r *plugin.Request) (*plugin.Response, error) {
	switch {
	case len(r.Body) > 0 || r.MessageID != "" || r.Get("ce-id") != "" || r.Get("webhook-id") != "":
		return nil, errors.New("an ownership check carries an event")
	case c.Die:
		panic("no")
	case !c.Ask:
		return &plugin.Response{Status: 200}, nil
	case c.Refuse:
		return &plugin.Response{Status: 405, Headers: []plugin.Header{{Name: "allow", Value: "GET"}}}, nil
	}
	return &plugin.Response{Status: 204, Headers: []plugin.Header{{Name: "webhook-allowed-origin", Value: "*"}}}, nil
}

// chainSigner sets header to the names and values of the signatures that it covers: those before it.
func chainSigner(id, header string) plugin.Kind {
	return plugin.Signer(id, func(struct{}, plugin.Target) (plugin.SignFunc, error) {
		return func(r *plugin.Request) error {
			covered := "("
			for _, h := range r.Headers {
				if strings.HasPrefix(h.Name, "x-") && h.Name != "x-static" {
					covered += h.Name + "=" + h.Value + ";"
				}
			}
			if !strings.Contains(r.URL, "?") {
				r.URL += "?"
			}
			r.URL += "&" + id
			r.Set(header, covered+r.URL[strings.Index(r.URL, "?"):]+")")
			return nil
		}, nil
	}, plugin.Emits("x-"+id))
}

type oneKey struct {
	Key plugin.Secret `slot:"key" doc:"Key" required:"true"`
}

type twoKeys struct {
	A plugin.Secret `slot:"a" doc:"A" required:"true"`
	B plugin.Secret `slot:"b" doc:"B" required:"true"`
}

type twoKeysOneRequired struct {
	A plugin.Secret `slot:"a" doc:"A" required:"true"`
	B plugin.Secret `slot:"b" doc:"B"`
}

func keyKind[C any](id, slot string) plugin.Kind {
	return plugin.Signer(id, func(C, plugin.Target) (plugin.SignFunc, error) {
		return func(*plugin.Request) error { return nil }, nil
	}, plugin.Format(slot, plugin.SecretFormat{
		Doc: "k_ and some more", Algorithms: []string{"short", "long"},
		Generate: func(algorithm string) ([]byte, error) { return []byte("k_made-" + algorithm + "-value"), nil },
		Read: func(value []byte) (plugin.SecretInfo, error) {
			if !strings.HasPrefix(string(value), "k_") {
				return plugin.SecretInfo{}, fmt.Errorf("%s does not begin with k_", value) // shows it, as it must not
			}
			info := plugin.SecretInfo{
				Value: []byte(strings.TrimSpace(string(value))), Algorithm: "short", PublicKey: "public", JWK: `{"kty":"x"}`, KeyID: "7",
			}
			if id == "leaky" {
				info.PublicKey = string(info.Value)
			}
			return info, nil
		},
	}))
}

func platform(t *testing.T) *fixture {
	return start(t, nil, self("plugin-platform"), self("plugin-signers")).ready(t)
}

func signedBy(t *testing.T, ids ...string) *subscription.Subscription {
	sub := newSub(t, 1, nil)
	sub.Proto().Signers = nil
	for _, id := range ids {
		sub.Proto().Signers = append(sub.Proto().Signers, &grapnelv1.PluginBinding{Plugin: "plugins/" + id})
	}
	return sub
}

func (f *fixture) receive(t *testing.T, sub *subscription.Subscription, job *delivery.Job) seen {
	t.Helper()
	got := f.attempt(t, sub, job)
	var s seen
	if err := json.Unmarshal(got.ResponseBody, &s); err != nil {
		t.Fatalf("%v: %+v", err, got)
	}
	return s
}

func TestSignersSignInTheirOrder(t *testing.T) {
	for name, ids := range map[string][]string{
		"here, elsewhere, here": {"beta", "alpha", "gamma"},
		"elsewhere, here, here": {"alpha", "gamma", "beta"},
		"here, here, elsewhere": {"gamma", "beta", "alpha"},
	} {
		t.Run(name, func(t *testing.T) {
			got := platform(t).receive(t, signedBy(t, ids...), newJob(0, "x"))
			a, b, c := ids[0], ids[1], ids[2]
			first := "(?&" + a + ")"
			second := "(x-" + a + "=" + first + ";?&" + a + "&" + b + ")"
			third := "(x-" + a + "=" + first + ";x-" + b + "=" + second + ";?&" + a + "&" + b + "&" + c + ")"
			for i, want := range []string{first, second, third} {
				if have := got.get("x-" + ids[i]); have != want {
					t.Errorf("%s signed %q, want %q", ids[i], have, want)
				}
			}
			if want := "mem://receiver/path?&" + a + "&" + b + "&" + c; got.URL != want {
				t.Errorf("url %q, want %q", got.URL, want)
			}
		})
	}
}

func TestSignersThatClashAreThePluginsFault(t *testing.T) {
	for name, tt := range map[string]struct {
		ids  []string
		want []string
	}{
		"both elsewhere":                {[]string{"beta", "liar", "gamma"}, []string{"x-beta", "changed"}},
		"elsewhere, then here":          {[]string{"liar", "beta"}, []string{"x-beta", "changed"}},
		"what the request had, changed": {[]string{"changer", "beta"}, []string{"content-type", "changed"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := platform(t).attempt(t, signedBy(t, tt.ids...), newJob(0, "x"))
			if got.Outcome != delivery.OutcomePluginError || got.Cause != delivery.CausePlugin {
				t.Errorf("%+v", got)
			}
			for _, part := range tt.want {
				if !strings.Contains(got.Error, part) {
					t.Errorf("%q lacks %q", got.Error, part)
				}
			}
		})
	}
}

func TestPrepareSecret(t *testing.T) {
	f := platform(t)
	for name, tt := range map[string]struct {
		kind, slot, value, algorithm string
		want                         Prepared
		field, summary               string
	}{
		"made":              {kind: "plugins/one", want: Prepared{Value: []byte("k_made-short-value"), Algorithm: "short", PublicKey: "public", JWK: `{"kty":"x"}`, KeyID: "7"}},
		"made as asked":     {kind: "one", slot: "key", algorithm: "long", want: Prepared{Value: []byte("k_made-long-value"), Algorithm: "short", PublicKey: "public", JWK: `{"kty":"x"}`, KeyID: "7"}},
		"given":             {kind: "one", value: "k_given-value \n", want: Prepared{Value: []byte("k_given-value"), Algorithm: "short", PublicKey: "public", JWK: `{"kty":"x"}`, KeyID: "7"}},
		"bad value":         {kind: "one", value: "canary-value", field: "value", summary: "does not begin"},
		"unknown algorithm": {kind: "one", algorithm: "tall", field: "algorithm", summary: `given "tall", want one of short, long`},
		"unknown slot":      {kind: "one", slot: "lock", field: "slot", summary: `no secret slot "lock"; it has "key"`},
		"two slots":         {kind: "two", value: "canary-value", field: "slot", summary: `it has "a", "b"`},
		"the required slot": {kind: "three", value: "plain-value", want: Prepared{Value: []byte("plain-value")}},
		"the other slot":    {kind: "three", slot: "b", value: "plain-value", want: Prepared{Value: []byte("plain-value")}},
		"none given":        {kind: "three", field: "value", summary: "must be given"},
		"too long":          {kind: "three", value: strings.Repeat("v", 64<<10+1), field: "value", summary: "65537 bytes"},
		"no text":           {kind: "three", value: "canary-value\xff", field: "value", summary: "UTF-8"},
		"no slots":          {kind: "beta", value: "canary-value", field: "plugin", summary: "takes no secret"},
		"a key made public": {kind: "leaky", value: "k_canary-value", field: "plugin", summary: "at fault"},
	} {
		t.Run(name, func(t *testing.T) {
			got, ds, err := f.PrepareSecret(t.Context(), tt.kind, tt.slot, []byte(tt.value), tt.algorithm)
			if err != nil {
				t.Fatal(err)
			}
			if string(got.Value) != string(tt.want.Value) || got.PublicKey != tt.want.PublicKey || got.JWK != tt.want.JWK ||
				got.KeyID != tt.want.KeyID || got.Algorithm != tt.want.Algorithm {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
			switch {
			case tt.field == "" && len(ds) > 0:
				t.Errorf("diagnostics %+v", ds)
			case tt.field != "" && (len(ds) != 1 || ds[0].Field != tt.field || !strings.Contains(ds[0].Summary, tt.summary)):
				t.Errorf("diagnostics %+v, want one for %s with %q", ds, tt.field, tt.summary)
			}
			if strings.Contains(fmt.Sprint(ds), "canary") {
				t.Errorf("the value is in %+v", ds)
			}
		})
	}
	if _, _, err := f.PrepareSecret(t.Context(), "plugins/nobody", "", nil, ""); !errors.Is(err, ErrUnknownPlugin) {
		t.Errorf("unknown kind: %v", err)
	}
	f.stop()
	if _, _, err := f.PrepareSecret(t.Context(), "one", "", []byte("k_canary-value"), ""); !errors.Is(err, ErrUnavailable) || strings.Contains(err.Error(), "canary") {
		t.Errorf("after the stop: %v", err)
	}
}

func TestCheckOwnership(t *testing.T) {
	f := platform(t)
	ask := func(uri string, config map[string]any) (*delivery.Attempt, error) {
		sub := newSub(t, 1, config)
		sub.Proto().Uri, sub.Proto().Signers = uri, nil
		return f.CheckOwnership(t.Context(), sub.Proto())
	}
	got, err := ask("mem://receiver", map[string]any{"ask": true})
	if err != nil || got.Outcome != delivery.OutcomeSucceeded || got.ResponseCode != 204 ||
		len(got.ResponseHeaders) != 1 || got.ResponseHeaders[0] != (delivery.Header{Name: "webhook-allowed-origin", Value: "*"}) {
		t.Errorf("agreed: %+v, %v", got, err)
	}
	got, err = ask("mem://receiver", map[string]any{"ask": true, "refuse": true})
	if err != nil || got.Outcome == delivery.OutcomeSucceeded || got.ResponseCode != 405 || len(got.ResponseHeaders) != 1 {
		t.Errorf("refused: %+v, %v", got, err)
	}
	got, err = ask("mem://receiver", nil)
	if err != nil || got.Outcome != delivery.OutcomeSucceeded {
		t.Errorf("not asked: %+v, %v", got, err)
	}
	got, err = ask("mem://receiver", map[string]any{"die": true})
	if err != nil || got.Outcome != delivery.OutcomePluginError {
		t.Errorf("panic: %+v, %v", got, err)
	}
	if got, err = ask("mute://receiver", nil); got != nil || err != nil {
		t.Errorf("a transport without the check: %+v, %v", got, err)
	}
	if _, err = ask("pigeon://loft", nil); !errors.Is(err, ErrUnknownPlugin) {
		t.Errorf("no transport: %v", err)
	}
	if n := f.metrics.open.Load(); n != 0 {
		t.Errorf("%d attempts are open", n)
	}
	f.stop()
	if _, err = ask("mem://receiver", nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after the stop: %v", err)
	}
}

func TestHostHoldsSignersApart(t *testing.T) {
	p := &pending{plan: &plan{remote: []hop{{id: "one"}, {id: "two"}}}}
	if why := p.addSigned([]*pluginv1.Header{{Name: "X-One", Value: "1"}, {Name: "x-one", Value: "2"}}); why != "" {
		t.Errorf("two values of one signer: %s", why)
	}
	p.stage++
	why := p.addSigned([]*pluginv1.Header{{Name: "x-two"}, {Name: "X-ONE", Value: "3"}})
	if want := "signer plugins/two set the header x-one, which signer plugins/one before it has set"; why != want {
		t.Errorf("got %q, want %q", why, want)
	}
}
