package oauth2_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/oauth2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// verify holds a signature against the public key that the authorization server was given.
func verify(t *testing.T, publicPEM, alg, signed string, signature []byte) bool {
	t.Helper()
	block, _ := pem.Decode([]byte(publicPEM))
	if block == nil {
		t.Fatal("the public key is no PEM")
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	sum256, sum384 := sha256.Sum256([]byte(signed)), sha512.Sum384([]byte(signed))
	halves := func() (*big.Int, *big.Int) {
		n := len(signature) / 2
		return new(big.Int).SetBytes(signature[:n]), new(big.Int).SetBytes(signature[n:])
	}
	switch alg {
	case "EdDSA":
		return ed25519.Verify(public.(ed25519.PublicKey), []byte(signed), signature)
	case "ES256":
		r, s := halves()
		return len(signature) == 64 && ecdsa.Verify(public.(*ecdsa.PublicKey), sum256[:], r, s)
	case "ES384":
		r, s := halves()
		return len(signature) == 96 && ecdsa.Verify(public.(*ecdsa.PublicKey), sum384[:], r, s)
	case "RS256":
		return rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, sum256[:], signature) == nil
	}
	t.Fatalf("alg %q", alg)
	return false
}

func TestPrivateKeyJWT(t *testing.T) {
	format := oauth2.SigningKeyFormat()
	for _, algorithm := range format.Algorithms {
		t.Run(algorithm, func(t *testing.T) {
			key, err := format.Generate(algorithm)
			if err != nil {
				t.Fatal(err)
			}
			info, err := format.Read(key)
			if err != nil || info.PublicKey == "" || info.JWK == "" || info.KeyID == "" {
				t.Fatalf("%+v, %v", info, err)
			}
			e := serve(t, nil)
			c := e.config()
			c.ClientAuth, c.ClientSecret, c.SigningKey = oauth2.PrivateKeyJWT, plugin.Secret{}, plugin.NewSecret(string(key), "older")
			s := newSource(t, c)
			used := map[string]bool{}
			for range 2 {
				s.Refused(token(t, s))
				if e.auth != "" || e.form.Get("client_secret") != "" || e.form.Get("client_id") != "grapnel" ||
					e.form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
					t.Errorf("authorization %q, form %v", e.auth, e.form)
				}
				header, claims := readJWT(t, info.PublicKey, e.form.Get("client_assertion"))
				if header["kid"] != info.KeyID || header["typ"] != "JWT" {
					t.Errorf("header %v", header)
				}
				jti, _ := claims["jti"].(string)
				if used[jti] || len(jti) < 20 {
					t.Errorf("jti %q was used before or can be guessed", jti)
				}
				used[jti] = true
				iat, exp := claims["iat"].(float64), claims["exp"].(float64)
				if now := float64(time.Now().Unix()); iat > now || iat < now-10 || exp != iat+60 {
					t.Errorf("iat %v, exp %v", iat, exp)
				}
				delete(claims, "jti")
				delete(claims, "iat")
				delete(claims, "exp")
				want := map[string]any{"iss": "grapnel", "sub": "grapnel", "aud": e.URL + "/token"}
				if diff := cmp.Diff(want, claims); diff != "" {
					t.Error(diff)
				}
			}
			c.AssertionAudience = "https://issuer.example"
			token(t, newSource(t, c))
			if _, claims := readJWT(t, info.PublicKey, e.form.Get("client_assertion")); claims["aud"] != "https://issuer.example" {
				t.Errorf("aud %v", claims["aud"])
			}
		})
	}
}

func readJWT(t *testing.T, publicPEM, text string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(text, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is no JWT", text)
	}
	raw := make([][]byte, 3)
	for i, p := range parts {
		var err error
		if raw[i], err = base64.RawURLEncoding.DecodeString(p); err != nil {
			t.Fatal(err)
		}
	}
	if err := json.Unmarshal(raw[0], &header); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(raw[1], &claims); err != nil {
		t.Fatal(err)
	}
	alg, _ := header["alg"].(string)
	if !verify(t, publicPEM, alg, parts[0]+"."+parts[1], raw[2]) {
		t.Errorf("the signature with %s does not verify", alg)
	}
	return header, claims
}
