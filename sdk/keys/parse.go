package keys

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// Complaints about a value. None shows any of it.
var (
	errEmpty     = errors.New("no key is given")
	errForm      = errors.New("the key is none of PEM (-----BEGIN PRIVATE KEY-----), a private JSON Web Key ({\"kty\":…}) and whsk_… (ed25519)")
	errPublic    = errors.New("this is a public key; signing needs the private one")
	errCert      = errors.New("this is a certificate; signing needs its private key")
	errEncrypted = errors.New("the key is encrypted with a passphrase; decrypt it first, with openssl pkcs8 -topk8 -nocrypt")
	errOpenSSH   = errors.New("this is an OpenSSH key; it must be PKCS#8 (-----BEGIN PRIVATE KEY-----)")
	errPEM       = errors.New("the PEM cannot be read: its header, its base64 or its end is damaged")
	errDER       = errors.New("the PEM's content is not the key that its header promises")
	errMore      = errors.New("there is more than one key; give one private key")
	errRest      = errors.New("there is text after the key")
	errPair      = errors.New("the key's public half does not belong to its private half")
	errCurve     = errors.New("the elliptic curve is not one of P-256 and P-384")
	errKind      = errors.New("the key's type cannot sign; it must be Ed25519, EC (P-256 or P-384) or RSA")
)

// maxValue bounds what is looked at; an RSA key of 4096 bits takes 4 KiB.
const maxValue = 64 << 10

// Parse reads a private key: PEM (PKCS#8, SEC 1 or PKCS#1), a private JSON Web Key (RFC 7517; OKP with
// Ed25519, EC with P-256 or P-384, RSA) or whsk_ and base64 of an ed25519 seed, with or without its public
// key. White space around it is ignored. Errors say what is wrong and show nothing of the value.
func Parse(value []byte) (*Key, error) {
	if len(value) > maxValue {
		return nil, fmt.Errorf("the key has %d bytes; no key is longer than %d", len(value), maxValue)
	}
	value = bytes.TrimSpace(value)
	switch {
	case len(value) == 0:
		return nil, errEmpty
	case value[0] == '{':
		return parseJWK(value)
	case bytes.HasPrefix(value, []byte("whsk_")):
		return parseWhsk(string(value[len("whsk_"):]))
	case bytes.HasPrefix(value, []byte("whpk_")):
		return nil, errPublic
	case bytes.Contains(value, []byte("-----BEGIN ")):
		return parsePEM(value)
	case bytes.HasPrefix(value, []byte("ssh-")), bytes.HasPrefix(value, []byte("ecdsa-sha2-")):
		return nil, errPublic
	}
	return nil, errForm
}

// parsePEM takes a text with exactly one private key. The EC PARAMETERS that openssl ecparam writes before
// a key are skipped.
func parsePEM(value []byte) (*Key, error) {
	var found *pem.Block
	for len(bytes.TrimSpace(value)) > 0 {
		block, rest := pem.Decode(value)
		switch {
		case block == nil && found != nil && !bytes.Contains(value, []byte("-----BEGIN ")):
			return nil, errRest
		case block == nil:
			return nil, errPEM
		case block.Type == "EC PARAMETERS":
		case found != nil:
			return nil, errMore
		default:
			found = block
		}
		value = rest
	}
	if found == nil {
		return nil, errPEM
	}
	return parseBlock(found)
}

func parseBlock(block *pem.Block) (*Key, error) {
	if block.Headers["DEK-Info"] != "" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
		return nil, errEncrypted
	}
	var private any
	var err error
	switch block.Type {
	case "PRIVATE KEY":
		private, err = parsePKCS8(block.Bytes)
	case "EC PRIVATE KEY":
		private, err = parseSEC1(block.Bytes)
	case "RSA PRIVATE KEY":
		private, err = parsePKCS1(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, errEncrypted
	case "OPENSSH PRIVATE KEY":
		return nil, errOpenSSH
	case "PUBLIC KEY", "RSA PUBLIC KEY", "EC PUBLIC KEY", "SSH2 PUBLIC KEY":
		return nil, errPublic
	case "CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE", "CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST":
		return nil, errCert
	default:
		return nil, errors.New("the PEM holds no private key; it must be PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY")
	}
	if err != nil {
		return nil, err
	}
	signer, ok := private.(crypto.Signer)
	if !ok {
		return nil, errKind // X25519 is for key agreement
	}
	return newKey(signer)
}

// oneAsymmetricKey is RFC 5958's, of which PKCS#8 is the first version.
type oneAsymmetricKey struct {
	Version    int
	Algorithm  asn1.RawValue
	PrivateKey []byte
	Attributes asn1.RawValue  `asn1:"optional,tag:0"`
	PublicKey  asn1.BitString `asn1:"optional,tag:1"`
}

