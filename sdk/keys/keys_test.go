package keys_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/keys"
)

// The key of RFC 8037 appendix A.1 and its thumbprint of A.3.
const (
	rfc8037Key        = `{"kty":"OKP","crv":"Ed25519","d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`
	rfc8037Thumbprint = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
)

// The RSA key of RFC 7517 appendix A.2, whose thumbprint RFC 7638 section 3.1 computes.
const (
	rfc7517Key = `{"kty":"RSA","alg":"RS256","kid":"2011-04-29","e":"AQAB",` +
		`"n":"0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",` +
		`"d":"X4cTteJY_gn4FYPsXB8rdXix5vwsg1FLN5E3EaG6RJoVH-HLLKD9M7dx5oo7GURknchnrRweUkC7hT5fJLM0WbFAKNLWY2vv7B6NqXSzUvxT0_YSfqijwp3RTzlBaCxWp4doFk5N2o8Gy_nHNKroADIkJ46pRUohsXywbReAdYaMwFs9tv8d_cPVY3i07a3t8MN6TNwm0dSawm9v47UiCl3Sk5ZiG7xojPLu4sbg1U2jx4IBTNBznbJSzFHK66jT8bgkuqsk0GjskDJk19Z4qwjwbsnn4j2WBii3RL-Us2lGVkY8fkFzme1z0HbIkfz0Y6mqnOYtqc0X4jfcKoAC8Q",` +
		`"p":"83i-7IvMGXoMXCskv73TKr8637FiO7Z27zv8oj6pbWUQyLPQBQxtPVnwD20R-60eTDmD2ujnMt5PoqMrm8RfmNhVWDtjjMmCMjOpSXicFHj7XOuVIYQyqVWlWEh6dN36GVZYk93N8Bc9vY41xy8B9RzzOGVQzXvNEvn7O0nVbfs",` +
		`"q":"3dfOR9cuYq-0S-mkFLzgItgMEfFzB2q3hWehMuG0oCuqnb3vobLyumqjVZQO1dIrdwgTnCdpYzBcOfW5r370AFXjiWft_NGEiovonizhKpo9VVS78TzFgxkIdrecRezsZ-1kYd_s1qDbxtkDEgfAITAG9LUnADun4vIcb6yelxk"}`
	rfc7638Thumbprint = "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
)

// The key of RFC 7515 appendix A.3.1.
const rfc7515EC = `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}`

