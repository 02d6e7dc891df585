package httpsignature_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/httpsignature"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// Keys of RFC 9421 appendix B.1.
const (
	keyRSAPSS = `{"kty":"RSA","e":"AQAB",` +
		`"n":"r4tmm3r20Wd_PbqvP1s2-QEtvpuRaV8Yq40gjUR8y2Rjxa6dpG2GXHbPfvMs8ct-Lh1GH45x28Rw3Ry53mm-oAXjyQ86OnDkZ5N8lYbggD4O3w6M6pAvLkhk95AndTrifbIFPNU8PPMO7OyrFAHqgDsznjPFmTOtCEcN2Z1FpWgchwuYLPL-Wokqltd11nqqzi-bJ9cvSKADYdUAAN5WUtzdpiy6LbTgSxP7ociU4Tn0g5I6aDZJ7A8Lzo0KSyZYoA485mqcO0GVAdVw9lq4aOT9v6d-nb4bnNkQVklLQ3fVAvJm-xdDOp9LCNCN48V2pnDOkFV6-U9nV5oyc6XI2w",` +
		`"d":"lAfIqfpCYomVShfAKnwf2lD9I0wKjkHsCtZCif4kAlwQqqW6N-tIL3bdOR-VWf0Q1ZBIDtpO91UrG7pansyrPERbNrRJlPiYEyPTHkCT1nD-l2isuiyGLNBNnFoKfBgA4KAbPJZQatFIV9Cn34JSHnpN5-2ehreGBYHtkwHFtlmzeF3yu5bqRcqOhx8lkYmBzDAEUFyyXjknU5-WjAT9DzuG0MpOTkcU1EnjnIjyVBZLUB5Lxm8puyq8hH8B_E5LNC-1oc8j-tDy98UvRTTiYvZvs87cGCFxg0LijNhg7CE3g9piNqB6DzMgA9MHSOwcElVtfKdYfo4H3OHZXsSmEQ",` +
		`"p":"5V-6ISI5yEaCFXm-fk1EM2xwAWekePVCAyvr9QbTlFOCZwt9WwjUjhtKRusi5Uq-IYZ_tq2WRE4As4b_FHEMtp2AER43IcvmXPqKFBoUktVDS7dThIHrsnRi1U7dHqVdwiMEMe5jxKNgnsKLpnq-4NyhoS6OeWu1SFozG9J9xQk",` +
		`"q":"w-wIde17W5Y0Cphp3ZZ0uM8OUq1AkrV2IKauqYHaDxAT32EM4ci2MMER2nIUEo4g_42lW0zYouFFqONwv0-HyOsgPpdSqKRC5WLgn0VXabjaNcy6KhNPXeJ0AgtqdiDwPeJ2_L_eKwNWQ43RfdQBUquAwSd7SEmmQ8sViqB628M"}`
	keyP256 = "-----BEGIN EC PRIVATE KEY-----\n" +
		"MHcCAQEEIFKbhfNZfpDsW43+0+JjUr9K+bTeuxopu653+hBaXGA7oAoGCCqGSM49\n" +
		"AwEHoUQDQgAEqIVYZVLCrPZHGHjP17CTW0/+D9Lfw0EkjqF7xB4FivAxzic30tMM\n" +
		"4GF+hR6Dxh71Z50VGGdldkkDXZCnTNnoXQ==\n-----END EC PRIVATE KEY-----\n"
	keyEd25519 = `{"kty":"OKP","crv":"Ed25519","d":"n4Ni-HpISpVObnQMW0wOhCKROaIKqKtW_2ZYb2p9KcU","x":"JrQLj5P_89iXES9-vFgrIy29clF9CC_oPPsw3c5D0bs"}`
	keyShared  = "base64:uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ=="
)

// The message of appendix B.2 and its digest.
const (
	vectorURL    = "https://example.com/foo?param=Value&Pet=dog"
	vectorBody   = `{"hello": "world"}`
	vectorDigest = "sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:"
	vectorTime   = 1618884473
)

func vectorRequest() plugin.Request {
	return plugin.Request{
		MessageID: "evt0123", Created: time.Unix(vectorTime, 987_654_321), Body: []byte(vectorBody), Nonce: []byte("0123456789abcdef"),
		Headers: []plugin.Header{
			{Name: "date", Value: "Tue, 20 Apr 2021 02:07:55 GMT"}, {Name: "content-type", Value: "application/json"},
			{Name: "webhook-id", Value: "evt0123"},
		},
	}
}

