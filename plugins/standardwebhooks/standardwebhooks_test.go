package standardwebhooks_test

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	official "github.com/standard-webhooks/standard-webhooks/libraries/go"
	svix "github.com/svix/svix-webhooks/go"

	"github.com/grapnel/grapnel/plugins/standardwebhooks"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
	"github.com/grapnel/grapnel/sdk/webhook"
)

// The vectors of the specification.
const (
	vectorSecret  = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	vectorPrivate = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
	vectorPublic  = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="
	vectorHMAC    = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	vectorEd25519 = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
	otherSecret   = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
)

func vectorRequest() plugin.Request {
	const id = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	return plugin.Request{
		MessageID: id, Created: time.Unix(1614265330, 987_654_321), Body: []byte(`{"test": 2432232314}`),
		Headers: []plugin.Header{{Name: "webhook-id", Value: id}},
	}
}

func configure(t testing.TB, keys ...string) *plugintest.Configured {
	t.Helper()
	h := plugintest.New(t, standardwebhooks.Kind())
	return h.Configure(plugintest.Instance{Kind: "standard-webhooks", Secrets: map[string][]string{"key": keys}})
}

func sign(t testing.TB, inst *plugintest.Configured, r plugin.Request) http.Header {
	t.Helper()
	signed, err := inst.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{}
	for _, h := range signed.Headers {
		header.Add(h.Name, h.Value)
	}
	return header
}

func TestVectors(t *testing.T) {
	seed := "whsk_" + base64.StdEncoding.EncodeToString(vectorSeed(t))
	tests := []struct {
		name string
		keys []string
		want string
	}{
		{"v1", []string{vectorSecret}, vectorHMAC},
		{"v1a", []string{vectorPrivate}, vectorEd25519},
		{"v1a from the seed alone", []string{seed}, vectorEd25519},
		{"unpadded", []string{strings.TrimRight(vectorPrivate, "=")}, vectorEd25519},
		{"both, newest first", []string{vectorPrivate, vectorSecret}, vectorEd25519 + " " + vectorHMAC},
		{"two of a kind", []string{vectorSecret, vectorSecret}, vectorHMAC + " " + vectorHMAC},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			header := sign(t, configure(t, tt.keys...), vectorRequest())
			if got := header.Values("webhook-signature"); len(got) != 1 || got[0] != tt.want {
				t.Errorf("webhook-signature %q, want %q", got, tt.want)
			}
			if got := header.Values("webhook-timestamp"); len(got) != 1 || got[0] != "1614265330" {
				t.Errorf("webhook-timestamp %q", got)
			}
			if got := header.Values("webhook-id"); len(got) != 1 || got[0] != vectorRequest().MessageID {
				t.Errorf("webhook-id %q", got)
			}
		})
	}
}

func vectorSeed(t *testing.T) []byte {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(vectorPrivate, "whsk_"))
	if err != nil {
		t.Fatal(err)
	}
	return raw[:ed25519.SeedSize]
}

func TestOfficialVerifiersAccept(t *testing.T) {
	now := time.Now()
	bodies := map[string][]byte{
		"json": []byte(`{"n":1}`), "empty": {}, "binary": {0, 0xff, '\r', '\n', '.'}, "large": bytes.Repeat([]byte("x"), 1<<20),
	}
	for name, keys := range map[string][]string{
		"one key": {vectorSecret}, "old key still live": {otherSecret, vectorSecret}, "new key": {vectorSecret, otherSecret},
		"beside ed25519": {vectorPrivate, vectorSecret},
	} {
		t.Run(name, func(t *testing.T) {
			inst := configure(t, keys...)
			for kind, body := range bodies {
				r := plugin.Request{MessageID: "evt0123", Created: now, Body: body}
				header := sign(t, inst, r)
				wh, err := official.NewWebhook(vectorSecret)
				if err != nil {
					t.Fatal(err)
				}
				if err := wh.Verify(body, header); err != nil {
					t.Errorf("standard-webhooks, %s: %v", kind, err)
				}
				sv, err := svix.NewWebhook(vectorSecret)
				if err != nil {
					t.Fatal(err)
				}
				if err := sv.Verify(body, header); err != nil {
					t.Errorf("svix, %s: %v", kind, err)
				}
				for _, key := range []string{vectorSecret, vectorPublic} {
					if key == vectorPublic && name != "beside ed25519" {
						continue
					}
					v, err := webhook.NewVerifier(key)
					if err != nil {
						t.Fatal(err)
					}
					if err := v.Verify(header, body); err != nil {
						t.Errorf("sdk/webhook with %s, %s: %v", key[:5], kind, err)
					}
				}
			}
		})
	}
}