func file(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func mustParse(t testing.TB, value []byte) *keys.Key {
	t.Helper()
	k, err := keys.Parse(value)
	if err != nil {
		t.Fatalf("parse: %v", err)
	}
	return k
}

func TestGeneratedKeysSignAndVerify(t *testing.T) {
	message := []byte("what was done \x00\xff")
	tests := []struct{ generate, algorithm, scheme string }{
		{keys.Ed25519, keys.Ed25519, keys.Ed25519},
		{keys.ECDSAP256, keys.ECDSAP256, keys.ECDSAP256},
		{keys.ECDSAP384, keys.ECDSAP384, keys.ECDSAP384},
		{keys.RSAPSSSHA512, keys.RSA, keys.RSAPSSSHA512},
		{keys.RSAV15SHA256, keys.RSA, keys.RSAV15SHA256},
		{keys.RSA, keys.RSA, keys.RSAPSSSHA256},
	}
	for _, tt := range tests {
		t.Run(tt.generate, func(t *testing.T) {
			value, err := keys.Generate(tt.generate)
			if err != nil {
				t.Fatal(err)
			}
			k := mustParse(t, value)
			if k.Algorithm() != tt.algorithm {
				t.Errorf("algorithm %q, want %q", k.Algorithm(), tt.algorithm)
			}
			if !bytes.Equal(k.PEM(), value) {
				t.Error("PEM is not what was generated")
			}
			again := mustParse(t, k.PrivateJWK(""))
			if again.ID() != k.ID() || !bytes.Equal(again.PEM(), k.PEM()) {
				t.Error("the private JWK is another key")
			}
			signature, err := k.Sign(tt.scheme, message)
			if err != nil {
				t.Fatal(err)
			}
			if !verify(t, k.PublicPEM(), tt.scheme, message, signature) {
				t.Error("signature does not verify with the public PEM")
			}
		})
	}
	if _, err := keys.Generate("dsa"); err == nil || !strings.Contains(err.Error(), keys.ECDSAP256) {
		t.Errorf("generate dsa: %v, want an error that names what there is", err)
	}
}

// verify is the receiver's side, from the public PEM alone.
func verify(t *testing.T, publicPEM, scheme string, message, signature []byte) bool {
	t.Helper()
	block, rest := pem.Decode([]byte(publicPEM))
	if block == nil || block.Type != "PUBLIC KEY" || len(rest) > 0 {
		t.Fatalf("public PEM %q", publicPEM)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	s256, s384, s512 := sha256.Sum256(message), sha512.Sum384(message), sha512.Sum512(message)
	switch scheme {
	case keys.Ed25519:
		return ed25519.Verify(public.(ed25519.PublicKey), message, signature)
	case keys.ECDSAP256, keys.ECDSAP384:
		digest, size := s256[:], 32
		if scheme == keys.ECDSAP384 {
			digest, size = s384[:], 48
		}
		if len(signature) != 2*size {
			t.Errorf("signature of %d bytes, want %d", len(signature), 2*size)
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
		return ecdsa.Verify(public.(*ecdsa.PublicKey), digest, r, s)
	case keys.RSAV15SHA256:
		return rsa.VerifyPKCS1v15(public.(*rsa.PublicKey), crypto.SHA256, s256[:], signature) == nil
	case keys.RSAPSSSHA256:
		return rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA256, s256[:], signature, &rsa.PSSOptions{SaltLength: 32}) == nil
	}
	return rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA512, s512[:], signature, &rsa.PSSOptions{SaltLength: 64}) == nil
}

func TestAKeySignsOnlyItsOwnSchemes(t *testing.T) {
	k := mustParse(t, file(t, "ed25519.pem"))
	if _, err := k.Sign(keys.RSAPSSSHA512, nil); err == nil || !strings.Contains(err.Error(), keys.Ed25519) {
		t.Errorf("ed25519 key signing RSA: %v", err)
	}
	if mustParse(t, file(t, "rsa-pkcs1.pem")).CanSign(keys.RSA) {
		t.Error("rsa alone is no scheme to sign with")
	}
}

func TestParseForms(t *testing.T) {
	const whsk = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
	raw, _ := base64.StdEncoding.DecodeString(whsk[5:])
	tests := []struct {
		name  string
		value []byte
		want  string
	}{
		{"PKCS#8", file(t, "ed25519.pem"), keys.Ed25519},
		{"SEC 1 after its parameters", file(t, "ec-p256-params.pem"), keys.ECDSAP256},
		{"SEC 1", file(t, "ec-p384-sec1.pem"), keys.ECDSAP384},
		{"PKCS#1", file(t, "rsa-pkcs1.pem"), keys.RSA},
		{"RSASSA-PSS", file(t, "rsa-pss.pem"), keys.RSA},
		{"JWK OKP", []byte(rfc8037Key), keys.Ed25519},
		{"JWK EC", []byte(rfc7515EC), keys.ECDSAP256},
		{"JWK RSA", []byte(rfc7517Key), keys.RSA},
		{"whsk", []byte(whsk), keys.Ed25519},
		{"whsk of the seed", []byte("whsk_" + base64.StdEncoding.EncodeToString(raw[:32])), keys.Ed25519},
		{"white space around", []byte("\r\n " + string(file(t, "ed25519.pem")) + "\n\n"), keys.Ed25519},
		{"CRLF", bytes.ReplaceAll(file(t, "ed25519.pem"), []byte("\n"), []byte("\r\n")), keys.Ed25519},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k := mustParse(t, tt.value)
			if k.Algorithm() != tt.want {
				t.Errorf("algorithm %q, want %q", k.Algorithm(), tt.want)
			}
			again := mustParse(t, k.PEM())
			if diff := cmp.Diff([]string{k.ID(), k.PublicPEM()}, []string{again.ID(), again.PublicPEM()}); diff != "" {
				t.Errorf("PEM is another key (-want +got):\n%s", diff)
			}
		})
	}
	if a, b := mustParse(t, []byte(whsk)), mustParse(t, []byte("whsk_"+base64.StdEncoding.EncodeToString(raw[:32]))); a.ID() != b.ID() {
		t.Error("seed and seed with public key are two keys")
	}
}