// instance configures the kind at the URL of the vectors.
func instance(config map[string]any, values ...string) plugintest.Instance {
	if config == nil {
		config = map[string]any{}
	}
	return plugintest.Instance{
		Kind: "http-signature", Config: config, Secrets: map[string][]string{"key": values},
		Target: plugin.Target{Method: "POST", URL: vectorURL},
	}
}

func sign(t testing.TB, in plugintest.Instance, r plugin.Request) plugin.Request {
	t.Helper()
	signed, err := plugintest.New(t, httpsignature.Kind()).Configure(in).Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// signatures takes both headers apart: the parameters and the signature of each label.
func signatures(t testing.TB, r plugin.Request) (params map[string]string, bytesOf map[string][]byte) {
	t.Helper()
	params, bytesOf = map[string]string{}, map[string][]byte{}
	for part := range strings.SplitSeq(r.Get("signature"), ", ") {
		label, value, _ := strings.Cut(part, "=:")
		raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSuffix(value, ":"))
		if err != nil || !strings.HasSuffix(value, ":") {
			t.Fatalf("signature %q: %v", part, err)
		}
		bytesOf[label] = raw
	}
	input := r.Get("signature-input")
	for part := range strings.SplitSeq(input, ", ") {
		label, value, found := strings.Cut(part, "=")
		if !found || bytesOf[label] == nil {
			t.Fatalf("signature-input %q has no signature for %q", input, label)
		}
		params[label] = value
	}
	return params, bytesOf
}

// accepts is a verifier: does the signature hold for the base, by the public half of the key?
func accepts(t testing.TB, key, scheme, base string, signature []byte) bool {
	t.Helper()
	s256, s384, s512 := sha256.Sum256([]byte(base)), sha512.Sum384([]byte(base)), sha512.Sum512([]byte(base))
	if scheme == "hmac-sha256" {
		secret, err := keys.ParseShared([]byte(key))
		if err != nil {
			t.Fatal(err)
		}
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(base))
		return hmac.Equal(mac.Sum(nil), signature)
	}
	k, err := keys.Parse([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	public := k.Signer().Public()
	half := len(signature) / 2
	switch scheme {
	case "ed25519":
		return ed25519.Verify(public.(ed25519.PublicKey), []byte(base), signature)
	case "ecdsa-p256-sha256", "ecdsa-p384-sha384":
		digest := s256[:]
		if scheme == "ecdsa-p384-sha384" {
			digest = s384[:]
		}
		return ecdsa.Verify(public.(*ecdsa.PublicKey), digest, new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:]))
	case "rsa-v1_5-sha256":
		return rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, s256[:], signature) == nil
	}
	return rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA512, s512[:], signature, &rsa.PSSOptions{SaltLength: 64}) == nil
}

