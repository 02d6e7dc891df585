package twilio_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/twilio"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const (
	token = "0123456789abcdef0123456789abcdef"
	other = "fedcba9876543210fedcba9876543210"
	form  = "application/x-www-form-urlencoded"
	json  = "application/json"
)

func configure(t testing.TB, url, method string, settings map[string]any, tokens ...string) *plugintest.Configured {
	t.Helper()
	in := plugintest.Instance{Kind: "twilio", Secrets: map[string][]string{"key": tokens}, Target: plugin.Target{URL: url, Method: method}}
	if settings != nil {
		in.Config = settings
	}
	return plugintest.New(t, twilio.Kind()).Configure(in)
}

func request(contentType, body string) plugin.Request {
	return plugin.Request{
		MessageID: "msg_1", Created: time.Unix(1700000000, 0), Body: []byte(body),
		Headers: []plugin.Header{{Name: "content-type", Value: contentType}},
	}
}

func signature(key, content string) string {
	mac := hmac.New(sha1.New, []byte(key))
	mac.Write([]byte(content))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// TestVectors are the example of Twilio's documentation, and a value that its npm library computes.
func TestVectors(t *testing.T) {
	tests := []struct{ name, token, url, contentType, body, wantURL, want string }{
		{"form", "12345", "https://mycompany.com/myapp.php?foo=1&bar=2", form + "; charset=utf-8",
			"To=%2B18005551212&Digits=1234&Caller=%2B14158675309&From=%2B14158675309&CallSid=CA1234567890ABCDE", "",
			"RSOYDt4T1cUTdK1PDd93/VVr8B8="},
		{"json", token, "https://example.com/hook?x=%27a%20b&y", json, `{"id":1}`,
			"https://example.com/hook?x=%27a%20b&y&bodySHA256=037c9214eef74cc3887f3a4f085b4e17d76280dafd273b0ee160c09c4ba1cfd4",
			"uAaUCmX4QyRtuq2zV9ArzbgpCDA="},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			signed, err := configure(t, tt.url, "POST", nil, tt.token).Sign(request(tt.contentType, tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if got := signed.Get("x-twilio-signature"); got != tt.want {
				t.Errorf("signature %s, want %s", got, tt.want)
			}
			if signed.URL != tt.wantURL {
				t.Errorf("URL %q, want %q", signed.URL, tt.wantURL)
			}
		})
	}
}

// TestURLs looks at what becomes of the URL when the body's hash goes into its query.
func TestURLs(t *testing.T) {
	sum := sha256.Sum256([]byte("{}"))
	digest := "bodySHA256=" + hex.EncodeToString(sum[:])
	tests := []struct{ url, sent, signed string }{
		{"https://h.example/p", "https://h.example/p?" + digest, ""},
		{"https://h.example/p?", "https://h.example/p?" + digest, ""},
		{"https://h.example/p?a=%7e&b=+&c", "https://h.example/p?a=%7e&b=+&c&" + digest, ""},
		{"https://h.example/p?a&", "https://h.example/p?a&" + digest, ""},
		{"https://h.example", "https://h.example?" + digest, "https://h.example/?" + digest},
		{"https://h.example:443/", "https://h.example:443/?" + digest, ""},
		{"https://[::1]:8443/p", "https://[::1]:8443/p?" + digest, ""},
	}
	for _, tt := range tests {
		signed, err := configure(t, tt.url, "POST", nil, token).Sign(request(json, "{}"))
		if err != nil {
			t.Fatal(err)
		}
		if signed.URL != tt.sent {
			t.Errorf("%s becomes %s, want %s", tt.url, signed.URL, tt.sent)
		}
		content := tt.signed
		if content == "" {
			content = tt.sent
		}
		if got, want := signed.Get("x-twilio-signature"), signature(token, content); got != want {
			t.Errorf("%s: signature %s, want that of %s", tt.url, got, content)
		}
	}
}

func TestForms(t *testing.T) {
	const url = "https://h.example/p"
	tests := []struct{ name, body, content, refused string }{
		{"empty", "", "", ""},
		{"decoded and sorted", "b=1+2&a=%C3%A9%26&c&=x", "xaé&b1 2c", ""},
		{"by key alone", "AB=1&A=z", "AzAB1", ""},
		{"empty fields", "&&a=1&", "a1", ""},
		{"one key, one value, twice", "a=1&b=2&a=1", "a1b2", ""},
		{"one key, two values", "a=1&b=2&a=3", "", `key "a" twice`},
		{"broken escape", "a=1&b=%zz", "", "field 2"},
		{"semicolon", "a=1;b=2", "", "%3B"},
		{"not UTF-8", "a=%ff", "", "not UTF-8"},
	}
	inst := configure(t, url, "POST", nil, token)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			signed, err := inst.Sign(request(form, tt.body))
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("%v, want a refusal that says %q", err, tt.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if signed.URL != "" {
				t.Errorf("a form changed the URL to %s", signed.URL)
			}
			if got := signed.Get("x-twilio-signature"); got != signature(token, url+tt.content) {
				t.Errorf("signature %s, want that of %q", got, url+tt.content)
			}
		})
	}
}

