package httpplugin

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"strings"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/plugins/oauth2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// formats says how the values of all slots are written.
func formats() []plugin.Option {
	line := plugin.SecretFormat{Doc: "one line of text", Read: readLine}
	token := plugin.SecretFormat{Doc: "visible ASCII characters without spaces", Read: readToken}
	return append(outbound.Formats(),
		plugin.Format("password", line),
		plugin.Format("token", token),
		plugin.Format("api_key", line),
		plugin.Format("client_secret", line),
		plugin.Format("assertion_key", oauth2.SigningKeyFormat()),
		plugin.Format("proxy_credentials", plugin.SecretFormat{Doc: "user:password", Read: readProxyCredentials}),
	)
}

func (c Config) material() outbound.Material {
	return outbound.Material{CA: c.CA, Certificate: c.ClientCertificate, Key: c.ClientKey}
}

// readLine takes what a header can carry. The line break that files and shells leave at the end is the
// commonest fault and worth its own words.
func readLine(value []byte) (plugin.SecretInfo, error) {
	text := string(value)
	switch {
	case text == "":
		return plugin.SecretInfo{}, errors.New("it is empty")
	case strings.TrimRight(text, "\r\n") != text:
		return plugin.SecretInfo{}, errors.New("it ends with a line break; store it without (printf %s, not echo)")
	case strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return plugin.SecretInfo{}, errors.New("it has a line break or another control character; want one line of text")
	case strings.TrimSpace(text) != text:
		return plugin.SecretInfo{}, errors.New("it begins or ends with a space; remove it")
	}
	return plugin.SecretInfo{}, nil
}

func readToken(value []byte) (plugin.SecretInfo, error) {
	if info, err := readLine(value); err != nil {
		return info, err
	}
	text := string(value)
	if strings.HasPrefix(strings.ToLower(text), "bearer ") {
		return plugin.SecretInfo{}, errors.New("it begins with the word Bearer, which is added when it is sent; store the token alone")
	}
	if i := strings.IndexFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }); i >= 0 {
		return plugin.SecretInfo{}, errors.New("it has a space or a character outside ASCII; want a token as RFC 6750 has them")
	}
	return plugin.SecretInfo{}, nil
}

// credentials stands for all that distinguishes credentials in a pool's key; nothing can be read from it. Auth that
// travels in headers counts too: connections to a receiver that binds a session to a connection must not carry two
// clients.
func (c Config) credentials() outbound.Fingerprint {
	auth, _ := json.Marshal(c.Auth) // strings only, none of them secret
	return outbound.FingerprintOf(
		c.ClientCertificate, c.ClientKey, c.CA, c.Password, c.Token, c.APIKey, c.ClientSecret, c.AssertionKey, c.ProxyCredentials,
		plugin.NewSecret(string(auth)),
	)
}

// trust is whom certificates may be by. A nil pool means the system's authorities.
type trust struct {
	// receiver is what the slot ca names, alone when it is filled.
	receiver *x509.CertPool
	// others, the token endpoint and the proxy, may be by the system's authorities as well.
	others *x509.CertPool
}

func newTrust(c Config, roots *x509.CertPool) (trust, error) {
	own, err := c.material().Authorities()
	if err != nil || len(own) == 0 {
		return trust{receiver: roots, others: roots}, err
	}
	t := trust{receiver: x509.NewCertPool(), others: roots}
	if t.others == nil {
		if t.others, err = x509.SystemCertPool(); err != nil {
			t.others = x509.NewCertPool() // a machine without authorities
		}
	} else {
		t.others = t.others.Clone()
	}
	for _, cert := range own {
		t.receiver.AddCert(cert)
		t.others.AddCert(cert)
	}
	return t, nil
}