func TestPublicHalves(t *testing.T) {
	ed := mustParse(t, []byte(rfc8037Key))
	if ed.ID() != rfc8037Thumbprint {
		t.Errorf("thumbprint %s, want RFC 8037's %s", ed.ID(), rfc8037Thumbprint)
	}
	rsaKey := mustParse(t, []byte(rfc7517Key))
	if rsaKey.ID() != rfc7638Thumbprint {
		t.Errorf("thumbprint %s, want RFC 7638's %s", rsaKey.ID(), rfc7638Thumbprint)
	}
	want := map[string]string{
		"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo",
		"kid": rfc8037Thumbprint, "use": "sig", "alg": "EdDSA",
	}
	if diff := cmp.Diff(want, object(t, []byte(ed.JWK()))); diff != "" {
		t.Errorf("public JWK (-want +got):\n%s", diff)
	}
	if got := object(t, []byte(rsaKey.JWK()))["alg"]; got != "RS256" {
		t.Errorf("alg %q of an RSA JWK, want that of the key read, RS256", got)
	}
	if alg, ok := object(t, []byte(mustParse(t, file(t, "rsa-pkcs1.pem")).JWK()))["alg"]; ok {
		t.Errorf("alg %q of an RSA key that names none", alg)
	}
	for _, value := range [][]byte{[]byte(rfc8037Key), []byte(rfc7515EC), []byte(rfc7517Key)} {
		public := object(t, []byte(mustParse(t, value).JWK()))
		for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "k"} {
			if _, ok := public[private]; ok {
				t.Errorf("the public JWK has %s", private)
			}
		}
	}
	if got := mustParse(t, mustParse(t, file(t, "rsa-pkcs1.pem")).PrivateJWK("PS512")); got.Alg() != "PS512" {
		t.Errorf("alg %q after a round trip, want PS512", got.Alg())
	}
}

func object(t *testing.T, doc []byte) map[string]string {
	t.Helper()
	var m map[string]string
	if err := json.Unmarshal(doc, &m); err != nil {
		t.Fatalf("JWK is not an object of strings: %v", err)
	}
	return m
}