func TestCompressedFormIsRefused(t *testing.T) {
	r := request(form, "a=1")
	r.Headers = append(r.Headers, plugin.Header{Name: "content-encoding", Value: "gzip"})
	if _, err := configure(t, "https://h.example/", "POST", nil, token).Sign(r); err == nil || !strings.Contains(err.Error(), "uncompressed") {
		t.Errorf("%v", err)
	}
}

func TestBodies(t *testing.T) {
	for name, body := range map[string][]byte{
		"empty": {}, "nul": {0}, "not UTF-8": {0xff, 0xfe}, "large": bytes.Repeat([]byte("x"), 1<<20),
	} {
		signed, err := configure(t, "https://h.example/", "POST", nil, token).Sign(request("", string(body)))
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(body)
		if want := "https://h.example/?bodySHA256=" + hex.EncodeToString(sum[:]); signed.URL != want {
			t.Errorf("%s: URL %s, want %s", name, signed.URL, want)
		}
	}
	signed, err := configure(t, "https://h.example/?a", "GET", nil, token).Sign(request("", ""))
	if err != nil {
		t.Fatal(err)
	}
	if got := signed.Get("x-twilio-signature"); signed.URL != "" || got != signature(token, "https://h.example/?a") {
		t.Errorf("GET without a body: URL %q, signature %s", signed.URL, got)
	}
}

func TestOneOfTwoTokensSigns(t *testing.T) {
	const url = "https://h.example/p"
	for with, want := range map[string]string{"newest": token, "oldest": other, "": token} {
		settings := map[string]any{}
		if with != "" {
			settings["sign_with"] = with
		}
		inst := configure(t, url, "POST", settings, token, other)
		for range 3 { // and the same each time
			signed, err := inst.Sign(request(form, "a=1"))
			if err != nil {
				t.Fatal(err)
			}
			if got := signed.Get("x-twilio-signature"); got != signature(want, url+"a1") {
				t.Errorf("sign_with %q: the other token signed", with)
			}
		}
	}
}

func TestConfigErrors(t *testing.T) {
	h := plugintest.New(t, twilio.Kind())
	tests := []struct {
		name, token, url string
		at, says         string
		warning          bool
	}{
		{name: "good", token: token, url: "https://h.example/"},
		{name: "short", token: "12345", at: "/secrets/key", says: "5 characters, want 32", warning: true},
		{name: "line break", token: token + "\n", at: "/secrets/key", says: "line break"},
		{name: "account SID", token: "AC" + token, at: "/secrets/key", says: "account SID"},
		{name: "API key", token: "SK" + token, at: "/secrets/key", says: "API key"},
		{name: "query", token: token, url: "https://h.example/?bodySHA256=1", at: "/target/uri", says: "only the signer may set"},
	}
	for _, tt := range tests {
		problems := h.Validate(plugintest.Instance{
			Kind: "twilio", Secrets: map[string][]string{"key": {tt.token}}, Target: plugin.Target{URL: tt.url},
		})
		if tt.at == "" {
			if len(problems) > 0 {
				t.Errorf("%s: %+v", tt.name, problems)
			}
			continue
		}
		if len(problems) != 1 || problems[0].Pointer != tt.at || problems[0].Warning != tt.warning || !strings.Contains(problems[0].Summary, tt.says) {
			t.Errorf("%s: %+v, want one at %s that says %q", tt.name, problems, tt.at, tt.says)
		} else if strings.Contains(problems[0].Summary, "56789") {
			t.Errorf("%s: %q shows the token", tt.name, problems[0].Summary)
		}
	}
}

func FuzzForm(f *testing.F) {
	for _, s := range []string{"a=1&b=2", "a=%", "&=&", "a=1&a=1", "%00=;"} {
		f.Add(s)
	}
	inst := configure(f, "https://h.example/", "POST", nil, token)
	f.Fuzz(func(t *testing.T, body string) {
		first, err1 := inst.Sign(request(form, body))
		second, err2 := inst.Sign(request(form, body))
		if (err1 == nil) != (err2 == nil) || first.Get("x-twilio-signature") != second.Get("x-twilio-signature") {
			t.Errorf("%q is signed differently each time", body)
		}
	})
}
