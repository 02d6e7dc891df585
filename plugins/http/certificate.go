package httpplugin

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const day = 24 * time.Hour

// pemParts is what a PEM text holds. Text between the blocks is ignored, as everywhere.
type pemParts struct {
	certificates []*x509.Certificate
	key          crypto.Signer
}

// readPEM takes certificates and at most one private key. Its errors show nothing of the value.
func readPEM(value []byte) (pemParts, error) {
	var parts pemParts
	for {
		var block *pem.Block
		block, value = pem.Decode(value)
		if block == nil {
			break
		}
		switch {
		case block.Type == "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return parts, fmt.Errorf("certificate %d cannot be read; want X.509 in DER inside PEM", len(parts.certificates)+1)
			}
			parts.certificates = append(parts.certificates, cert)
		case block.Type == "EC PARAMETERS": // openssl puts it before an EC key
		case block.Type == "ENCRYPTED PRIVATE KEY", block.Headers["DEK-Info"] != "":
			return parts, errors.New("the private key is encrypted with a passphrase; store it decrypted, it is encrypted at rest here")
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			if parts.key != nil {
				return parts, errors.New("there are two private keys; want one")
			}
			key, err := readKey(block.Bytes)
			if err != nil {
				return parts, err
			}
			parts.key = key
		default:
			return parts, errors.New("there is a PEM block that is neither CERTIFICATE nor PRIVATE KEY")
		}
	}
	if len(bytes.TrimSpace(value)) > 0 && bytes.Contains(value, []byte("-----BEGIN")) {
		return parts, errors.New("a PEM block is broken off or malformed")
	}
	return parts, nil
}

func readKey(der []byte) (crypto.Signer, error) {
	var key any
	var err error
	if key, err = x509.ParsePKCS8PrivateKey(der); err != nil {
		if key, err = x509.ParseECPrivateKey(der); err != nil {
			key, err = x509.ParsePKCS1PrivateKey(der)
		}
	}
	if err != nil {
		return nil, errors.New("the private key cannot be read; want PKCS#8, SEC1 or PKCS#1")
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		return key, nil
	case *rsa.PrivateKey:
		return key, nil
	case ed25519.PrivateKey:
		return key, nil
	}
	return nil, errors.New("the private key is of a kind that TLS does not use; want RSA, ECDSA or Ed25519")
}

func belongs(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

// readClientCertificate is the format of slot client_certificate.
func readClientCertificate(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value)
	switch {
	case err != nil:
		return plugin.SecretInfo{}, err
	case len(parts.certificates) == 0:
		return plugin.SecretInfo{}, errors.New("there is no certificate in it; want PEM: the certificate, its chain, and its private key unless slot client_key holds that")
	case parts.key != nil && !belongs(parts.key, parts.certificates[0]):
		return plugin.SecretInfo{}, errors.New("the private key does not belong to the first certificate; the client's own certificate comes before its chain")
	case parts.certificates[0].IsCA && len(parts.certificates) > 1:
		return plugin.SecretInfo{}, errors.New("the first certificate is an authority's; the client's own certificate comes before its chain")
	}
	// Without a key the value is the certificate itself, and no value is shown to anybody.
	var chain strings.Builder
	if parts.key != nil {
		for _, c := range parts.certificates {
			chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
		}
	}
	leaf := parts.certificates[0]
	fingerprint := sha256.Sum256(leaf.Raw)
	return plugin.SecretInfo{
		Algorithm: "x509, not after " + leaf.NotAfter.UTC().Format(time.RFC3339),
		PublicKey: chain.String(),
		KeyID:     base64.RawURLEncoding.EncodeToString(fingerprint[:]), // x5t#S256 of RFC 8705
	}, nil
}

// readClientKey is the format of slot client_key.
func readClientKey(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value)
	switch {
	case err != nil:
		return plugin.SecretInfo{}, err
	case parts.key == nil:
		return plugin.SecretInfo{}, errors.New("there is no private key in it; want one in PEM")
	case len(parts.certificates) > 0:
		return plugin.SecretInfo{}, errors.New("there is a certificate in it, which belongs into slot client_certificate")
	}
	return plugin.SecretInfo{}, nil
}

// readCA is the format of slot ca.
func readCA(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value)
	switch {
	case err != nil:
		return plugin.SecretInfo{}, err
	case parts.key != nil:
		return plugin.SecretInfo{}, errors.New("there is a private key in it; want certificates of authorities only")
	case len(parts.certificates) == 0:
		return plugin.SecretInfo{}, errors.New("there is no certificate in it; want the certificates of the authorities in PEM")
	}
	until := parts.certificates[0].NotAfter
	for _, c := range parts.certificates {
		if c.NotAfter.Before(until) {
			until = c.NotAfter
		}
	}
	return plugin.SecretInfo{Algorithm: "x509, not after " + until.UTC().Format(time.RFC3339)}, nil
}

