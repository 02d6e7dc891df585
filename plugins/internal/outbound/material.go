package outbound

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxChain is how many certificates a client may show, maxAuthorities how many a slot ca may hold.
	maxChain       = 10
	maxAuthorities = 100
	// expirySoon is when a certificate's end is worth a warning.
	expirySoon = 14 * 24 * time.Hour
)

// Fingerprint tells settings with different secrets apart without holding them.
type Fingerprint [sha256.Size]byte

// FingerprintOf hashes secrets; order counts, and so does which slot a value is in.
func FingerprintOf(slots ...plugin.Secret) Fingerprint {
	h := sha256.New()
	for _, s := range slots {
		for _, v := range s.Values() {
			sum := sha256.Sum256(v)
			h.Write(sum[:])
		}
		h.Write([]byte{0}) // no sum is one byte long: ends the slot
	}
	return Fingerprint(h.Sum(nil))
}

// Material is the secret slots that TLS to a receiver is made of. All may be empty.
type Material struct {
	// CA holds the authorities that the receiver's certificate may be by, instead of the system's: all live versions.
	CA plugin.Secret
	// Certificate is the client's chain, the leaf first, with its key unless Key has that.
	Certificate, Key plugin.Secret
}

// TLSConfig is what a client offers and believes. The newest certificate that has a key is shown to receivers that ask
// for one, whichever authorities they name.
func (m Material) TLSConfig(serverName string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	authorities, err := m.Authorities()
	if err != nil {
		return nil, err
	}
	if len(authorities) > 0 {
		config.RootCAs = x509.NewCertPool()
		for _, c := range authorities {
			config.RootCAs.AddCert(c)
		}
	}
	pair, err := m.ClientCertificate()
	if err != nil {
		return nil, err
	}
	if pair != nil {
		config.Certificates = []tls.Certificate{*pair}
	}
	return config, nil
}

// Authorities are the certificates of all live versions of the slot ca: both old and new during a rotation.
func (m Material) Authorities() ([]*x509.Certificate, error) {
	var all []*x509.Certificate
	for _, value := range m.CA.Values() {
		parts, err := readPEM(value, maxAuthorities)
		if err != nil {
			return nil, fmt.Errorf("ca: %w", err)
		}
		all = append(all, parts.certificates...)
	}
	return all, nil
}

var (
	errNoClientKey = errors.New("the client certificate comes without its private key; append that to the same secret, or fill slot client_key")
	errStrangeKey  = errors.New("no live version of client_key belongs to a live version of the client certificate")
)

// ClientCertificate pairs the newest certificate that has a key with that key. During a rotation of two
// slots, which cannot change at once, that is the old pair until both are new. Nil when the slot is empty.
func (m Material) ClientCertificate() (*tls.Certificate, error) {
	if m.Certificate.Empty() {
		return nil, nil
	}
	var candidates []crypto.Signer
	for _, value := range m.Key.Values() {
		parts, err := readPEM(value, maxChain)
		if err != nil {
			return nil, fmt.Errorf("client key: %w", err)
		}
		candidates = append(candidates, parts.key)
	}
	for _, value := range m.Certificate.Values() {
		parts, err := readPEM(value, maxChain)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		if len(parts.certificates) == 0 {
			continue
		}
		own := candidates
		if parts.key != nil {
			own = []crypto.Signer{parts.key}
		}
		for _, key := range own {
			if key != nil && belongs(key, parts.certificates[0]) {
				return newCertificate(parts.certificates, key), nil
			}
		}
	}
	if len(candidates) == 0 {
		return nil, errNoClientKey
	}
	return nil, errStrangeKey
}

func newCertificate(chain []*x509.Certificate, key crypto.Signer) *tls.Certificate {
	if long, ok := key.(*rsa.PrivateKey); ok && long.N.BitLen() > 2048 {
		key = modestKey{long}
	}
	out := &tls.Certificate{PrivateKey: key, Leaf: chain[0]}
	for _, c := range chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

// modestKey gives way to others while it signs, which takes milliseconds.
type modestKey struct{ *rsa.PrivateKey }

// Sign implements crypto.Signer.
func (k modestKey) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) (signature []byte, err error) {
	gate.Modestly(func() { signature, err = k.PrivateKey.Sign(random, digest, opts) })
	return signature, err
}

// Check says what is wrong with the client certificate, and what soon will be.
func (m Material) Check(now time.Time) []plugin.Problem {
	if m.Certificate.Empty() {
		if m.Key.Empty() {
			return nil
		}
		return []plugin.Problem{Unused("client_key", "there is no client_certificate")}
	}
	pair, err := m.ClientCertificate()
	if err != nil {
		return []plugin.Problem{{Pointer: "/secrets/client_certificate", Code: "certificate.key", Summary: err.Error()}}
	}
	p := plugin.Problem{Pointer: "/secrets/client_certificate", Warning: true}
	switch text := Validity(pair.Leaf, now); {
	case text != "":
		p.Code, p.Summary = "certificate.expired", text+"; receivers will refuse it"
	case pair.Leaf.NotAfter.Sub(now) < expirySoon:
		p.Code, p.Summary = "certificate.expires", "the client certificate expires on "+pair.Leaf.NotAfter.UTC().Format(time.RFC3339)
	default:
		return nil
	}
	return []plugin.Problem{p}
}

