package jose_test

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
	"encoding/json"
	"fmt"
	"hash"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/jose"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const (
	// RFC 7515 appendix A.1, which RFC 7797 section 4 uses too.
	keyHMAC = `{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"}`
	// RFC 7515 appendix A.2.
	keyRSA = `{"kty":"RSA","e":"AQAB",` +
		`"n":"ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ",` +
		`"d":"Eq5xpGnNCivDflJsRQBXHx1hdR1k6Ulwe2JZD50LpXyWPEAeP88vLNO97IjlA7_GQ5sLKMgvfTeXZx9SE-7YwVol2NXOoAJe46sui395IW_GO-pWJ1O0BkTGoVEn2bKVRUCgu-GjBVaYLU6f3l9kJfFNS3E0QbVdxzubSu3Mkqzjkn439X0M_V51gfpRLI9JYanrC4D4qAdGcopV_0ZHHzQlBjudU2QvXt4ehNYTCBr6XCLQUShb1juUO1ZdiYoFaFQT5Tw8bGUl_x_jTj3ccPDVZFD9pIuhLhBOneufuBiB4cS98l2SR_RQyGWSeWjnczT0QU91p1DhOVRuOopznQ",` +
		`"p":"4BzEEOtIpmVdVEZNCqS7baC4crd0pqnRH_5IB3jw3bcxGn6QLvnEtfdUdiYrqBdss1l58BQ3KhooKeQTa9AB0Hw_Py5PJdTJNPY8cQn7ouZ2KKDcmnPGBY5t7yLc1QlQ5xHdwW1VhvKn-nXqhJTBgIPgtldC-KDV5z-y2XDwGUc",` +
		`"q":"uQPEfgmVtjL0Uyyx88GZFF1fOunH3-7cepKmtH4pxhtCoHqpWmT8YAmZxaewHgHAjLYsp1ZSe7zFYHj7C6ul7TjeLQeZD_YwD66t62wDmpe_HlB-TnBA-njbglfIsRLtXlnDzQkv5dTltRJ11BKBBypeeF6689rjcJIDEz9RWdc"}`
	// RFC 7515 appendix A.3.
	keyEC = `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}`
	// RFC 8037 appendix A.1.
	keyEd25519 = `{"kty":"OKP","crv":"Ed25519","d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
)

func request(body string) plugin.Request {
	return plugin.Request{
		MessageID: "evt0123", Created: time.Unix(1700000000, 999), Body: []byte(body), Nonce: []byte("0123456789abcdef"),
		Headers: []plugin.Header{{Name: "webhook-id", Value: "evt0123"}},
	}
}

func instance(kind string, config map[string]any, values ...string) plugintest.Instance {
	if config == nil {
		config = map[string]any{}
	}
	return plugintest.Instance{Kind: kind, Config: config, Secrets: map[string][]string{"key": values}, Target: plugin.Target{URL: "https://example.com/"}}
}

func sign(t testing.TB, in plugintest.Instance, r plugin.Request) plugin.Request {
	t.Helper()
	signed, err := plugintest.New(t, jose.Kinds()...).Configure(in).Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

func parse(t testing.TB, value string) *keys.Key {
	t.Helper()
	k, err := keys.Parse([]byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// accepts is a verifier of a signing input, by the public half of the key.
func accepts(t testing.TB, value, alg string, input, signature []byte) bool {
	t.Helper()
	s256, s384 := sha256.Sum256(input), sha512.Sum384(input)
	if newHash := map[string]func() hash.Hash{"HS256": sha256.New, "HS384": sha512.New384, "HS512": sha512.New}[alg]; newHash != nil {
		secret, err := keys.ParseShared([]byte(value))
		if err != nil {
			t.Fatal(err)
		}
		mac := hmac.New(newHash, secret)
		mac.Write(input)
		return hmac.Equal(mac.Sum(nil), signature)
	}
	public := parse(t, value).Signer().Public()
	half := len(signature) / 2
	r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
	switch alg {
	case "EdDSA":
		return ed25519.Verify(public.(ed25519.PublicKey), input, signature)
	case "ES256":
		return half == 32 && ecdsa.Verify(public.(*ecdsa.PublicKey), s256[:], r, s)
	case "ES384":
		return half == 48 && ecdsa.Verify(public.(*ecdsa.PublicKey), s384[:], r, s)
	case "RS256":
		return rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, s256[:], signature) == nil
	case "PS256":
		return rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA256, s256[:], signature, &rsa.PSSOptions{SaltLength: 32}) == nil
	}
	t.Fatalf("alg %q", alg)
	return false
}

// open takes a compact serialisation apart.
func open(t testing.TB, compact string) (header map[string]any, payload, signature []byte) {
	t.Helper()
	parts := strings.Split(compact, ".")
	if len(parts) != 3 {
		t.Fatalf("%q has %d parts, want 3", compact, len(parts))
	}
	raw := make([][]byte, 3)
	for i, p := range parts {
		var err error
		if raw[i], err = base64.RawURLEncoding.Strict().DecodeString(p); err != nil {
			t.Fatalf("part %d of %q: %v", i, compact, err)
		}
	}
	if err := json.Unmarshal(raw[0], &header); err != nil {
		t.Fatalf("header %s: %v", raw[0], err)
	}
	return header, raw[1], raw[2]
}

func TestDetachedVectors(t *testing.T) {
	const frodo = "It\u2019s a dangerous business, Frodo, going out your door. You step onto the road, and if you don't keep your feet, there\u2019s no knowing where you might be swept off to."
	for _, tt := range []struct {
		name   string
		config map[string]any
		key    string
		body   string
		want   string
	}{
		{"RFC 7797 section 4.1", map[string]any{"algorithm": "HS256"}, keyHMAC, "$.02", "eyJhbGciOiJIUzI1NiJ9..5mvfOroL-g7HyqJoozehmsaqmvTYGEq5jTI1gVvoEoQ"},
		{"RFC 7797 section 4.2", map[string]any{"algorithm": "HS256", "b64": false}, keyHMAC, "$.02",
			"eyJhbGciOiJIUzI1NiIsImI2NCI6ZmFsc2UsImNyaXQiOlsiYjY0Il19..A5dxf2s96_n5FLueVuW1Z_vh161FwXZC4YLPff6dmDY"},
		{"RFC 7520 section 4.5", map[string]any{"kid": "018c0ae5-4d9b-471b-bfd6-eef314bc7037"}, `{"kty":"oct","k":"hJtXIZ2uSN5kbQfbtTNWbpdmhkV8FJG-Onbc6mxCcYg"}`, frodo,
			"eyJhbGciOiJIUzI1NiIsImtpZCI6IjAxOGMwYWU1LTRkOWItNDcxYi1iZmQ2LWVlZjMxNGJjNzAzNyJ9..s0h6KThzkfBBBkLspW1h84VsJZFTsPPqMDA7g1Md7p0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.config["iat"] = false
			signed := sign(t, instance("jws", tt.config, tt.key), request(tt.body))
			if got := signed.Get("x-jws-signature"); got != tt.want {
				t.Errorf("x-jws-signature %s, want %s", got, tt.want)
			}
		})
	}
}

func TestCompactVectors(t *testing.T) {
	const claims = "{\"iss\":\"joe\",\r\n \"exp\":1300819380,\r\n \"http://example.com/is_root\":true}"
	for _, tt := range []struct{ name, key, payload, want string }{
		{"RFC 7515 A.2", keyRSA, claims, "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ." +
			"cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"},
		{"RFC 8037 A.4", keyEd25519, "Example of Ed25519 signing",
			"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"},
	} {
		got, err := jose.Compact(parse(t, tt.key), nil, []byte(tt.payload))
		if err != nil || got != tt.want {
			t.Errorf("%s: %s, %v; want %s", tt.name, got, err, tt.want)
		}
	}
	// RFC 7515 A.3 draws a random number: the published signature proves the verifier, ours must hold too.
	const published = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
	got, err := jose.Compact(parse(t, keyEC), nil, []byte(claims))
	if err != nil {
		t.Fatal(err)
	}
	input := got[:strings.LastIndexByte(got, '.')]
	for _, compact := range []string{input + "." + published, got} {
		header, _, signature := open(t, compact)
		if header["alg"] != "ES256" || !accepts(t, keyEC, "ES256", []byte(input), signature) {
			t.Errorf("%s does not hold", compact)
		}
	}
}

func TestCompactPutsInWhatTheKeySigns(t *testing.T) {
	header := map[string]any{"kid": "k1", "alg": "PS256"}
	got, err := jose.Compact(parse(t, keyRSA), header, []byte("{}"))
	if err != nil {
		t.Fatal(err)
	}
	protected, _, signature := open(t, got)
	if diff := cmp.Diff(header, protected); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if !accepts(t, keyRSA, "PS256", []byte(got[:strings.LastIndexByte(got, '.')]), signature) {
		t.Error("signature does not hold")
	}
	given := map[string]any{"typ": "JWT"}
	if _, err := jose.Compact(parse(t, keyEC), given, nil); err != nil || len(given) != 1 {
		t.Errorf("the caller's header was changed to %v, %v", given, err)
	}
	for _, alg := range []any{"none", "HS256", "RS256", 7} {
		if got, err := jose.Compact(parse(t, keyEC), map[string]any{"alg": alg}, nil); err == nil {
			t.Errorf("alg %v with an EC key: %s", alg, got)
		}
	}
}

func TestEveryAlgorithm(t *testing.T) {
	h := plugintest.New(t, jose.Kinds()...)
	slot := h.Kind("jws").GetSecretSlots()[0]
	for _, alg := range slot.GetAlgorithms() {
		t.Run(alg, func(t *testing.T) {
			made, problems := h.PrepareSecret("jws", "key", "", alg)
			if len(problems) > 0 || made.Algorithm != alg {
				t.Fatalf("made a key for %q: %v", made.Algorithm, problems)
			}
			key, shared := string(made.Value), strings.HasPrefix(alg, "HS")
			if shared != (made.PublicKey == "") || shared != (made.JWK == "") || shared != (made.KeyID == "") {
				t.Errorf("public key %q, JWK %q, key id %q", made.PublicKey, made.JWK, made.KeyID)
			}
			if !shared {
				var public map[string]string
				if err := json.Unmarshal([]byte(made.JWK), &public); err != nil || public["alg"] != alg || public["kid"] != made.KeyID {
					t.Errorf("JWK %s: %v", made.JWK, err)
				}
			}
			for _, b64 := range []bool{true, false} {
				inst := h.Configure(instance("jws", map[string]any{"b64": b64, "typ": "JOSE"}, key))
				for _, body := range []string{"", "{\"a\":1}", "\x00\xff.\r\n", strings.Repeat("x", 1<<20)} {
					signed, err := inst.Sign(request(body))
					if err != nil {
						t.Fatal(err)
					}
					checkDetached(t, signed.Get("x-jws-signature"), key, alg, made.KeyID, b64, body)
				}
			}
		})
	}
}

func checkDetached(t *testing.T, compact, key, alg, kid string, b64 bool, body string) {
	t.Helper()
	header, payload, signature := open(t, compact)
	want := map[string]any{"alg": alg, "iat": 1.7e9, "typ": "JOSE"}
	if kid != "" {
		want["kid"] = kid
	}
	encoded := base64.RawURLEncoding.EncodeToString([]byte(body))
	if !b64 {
		want["b64"], want["crit"], encoded = false, []any{"b64"}, body
	}
	if diff := cmp.Diff(want, header); diff != "" || len(payload) > 0 {
		t.Errorf("payload %q, header (-want +got):\n%s", payload, diff)
	}
	lead, _, _ := strings.Cut(compact, ".")
	if !accepts(t, key, alg, []byte(lead+"."+encoded), signature) {
		t.Errorf("%s does not hold for a body of %d bytes", compact, len(body))
	}
}

func TestToken(t *testing.T) {
	sum := sha256.Sum256([]byte("hello"))
	for _, tt := range []struct {
		name   string
		config map[string]any
		header string
		prefix string
		want   map[string]any
	}{
		{"defaults", nil, "authorization", "Bearer ", map[string]any{"iat": 1.7e9, "exp": 1.7e9 + 300, "jti": "evt0123"}},
		{"all", map[string]any{
			"issuer": "https://a.example/<x>", "subject": "s", "audience": []string{"r"}, "lifetime": "90s", "jti": "attempt",
			"body_hash": "request_body_sha256", "claims": map[string]any{"tenant": map[string]any{"id": 12345678901}, "b": "é"},
		}, "authorization", "Bearer ", map[string]any{
			"iss": "https://a.example/<x>", "sub": "s", "aud": "r", "iat": 1.7e9, "exp": 1.7e9 + 90, "jti": "evt0123.MDEyMzQ1Njc4OWFiY2RlZg",
			"request_body_sha256": fmt.Sprintf("%x", sum), "tenant": map[string]any{"id": 12345678901.0}, "b": "é",
		}},
		{"another header", map[string]any{
			"header": "X-Token", "jti": "none", "audience": []string{"a", "b"}, "body_hash": "h", "body_hash_encoding": "base64url",
		}, "x-token", "", map[string]any{
			"iat": 1.7e9, "exp": 1.7e9 + 300, "aud": []any{"a", "b"}, "h": base64.RawURLEncoding.EncodeToString(sum[:]),
		}},
		{"another prefix", map[string]any{"prefix": "JWT ", "jti": "none"}, "authorization", "JWT ", map[string]any{"iat": 1.7e9, "exp": 1.7e9 + 300}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			signed := sign(t, instance("jwt", tt.config, keyEd25519), request("hello"))
			token, found := strings.CutPrefix(signed.Get(tt.header), tt.prefix)
			if !found || len(signed.Headers) != 2 {
				t.Fatalf("headers %v", signed.Headers)
			}
			header, payload, signature := open(t, token)
			if diff := cmp.Diff(map[string]any{"alg": "EdDSA", "typ": "JWT", "kid": parse(t, keyEd25519).ID()}, header); diff != "" {
				t.Errorf("header (-want +got):\n%s", diff)
			}
			var claims map[string]any
			if err := json.Unmarshal(payload, &claims); err != nil {
				t.Fatalf("claims %s: %v", payload, err)
			}
			if diff := cmp.Diff(tt.want, claims); diff != "" {
				t.Errorf("claims (-want +got):\n%s", diff)
			}
			if !accepts(t, keyEd25519, "EdDSA", []byte(token[:strings.LastIndexByte(token, '.')]), signature) {
				t.Error("signature does not hold")
			}
		})
	}
}

func TestSameRequestSameBytes(t *testing.T) {
	h := plugintest.New(t, jose.Kinds()...)
	for _, kind := range []string{"jws", "jwt"} {
		for _, key := range []string{keyHMAC, keyEd25519, keyRSA} {
			config := map[string]any{}
			if kind == "jwt" {
				config = map[string]any{"jti": "attempt", "claims": map[string]any{"z": 1, "a": 2, "m": []int{3}}}
			}
			inst := h.Configure(instance(kind, config, key))
			first, err := inst.Sign(request("one"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := inst.Sign(request("two")); err != nil {
				t.Fatal(err)
			}
			again, err := inst.Sign(request("one"))
			if diff := cmp.Diff(first.Headers, again.Headers); err != nil || diff != "" {
				t.Errorf("%s: %v (-first +again):\n%s", kind, err, diff)
			}
		}
	}
}

func TestWhichLiveKeySigns(t *testing.T) {
	for _, kind := range []string{"jws", "jwt"} {
		for which, want := range map[string]string{"": "EdDSA", "newest": "EdDSA", "oldest": "ES256"} {
			config := map[string]any{}
			if which != "" {
				config["sign_with"] = which
			}
			signed := sign(t, instance(kind, config, keyEd25519, keyRSA, keyEC), request(""))
			compact := strings.TrimPrefix(signed.Headers[1].Value, "Bearer ")
			if header, _, _ := open(t, compact); header["alg"] != want {
				t.Errorf("%s, sign_with %q: signed by %v, want %s", kind, which, header["alg"], want)
			}
		}
	}
}

func TestAlgorithmOfAKey(t *testing.T) {
	h := plugintest.New(t, jose.Kinds()...)
	shared := func(n int) string {
		return "base64:" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa7}, n))
	}
	for _, tt := range []struct{ value, want string }{
		{shared(32), "HS256"}, {shared(47), "HS256"}, {shared(48), "HS384"}, {shared(64), "HS512"}, {keyHMAC, "HS512"},
		{keyRSA, "RS256"}, {strings.Replace(keyRSA, `{`, `{"alg":"PS256",`, 1), "PS256"}, {keyEC, "ES256"}, {keyEd25519, "EdDSA"},
	} {
		read, problems := h.PrepareSecret("jwt", "key", tt.value, "")
		if len(problems) > 0 || read.Algorithm != tt.want {
			t.Errorf("algorithm %q, want %q; %v", read.Algorithm, tt.want, problems)
		}
		signed := sign(t, instance("jws", nil, tt.value), request(""))
		header, _, _ := open(t, signed.Get("x-jws-signature"))
		if header["alg"] != tt.want {
			t.Errorf("signed with %v, want what the secret says, %s", header["alg"], tt.want)
		}
	}
}

func TestSignErrors(t *testing.T) {
	taken := request("")
	taken.Headers = append(taken.Headers, plugin.Header{Name: "X-JWS-Signature", Value: "x"}, plugin.Header{Name: "Authorization", Value: "Basic eDp5"})
	h := plugintest.New(t, jose.Kinds()...)
	for _, tt := range []struct {
		kind   string
		config map[string]any
		r      plugin.Request
		hint   string
	}{
		{"jws", nil, taken, "x-jws-signature header already"},
		{"jwt", nil, taken, "authorization header already"},
	} {
		if _, err := h.Configure(instance(tt.kind, tt.config, keyEd25519)).Sign(tt.r); err == nil || !strings.Contains(err.Error(), tt.hint) {
			t.Errorf("%s: %v, want %q", tt.kind, err, tt.hint)
		}
	}
}

func TestBadConfigsAreRefused(t *testing.T) {
	h := plugintest.New(t, jose.Kinds()...)
	weak := "base64:" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa7}, 31))
	tests := []struct {
		name, kind string
		config     map[string]any
		secrets    []string
		pointer    string
		hint       string
	}{
		{"header name", "jws", map[string]any{"header": "x y"}, nil, "/config/header", "no header name"},
		{"no header", "jws", map[string]any{"header": ""}, nil, "/config/header", "missing"},
		{"header of others", "jws", map[string]any{"header": "Webhook-Id"}, nil, "/config/header", "set by others"},
		{"header of the subscription", "jwt", map[string]any{"header": "x-own"}, nil, "/config/header", "sets a header"},
		{"none", "jws", map[string]any{"algorithm": "none"}, nil, "/config/algorithm", "EdDSA"},
		{"prefix", "jwt", map[string]any{"prefix": "a\nb"}, nil, "/config/prefix", "ASCII"},
		{"lifetime", "jwt", map[string]any{"lifetime": "1500ms"}, nil, "/config/lifetime", "whole seconds"},
		{"audience", "jwt", map[string]any{"audience": []string{"a", ""}}, nil, "/config/audience/1", "empty"},
		{"body hash as a known claim", "jwt", map[string]any{"body_hash": "jti"}, nil, "/config/body_hash", "another name"},
		{"known claim", "jwt", map[string]any{"claims": map[string]any{"iss": "x"}}, nil, "/config/claims/iss", "field of its own"},
		{"claim and body hash", "jwt", map[string]any{"body_hash": "h", "claims": map[string]any{"h": "x"}}, nil, "/config/claims/h", "field of its own"},
		{"weak", "jws", nil, []string{weak}, "/secrets/key", "at least 32 bytes"},
		{"weak for HS512", "jws", map[string]any{"algorithm": "HS512"}, []string{keyEd25519}, "/secrets/key", "cannot sign HS512"},
		{"shared for ES256", "jwt", map[string]any{"algorithm": "ES256"}, []string{keyHMAC}, "/secrets/key", "cannot sign ES256"},
		{"the older of two", "jwt", map[string]any{"algorithm": "EdDSA"}, []string{keyEd25519, keyEC}, "/secrets/key", "version 2 of 2"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := instance(tt.kind, tt.config, tt.secrets...)
			in.Target.Headers = []plugin.Header{{Name: "X-Own", Value: "1"}}
			problems := h.Validate(in)
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
	for _, kind := range []string{"jws", "jwt"} {
		if problems := h.Validate(instance(kind, nil, keyEC, keyRSA, keyHMAC, keyEd25519)); len(problems) > 0 {
			t.Errorf("%s refuses good keys: %+v", kind, problems)
		}
	}
	text := strings.Repeat("0123456789abcdef", 4)
	if problems := h.Validate(instance("jws", nil, text)); len(problems) != 1 || !problems[0].Warning || problems[0].Code != "secret.ambiguous" {
		t.Errorf("problems %+v, want a warning about a shared key that looks like hex", problems)
	}
}
