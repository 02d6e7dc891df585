package standardwebhooks

import (
	"bytes"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

func BenchmarkSign(b *testing.B) {
	sign, err := build(names{"webhook-id", "webhook-timestamp", "webhook-signature"})(Config{Key: plugin.NewSecret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")}, plugin.Target{})
	if err != nil {
		b.Fatal(err)
	}
	body := bytes.Repeat([]byte("x"), 1024)
	headers := make([]plugin.Header, 0, 8)
	b.ReportAllocs()
	for b.Loop() {
		r := plugin.Request{MessageID: "evt_0123456789abcdef", Created: time.Unix(1614265330, 0), Body: body, Headers: headers[:0]}
		if err := sign(&r); err != nil {
			b.Fatal(err)
		}
	}
}
