package header_test

import (
	"testing"

	"github.com/grapnel/grapnel/internal/header"
)

// TestKey: names that differ in case, or in _ and -, are one, and no others are.
func TestKey(t *testing.T) {
	for name, want := range map[string]string{"": "", "X-Api-Key": "x-api-key", "x_API_key": "x-api-key", "xapikey": "xapikey", "x--a_": "x--a-"} {
		if got := header.Key(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}
