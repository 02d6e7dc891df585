package server_test

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// jwk is a key as a receiver reads it.
type jwk struct {
	Kty, Crv, X, Kid, Alg, Use string
}

func TestJWKS(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme") // with a symmetric key
	ctx, secrets := t.Context(), grapnelv1.NewSecretServiceClient(s.Conn)
	get := func(ns, etag string) (*http.Response, []jwk) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.AdminAddr+"/namespaces/"+ns+"/jwks.json", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("If-None-Match", etag)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var set struct{ Keys []jwk }
		if resp.StatusCode == http.StatusOK {
			if err := json.Unmarshal(body, &set); err != nil {
				t.Fatalf("%v: %s", err, body)
			}
			if !strings.HasPrefix(string(body), `{"keys":[`) || strings.Contains(string(body), `"d"`) {
				t.Errorf("body = %s", body)
			}
		}
		return resp, set.Keys
	}

	resp, keys := get("acme", "")
	if resp.StatusCode != http.StatusOK || len(keys) != 0 || resp.Header.Get("Content-Type") != "application/jwk-set+json" {
		t.Errorf("without asymmetric keys: %v, %v", resp, keys)
	}
	if resp, _ := get("nowhere", ""); resp.StatusCode != http.StatusNotFound {
		t.Errorf("unknown namespace: %v", resp.Status)
	}

	made, err := secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "pair", Kind: grapnelv1.Secret_KIND_ED25519})
	if err != nil {
		t.Fatal(err)
	}
	resp, keys = get("acme", resp.Header.Get("ETag"))
	if resp.StatusCode != http.StatusOK || len(keys) != 1 || !strings.Contains(resp.Header.Get("Cache-Control"), "max-age=") {
		t.Fatalf("after a new key: %v, %v", resp, keys)
	}
	private, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(made.GetGeneratedValue(), "whsk_"))
	if err != nil {
		t.Fatal(err)
	}
	public, err := base64.RawURLEncoding.DecodeString(keys[0].X)
	if err != nil || !ed25519.PublicKey(public).Equal(ed25519.PrivateKey(private).Public()) {
		t.Errorf("the key published is not the public half: %v", err)
	}
	version := made.GetSecret().GetVersions()[0]
	if k := keys[0]; k.Kty != "OKP" || k.Crv != "Ed25519" || k.Alg != "EdDSA" || k.Use != "sig" || k.Kid != version.GetKeyId() {
		t.Errorf("key = %+v, want kid %s", k, version.GetKeyId())
	}
	if again, _ := get("acme", resp.Header.Get("ETag")); again.StatusCode != http.StatusNotModified {
		t.Errorf("unchanged: %v", again.Status)
	}

	// In an overlap both keys are there, the new one first; without one the old is gone at once.
	name := made.GetSecret().GetName()
	if _, err := secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	if _, both := get("acme", ""); len(both) != 2 || both[1] != keys[0] {
		t.Errorf("in an overlap: %v, want the old key second", both)
	}
	if _, err := secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: name, Overlap: durationpb.New(0)}); err != nil {
		t.Fatal(err)
	}
	if _, one := get("acme", ""); len(one) != 1 || one[0] == keys[0] {
		t.Errorf("after the overlap: %v", one)
	}
}

