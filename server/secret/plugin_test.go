package secret_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	"github.com/grapnel/grapnel/server/secret"
)

// rfc8037 is the example key of RFC 8037, appendix A.2, with its thumbprint by appendix A.3.
const (
	rfc8037      = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	rfc8037Thumb = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
)

// rfc7638 is the example key of RFC 7638, section 3.1, with its thumbprint.
const (
	rfc7638 = `{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMst` +
		`n64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",` +
		`"e":"AQAB","alg":"RS256","kid":"2011-04-29"}`
	rfc7638Thumb = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
)

func bound(slot, value, jwk string) secret.Material {
	return secret.Material{
		Kind: opaque, Plugin: "plugins/pair", Slot: slot, Value: []byte(value),
		Algorithm: "ed25519", PublicKey: "public", JWK: jwk, KeyID: "kid",
	}
}

func TestKeysOfPluginsAreKept(t *testing.T) {
	s, _ := store(t, etcd.Client)
	made, err := s.Create(t.Context(), "acme", "k", bound("key", "one", rfc8037))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rotate(t.Context(), "acme", "k", bound("key", "two", ""), time.Hour, made.Proto.Etag); err != nil {
		t.Fatal(err)
	}
	again, err := secret.Open(t.Context(), secret.Options{Client: etcd.Client, Prefix: prefix(t), Key: key()})
	if err != nil {
		t.Fatal(err)
	}
	got, err := again.Get("acme", "k")
	if err != nil || got.Fault != nil || !cmp.Equal(values(again, "k"), []string{"two", "one"}) {
		t.Fatalf("opened again: %v, %v", got, err)
	}
	p := got.Proto
	if p.Plugin != "plugins/pair" || p.Slot != "key" || p.Versions[0].Jwk != "" || p.Versions[1].Jwk != rfc8037 ||
		p.Versions[1].Algorithm != "ed25519" || p.Versions[1].PublicKey != "public" || p.Versions[1].KeyId != "kid" {
		t.Errorf("metadata %v", p)
	}
	// What is not of the same plugin, slot and kind is not a version of it.
	for _, m := range []secret.Material{bound("other", "x", ""), {Kind: opaque, Value: []byte("x")}, {Kind: hmac, Value: []byte("x")}} {
		var changed *secret.EtagError
		if _, err := s.Rotate(t.Context(), "acme", "k", m, 0, ""); !errors.As(err, &changed) {
			t.Errorf("%v: %v", m, err)
		}
	}
}

