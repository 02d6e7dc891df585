package httpsignature

import (
	"bytes"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

func BenchmarkSign(b *testing.B) {
	for _, algorithm := range []string{hmacSHA256, "ed25519", "ecdsa-p256-sha256"} {
		b.Run(algorithm, func(b *testing.B) {
			value, err := generate(algorithm)
			if err != nil {
				b.Fatal(err)
			}
			target := plugin.Target{URL: "https://example.com/hook?a=1"}
			sign, err := build(Config{
				Algorithm: "auto", Label: "sig1", Tag: "webhook", Alg: true, Digest: "sha-256", Key: plugin.NewSecret(string(value)),
				Components: []string{"@method", "@target-uri", "content-digest", "content-type", "webhook-id"},
			}, target)
			if err != nil {
				b.Fatal(err)
			}
			body, headers := bytes.Repeat([]byte("x"), 1024), make([]plugin.Header, 0, 8)
			b.ReportAllocs()
			for b.Loop() {
				r := plugin.Request{MessageID: "evt0123", Created: time.Unix(1700000000, 0), Method: "POST", URL: target.URL, Body: body}
				r.Headers = append(headers, plugin.Header{Name: "content-type", Value: "application/json"}, plugin.Header{Name: "webhook-id", Value: "evt0123"})
				if err := sign(&r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