// edit changes members of a JWK; an empty value deletes.
func edit(t *testing.T, jwk string, changes ...string) []byte {
	t.Helper()
	m := object(t, []byte(jwk))
	for i := 0; i < len(changes); i += 2 {
		m[changes[i]] = changes[i+1]
		if changes[i+1] == "" {
			delete(m, changes[i])
		}
	}
	out, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestBadValuesAreRefusedWithoutShowingThem(t *testing.T) {
	other := object(t, []byte(mustParse(t, file(t, "ec-p256-params.pem")).JWK()))
	ed := file(t, "ed25519.pem")
	tests := []struct {
		name  string
		value []byte
		hint  string
	}{
		{"nothing", nil, "no key"},
		{"white space", []byte(" \n"), "no key"},
		{"a word", []byte("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), "PEM"},
		{"too long", bytes.Repeat([]byte("a"), 70_000), "65536"},
		{"public PEM", file(t, "public.pem"), "public key"},
		{"whpk", []byte("whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="), "public key"},
		{"ssh public", []byte("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ5027OA6R"), "public key"},
		{"public JWK", edit(t, rfc8037Key, "d", ""), "public key"},
		{"certificate", file(t, "certificate.pem"), "certificate"},
		{"key and certificate", append(file(t, "rsa-pkcs1.pem"), file(t, "certificate.pem")...), "more than one"},
		{"two keys", append(slices.Clone(ed), ed...), "more than one"},
		{"text after", append(slices.Clone(ed), "hunter2hunter2"...), "after the key"},
		{"encrypted PKCS#8", file(t, "encrypted-pkcs8.pem"), "passphrase"},
		{"encrypted SEC 1", file(t, "encrypted-sec1.pem"), "passphrase"},
		{"OpenSSH", pemOf("OPENSSH PRIVATE KEY", []byte("openssh-key-v1")), "OpenSSH"},
		{"another PEM", pemOf("PGP MESSAGE", []byte("x")), "PRIVATE KEY"},
		{"cut off", ed[:60], "damaged"},
		{"not DER", pemOf("PRIVATE KEY", []byte("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")), "not the key"},
		{"not DER, SEC 1", pemOf("EC PRIVATE KEY", []byte("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")), "not the key"},
		{"not DER, PKCS#1", pemOf("RSA PRIVATE KEY", []byte("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")), "not the key"},
		{"X25519", file(t, "x25519.pem"), "cannot sign"},
		{"Ed448", file(t, "ed448.pem"), "Ed25519"},
		{"P-521", file(t, "ec-p521.pem"), "P-256 and P-384"},
		{"RSA 1024", file(t, "rsa-1024.pem"), "2048"},
		{"RSA of 16384 bits, PKCS#1", bigPKCS1(t), "16384 bits; at most 4096"},
		{"RSA of 8192 bits", file(t, "rsa-8192.pem"), "8192 bits; at most 4096"},
		{"public half in a private header", pemOf("PRIVATE KEY", derOf(t, file(t, "public.pem"))), "public key"},
		{"not JSON", []byte(`{"kty":"OKP","d":"nWGxne_9WmC6hEr0`), "JSON"},
		{"JWK with a number", []byte(`{"kty":"OKP","d":12345678}`), "JSON"},
		{"JWKS", []byte(`{"keys":[` + rfc8037Key + `]}`), "set"},
		{"oct", []byte(`{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ"}`), "shared key"},
		{"for encryption", edit(t, rfc8037Key, "use", "enc"), "use"},
		{"OKP of another curve", edit(t, rfc8037Key, "crv", "X25519"), "Ed25519"},
		{"EC of another curve", edit(t, rfc7515EC, "crv", "P-521"), "P-256"},
		{"EC on the wrong curve", edit(t, rfc7515EC, "crv", "P-384"), "48 bytes"},
		{"padded", edit(t, rfc8037Key, "d", "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="), "base64url"},
		{"short d", edit(t, rfc8037Key, "d", "nWGxne_9WmC6hEr0"), "32 bytes"},
		{"d of zero", edit(t, rfc7515EC, "d", strings.Repeat("A", 43)), "its curve"},
		{"no x", edit(t, rfc7515EC, "x", ""), "no x"},
		{"alg of another key", edit(t, rfc7515EC, "alg", "RS256"), "ES256"},
		{"RSA without primes", edit(t, rfc7517Key, "p", "", "q", ""), "primes"},
		{"RSA with an even exponent", edit(t, rfc7517Key, "e", "Ag"), "exponent"},
		{"RSA with a huge exponent", edit(t, rfc7517Key, "e", strings.Repeat("A_", 40)), "exponent"},
		{"RSA of 16384 bits", edit(t, rfc7517Key, "n", strings.Repeat("_", 2728)), "4096"},
		{"halves of two OKP keys", edit(t, rfc8037Key, "x", "JrQLj5P_89iXES9-vFgrIy29clF9CC_oPPsw3c5D0bs"), "does not belong"},
		{"halves of two EC keys", edit(t, rfc7515EC, "x", other["x"], "y", other["y"]), "does not belong"},
		{"halves of two RSA keys", edit(t, rfc7517Key, "d", object(t, []byte(rfc7517Key))["n"]), "does not belong"},
		{"halves of two EC keys, SEC 1", mixSEC1(t), "does not belong"},
		{"halves of two ed25519 keys, PKCS#8", mixPKCS8(t), "does not belong"},
		{"halves of two, whsk", []byte("whsk_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 64))), "does not belong"},
		{"short whsk", []byte("whsk_" + base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 31))), "this one is 31"},
		{"whsk with a break", []byte("whsk_BwcHBwcHBwcHBwcHBwcH\nBwcHBwcHBwcHBwcHBwcHBwcHBwc="), "line break"},
		{"whsk in the URL alphabet", []byte("whsk_-_" + strings.Repeat("a", 41)), "standard base64"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, err := keys.Parse(tt.value)
			if err == nil {
				t.Fatalf("taken as %v", k)
			}
			if !strings.Contains(err.Error(), tt.hint) {
				t.Errorf("error %q, want it to say %q", err, tt.hint)
			}
			noneOf(t, err.Error(), tt.value)
		})
	}
}

// noneOf fails when text repeats 10 characters of value that are not words of this package's own.
func noneOf(t *testing.T, text string, value []byte) {
	t.Helper()
	for i := 0; i+10 <= len(value); i++ {
		part := string(value[i : i+10])
		if strings.Contains(text, part) && !strings.Contains("-----BEGIN PRIVATE KEY-----", part) && !strings.Contains("EC PRIVATE KEY or RSA PRIVATE KEY", part) {
			t.Errorf("error %q shows %q of the value", text, part)
			return
		}
	}
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func derOf(t *testing.T, value []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(value)
	if block == nil {
		t.Fatal("no PEM")
	}
	return block.Bytes
}

// bigPKCS1 is a text that would take long to compute with.
func bigPKCS1(t *testing.T) []byte {
	t.Helper()
	n := new(big.Int).Lsh(big.NewInt(3), 16382)
	n.Add(n, big.NewInt(1))
	der, err := asn1.Marshal(struct {
		Version                  int
		N, E, D, P, Q, X, Y, Inv *big.Int
	}{0, n, big.NewInt(65537), n, n, n, n, n, n})
	if err != nil {
		t.Fatal(err)
	}
	return pemOf("RSA PRIVATE KEY", der)
}

// mixSEC1 is a SEC 1 key with one bit of its public half turned.
func mixSEC1(t *testing.T) []byte {
	t.Helper()
	block, _ := pem.Decode(file(t, "ec-p384-sec1.pem"))
	block.Bytes[len(block.Bytes)-1] ^= 1
	return pem.EncodeToMemory(block)
}

// mixPKCS8 is an ed25519 key of RFC 8410's second version, whose public half is another's.
func mixPKCS8(t *testing.T) []byte {
	t.Helper()
	block, _ := pem.Decode(file(t, "ed25519.pem"))
	der := slices.Clone(block.Bytes)
	der[4] = 1 // version v2
	der = append(der, 0x81, 0x21, 0x00)
	der = append(der, bytes.Repeat([]byte{0x42}, 32)...)
	der[1] = byte(len(der) - 2)
	return pemOf("PRIVATE KEY", der)
}

func TestPrintingShowsNothing(t *testing.T) {
	k := mustParse(t, []byte(rfc8037Key))
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q", "%d"} {
		text := fmt.Sprintf(verb, k)
		if !strings.Contains(text, rfc8037Thumbprint) || strings.Contains(text, "nWGxne_9") || strings.Contains(text, "9d61b19d") {
			t.Errorf("%s prints %q", verb, text)
		}
	}
}

func TestShared(t *testing.T) {
	raw := []byte("0123456789abcdef\xff")
	std := base64.StdEncoding.EncodeToString(raw)
	url := base64.RawURLEncoding.EncodeToString(raw)
	for name, value := range map[string]string{
		"base64": "base64:" + std, "base64url": "base64:" + url, "whsec": "whsec_" + std, "oct": `{"kty":"oct","k":"` + url + `"}`,
	} {
		got, err := keys.ParseShared([]byte(value))
		if err != nil || !bytes.Equal(got, raw) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if got, err := keys.ParseShared([]byte(std)); err != nil || string(got) != std {
		t.Errorf("plain text: %q, %v; want it as it stands", got, err)
	}
	for _, tt := range []struct{ name, value, hint string }{
		{"nothing", "", "no key"},
		{"short", "hunter2", "this one has 7"},
		{"short base64", "base64:aGk=", "this one has 2"},
		{"broken base64", "base64:MfKQ9r8GKYqrTwjUPD8ILPZIo2L!!", "not base64"},
		{"line break", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n", "line break"},
		{"PEM", string(file(t, "ed25519.pem")), "no shared key"},
		{"whsk", "whsk_BwcHBwcHBwcHBwcHBwcHBwcHBwc", "no shared key"},
		{"private JWK", rfc8037Key, "no shared key"},
		{"oct without k", `{"kty":"oct"}`, "no k"},
	} {
		_, err := keys.ParseShared([]byte(tt.value))
		if err == nil || !strings.Contains(err.Error(), tt.hint) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.hint)
			continue
		}
		noneOf(t, err.Error(), []byte(tt.value))
	}
	for value, want := range map[string]bool{
		std + "==": false, "base64:" + std: false, "correct horse battery staple, correct": false,
		strings.Repeat("a1", 16): true, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{9}, 32)): true,
	} {
		if got := keys.LooksEncoded([]byte(value)); got != want {
			t.Errorf("LooksEncoded(%q) = %v", value, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	paths, err := filepath.Glob("testdata/*.pem")
	if err != nil || len(paths) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, p := range paths {
		f.Add(file(f, filepath.Base(p)))
	}
	for _, s := range []string{rfc8037Key, rfc7517Key, rfc7515EC, "whsk_" + strings.Repeat("A", 43), "whpk_", "{", ""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		k, err := keys.Parse(value)
		if _, sharedErr := keys.ParseShared(value); sharedErr == nil && err == nil {
			t.Fatal("both a private key and a shared key")
		}
		if err != nil {
			if k != nil {
				t.Fatal("a key beside an error")
			}
			return
		}
		again, err := keys.Parse(k.PEM())
		if err != nil || again.ID() != k.ID() {
			t.Fatalf("own PEM not read back: %v", err)
		}
		scheme := k.Algorithm()
		if scheme == keys.RSA {
			scheme = keys.RSAV15SHA256
		}
		signature, err := k.Sign(scheme, value)
		if err != nil || !verify(t, k.PublicPEM(), scheme, value, signature) {
			t.Fatalf("taken, but does not sign: %v", err)
		}
	})
}
