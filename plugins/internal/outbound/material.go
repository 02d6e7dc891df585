package outbound

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"strings"
	"sync/atomic"

	"github.com/grapnel/grapnel/sdk/plugin"
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

// TLSConfig is what a client offers and believes: authorities of the slot ca, all live versions of it,
// instead of the system's, and the newest client certificate. Both may be empty.
func TLSConfig(serverName string, ca, clientCertificate plugin.Secret) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName}
	for _, value := range ca.Values() {
		if config.RootCAs == nil {
			config.RootCAs = x509.NewCertPool()
		}
		authorities, err := parseAuthorities(value)
		if err != nil {
			return nil, err
		}
		for _, c := range authorities {
			config.RootCAs.AddCert(c)
		}
	}
	if !clientCertificate.Empty() {
		pair, err := parsePair(clientCertificate.Values()[0])
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// Offer is what became of the client certificate in one handshake.
type Offer struct{ asked, given atomic.Bool }

// Offering returns a copy of config for one handshake and what will be known about it afterwards.
func Offering(config *tls.Config) (*tls.Config, *Offer) {
	o := &Offer{}
	config = config.Clone()
	certificates := config.Certificates
	config.GetClientCertificate = func(request *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		o.asked.Store(true)
		for i := range certificates {
			if request.SupportsCertificate(&certificates[i]) == nil {
				o.given.Store(true)
				return &certificates[i], nil
			}
		}
		return &tls.Certificate{}, nil // none
	}
	return config, o
}

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

// AuthoritiesFormat is the format of a slot ca.
func AuthoritiesFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "PEM: one or more certificates of authorities",
		Read: func(value []byte) (plugin.SecretInfo, error) {
			_, err := parseAuthorities(value)
			return plugin.SecretInfo{}, err
		},
	}
}

// PairFormat is the format of a slot client_certificate.
func PairFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc:  "PEM: the certificate, then its intermediates, and the private key",
		Read: readPair,
	}
}

func readPair(value []byte) (plugin.SecretInfo, error) {
	pair, err := parsePair(value)
	if err != nil {
		return plugin.SecretInfo{}, err
	}
	var public strings.Builder
	for _, der := range pair.Certificate {
		public.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	sum := sha256.Sum256(pair.Certificate[0])
	return plugin.SecretInfo{
		Algorithm: strings.ToLower(pair.Leaf.PublicKeyAlgorithm.String()),
		PublicKey: public.String(), KeyID: hex.EncodeToString(sum[:]),
	}, nil
}

func parseAuthorities(value []byte) ([]*x509.Certificate, error) {
	var found []*x509.Certificate
	for len(value) > 0 {
		var block *pem.Block
		if block, value = pem.Decode(value); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("there is a PEM block that is no CERTIFICATE; give certificates of authorities only")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, errors.New("one of the certificates cannot be read; want X.509 in PEM")
		}
		found = append(found, c)
	}
	if len(found) == 0 {
		return nil, errors.New("there is no certificate; want one or more PEM blocks of type CERTIFICATE")
	}
	return found, nil
}

// parsePair gives errors of its own: those below may quote.
func parsePair(value []byte) (tls.Certificate, error) {
	pair, err := tls.X509KeyPair(value, value)
	if err == nil {
		return pair, nil
	}
	certificate, key := false, false
	for rest := value; len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		certificate = certificate || block.Type == "CERTIFICATE"
		key = key || strings.HasSuffix(block.Type, "PRIVATE KEY")
		if strings.Contains(block.Type, "ENCRYPTED") || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return pair, errors.New("the private key is encrypted; give it without a passphrase")
		}
	}
	switch {
	case !certificate:
		return pair, errors.New("there is no certificate; want PEM blocks of type CERTIFICATE and PRIVATE KEY in one text")
	case !key:
		return pair, errors.New("there is no private key; want PEM blocks of type CERTIFICATE and PRIVATE KEY in one text")
	}
	return pair, errors.New("certificate and private key cannot be read, or do not belong together; the first certificate must be the key's")
}