// TestPluginKeys goes around with a key that a plugin makes: made, shown, used, rotated.
func TestPluginKeys(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	ctx, secrets := t.Context(), grapnelv1.NewSecretServiceClient(s.Conn)
	made, err := secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "own", Plugin: "plugins/standard-webhooks"})
	if err != nil {
		t.Fatal(err)
	}
	got := made.GetSecret()
	if got.GetPlugin() != "plugins/standard-webhooks" || got.GetSlot() != "key" || !strings.HasPrefix(made.GetGeneratedValue(), "whsec_") || got.GetVersions()[0].GetAlgorithm() == "" {
		t.Errorf("made = %v", got)
	}
	if _, err := secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: got.GetName(), Value: "no key at all"}); err == nil || !strings.Contains(err.Error(), "value") {
		t.Errorf("a value that is no key: %v", err)
	}
	rotated, err := secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: got.GetName()})
	if err != nil || rotated.GetSecret().GetVersions()[0].GetAlgorithm() != got.GetVersions()[0].GetAlgorithm() {
		t.Errorf("rotated = %v, %v", rotated.GetSecret(), err)
	}
	if _, err := secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "x", Plugin: "plugins/nobody"}); err == nil || !strings.Contains(err.Error(), "plugins/standard-webhooks") {
		t.Errorf("unknown plugin: %v", err)
	}

	// A key bound to nobody is checked by who uses it.
	_, err = grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/acme", SubscriptionId: "orders", Subscription: &grapnelv1.Subscription{
			Uri: "http://127.0.0.1:1/", Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/free"}}},
		},
	})
	if err == nil {
		t.Fatal("a secret that does not exist was taken")
	}
	free, err := secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: "free", Value: made.GetGeneratedValue()})
	if err != nil {
		t.Fatal(err)
	}
	_, err = grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/acme", SubscriptionId: "orders", Subscription: &grapnelv1.Subscription{
			Uri: "http://127.0.0.1:1/", Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/free"}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: free.GetSecret().GetName(), Value: "anything"})
	if err == nil || !strings.Contains(err.Error(), "plugins/standard-webhooks") || strings.Contains(err.Error(), "anything") {
		t.Errorf("a value that its user cannot read: %v", err)
	}
}

// TestKeyPairsOfPlugins: whatever pair a plugin says it can make is made, published under the kid that its
// signatures carry, and of the same algorithm after a rotation.
func TestKeyPairsOfPlugins(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	ctx, secrets := t.Context(), grapnelv1.NewSecretServiceClient(s.Conn)
	published := func() string {
		t.Helper()
		resp, err := http.Get("http://" + s.AdminAddr + "/namespaces/acme/jwks.json")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		for _, private := range []string{`"d":`, `"p":`, `"k":`} {
			if strings.Contains(string(body), private) {
				t.Errorf("the key set has %s", private)
			}
		}
		return string(body)
	}
	pairs := 0
	for p, err := range s.Client.Plugins(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		for _, slot := range p.GetSecretSlots() {
			for i, algorithm := range slot.GetAlgorithms() {
				id := strings.TrimPrefix(p.GetName(), "plugins/") + "-" + slot.GetSlot() + "-" + string(rune('a'+i))
				made, err := secrets.CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
					Parent: "namespaces/acme", SecretId: strings.ReplaceAll(id, "_", "-"), Plugin: p.GetName(), Slot: slot.GetSlot(), Algorithm: algorithm,
				})
				if err != nil {
					t.Errorf("%s %s %s: %v", p.GetName(), slot.GetSlot(), algorithm, err)
					continue
				}
				rotated, err := secrets.RotateSecret(ctx, &grapnelv1.RotateSecretRequest{Name: made.GetSecret().GetName()})
				if err != nil {
					t.Errorf("%s %s %s: rotate: %v", p.GetName(), slot.GetSlot(), algorithm, err)
					continue
				}
				versions := rotated.GetSecret().GetVersions()
				if versions[0].GetAlgorithm() != versions[1].GetAlgorithm() || made.GetGeneratedValue() == "" || made.GetGeneratedValue() == rotated.GetGeneratedValue() {
					t.Errorf("%s %s %s: %v", p.GetName(), slot.GetSlot(), algorithm, versions)
				}
				for _, v := range versions {
					if (v.GetPublicKey() == "") != (v.GetJwk() == "") {
						t.Errorf("%s %s %s: has a public key or a JWK, and not both", p.GetName(), slot.GetSlot(), algorithm)
					}
					if v.GetJwk() == "" {
						continue
					}
					pairs++
					if set := published(); v.GetKeyId() == "" || !strings.Contains(set, `"kid":"`+v.GetKeyId()+`"`) {
						t.Errorf("%s %s %s: kid %q is not in %s", p.GetName(), slot.GetSlot(), algorithm, v.GetKeyId(), set)
					}
				}
			}
		}
	}
	if pairs < 10 {
		t.Errorf("only %d key pairs were made", pairs)
	}
}
