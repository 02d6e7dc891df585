package plugin_test

import (
	"context"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

type baseConfig struct {
	Size int           `json:"size" required:"true" minimum:"1"`
	Cert plugin.Secret `slot:"cert"`
}

type wrapConfig struct {
	Word string        `json:"word" default:"hello"`
	Key  plugin.Secret `slot:"key" required:"true"`
}

func wrapped(seen *[]plugin.Request, ended *[]string) plugin.Kind {
	base := plugin.Transport("base", func(c baseConfig, t plugin.Target) (plugin.AttemptFunc, error) {
		t.OnClose(func(context.Context) { *ended = append(*ended, "base of "+t.URL) })
		return func(_ context.Context, r *plugin.Request) (*plugin.Response, error) {
			*seen = append(*seen, *r)
			r.Set("x-base", "added")
			return &plugin.Response{Status: 500 + c.Size, Body: c.Cert.Values()[0]}, nil
		}, nil
	}, plugin.Schemes("base", "bases"), plugin.Emits("x-base"), plugin.MaxBody(1000), plugin.Doc("the base"), plugin.Example(map[string]any{"size": 3}))
	return plugin.Wrap("wrap", base, func(c wrapConfig, t plugin.Target, send plugin.AttemptFunc) (plugin.AttemptFunc, error) {
		t.OnClose(func(context.Context) { *ended = append(*ended, "wrapper of "+t.URL) })
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			r.Set("x-word", c.Word+string(c.Key.Values()[0]))
			resp, err := send(ctx, r)
			if err == nil {
				resp.Headers = append(resp.Headers, plugin.Header{Name: "x-url", Value: r.URL})
			}
			return resp, err
		}, nil
	}, plugin.Schemes("wrap+bases"), plugin.Emits("x-word"), plugin.Example(wrapConfig{Word: "w"}))
}

func TestWrapPartsSettingsAndSecrets(t *testing.T) {
	var seen []plugin.Request
	var ended []string
	t.Run("", func(t *testing.T) {
		h := plugintest.New(t, wrapped(&seen, &ended))
		in := h.Configure(plugintest.Instance{
			Kind: "wrap", Config: map[string]any{"size": 4}, Secrets: map[string][]string{"key": {"-key"}, "cert": {"certificate"}},
			Target: plugin.Target{URL: "wrap+bases://host/path"},
		})
		resp, err := in.Attempt(t.Context(), plugin.Request{MessageID: "m"})
		if err != nil || resp.Status != 504 || string(resp.Body) != "certificate" || resp.Headers[0].Value != "wrap+bases://host/path" {
			t.Errorf("%+v, %v", resp, err)
		}
		k := h.Kind("wrap")
		if tr := k.GetTransport(); strings.Join(tr.GetMayAddHeaders(), " ") != "x-base x-word" || strings.Join(tr.GetUriSchemes(), " ") != "wrap+bases" || tr.GetMaxBodyBytes() != 1000 {
			t.Errorf("%v", tr)
		}
		if k.GetConfigExample() != `{"size":3,"word":"w"}` || k.GetDescription() != "the base" || len(k.GetSecretSlots()) != 2 {
			t.Errorf("%v", k)
		}
	})
	if len(seen) != 1 || seen[0].URL != "bases://host/path" || seen[0].Get("x-word") != "hello-key" {
		t.Errorf("%+v", seen)
	}
	if strings.Join(ended, ", ") != "wrapper of wrap+bases://host/path, base of bases://host/path" {
		t.Errorf("closed: %v", ended)
	}
}

func TestWrapTellsAllThatIsWrong(t *testing.T) {
	h := plugintest.New(t, wrapped(new([]plugin.Request), new([]string)))
	_, problems := h.TryConfigure(plugintest.Instance{
		Kind: "wrap", Config: map[string]any{"size": 0, "word": 7, "other": true}, Secrets: map[string][]string{"other": {"x"}},
	})
	got := map[string]string{}
	for _, p := range problems {
		got[p.Pointer] = p.Code
	}
	for pointer, code := range map[string]string{
		"/config/size": "config.range", "/config/word": "config.type", "/config/other": "config.unknown_field",
		"/secrets/key": "secret.missing", "/secrets/other": "secret.unknown_slot",
	} {
		if got[pointer] != code {
			t.Errorf("%s: %q, want %q", pointer, got[pointer], code)
		}
	}
	if len(problems) != 5 {
		t.Errorf("%+v", problems)
	}
	if problems := h.Validate(plugintest.Instance{Kind: "wrap", Config: []int{1}}); len(problems) != 1 || problems[0].Code != "config.type" {
		t.Errorf("an array: %+v", problems)
	}
	if problems := h.Validate(plugintest.Instance{Kind: "wrap", Config: map[string]any{"size": 1}}); len(problems) != 0 {
		t.Errorf("without secrets: %+v", problems)
	}
}

func TestWrapRefusesNamesThatMeet(t *testing.T) {
	base := plugin.Transport("base", func(baseConfig, plugin.Target) (plugin.AttemptFunc, error) { return nil, nil })
	wrap := func(c baseConfig, _ plugin.Target, send plugin.AttemptFunc) (plugin.AttemptFunc, error) {
		return send, nil
	}
	signer := plugin.Signer("signer", func(struct{}, plugin.Target) (plugin.SignFunc, error) { return nil, nil })
	for want, kind := range map[string]plugin.Kind{
		`setting "size" is one of "base", too`:        plugin.Wrap("wrap", base, wrap),
		`takes a transport, and "signer" is a signer`: plugin.Wrap("wrap", signer, wrap),
	} {
		if _, _, err := plugin.NewGRPCServer("p", "1.0.0", kind); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}
