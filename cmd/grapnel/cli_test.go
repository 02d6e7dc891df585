package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/sdk/client"
)

func TestTarget(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:7070": "127.0.0.1:7070", "localhost": "localhost:7070", "grapnel.example.com": "grapnel.example.com:7070",
		"::1": "[::1]:7070", "[::1]": "[::1]:7070", "[::1]:80": "[::1]:80", "fe80::1%eth0": "[fe80::1%eth0]:7070",
		"dns:///grapnel.internal:7070": "dns:///grapnel.internal:7070", "unix:/run/grapnel": "unix:/run/grapnel",
	} {
		if got, err := target(addr); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", addr, got, err, want)
		}
	}
	for _, addr := range []string{"", ":7070", "a:b", "a:0", "a:65536", "a:1:2", "http://a", "a b", "a/b", "u@a:1", "\x1b[2J", "a\n:1"} {
		if got, err := target(addr); err == nil || !strings.Contains(err.Error(), "host:port") {
			t.Errorf("%q: %q, %v, want that host:port is wanted", addr, got, err)
		}
	}
}

// TestTimeoutIsTheOnlyLimit: --timeout says how long a call may take, so no call has a limit of its own that a person cannot
// see; how calls are repeated stays.
func TestTimeoutIsTheOnlyLimit(t *testing.T) {
	text := withoutTimeouts(client.ServiceConfig())
	if strings.Contains(text, "timeout") || !strings.Contains(text, "retryPolicy") || !json.Valid([]byte(text)) {
		t.Errorf("service config: %s", text)
	}
}

func TestTemplates(t *testing.T) {
	object := []byte(`{"name":"n","big":"9007199254740993","number":9007199254740993,"list":["a","b"],"deep":{"x":true,"a b":1},"none":null}`)
	for text, want := range map[string]string{
		".name": "n", "name": "n", "$.name": "n", "{.name}": "n", "{.name}/{.list[1]}": "n/b", "{.list[*]}": "a b", "{.list}": `["a","b"]`,
		"{.number}": "9007199254740993", `{.name}{"\t"}{.deep.x}`: "n\ttrue", "{.deep['a b']}": "1", "{.absent}": "", "{.none}": "null",
		`{'}'}{.name}`: "}n", "x": "", "a {.name} z": "a n z", `{.list[?@ == "b"]}`: "b",
	} {
		parsed, err := parseTemplate(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := parsed.apply(object); err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", text, got, err, want)
		}
	}
	for _, text := range []string{"{.name", "{range .list}", "{end}", "{.a[}", "{..}", `{"\q"}`} {
		if _, err := parseTemplate(text); err == nil {
			t.Errorf("%s is taken", text)
		}
	}
}

// TestClosest: a suggestion is a word that was meant, and not any word.
func TestClosest(t *testing.T) {
	known := []string{"stripe", "github", "hmac", "jws", "jwt", "orders-key"}
	for word, want := range map[string]string{
		"stripee": "stripe", "strpe": "stripe", "Stripe": "stripe", "orders_key": "orders-key", "hamc": "hmac", "nothing": "", "x": "", "": "", "jwz": "jws",
	} {
		if got := closest(word, known); got != want {
			t.Errorf("%q: %q, want %q", word, got, want)
		}
	}
}
