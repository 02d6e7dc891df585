package keys

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
)

// RSAPSSSHA256 is RSASSA-PSS with SHA-256 (PS256 of RFC 7518), a scheme that RFC 9421 has no name for.
const RSAPSSSHA256 = "rsa-pss-sha256"

// CanSign reports whether the key signs by the scheme: its own algorithm, or for an RSA key one of
// rsa-pss-sha512, rsa-pss-sha256 and rsa-v1_5-sha256.
func (k *Key) CanSign(scheme string) bool {
	if k.algorithm == RSA {
		return scheme == RSAPSSSHA512 || scheme == RSAPSSSHA256 || scheme == RSAV15SHA256
	}
	return scheme == k.algorithm
}

// Sign signs message, hashing it first where the scheme does. ECDSA signatures are the two numbers one
// after the other in fixed width (64 or 96 bytes), as RFC 9421 and RFC 7518 want them, and not ASN.1; the
// salt of RSA-PSS is as long as its hash. Ed25519 and rsa-v1_5-sha256 give the same bytes each time.
func (k *Key) Sign(scheme string, message []byte) ([]byte, error) {
	if !k.CanSign(scheme) {
		return nil, fmt.Errorf("a key for %s cannot sign %s", k.algorithm, scheme)
	}
	switch private := k.signer.(type) {
	case ed25519.PrivateKey:
		return ed25519.Sign(private, message), nil
	case *ecdsa.PrivateKey:
		return signECDSA(private, scheme, message)
	case *rsa.PrivateKey:
		return signRSA(private, scheme, message)
	}
	return nil, errKind
}

func signECDSA(private *ecdsa.PrivateKey, scheme string, message []byte) ([]byte, error) {
	var digest []byte
	if scheme == ECDSAP384 {
		sum := sha512.Sum384(message)
		digest = sum[:]
	} else {
		sum := sha256.Sum256(message)
		digest = sum[:]
	}
	r, s, err := ecdsa.Sign(rand.Reader, private, digest)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", scheme, err)
	}
	size := (private.Params().BitSize + 7) / 8
	out := make([]byte, 2*size)
	r.FillBytes(out[:size])
	s.FillBytes(out[size:])
	return out, nil
}

func signRSA(private *rsa.PrivateKey, scheme string, message []byte) ([]byte, error) {
	var out []byte
	var err error
	pss := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
	switch scheme {
	case RSAPSSSHA512:
		sum := sha512.Sum512(message)
		out, err = rsa.SignPSS(rand.Reader, private, crypto.SHA512, sum[:], pss)
	case RSAPSSSHA256:
		sum := sha256.Sum256(message)
		out, err = rsa.SignPSS(rand.Reader, private, crypto.SHA256, sum[:], pss)
	default:
		sum := sha256.Sum256(message)
		out, err = rsa.SignPKCS1v15(nil, private, crypto.SHA256, sum[:])
	}
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", scheme, err)
	}
	return out, nil
}