// TestValuesAreBoundToPluginAndSlot: a sealed value that is moved to another plugin or slot is not used.
func TestValuesAreBoundToPluginAndSlot(t *testing.T) {
	for name, tamper := range map[string]func(*storev1.SecretRecord){
		"slot":      func(r *storev1.SecretRecord) { r.Slot = "other" },
		"plugin":    func(r *storev1.SecretRecord) { r.Plugin = "plugins/thief" },
		"no plugin": func(r *storev1.SecretRecord) { r.Plugin, r.Slot = "", "" },
		"shifted":   func(r *storev1.SecretRecord) { r.Plugin, r.Slot = "plugins/pair|key", "" },
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := store(t, etcd.Client)
			if _, err := s.Create(t.Context(), "acme", "mine", bound("key", "value", "")); err != nil {
				t.Fatal(err)
			}
			rec := record(t, "mine")
			tamper(rec)
			overwrite(t, "mine", rec)
			eventually(t, "it is refused", func() bool { _, ok := s.Versions("namespaces/acme/secrets/mine"); return !ok })
			if got, err := s.Get("acme", "mine"); err != nil || !errors.Is(got.Fault, secret.ErrTampered) {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
}

// oldSealed is a value as it was sealed before secrets had plugins, under the key of the tests.
const oldSealed = "qvtgSXdLzS0btB3PgGSOz19SueTq87qsX0rJojBisS43J6aDvvJyLMw="

// TestOldRecordsOpen: what was sealed before secrets had plugins still opens.
func TestOldRecordsOpen(t *testing.T) {
	s, _ := store(t, etcd.Client)
	create(t, s, "k", opaque, "value")
	rec := record(t, "k")
	if rec.Plugin != "" || rec.Slot != "" {
		t.Fatal(rec)
	}
	sealed, err := base64.StdEncoding.DecodeString(oldSealed)
	if err != nil {
		t.Fatal(err)
	}
	rec.Versions[0].Sealed = sealed
	overwrite(t, "k", rec)
	eventually(t, "the old value is in use", func() bool { return cmp.Equal(values(s, "k"), []string{"sealed before"}) })
}

func TestMaterialOfPluginsIsChecked(t *testing.T) {
	s, _ := store(t, etcd.Client)
	for name, c := range map[string]struct {
		change func(*secret.Material)
		reason string
	}{
		"no value":       {func(m *secret.Material) { m.Value = nil }, "secret.length"},
		"long value":     {func(m *secret.Material) { m.Value = make([]byte, 64<<10+1) }, "secret.length"},
		"long key":       {func(m *secret.Material) { m.PublicKey = strings.Repeat("x", 16<<10+1) }, "secret.public"},
		"no text":        {func(m *secret.Material) { m.KeyID = "\xff" }, "secret.public"},
		"no JSON":        {func(m *secret.Material) { m.JWK = "key" }, "secret.jwk"},
		"symmetric":      {func(m *secret.Material) { m.JWK = `{"kty":"oct","k":"c4n4ry"}` }, "secret.jwk"},
		"private":        {func(m *secret.Material) { m.JWK = `{"kty":"EC","crv":"P-256","x":"a","y":"b","d":"c4n4ry"}` }, "secret.jwk"},
		"half a key":     {func(m *secret.Material) { m.JWK = `{"kty":"EC","crv":"P-256","x":"a"}` }, "secret.jwk"},
		"unknown family": {func(m *secret.Material) { m.JWK = `{"kty":"PQ","x":"a"}` }, "secret.jwk"},
		"kind":           {func(m *secret.Material) { m.Kind = hmac }, "secret.kind"},
	} {
		m := bound("key", "value", "")
		c.change(&m)
		_, err := s.Create(t.Context(), "acme", "k", m)
		var bad *secret.InvalidError
		if !errors.As(err, &bad) || bad.Violations[0].Reason != c.reason || strings.Contains(err.Error(), "c4n4ry") {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := bound("key", "c4n4ry", "")
	m.Made = true
	asJSON, err := json.Marshal(m)
	if text := fmt.Sprintf("%v %+v %#v %s", m, m, m, asJSON); err != nil || strings.Contains(text, "c4n4ry") || strings.Contains(text, fmt.Sprint([]byte("c4n4ry"))[1:8]) {
		t.Errorf("printed: %s %v", text, err)
	}
}

func TestJWKS(t *testing.T) {
	s, r := store(t, etcd.Client)
	if _, err := r.CreateNamespace(t.Context(), "other", nil); err != nil {
		t.Fatal(err)
	}
	put := func(ns, id string, m secret.Material) {
		t.Helper()
		if _, err := s.Create(t.Context(), ns, id, m); err != nil {
			t.Fatal(err)
		}
	}
	if got := string(s.JWKS("acme")); got != `{"keys":[]}` {
		t.Errorf("without keys: %s", got)
	}
	pair, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := pair.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.RawURLEncoding.EncodeToString
	ec := fmt.Sprintf(`{"kty":"EC","crv":"P-256","x":%q,"y":%q,"use":"enc","x5t":"dropped"}`, b64(raw[1:33]), b64(raw[33:]))
	nameless := bound("key", "v", rfc8037)
	nameless.KeyID = ""
	rsa := bound("key", "v", rfc7638)
	rsa.KeyID, rsa.Algorithm = "", "rsa"
	ecdsa := bound("key", "v", ec)
	ecdsa.KeyID, ecdsa.Algorithm = "mine", "ecdsa-p256-sha256"
	put("acme", "d-nameless", nameless)
	put("acme", "c-again", nameless)
	put("acme", "b-rsa", rsa)
	put("acme", "a-ecdsa", ecdsa)
	put("acme", "e-shared", bound("key", "v", ""))
	put("other", "x", bound("key", "v", rfc8037))
	create(t, s, "f-symmetric", hmac, "")

	var set struct{ Keys []map[string]string }
	if err := json.Unmarshal(s.JWKS("acme"), &set); err != nil {
		t.Fatal(err)
	}
	want := []map[string]string{
		{"kty": "EC", "crv": "P-256", "x": b64(raw[1:33]), "y": b64(raw[33:]), "use": "enc", "alg": "ES256", "kid": "mine"},
		{"kty": "RSA", "n": jwkOf(t, rfc7638)["n"], "e": "AQAB", "use": "sig", "alg": "RS256", "kid": "2011-04-29"},
		{"kty": "OKP", "crv": "Ed25519", "x": jwkOf(t, rfc8037)["x"], "use": "sig", "alg": "EdDSA", "kid": rfc8037Thumb},
	}
	if diff := cmp.Diff(want, set.Keys); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// Without a kid of its own an RSA key has its thumbprint, too.
	bare := rsa
	bare.JWK = strings.Replace(rfc7638, `,"kid":"2011-04-29"`, "", 1)
	if _, err := s.Rotate(t.Context(), "acme", "b-rsa", bare, 0, ""); err != nil {
		t.Fatal(err)
	}
	if got := string(s.JWKS("acme")); !strings.Contains(got, rfc7638Thumb) || strings.Contains(got, "2011-04-29") {
		t.Errorf("after a rotation without overlap: %s", got)
	}
}

// TestStandardWebhooksKeysHaveAJWK: pairs of KIND_ED25519 are published, those of older records included.
func TestStandardWebhooksKeysHaveAJWK(t *testing.T) {
	s, _ := store(t, etcd.Client)
	// The private key of RFC 8037, appendix A.1.
	seed, err := base64.RawURLEncoding.DecodeString("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
	if err != nil {
		t.Fatal(err)
	}
	sec, _ := create(t, s, "pair", edwa, "whsk_"+base64.StdEncoding.EncodeToString(seed))
	v := sec.Proto.Versions[0]
	if v.KeyId != rfc8037Thumb || jwkOf(t, v.Jwk)["x"] != jwkOf(t, rfc8037)["x"] || !strings.HasPrefix(v.PublicKey, "whpk_") {
		t.Errorf("metadata %v", v)
	}
	if got := string(s.JWKS("acme")); !strings.Contains(got, `"kid":"`+rfc8037Thumb+`"`) {
		t.Errorf("key set %s", got)
	}
}

func jwkOf(t *testing.T, text string) map[string]string {
	t.Helper()
	m := map[string]string{}
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	return m
}