// TestVectors holds appendix B.2: where the scheme is deterministic the very bytes must come out; where it
// is not, the published signature proves the base that is written here, and ours must hold for the same.
func TestVectors(t *testing.T) {
	const b23 = "\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\"@method\": POST\n\"@path\": /foo\n\"@query\": ?param=Value&Pet=dog\n" +
		"\"@authority\": example.com\n\"content-type\": application/json\n\"content-digest\": " + vectorDigest + "\n\"content-length\": 18\n"
	tests := []struct {
		name, key, scheme string
		config            map[string]any
		base, input       string
		published         string
	}{
		{"b22", keyRSAPSS, "rsa-pss-sha512",
			map[string]any{"components": []string{"@authority", "content-digest", `@query-param;name="Pet"`}, "keyid": "test-key-rsa-pss", "tag": "header-example"},
			"\"@authority\": example.com\n\"content-digest\": " + vectorDigest + "\n\"@query-param\";name=\"Pet\": dog\n",
			`("@authority" "content-digest" "@query-param";name="Pet");created=1618884473;keyid="test-key-rsa-pss";tag="header-example"`,
			"LjbtqUbfmvjj5C5kr1Ugj4PmLYvx9wVjZvD9GsTT4F7GrcQEdJzgI9qHxICagShLRiLMlAJjtq6N4CDfKtjvuJyE5qH7KT8UCMkSowOB4+ECxCmT8rtAmj/0PIXxi0A0nxKyB09RNrCQibbUjsLS/2YyFYXEu4TRJQzRw1rLEuEfY17SARYhpTlaqwZVtR8NV7+4UKkjqpcAoFqWFQh62s7Cl+H2fjBSpqfZUJcsIk4N6wiKYd4je2U/lankenQ99PZfB4jY3I5rSV2DSBVkSFsURIjYErOs0tFTQosMTAoxk//0RoKUqiYY8Bh0aaUEb0rQl3/XaVe4bXTugEjHSw=="},
		{"b23", keyRSAPSS, "rsa-pss-sha512",
			map[string]any{"components": []string{"date", "@method", "@path", "@query", "@authority", "content-type", "content-digest", "content-length"}, "keyid": "test-key-rsa-pss"},
			b23,
			`("date" "@method" "@path" "@query" "@authority" "content-type" "content-digest" "content-length");created=1618884473;keyid="test-key-rsa-pss"`,
			"bbN8oArOxYoyylQQUU6QYwrTuaxLwjAC9fbY2F6SVWvh0yBiMIRGOnMYwZ/5MR6fb0Kh1rIRASVxFkeGt683+qRpRRU5p2voTp768ZrCUb38K0fUxN0O0iC59DzYx8DFll5GmydPxSmme9v6ULbMFkl+V5B1TP/yPViV7KsLNmvKiLJH1pFkh/aYA2HXXZzNBXmIkoQoLd7YfW91kE9o/CCoC1xMy7JA1ipwvKvfrs65ldmlu9bpG6A9BmzhuzF8Eim5f8ui9eH8LZH896+QIF61ka39VBrohr9iyMUJpvRX2Zbhl5ZJzSRxpJyoEZAFL2FUo5fTIztsDZKEgM4cUA=="},
		{"b25", keyShared, "hmac-sha256",
			map[string]any{"components": []string{"date", "@authority", "content-type"}, "keyid": "test-shared-secret"},
			"\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\"@authority\": example.com\n\"content-type\": application/json\n",
			`("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"`,
			"pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="},
		{"b26", keyEd25519, "ed25519",
			map[string]any{"components": []string{"date", "@method", "@path", "@authority", "content-type", "content-length"}, "keyid": "test-key-ed25519"},
			"\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\"@method\": POST\n\"@path\": /foo\n\"@authority\": example.com\n\"content-type\": application/json\n\"content-length\": 18\n",
			`("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519"`,
			"wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw=="},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			label := "sig-" + tt.name
			config := map[string]any{"label": label, "tag": "", "alg": false, "digest": "sha-512"}
			for name, value := range tt.config {
				config[name] = value
			}
			signed := sign(t, instance(config, tt.key), vectorRequest())
			if got, want := signed.Get("signature-input"), label+"="+tt.input; got != want {
				t.Errorf("signature-input\n%s, want\n%s", got, want)
			}
			base := tt.base + `"@signature-params": ` + tt.input
			published, err := base64.StdEncoding.DecodeString(tt.published)
			if err != nil || !accepts(t, tt.key, tt.scheme, base, published) {
				t.Fatalf("the published signature does not hold for the base of this test: %v", err)
			}
			_, got := signatures(t, signed)
			if !accepts(t, tt.key, tt.scheme, base, got[label]) {
				t.Errorf("our signature does not hold for the RFC's base")
			}
			if deterministic := !strings.HasPrefix(tt.scheme, "rsa-pss"); deterministic && !bytes.Equal(got[label], published) {
				t.Errorf("signature %s, want %s", signed.Get("signature"), tt.published)
			}
		})
	}
}

