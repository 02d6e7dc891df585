package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestSigner(t *testing.T) {
	h := plugintest.New(t, Signer())
	inst := h.Configure(plugintest.Instance{Kind: "example-signer", Secrets: map[string][]string{"key": {"key", "old key"}}})
	got, err := inst.Sign(plugin.Request{MessageID: "evt_1", Body: []byte("The quick brown fox jumps over the lazy dog")})
	if err != nil {
		t.Fatal(err)
	}
	const want = "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
	if v := got.Get("x-example-signature"); v != want {
		t.Errorf("x-example-signature %q, want %q", v, want)
	}
}

func TestSpool(t *testing.T) {
	dir := t.TempDir()
	h := plugintest.New(t, Signer(), Spool())
	signer := h.Configure(plugintest.Instance{Kind: "example-signer", Secrets: map[string][]string{"key": {"key"}}})
	spool := h.Configure(plugintest.Instance{
		Kind: "file-spool", Config: map[string]string{"dir": dir}, Target: plugin.Target{URL: "file-spool:///orders"},
	})
	for range 2 {
		resp, err := spool.Attempt(t.Context(), plugin.Request{MessageID: "../evt_1", Body: []byte(`{"n":1}`)}, signer)
		if err != nil || resp.Status != 201 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("spool holds %v, %v; want one file", files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	var got plugin.Request
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if string(got.Body) != `{"n":1}` || got.URL != "file-spool:///orders" || got.Get("x-example-signature") == "" {
		t.Errorf("spooled %+v", got)
	}
	if _, problems := h.TryConfigure(plugintest.Instance{Kind: "file-spool"}); len(problems) == 0 {
		t.Error("an instance without a folder is taken")
	}
	missing := h.Configure(plugintest.Instance{Kind: "file-spool", Config: map[string]string{"dir": filepath.Join(dir, "missing")}})
	if _, err := missing.Attempt(t.Context(), plugin.Request{MessageID: "evt_2"}); err == nil {
		t.Error("a folder that is not there takes a request")
	}
}