// TestSvix looks for the same bytes under Svix's names, and has Svix's own library verify them.
func TestSvix(t *testing.T) {
	h := plugintest.New(t, standardwebhooks.Kinds()...)
	inst := h.Configure(plugintest.Instance{Kind: "svix", Secrets: map[string][]string{"key": {vectorPrivate, vectorSecret}}})
	header := sign(t, inst, vectorRequest())
	for name, want := range map[string]string{
		"svix-id": vectorRequest().MessageID, "svix-timestamp": "1614265330", "svix-signature": vectorEd25519 + " " + vectorHMAC,
		"webhook-signature": "", "webhook-timestamp": "",
	} {
		if got := header.Get(name); got != want {
			t.Errorf("%s %q, want %q", name, got, want)
		}
	}
	now := plugin.Request{MessageID: "evt0123", Created: time.Now(), Body: []byte("{}")}
	verifier, err := svix.NewWebhook(vectorSecret)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifier.Verify(now.Body, sign(t, inst, now)); err != nil {
		t.Error(err)
	}
}

func TestSignerIsPureAndConcurrent(t *testing.T) {
	inst := configure(t, vectorSecret, vectorPrivate)
	want := sign(t, inst, vectorRequest()).Get("webhook-signature")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				other := vectorRequest()
				other.MessageID, other.Headers = "msg_"+strconv.Itoa(i), nil
				if _, err := inst.Sign(other); err != nil {
					t.Error(err)
					return
				}
				signed, err := inst.Sign(vectorRequest())
				if err != nil {
					t.Error(err)
					return
				}
				if got := signed.Get("webhook-signature"); got != want {
					t.Errorf("webhook-signature %q, want %q", got, want)
				}
			}
		})
	}
	wg.Wait()
}

func TestMalformedKeysAreRefusedWithoutShowingThem(t *testing.T) {
	h := plugintest.New(t, standardwebhooks.Kind())
	encode := func(n int) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa7}, n)) }
	swapped := append(vectorSeed(t), make([]byte, 32)...)
	tests := []struct{ name, key, hint string }{
		{"no prefix", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_"},
		{"other prefix", "sk_live_MfKQ9r8GKYqrTwjU", "whsec_"},
		{"public key", vectorPublic, "whpk_"},
		{"line break", vectorSecret + "\n", "line break"},
		{"url base64", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLa-_", "URL alphabet"},
		{"hex", "whsec_" + strings.Repeat("a1b2", 16), "hex"},
		{"garbage", "whsec_!!!!MfKQ9r8GKYqrTwjUPD8ILPZIo2", "base64"},
		{"empty value", "whsec_", "24 to 64 bytes"},
		{"short", "whsec_" + encode(23), "this one is 23"},
		{"long", "whsec_" + encode(65), "this one is 65"},
		{"short ed25519", "whsk_" + encode(31), "this one is 31"},
		{"halves of two keys", "whsk_" + base64.StdEncoding.EncodeToString(swapped), "public half"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			problems := h.Validate(plugintest.Instance{
				Kind: "standard-webhooks", Secrets: map[string][]string{"key": {vectorSecret, tt.key}},
			})
			if len(problems) != 1 || problems[0].Pointer != "/secrets/key" || problems[0].Warning {
				t.Fatalf("problems %+v, want one error at /secrets/key", problems)
			}
			text := problems[0].Summary
			if !strings.Contains(text, tt.hint) || !strings.Contains(text, "version 2 of 2") {
				t.Errorf("summary %q, want it to say %q and which version", text, tt.hint)
			}
			if _, value, _ := strings.Cut(tt.key, "_"); len(value) > 8 && strings.Contains(text, value[:8]) {
				t.Errorf("summary %q shows the key", text)
			}
		})
	}
	if problems := h.Validate(plugintest.Instance{Kind: "standard-webhooks", Secrets: map[string][]string{"key": {vectorSecret, vectorPrivate}}}); len(problems) > 0 {
		t.Errorf("good keys: %+v", problems)
	}
}