// TestPublishedSignaturesOfOtherExamples proves the verifier of these tests on B.2.1, whose nonce no host
// gives, and B.2.4, which is a response.
func TestPublishedSignaturesOfOtherExamples(t *testing.T) {
	for _, tt := range []struct{ name, key, scheme, base, signature string }{
		{"b21", keyRSAPSS, "rsa-pss-sha512",
			`"@signature-params": ();created=1618884473;keyid="test-key-rsa-pss";nonce="b3k2pp5k7z-50gnwp.yemd"`,
			"d2pmTvmbncD3xQm8E9ZV2828BjQWGgiwAaw5bAkgibUopemLJcWDy/lkbbHAve4cRAtx31Iq786U7it++wgGxbtRxf8Udx7zFZsckzXaJMkA7ChG52eSkFxykJeNqsrWH5S+oxNFlD4dzVuwe8DhTSja8xxbR/Z2cOGdCbzR72rgFWhzx2VjBqJzsPLMIQKhO4DGezXehhWwE56YCE+O6c0mKZsfxVrogUvA4HELjVKWmAvtl6UnCh8jYzuVG5WSb/QEVPnP5TmcAnLH1g+s++v6d4s8m0gCw1fV5/SITLq9mhho8K3+7EPYTU8IU1bLhdxO5Nyt8C8ssinQ98Xw9Q=="},
		{"b24", keyP256, "ecdsa-p256-sha256",
			"\"@status\": 200\n\"content-type\": application/json\n\"content-digest\": sha-512=:mEWXIS7MaLRuGgxOBdODa3xqM1XdEvxoYhvlCFJ41QJgJc4GTsPp29l5oGX69wWdXymyU0rjJuahq4l5aGgfLQ==:\n\"content-length\": 23\n" +
				`"@signature-params": ("@status" "content-type" "content-digest" "content-length");created=1618884473;keyid="test-key-ecc-p256"`,
			"wNmSUAhwb5LxtOtOpNa6W5xj067m5hFrj0XQ4fvpaCLx0NKocgPquLgyahnzDnDAUy5eCdlYUEkLIj+32oiasw=="},
	} {
		signature, err := base64.StdEncoding.DecodeString(tt.signature)
		if err != nil || !accepts(t, tt.key, tt.scheme, tt.base, signature) {
			t.Errorf("%s does not hold: %v", tt.name, err)
		}
	}
}

func TestDefaults(t *testing.T) {
	signed := sign(t, instance(nil, keyEd25519), vectorRequest())
	id := parse(t, keyEd25519).ID()
	params := `("@method" "@target-uri" "content-digest" "content-type" "webhook-id");created=1618884473;keyid="` + id + `";alg="ed25519";tag="webhook"`
	want := []plugin.Header{
		{Name: "content-digest", Value: "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"},
		{Name: "signature-input", Value: "sig1=" + params},
	}
	if diff := cmp.Diff(want, signed.Headers[3:5]); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
	base := "\"@method\": POST\n\"@target-uri\": " + vectorURL + "\n\"content-digest\": sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:\n" +
		"\"content-type\": application/json\n\"webhook-id\": evt0123\n\"@signature-params\": " + params
	if _, got := signatures(t, signed); !accepts(t, keyEd25519, "ed25519", base, got["sig1"]) {
		t.Error("signature does not hold")
	}
}

