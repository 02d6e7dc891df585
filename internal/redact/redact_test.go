package redact_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/url"
	"strconv"
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

// A library's error may show a secret as it was written into a header, a URL or a log: by itself, or as a part of more.
func TestCleanKnowsEncodings(t *testing.T) {
	const plain = "päss w0rd/+&\"?\n\x00 and more"
	key := []byte("\x01\xfe\xffkey-bytes\x80\x7f0123")
	whsec := "whsec_" + base64.StdEncoding.EncodeToString(key)
	quotedJSON, err := json.Marshal(plain)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"hex":              hex.EncodeToString([]byte(plain)),
		"HEX":              strings.ToUpper(hex.EncodeToString([]byte(plain))),
		"hex of more":      hex.EncodeToString([]byte("x" + plain + "yz")),
		"after a digit":    "0" + hex.EncodeToString([]byte(plain)),
		"query":            url.QueryEscape(plain),
		"path":             url.PathEscape(plain),
		"lower percent":    strings.ToLower(url.QueryEscape(plain)),
		"quoted":           strconv.Quote(plain),
		"quoted to ASCII":  strconv.QuoteToASCII(plain),
		"JSON":             string(quotedJSON),
		"the key":          string(key),
		"the key in hex":   fmt.Sprintf("%x", key),
		"the key, quoted":  fmt.Sprintf("%q", key),
		"the key, url":     base64.RawURLEncoding.EncodeToString(key),
		"whsec in base64":  base64.StdEncoding.EncodeToString([]byte(whsec)),
		"a user's, base64": base64.URLEncoding.EncodeToString([]byte("user:" + plain)),
	} {
		for _, around := range []string{"%s", "Authorization: %s; and more", "\"%s\"", "x=%s&y=1"} {
			text := fmt.Sprintf(strings.ReplaceAll(around, "%s", "%[1]s"), text)
			got := redact.Text(text, [][]byte{[]byte(plain), []byte(whsec)})
			if !strings.Contains(got, redact.Mark) {
				t.Errorf("%s: %q stays %q", name, text, got)
			}
			for i := 0; i+8 <= len(text); i++ { // nothing longer than what neighbours share stays
				if part := text[i : i+8]; strings.Contains(got, part) && strings.Count(text, part) == 1 && i > 20 && i+8 < len(text)-20 && name != "a user's, base64" && name != "hex of more" {
					t.Errorf("%s: %q of %q stays in %q", name, part, text, got)
					break
				}
			}
		}
	}
	for skip := range 3 {
		for tail := range 3 {
			for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
				text := encoding.EncodeToString([]byte(strings.Repeat("u", skip) + "canary-secret" + strings.Repeat("v", tail)))
				if got := redact.Text("got "+text+" here", [][]byte{[]byte("canary-secret")}); len(strings.ReplaceAll(got, redact.Mark, "")) > len("got  here")+8 {
					t.Errorf("%d before and %d behind: %q stays %q", skip, tail, text, got)
				}
			}
		}
	}
	const ordinary = `Post "https://example.com/a%20b?c=d+e": x509: certificate signed by unknown authority "Zm9vYmFyYmF6cXV4cXV1eA==" 0123456789abcdef0123456789abcdef \"q\"`
	if got := redact.Text(ordinary, [][]byte{[]byte(plain), []byte(whsec), []byte("canary-secret")}); got != ordinary {
		t.Errorf("an ordinary text became %q", got)
	}
}

func BenchmarkClean(b *testing.B) {
	var s redact.Set
	s.Add("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	b.ReportAllocs()
	for b.Loop() {
		s.Clean("application/json; charset=utf-8; profile=https://example.com/schema")
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
