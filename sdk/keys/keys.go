// Package keys makes and reads the private keys of asymmetric signature schemes, and the shared keys of
// their symmetric counterparts, in the forms in which people keep them: PEM, JSON Web Keys and Standard
// Webhooks' whsk_.
//
// It owns the reading: what it returns is complete, its halves belong together and it is strong enough to
// sign with (Ed25519, NIST P-256 and P-384, RSA of 2048 to 4096 bits). Its errors say what is wrong with a
// value's form and what would be right, and show nothing of the value. It does no I/O.
package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// Algorithms of keys, named as RFC 9421 names its signature algorithms. RSA alone is the algorithm of an
// RSA key that was read: which of the RSA schemes it signs with is its user's choice.
const (
	Ed25519      = "ed25519"
	ECDSAP256    = "ecdsa-p256-sha256"
	ECDSAP384    = "ecdsa-p384-sha384"
	RSA          = "rsa"
	RSAPSSSHA512 = "rsa-pss-sha512"
	RSAV15SHA256 = "rsa-v1_5-sha256"
)

// Sizes of RSA keys in bits: what Generate makes and what Parse takes. No standard of signing asks for more than 4096; a
// signature with 8192 takes some ten times as long, and how many of them a process makes is for its users' tenants to say.
const (
	rsaBits    = 3072
	rsaMinBits = 2048
	rsaMaxBits = 4096
)

// Key is a private key. It is immutable and safe for concurrent use. However it is printed, it shows its
// algorithm and its id only.
type Key struct {
	algorithm string
	signer    crypto.Signer
	pem       []byte
	publicPEM string
	jwk       []member // the members that RFC 7638 requires, in its order
	id        string
	alg       string // of the JSON Web Key that it was read from
}

// Generate makes a key for one of ed25519, ecdsa-p256-sha256, ecdsa-p384-sha384, rsa, rsa-pss-sha512 and
// rsa-v1_5-sha256 (RSA of 3072 bits) and returns it as PEM (PKCS#8), which Parse reads.
func Generate(algorithm string) ([]byte, error) {
	var signer crypto.Signer
	var err error
	switch algorithm {
	case Ed25519:
		_, signer, err = ed25519.GenerateKey(rand.Reader)
	case ECDSAP256:
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case ECDSAP384:
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case RSA, RSAPSSSHA512, RSAV15SHA256:
		signer, err = rsa.GenerateKey(rand.Reader, rsaBits)
	default:
		return nil, fmt.Errorf("algorithm %q is not known; there are %s", algorithm,
			strings.Join([]string{Ed25519, ECDSAP256, ECDSAP384, RSA, RSAPSSSHA512, RSAV15SHA256}, ", "))
	}
	if err != nil {
		return nil, fmt.Errorf("generate %s: %w", algorithm, err)
	}
	return marshal(signer)
}

func marshal(signer crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		return nil, fmt.Errorf("marshal PKCS#8: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// newKey is where every form of key ends: it checks what all have in common and derives the public half.
func newKey(signer crypto.Signer) (*Key, error) {
	k := &Key{signer: signer}
	switch private := signer.(type) {
	case ed25519.PrivateKey:
		k.algorithm = Ed25519
	case *ecdsa.PrivateKey:
		switch private.Curve {
		case elliptic.P256():
			k.algorithm = ECDSAP256
		case elliptic.P384():
			k.algorithm = ECDSAP384
		default:
			return nil, errCurve
		}
	case *rsa.PrivateKey:
		if err := checkRSA(private); err != nil {
			return nil, err
		}
		k.algorithm = RSA
	default:
		return nil, errKind
	}
	var err error
	if k.pem, err = marshal(signer); err != nil {
		return nil, errors.New("the key cannot be written as PKCS#8")
	}
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return nil, errors.New("the key's public half cannot be written as PKIX")
	}
	k.publicPEM = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	if k.jwk, err = publicMembers(signer.Public()); err != nil {
		return nil, err
	}
	k.id = thumbprint(k.jwk)
	return k, nil
}

// checkRSA bounds the sizes before anything costly is computed, and Validate proves that the halves
// belong together.
func checkRSA(k *rsa.PrivateKey) error {
	if err := checkRSASize(k.N.BitLen()); err != nil {
		return err
	}
	switch {
	case len(k.Primes) != 2:
		return errors.New("the RSA key has more than two primes, which many receivers cannot verify")
	case k.E < 3 || k.E%2 == 0:
		return errors.New("the RSA key's public exponent must be an odd number from 3 on, usually 65537")
	}
	if k.Validate() != nil {
		return errPair
	}
	return nil
}

func checkRSASize(bits int) error {
	switch {
	case bits < rsaMinBits:
		return fmt.Errorf("the RSA key has %d bits; it needs at least %d", bits, rsaMinBits)
	case bits > rsaMaxBits:
		return fmt.Errorf("the RSA key has %d bits; at most %d are taken", bits, rsaMaxBits)
	}
	return nil
}

// Algorithm is ed25519, ecdsa-p256-sha256, ecdsa-p384-sha384 or rsa.
func (k *Key) Algorithm() string { return k.algorithm }

// Signer is the private half: an ed25519.PrivateKey, *ecdsa.PrivateKey or *rsa.PrivateKey.
func (k *Key) Signer() crypto.Signer { return k.signer }

// PEM is the private half as PKCS#8.
func (k *Key) PEM() []byte { return append([]byte(nil), k.pem...) }

// PublicPEM is the public half as PKIX (BEGIN PUBLIC KEY).
func (k *Key) PublicPEM() string { return k.publicPEM }

// Alg is the alg of the JSON Web Key that the key was read from (RFC 7518): its owner's word on which
// scheme it is for. Empty when there was none.
func (k *Key) Alg() string { return k.alg }

// ID is the RFC 7638 thumbprint of the public half: SHA-256 in base64url, 43 characters.
func (k *Key) ID() string { return k.id }

// String shows nothing of the private half.
func (k *Key) String() string { return k.algorithm + " key " + k.id }

// GoString shows nothing of the private half.
func (k *Key) GoString() string { return k.String() }

// Format shows nothing of the private half, whatever the verb.
func (k *Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(k.String())) }