func parse(t testing.TB, value string) *keys.Key {
	t.Helper()
	k, err := keys.Parse([]byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestBase has the examples of RFC 9421 section 2 and the edges that it names.
func TestBase(t *testing.T) {
	header := func(pairs ...string) []plugin.Header {
		var out []plugin.Header
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, plugin.Header{Name: pairs[i], Value: pairs[i+1]})
		}
		return out
	}
	tests := []struct {
		name       string
		url        string
		headers    []plugin.Header
		components []string
		want       string
	}{
		{"fields", vectorURL, header(
			"x-ows-header", "   Leading and trailing whitespace.\t", "x-obs-fold-header", "Obsolete\r\n    line folding.",
			"cache-control", "max-age=60", "cache-control", "   must-revalidate", "example-dict", " a=1,    b=2;x=1;y=2,   c=(a   b   c)", "x-empty-header", ""),
			[]string{"Cache-Control", "x-obs-fold-header", `"x-ows-header"`, "example-dict", "x-empty-header"},
			"\"cache-control\": max-age=60, must-revalidate\n\"x-obs-fold-header\": Obsolete line folding.\n\"x-ows-header\": Leading and trailing whitespace.\n" +
				"\"example-dict\": a=1,    b=2;x=1;y=2,   c=(a   b   c)\n\"x-empty-header\": \n"},
		{"bytes", vectorURL, header("example-header", "value, with, lots", "example-header", "of, commas"),
			[]string{"example-header;bs", "example-header"},
			"\"example-header\";bs: :dmFsdWUsIHdpdGgsIGxvdHM=:, :b2YsIGNvbW1hcw==:\n\"example-header\": value, with, lots, of, commas\n"},
		{"bytes outside ASCII", vectorURL, header("x", "é"), []string{`"x";bs`}, "\"x\";bs: :w6k=:\n"},
		{"derived", "HTTPS://WWW.Example.com:443/path?param=value", nil,
			[]string{"@target-uri", "@authority", "@scheme", "@request-target", "@path", "@query"},
			"\"@target-uri\": https://www.example.com/path?param=value\n\"@authority\": www.example.com\n\"@scheme\": https\n" +
				"\"@request-target\": /path?param=value\n\"@path\": /path\n\"@query\": ?param=value\n"},
		{"another port", "http://example.com:443", nil, []string{"@target-uri", "@authority"},
			"\"@target-uri\": http://example.com:443/\n\"@authority\": example.com:443\n"},
		{"no path, no query", "https://example.com", nil, []string{"@target-uri", "@path", "@query", "@request-target"},
			"\"@target-uri\": https://example.com/\n\"@path\": /\n\"@query\": ?\n\"@request-target\": /\n"},
		{"empty query", "https://[::1]/?", nil, []string{"@target-uri", "@query"}, "\"@target-uri\": https://[::1]/?\n\"@query\": ?\n"},
		{"encoded as it is", "https://example.com/a%2Fb%20c?q=%2f+x", nil, []string{"@path", "@query"}, "\"@path\": /a%2Fb%20c\n\"@query\": ?q=%2f+x\n"},
		{"query parameters", "https://example.com/parameters?var=this%20is%20a%20big%0Amultiline%20value&bar=with+plus+whitespace&fa%C3%A7ade%22%3A%20=something&qux=", nil,
			[]string{`@query-param;name="var"`, `@query-param;name="bar"`, `@query-param;name="fa%C3%A7ade%22%3A%20"`, `"@query-param";name="qux"`},
			"\"@query-param\";name=\"var\": this%20is%20a%20big%0Amultiline%20value\n\"@query-param\";name=\"bar\": with%20plus%20whitespace\n" +
				"\"@query-param\";name=\"fa%C3%A7ade%22%3A%20\": something\n\"@query-param\";name=\"qux\": \n"},
		{"nothing", vectorURL, nil, []string{}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := instance(map[string]any{"components": tt.components}, keyShared)
			in.Target.URL = tt.url
			r := vectorRequest()
			r.Headers = tt.headers
			params, got := signatures(t, sign(t, in, r))
			base := tt.want + `"@signature-params": ` + params["sig1"]
			if !accepts(t, keyShared, "hmac-sha256", base, got["sig1"]) {
				t.Errorf("signature does not hold for\n%s", base)
			}
		})
	}
}

func TestSignErrors(t *testing.T) {
	for _, tt := range []struct {
		name, component, url string
		header               plugin.Header
		hint                 string
	}{
		{"absent header", "x-absent", vectorURL, plugin.Header{}, `component "x-absent": the request has no such header`},
		{"absent parameter", `@query-param;name="pet"`, vectorURL, plugin.Header{}, "no such parameter"},
		{"repeated parameter", `@query-param;name="a"`, "https://example.com/?a=1&%61=2", plugin.Header{}, "more than once"},
		{"broken parameter", `@query-param;name="a"`, "https://example.com/?a=%zz", plugin.Header{}, "percent-encoded"},
		{"outside ASCII", "x", vectorURL, plugin.Header{Name: "x", Value: "é"}, ";bs"},
		{"signed already", "@method", vectorURL, plugin.Header{Name: "Signature", Value: "sig=:AA==:"}, "already"},
		{"another digest", "content-digest", vectorURL, plugin.Header{Name: "content-digest", Value: "sha-256=:AA==:"}, "already"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := instance(map[string]any{"components": []string{tt.component}}, keyShared)
			in.Target.URL = tt.url
			r := vectorRequest()
			if tt.header.Name != "" {
				r.Headers = append(r.Headers, tt.header)
			}
			_, err := plugintest.New(t, httpsignature.Kind()).Configure(in).Sign(r)
			if err == nil || !strings.Contains(err.Error(), tt.hint) {
				t.Errorf("error %v, want %q", err, tt.hint)
			}
		})
	}
}