var (
	errNoClientKey = errors.New("the client certificate comes without its private key; append that to the same secret, or fill slot client_key")
	errStrangeKey  = errors.New("no live version of client_key belongs to a live version of the client certificate")
)

// clientCertificate pairs the newest certificate that has a key with that key. During a rotation of two
// slots, which cannot change at once, that is the old pair until both are new. Nil when the slot is empty.
func clientCertificate(c Config) (*tls.Certificate, error) {
	if c.ClientCertificate.Empty() {
		return nil, nil
	}
	var keys []crypto.Signer
	for _, value := range c.ClientKey.Values() {
		parts, err := readPEM(value)
		if err != nil {
			return nil, fmt.Errorf("client key: %w", err)
		}
		keys = append(keys, parts.key)
	}
	for _, value := range c.ClientCertificate.Values() {
		parts, err := readPEM(value)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		if len(parts.certificates) == 0 {
			continue
		}
		candidates := keys
		if parts.key != nil {
			candidates = []crypto.Signer{parts.key}
		}
		for _, key := range candidates {
			if key != nil && belongs(key, parts.certificates[0]) {
				return newCertificate(parts.certificates, key), nil
			}
		}
	}
	if len(keys) == 0 {
		return nil, errNoClientKey
	}
	return nil, errStrangeKey
}

func newCertificate(chain []*x509.Certificate, key crypto.Signer) *tls.Certificate {
	out := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

// validity is what is wrong with a client certificate's dates, or "".
func validity(leaf *x509.Certificate, now time.Time) string {
	switch {
	case now.After(leaf.NotAfter):
		return "the client certificate expired on " + leaf.NotAfter.UTC().Format(time.RFC3339)
	case now.Before(leaf.NotBefore):
		return "the client certificate is not valid before " + leaf.NotBefore.UTC().Format(time.RFC3339)
	}
	return ""
}

// authorities are the certificates of all live versions of slot ca: both old and new during a rotation.
func authorities(c Config) ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, value := range c.CA.Values() {
		parts, err := readPEM(value)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		all = append(all, parts.certificates...)
	}
	return all, nil
}

// checkTLS looks at certificates and names.
func checkTLS(c Config, u *target) []plugin.Problem {
	var problems []plugin.Problem
	if c.TLS.ServerName != "" {
		if err := checkHostname(c.TLS.ServerName); err != nil {
			problems = append(problems, plugin.Problem{
				Pointer: "/config/tls/server_name", Code: "tls.server_name",
				Summary: fmt.Sprintf("given %q, want a host name such as hooks.example.com", c.TLS.ServerName),
			})
		}
	}
	if c.ClientCertificate.Empty() && !c.ClientKey.Empty() {
		problems = append(problems, unused("client_key", "there is no client_certificate"))
	}
	if u != nil && u.scheme == "http" && c.Auth.Type != authOAuth2 {
		const why = "the URI begins with http://"
		if !c.ClientCertificate.Empty() {
			problems = append(problems, unused("client_certificate", why))
		}
		if !c.CA.Empty() && c.Proxy.URL == "" {
			problems = append(problems, unused("ca", why))
		}
	}
	certificate, err := clientCertificate(c)
	switch {
	case err != nil:
		problems = append(problems, plugin.Problem{Pointer: "/secrets/client_certificate", Code: "certificate.key", Summary: err.Error()})
	case certificate != nil:
		problems = append(problems, checkValidity(certificate.Leaf, time.Now())...)
	}
	return problems
}

func checkValidity(leaf *x509.Certificate, now time.Time) []plugin.Problem {
	p := plugin.Problem{Pointer: "/secrets/client_certificate", Warning: true}
	text := validity(leaf, now)
	switch {
	case text != "":
		p.Code, p.Summary = "certificate.expired", text+"; receivers will refuse it"
	case leaf.NotAfter.Sub(now) < 14*day:
		p.Code, p.Summary = "certificate.expires", "the client certificate expires on "+leaf.NotAfter.UTC().Format(time.RFC3339)
	default:
		return nil
	}
	return []plugin.Problem{p}
}

func unused(slot, why string) plugin.Problem {
	return plugin.Problem{
		Pointer: "/secrets/" + slot, Code: "secret.unused", Warning: true,
		Summary: fmt.Sprintf("the secret in slot %s is not used: %s", slot, why),
	}
}
