package hmacplugin

import (
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// FuzzTemplate holds the parser to its promises: it never panics, what it takes renders, and quoted text
// renders as itself.
func FuzzTemplate(f *testing.F) {
	for _, s := range []string{"", "{id}.{timestamp}.{body}", "{{}}", "{", "}", "{{{id}}}", "{header:X-A}", "{header:}", "{}", "{id", "a}b", "{type}{url}{nonce}"} {
		f.Add(s)
	}
	r := &plugin.Request{
		MessageID: "msg", Created: time.Unix(1700000000, 0), Body: []byte("b"), URL: "https://h/p?q", Method: "POST",
		EventType: "t",
	}
	f.Fuzz(func(t *testing.T, text string) {
		v := &values{request: r, timestamp: []byte("1700000000")}
		if parsed, err := parse(text); err == nil {
			a, errA := parsed.text(nil, v)
			b, errB := parsed.append(nil, v)
			if (errA == nil) != (errB == nil) || errA == nil && a != string(b) {
				t.Errorf("%q renders as %q, %v and as %q, %v", text, a, errA, b, errB)
			}
		} else if !strings.Contains(err.Error(), "character") && !strings.Contains(err.Error(), "header name") {
			t.Errorf("%q: %v does not say where", text, err)
		}
		parsed, err := parse(quote(text))
		if err != nil {
			t.Fatalf("quoted %q: %v", text, err)
		}
		if got, err := parsed.text(nil, v); err != nil || got != text {
			t.Errorf("quoted %q renders as %q, %v", text, got, err)
		}
	})
}

func BenchmarkSign(b *testing.B) {
	body := make([]byte, 1024)
	for name, s := range map[string]scheme{
		"stripe": {algorithm: "sha256", content: "{timestamp}.{body}", each: "v1={signature}", join: ",",
			headers: []header{{name: "stripe-signature", value: "t={timestamp},{signatures}"}}},
		"github": {algorithm: "sha256", content: "{body}", headers: []header{
			{name: "x-github-event", value: "{type}"}, {name: "x-github-delivery", value: "{id}"}, {name: "x-hub-signature-256", value: "sha256={signature}"}}},
	} {
		b.Run(name, func(b *testing.B) {
			c, faults := compile(s, [][]byte{[]byte("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")}, false)
			if len(faults) > 0 {
				b.Fatal(faults)
			}
			headers := append(make([]plugin.Header, 0, 8), plugin.Header{Name: "content-type", Value: "application/json"})
			b.ReportAllocs()
			for b.Loop() {
				r := plugin.Request{MessageID: "evt_0123456789abcdef", EventType: "order.created", Created: time.Unix(1614265330, 0), Body: body, Headers: headers[:1]}
				if err := c.sign(&r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