func TestADigestThatIsThereAlreadyIsKept(t *testing.T) {
	r := vectorRequest()
	r.Headers = append(r.Headers, plugin.Header{Name: "content-digest", Value: vectorDigest})
	signed := sign(t, instance(map[string]any{"digest": "sha-512"}, keyEd25519), r)
	n := 0
	for _, h := range signed.Headers {
		if h.Name == "content-digest" {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d content-digest headers, want 1", n)
	}
	plain := sign(t, instance(map[string]any{"components": []string{"@method"}}, keyEd25519), vectorRequest())
	if got := plain.Get("content-digest"); got != "" {
		t.Errorf("content-digest %q although it is not covered", got)
	}
}

func TestTwoLiveKeysSignUnderTwoLabels(t *testing.T) {
	for label, second := range map[string]string{"sig1": "sig2", "hook": "hook2", "a9": "a10"} {
		signed := sign(t, instance(map[string]any{"label": label, "components": []string{"@method"}}, keyEd25519, keyShared), vectorRequest())
		params, got := signatures(t, signed)
		for l, k := range map[string][2]string{label: {keyEd25519, "ed25519"}, second: {keyShared, "hmac-sha256"}} {
			if !accepts(t, k[0], k[1], "\"@method\": POST\n\"@signature-params\": "+params[l], got[l]) {
				t.Errorf("label %s of %s does not hold", l, signed.Get("signature-input"))
			}
		}
		if !strings.HasPrefix(signed.Get("signature"), label+"=:") {
			t.Errorf("signature %q, want the newest key first", signed.Get("signature"))
		}
	}
}

func TestEveryAlgorithmThatCanBeMade(t *testing.T) {
	h := plugintest.New(t, httpsignature.Kind())
	for _, algorithm := range h.Kind("http-signature").GetSecretSlots()[0].GetAlgorithms() {
		t.Run(algorithm, func(t *testing.T) {
			made, problems := h.PrepareSecret("http-signature", "key", "", algorithm)
			if len(problems) > 0 {
				t.Fatal(problems)
			}
			if made.Algorithm != algorithm || made.KeyID == "" {
				t.Errorf("algorithm %q, key id %q", made.Algorithm, made.KeyID)
			}
			if shared := algorithm == "hmac-sha256"; shared != (made.PublicKey == "") || shared != (made.JWK == "") {
				t.Errorf("public key %q, JWK %q", made.PublicKey, made.JWK)
			}
			inst := h.Configure(instance(map[string]any{"expires": "5m", "nonce": true, "components": []string{"content-digest"}}, string(made.Value)))
			for _, body := range [][]byte{nil, {0, 0xff, '\r', '\n'}, bytes.Repeat([]byte("x"), 1<<20)} {
				r := vectorRequest()
				r.Body = body
				signed, err := inst.Sign(r)
				if err != nil {
					t.Fatal(err)
				}
				params, got := signatures(t, signed)
				want := `("content-digest");created=1618884473;expires=1618884773;nonce="MDEyMzQ1Njc4OWFiY2RlZg";keyid="` + made.KeyID + `";alg="` + algorithm + `";tag="webhook"`
				if params["sig1"] != want {
					t.Errorf("parameters %s, want %s", params["sig1"], want)
				}
				sum := sha256.Sum256(body)
				base := `"content-digest": sha-256=:` + base64.StdEncoding.EncodeToString(sum[:]) + ":\n\"@signature-params\": " + want
				if !accepts(t, string(made.Value), algorithm, base, got["sig1"]) {
					t.Errorf("signature over a body of %d bytes does not hold", len(body))
				}
			}
		})
	}
}

func TestSameRequestSameBytes(t *testing.T) {
	h := plugintest.New(t, httpsignature.Kind())
	for _, tt := range [][2]string{{keyShared, "auto"}, {keyEd25519, "auto"}, {keyRSAPSS, "rsa-v1_5-sha256"}} {
		inst := h.Configure(instance(map[string]any{"algorithm": tt[1], "nonce": true}, tt[0]))
		first, err := inst.Sign(vectorRequest())
		if err != nil {
			t.Fatal(err)
		}
		other := vectorRequest()
		other.Body = []byte("other")
		if _, err := inst.Sign(other); err != nil {
			t.Fatal(err)
		}
		again, err := inst.Sign(vectorRequest())
		if diff := cmp.Diff(first.Headers, again.Headers); err != nil || diff != "" {
			t.Errorf("%s: %v (-first +again):\n%s", tt[1], err, diff)
		}
	}
}

func TestBadConfigsAreRefused(t *testing.T) {
	h := plugintest.New(t, httpsignature.Kind())
	components := func(list ...string) map[string]any { return map[string]any{"components": list} }
	rsaKey, p256 := keyRSAPSS, keyP256
	tests := []struct {
		name    string
		config  map[string]any
		secrets []string
		pointer string
		hint    string
	}{
		{"unknown derived", components("content-digest", "@url"), nil, "/config/components/1", "@target-uri"},
		{"of responses", components("content-digest", "@status"), nil, "/config/components/1", "responses"},
		{"itself", components("content-digest", "signature"), nil, "/config/components/1", "itself"},
		{"host", components("content-digest", "Host"), nil, "/config/components/1", "@authority"},
		{"of the connection", components("content-digest", "Connection"), nil, "/config/components/1", "after the signature"},
		{"no header name", components("content-digest", "x y"), nil, "/config/components/1", "no header name"},
		{"empty", components("content-digest", ""), nil, "/config/components/1", "header name"},
		{"half a quote", components("content-digest", `"x`), nil, "/config/components/1", "quote"},
		{"parameter without a name", components("content-digest", "x;"), nil, "/config/components/1", "takes no parameter"},
		{"a lone quote", components("content-digest", `"`), nil, "/config/components/1", "quote"},
		{"twice", components("content-digest", "Content-Digest"), nil, "/config/components/1", "twice"},
		{"no name", components("content-digest", "@query-param"), nil, "/config/components/1", `name="`},
		{"name not encoded", components("content-digest", `@query-param;name="a b"`), nil, "/config/components/1", `"a%20b"`},
		{"sf", components("content-digest", "x;sf"), nil, "/config/components/1", "not offered"},
		{"key", components("content-digest", `x;key="a"`), nil, "/config/components/1", "not offered"},
		{"req", components("content-digest", "@method;req"), nil, "/config/components/1", "responses"},
		{"tr", components("content-digest", "x;tr"), nil, "/config/components/1", "trailers"},
		{"unquoted value", components("content-digest", "@query-param;name=a"), nil, "/config/components/1", "double quotes"},
		{"bs of a derived one", components("content-digest", "@path;bs"), nil, "/config/components/1", "bs"},
		{"label", map[string]any{"label": "Sig 1"}, nil, "/config/label", "lower-case"},
		{"tag", map[string]any{"tag": "a\nb"}, nil, "/config/tag", "ASCII"},
		{"keyid", map[string]any{"keyid": "clé"}, nil, "/config/keyid", "ASCII"},
		{"expires", map[string]any{"expires": "1500ms"}, nil, "/config/expires", "whole seconds"},
		{"key for another algorithm", map[string]any{"algorithm": "ed25519"}, []string{keyEd25519, p256}, "/secrets/key", "version 2 of 2"},
		{"shared key for another algorithm", map[string]any{"algorithm": "rsa-pss-sha512"}, []string{keyShared}, "/secrets/key", "hmac-sha256"},
		{"private key for HMAC", map[string]any{"algorithm": "hmac-sha256"}, []string{rsaKey}, "/secrets/key", "cannot sign hmac-sha256"},
		{"no key at all", nil, []string{"hunter2"}, "/secrets/key", "at least 16 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			problems := h.Validate(instance(tt.config, tt.secrets...))
			if len(problems) != 1 || problems[0].Pointer != tt.pointer || problems[0].Warning || !strings.Contains(problems[0].Summary, tt.hint) {
				t.Fatalf("problems %+v, want one error at %s that says %q", problems, tt.pointer, tt.hint)
			}
			for _, secret := range tt.secrets {
				if strings.Contains(problems[0].Summary, secret[len(secret)-6:]) {
					t.Errorf("summary %q shows the key", problems[0].Summary)
				}
			}
		})
	}
	if problems := h.Validate(instance(nil, keyEd25519, keyP256, keyRSAPSS, keyShared)); len(problems) > 0 {
		t.Errorf("good keys refused: %+v", problems)
	}
}

func TestWarnings(t *testing.T) {
	h := plugintest.New(t, httpsignature.Kind())
	odd := instance(nil, keyEd25519)
	odd.Target.URL = "https://Example.com:443/"
	for code, in := range map[string]plugintest.Instance{
		"config.body_not_covered": instance(map[string]any{"components": []string{"@method"}}, keyEd25519),
		"secret.ambiguous":        instance(nil, strings.TrimPrefix(keyShared, "base64:")),
		"config.authority":        odd,
	} {
		problems := h.Validate(in)
		if len(problems) != 1 || problems[0].Code != code || !problems[0].Warning {
			t.Errorf("problems %+v, want the warning %s", problems, code)
		}
	}
}