// parsePKCS8 reads what crypto/x509 does, and two things more: RSA keys marked as RSASSA-PSS (RFC 4055), as
// openssl genpkey -algorithm RSA-PSS writes them and RFC 9421 prints one, and the public halves that
// crypto/x509 skips, to compare them.
func parsePKCS8(der []byte) (any, error) {
	var outer oneAsymmetricKey
	if _, err := asn1.Unmarshal(der, &outer); err != nil {
		if _, err := x509.ParsePKIXPublicKey(der); err == nil {
			return nil, errPublic
		}
		return nil, errDER
	}
	for _, oid := range []string{oidRSA, oidRSASSAPSS} {
		if bytes.HasPrefix(outer.Algorithm.Bytes, []byte(oid)) {
			return parsePKCS1(outer.PrivateKey)
		}
	}
	private, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("the key is damaged, or of a type that cannot be used; it must be Ed25519, EC (P-256 or P-384) or RSA")
	}
	if edKey, ok := private.(ed25519.PrivateKey); ok && outer.PublicKey.BitLength > 0 {
		if !bytes.Equal(outer.PublicKey.RightAlign(), edKey[ed25519.SeedSize:]) {
			return nil, errPair
		}
	}
	return private, checkSEC1Pair(outer.PrivateKey, private)
}

// Object identifiers in DER: rsaEncryption and id-RSASSA-PSS.
const (
	oidRSA       = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"
	oidRSASSAPSS = "\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0a"
)

// rsaPrivateKey is RFC 8017's, read first for its sizes: crypto/x509 would compute with numbers of any.
type rsaPrivateKey struct {
	Version                          int
	N                                *big.Int
	E                                *big.Int
	D, P, Q, ExpP, ExpQ, Coefficient *big.Int
	Other                            asn1.RawValue `asn1:"optional"`
}

func parsePKCS1(der []byte) (any, error) {
	var numbers rsaPrivateKey
	if _, err := asn1.Unmarshal(der, &numbers); err != nil {
		return nil, errDER
	}
	if err := checkRSASize(numbers.N.BitLen()); err != nil {
		return nil, err
	}
	for _, n := range []*big.Int{numbers.E, numbers.D, numbers.P, numbers.Q, numbers.ExpP, numbers.ExpQ, numbers.Coefficient} {
		if n.BitLen() > numbers.N.BitLen() {
			return nil, errPair
		}
	}
	private, err := x509.ParsePKCS1PrivateKey(der)
	if err == nil {
		return private, nil
	}
	return nil, errors.New("the RSA key's numbers do not belong together")
}

// ecPrivateKey is RFC 5915's.
type ecPrivateKey struct {
	Version    int
	PrivateKey []byte
	Curve      asn1.ObjectIdentifier `asn1:"optional,explicit,tag:0"`
	PublicKey  asn1.BitString        `asn1:"optional,explicit,tag:1"`
}

func parseSEC1(der []byte) (any, error) {
	private, err := x509.ParseECPrivateKey(der)
	if err != nil {
		if strings.Contains(err.Error(), "curve") {
			return nil, errCurve
		}
		return nil, errDER
	}
	return private, checkSEC1Pair(der, private)
}

// checkSEC1Pair compares the public half that an RFC 5915 structure may carry, which crypto/x509 ignores.
func checkSEC1Pair(der []byte, private any) error {
	signer, ok := private.(interface {
		Public() crypto.PublicKey
	})
	if !ok {
		return nil
	}
	point, ok := publicPoint(signer.Public())
	if !ok {
		return nil
	}
	var inner ecPrivateKey
	if _, err := asn1.Unmarshal(der, &inner); err != nil || inner.PublicKey.BitLength == 0 {
		return nil // no public half to compare
	}
	given := inner.PublicKey.RightAlign()
	if len(given) > 0 && (given[0] == 2 || given[0] == 3) { // compressed: x and the parity of y
		size := (len(point) - 1) / 2
		if bytes.Equal(given[1:], point[1:1+size]) && given[0] == 2+point[len(point)-1]&1 {
			return nil
		}
		return errPair
	}
	if !bytes.Equal(given, point) {
		return errPair
	}
	return nil
}

func parseWhsk(encoded string) (*Key, error) {
	if strings.ContainsAny(encoded, " \t\r\n") {
		return nil, errors.New("the key has a space or a line break in it; remove it")
	}
	raw, err := base64.RawStdEncoding.Strict().DecodeString(strings.TrimRight(encoded, "="))
	if err != nil {
		return nil, errors.New("the part after whsk_ is not standard base64 (A-Z a-z 0-9 + /)")
	}
	switch len(raw) {
	case ed25519.SeedSize:
		return newKey(ed25519.NewKeyFromSeed(raw))
	case ed25519.PrivateKeySize:
		private := ed25519.NewKeyFromSeed(raw[:ed25519.SeedSize])
		if !bytes.Equal(private, raw) {
			return nil, errPair
		}
		return newKey(private)
	}
	return nil, fmt.Errorf("an ed25519 key is %d bytes (seed) or %d (seed and public key) before base64; this one is %d",
		ed25519.SeedSize, ed25519.PrivateKeySize, len(raw))
}