// Validity is what is wrong with a client certificate's dates, or "".
func Validity(leaf *x509.Certificate, now time.Time) string {
	switch {
	case now.After(leaf.NotAfter):
		return "the client certificate expired on " + leaf.NotAfter.UTC().Format(time.RFC3339)
	case now.Before(leaf.NotBefore):
		return "the client certificate is not valid before " + leaf.NotBefore.UTC().Format(time.RFC3339)
	}
	return ""
}

// Unused warns of a secret that nothing asks for.
func Unused(slot, why string) plugin.Problem {
	return plugin.Problem{
		Pointer: "/secrets/" + slot, Code: "secret.unused", Warning: true,
		Summary: fmt.Sprintf("the secret in slot %s is not used: %s", slot, why),
	}
}

// Offer is what became of the client certificate in one handshake.
type Offer struct{ asked, given atomic.Bool }

// Offering returns a copy of config for one handshake and what will be known about it afterwards. A list of
// certificates would not do: crypto/tls shows none of those if the receiver names other authorities, and the receiver
// would then complain of an absent one.
func Offering(config *tls.Config) (*tls.Config, *Offer) {
	o := &Offer{}
	config = config.Clone()
	certificates := config.Certificates
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		o.asked.Store(true)
		if len(certificates) == 0 {
			return &tls.Certificate{}, nil // none
		}
		o.given.Store(true)
		return &certificates[0], nil
	}
	return config, o
}

// Asked reports whether the receiver wanted a client certificate.
func (o *Offer) Asked() bool { return o.asked.Load() }

// Refusal explains a connection that ended as soon as it was there: with TLS 1.3 the receiver judges the
// client certificate after the handshake is over for the client, and its alert may be lost on the way.
// It is empty when the receiver had not asked for one.
func (o *Offer) Refusal() string {
	switch {
	case !o.asked.Load():
		return ""
	case o.given.Load():
		return "the receiver refused the client certificate"
	}
	return "the receiver wants a client certificate; fill the slot client_certificate with one that it trusts"
}

// Formats says how the values of the slots ca, client_certificate and client_key are written.
func Formats() []plugin.Option {
	return []plugin.Option{
		plugin.Format("client_certificate", plugin.SecretFormat{
			Doc: "PEM: the client's certificate, its chain, and its private key unless slot client_key holds that", Read: ReadClientCertificate,
		}),
		plugin.Format("client_key", plugin.SecretFormat{Doc: "PEM: one private key, PKCS#8, SEC1 or PKCS#1", Read: ReadClientKey}),
		plugin.Format("ca", plugin.SecretFormat{Doc: "PEM: one or more certificates", Read: ReadCA}),
	}
}

// pemParts is what a PEM text holds. Text between the blocks is ignored, as everywhere.
type pemParts struct {
	certificates []*x509.Certificate
	key          crypto.Signer
}

// readPEM takes up to most certificates and at most one private key. Its errors show nothing of the value.
func readPEM(value []byte, most int) (pemParts, error) {
	var parts pemParts
	for {
		var block *pem.Block
		block, value = pem.Decode(value)
		if block == nil {
			break
		}
		switch {
		case block.Type == "CERTIFICATE":
			if len(parts.certificates) == most {
				return parts, fmt.Errorf("there are more than %d certificates", most)
			}
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
			key, err := readKey(block)
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

// readKey takes the keys that sdk/keys takes, whose sizes are bounded before anything is computed with them: what a
// handshake costs must not be for a tenant to choose. TLS knows one curve more.
func readKey(block *pem.Block) (crypto.Signer, error) {
	key, err := keys.Parse(pem.EncodeToMemory(block))
	if err == nil {
		return key.Signer(), nil
	}
	const largestEC = 1 << 10
	if len(block.Bytes) > largestEC {
		return nil, fmt.Errorf("the private key is not taken: %w", err)
	}
	found, ecErr := x509.ParseECPrivateKey(block.Bytes)
	if ecErr != nil {
		if any8, pkcs8Err := x509.ParsePKCS8PrivateKey(block.Bytes); pkcs8Err == nil {
			found, _ = any8.(*ecdsa.PrivateKey)
		}
	}
	if found == nil {
		return nil, fmt.Errorf("the private key is not taken: %w", err)
	}
	return found, nil
}

func belongs(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

// ReadClientCertificate is the format of slot client_certificate. Its errors show nothing of the value.
func ReadClientCertificate(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value, maxChain)
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

// ReadClientKey is the format of slot client_key.
func ReadClientKey(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value, maxChain)
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

// ReadCA is the format of slot ca.
func ReadCA(value []byte) (plugin.SecretInfo, error) {
	parts, err := readPEM(value, maxAuthorities)
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
