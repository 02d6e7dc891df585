package outbound_test

import (
	"testing"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
)

// TestEcho: a secret is taken out of what a receiver says however its language escapes texts.
func TestEcho(t *testing.T) {
	values := []string{`ab/c+d&e"f\g==`, "plain-canary", "short"}
	for text, want := range map[string]string{
		"":                            "",
		"nothing, short":              "nothing, short",
		`is plain-canary.`:            "is [redacted].",
		`ab/c+d&e"f\g== plain-canary`: "[redacted] [redacted]",
		`{"php":"ab\/c+d&e\"f\\g=="}`: `{"php":"[redacted]"}`,
		`ab/c\u002bd\u0026e\u0022f\\g\u003d\u003D.`: "[redacted].", // Gson, System.Text.Json
		`ab%2fc%2bd%26e%22f%5cg%3d%3d`:              "[redacted]",  // Java, .NET
		`ab%2Fc%2Bd%26e%22f%5Cg==`:                  "[redacted]",
		`ab&#x2F;c&#43;d&amp;e&quot;f\g==`:          "[redacted]",
		`{\"in\":\"ab\\\/c+d&e\\\"f\\g==\"`:         `{\"in\":\"[redacted]\"`,
		`ab\/c+d%26 another`:                        `ab\/c+d%26 another`,
		`%70%6Cain-canary`:                          "[redacted]",
		`plain-can`:                                 "plain-can",
		`%`:                                         "%",
		`\`:                                         `\`,
		`&`:                                         "&",
	} {
		if got := outbound.Echo(text, values, false); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	for text, want := range map[string]string{
		`it is plain-can`:     "it is [redacted]",
		`it is pla`:           "it is pla",
		`it is ab\/c+d&e\`:    "it is [redacted]",
		`it is ab\/c+d\u00`:   "it is [redacted]",
		`it is ab%2fc%2bd%26`: "it is [redacted]",
		`it is ab/c+d&am`:     "it is [redacted]",
	} {
		if got := outbound.Echo(text, values, true); got != want {
			t.Errorf("cut off, %s: %s, want %s", text, got, want)
		}
	}
}
