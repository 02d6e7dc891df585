package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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

func TestPseudonym(t *testing.T) {
	in := plugintest.New(t, Pseudonym()).Configure(plugintest.Instance{
		Kind: "example-pseudonym", Config: map[string]any{"fields": []string{"email"}}, Secrets: map[string][]string{"key": {"key"}},
	})
	made, err := in.Transform(t.Context(), plugin.Event{Data: []byte(`{"id":9007199254740993,"to":[{"email":"ada@example.com","name":"Ada"}],"from":{"email":"ada@example.com"}}`)})
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, []byte("key"))
	mac.Write([]byte(`"ada@example.com"`))
	ada := hex.EncodeToString(mac.Sum(nil))[:32]
	want := `{"from":{"email":"` + ada + `"},"id":9007199254740993,"to":[{"email":"` + ada + `","name":"Ada"}]}`
	if string(made.Body) != want {
		t.Errorf("%s, want %s", made.Body, want)
	}
	if _, err := in.Transform(t.Context(), plugin.Event{Data: []byte("null")}); err == nil || err.Error() != "dropped: the payload is null" {
		t.Errorf("%v, want it dropped", err)
	}
	if _, err := in.Transform(t.Context(), plugin.Event{Data: []byte("email=ada")}); err == nil || !strings.Contains(err.Error(), "not JSON") {
		t.Errorf("%v, want it to fail", err)
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

// TestZoom plays receivers that answer the validation rightly, wrongly, and not at all.
func TestZoom(t *testing.T) {
	const token = "zoom-token-of-a-test"
	sign := func(text string) string {
		m := hmac.New(sha256.New, []byte(token))
		m.Write([]byte(text))
		return hex.EncodeToString(m.Sum(nil))
	}
	var answer func(w http.ResponseWriter, plain string)
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if string(body) == "delivery" {
			w.WriteHeader(http.StatusAccepted)
			return
		}
		var got validation
		signed := r.Header.Get("x-zm-signature") == "v0="+sign("v0:"+r.Header.Get("x-zm-request-timestamp")+":"+string(body))
		if err := json.Unmarshal(body, &got); err != nil || !signed || got.Event != "endpoint.url_validation" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		answer(w, got.Payload["plainToken"])
	}))
	defer receiver.Close()
	in := plugintest.New(t, Zoom()).Configure(plugintest.Instance{
		Kind: "example-zoom", Config: map[string]any{"method": "PUT"}, Secrets: map[string][]string{"zoom_token": {token}},
		Target: plugin.Target{URL: "zoom+" + receiver.URL + "/hook", Egress: plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")})},
	})
	ask := func(how func(http.ResponseWriter, string)) (*plugin.Response, error) {
		answer = how
		return in.Attempt(t.Context(), plugin.Request{OwnershipCheck: true, Created: time.Unix(1_700_000_000, 0)})
	}
	resp, err := ask(func(w http.ResponseWriter, plain string) {
		_ = json.NewEncoder(w).Encode(map[string]string{"plainToken": plain, "encryptedToken": sign(plain)})
	})
	if err != nil || resp.Status != http.StatusOK {
		t.Errorf("a receiver that answers rightly: %v, %v", resp, err)
	}
	if resp, err = ask(func(w http.ResponseWriter, plain string) {
		_ = json.NewEncoder(w).Encode(map[string]string{"plainToken": plain, "encryptedToken": plain})
	}); err == nil || !strings.Contains(err.Error(), "ownership: ") {
		t.Errorf("a receiver that does not know the token: %v, %v", resp, err)
	}
	if resp, err = ask(func(w http.ResponseWriter, _ string) { w.WriteHeader(http.StatusNotFound) }); err != nil || resp.Status != http.StatusNotFound {
		t.Errorf("a receiver that wants nothing: %v, %v", resp, err)
	}
	if resp, err = in.Attempt(t.Context(), plugin.Request{MessageID: "evt_1", Body: []byte("delivery")}); err != nil || resp.Status != http.StatusAccepted {
		t.Errorf("a delivery: %v, %v", resp, err)
	}
}

// TestZoomTakesTheSettingsOfHTTP: what is wrong with either is told in one answer, and nothing is lost on the way.
func TestZoomTakesTheSettingsOfHTTP(t *testing.T) {
	h := plugintest.New(t, Zoom())
	_, problems := h.TryConfigure(plugintest.Instance{
		Kind: "example-zoom", Config: map[string]any{"method": "GET", "metod": "PUT"}, Target: plugin.Target{URL: "zoom+https://example.com/"},
	})
	var pointers []string
	for _, p := range problems {
		pointers = append(pointers, p.Pointer)
	}
	slices.Sort(pointers)
	if !slices.Equal(pointers, []string{"/config/method", "/config/metod", "/secrets/zoom_token"}) {
		t.Errorf("%+v", problems)
	}
	if k := h.Kind("example-zoom"); !strings.Contains(k.GetConfigSchema(), "tls_timeout") || len(k.GetSecretSlots()) < 2 {
		t.Errorf("%v", k)
	}
}
