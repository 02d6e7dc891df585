package redact_test

import (
	"strings"
	"testing"

	"github.com/grapnel/grapnel/internal/redact"
)

const pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\nabc\n-----END PRIVATE KEY-----\n-----BEGIN CERTIFICATE-----\n" +
	"MIIBhTCCASugAwIBAgIQIRi6zePL\n-----END CERTIFICATE-----\nand-this-is-behind-it\n"

func TestClean(t *testing.T) {
	values := [][]byte{[]byte("canary-key"), []byte("whsec_MfKQ9r8GKYqrTw"), []byte("short"), []byte(pem), []byte("-key-and-more")}
	for text, want := range map[string]string{
		"":                       "",
		"nothing":                "nothing",
		"with canary-key inside": "with [redacted] inside",
		"canary-keycanary-key":   "[redacted]",
		"whsec_MfKQ9r8GKYqrTw":   "[redacted]",
		"or MfKQ9r8GKYqrTw, twice MfKQ9r8GKYqrTw": "or [redacted], twice [redacted]",
		"a short word":                           "a short word",
		"canary-key-and-more.":                   "[redacted].",
		"cut off at canary-k":                    "cut off at [redacted]",
		"not cut off at canary-k, this":          "not cut off at canary-k, this",
		"line MC4CAQAwBQYDK2VwBCIEIJ\\n of it":   "line [redacted]\\n of it",
		"MIIBhTCCASugAwIBAgIQIRi6zePL is public": "MIIBhTCCASugAwIBAgIQIRi6zePL is public",
		"and-this-is-behind-it":                  "[redacted]",
		"-----BEGIN PRIVATE KEY----- or abc":     "-----BEGIN PRIVATE KEY----- or abc",
	} {
		if got := redact.Text(text, values); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestSetForgets(t *testing.T) {
	var s redact.Set
	s.Add("tok_canary-one")
	s.Add("tok_canary-one")
	s.Add("tok_canary-two")
	s.Remove("tok_canary-one")
	if got := s.Clean("canary-one canary-two"); got != "[redacted] [redacted]" {
		t.Errorf("one of two uses is left: %q", got)
	}
	s.Remove("tok_canary-one")
	if got := s.Clean("canary-one canary-two"); got != "canary-one [redacted]" {
		t.Errorf("none is left: %q", got)
	}
}

func FuzzClean(f *testing.F) {
	f.Add("some text canary-key", "canary-key")
	f.Fuzz(func(t *testing.T, text, value string) {
		if len(value) < 6 || strings.Contains(redact.Mark, value) {
			return
		}
		got := redact.Text(text, [][]byte{[]byte(value)})
		if strings.Contains(strings.ReplaceAll(got, redact.Mark, "\x00"), value) && !strings.Contains(value, "\x00") {
			t.Errorf("%q is left in %q", value, got)
		}
	})
}

// TestKeyAndItsCertificate: a line of an RSA key may be one of its certificate as well, which is public.
func TestKeyAndItsCertificate(t *testing.T) {
	const both = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQ"
	const key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\n" + both + "\nAQEFAASCBKcwggSjAgEAAoIB\n-----END PRIVATE KEY-----\n"
	const certificate = "-----BEGIN CERTIFICATE-----\nMIIBhTCCASugAwIBAgIQIRi6\n" + both + "\n-----END CERTIFICATE-----\n"
	for _, value := range []string{certificate + key, key + certificate} {
		if got := redact.Text(certificate+"\nand more", [][]byte{[]byte(value)}); got != certificate+"\nand more" {
			t.Errorf("%q", got)
		}
		if got := redact.Text("AQEFAASCBKcwggSjAgEAAoIB, "+both, [][]byte{[]byte(value)}); got != redact.Mark+", "+both {
			t.Errorf("%q", got)
		}
	}
	if got := redact.Text(both, [][]byte{[]byte(key)}); got != redact.Mark {
		t.Errorf("without the certificate: %q", got)
	}
}
