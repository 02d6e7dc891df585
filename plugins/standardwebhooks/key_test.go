package standardwebhooks

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
)

// TestPublicHalf takes the key pair and the thumbprint of RFC 8037, appendix A.
func TestPublicHalf(t *testing.T) {
	seed, err := base64.RawURLEncoding.DecodeString("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A")
	if err != nil {
		t.Fatal(err)
	}
	info, err := format().Read([]byte("whsk_" + base64.StdEncoding.EncodeToString(seed)))
	if err != nil {
		t.Fatal(err)
	}
	if want := "whpk_11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="; info.PublicKey != want {
		t.Errorf("public key %s, want %s", info.PublicKey, want)
	}
	if info.Algorithm != "ed25519" || info.KeyID != "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k" {
		t.Errorf("algorithm %s, key id %s", info.Algorithm, info.KeyID)
	}
	var jwk map[string]string
	if err := json.Unmarshal([]byte(info.JWK), &jwk); err != nil {
		t.Fatal(err)
	}
	if jwk["kid"] != info.KeyID || jwk["kty"] != "OKP" || jwk["crv"] != "Ed25519" || jwk["d"] != "" || jwk["x"] != "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" {
		t.Errorf("JWK %s", info.JWK)
	}
}

func TestGeneratedKeys(t *testing.T) {
	f := format()
	for algorithm, prefix := range map[string]string{"hmac-sha256": "whsec_", "ed25519": "whsk_"} {
		seen := map[string]bool{}
		for range 3 {
			value, err := f.Generate(algorithm)
			if err != nil {
				t.Fatal(err)
			}
			info, err := f.Read(value)
			if err != nil {
				t.Fatalf("%s: %v", algorithm, err)
			}
			if !strings.HasPrefix(string(value), prefix) || info.Algorithm != algorithm || seen[string(value)] {
				t.Errorf("%s: made %s for %s", algorithm, value, info.Algorithm)
			}
			if (info.PublicKey != "") != (algorithm == "ed25519") || (info.JWK != "") != (algorithm == "ed25519") {
				t.Errorf("%s: public key %q, JWK %q", algorithm, info.PublicKey, info.JWK)
			}
			seen[string(value)] = true
		}
	}
}
