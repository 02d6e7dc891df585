package oauth2

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"time"

	"github.com/grapnel/grapnel/plugins/jose"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// assertionLifetime is short: an assertion is made for one request.
const assertionLifetime = time.Minute

// assertion is the client's JWT (RFC 7523, section 3; OpenID Connect Core, section 9).
func (s *Source) assertion(now time.Time) (string, error) {
	audience := s.config.AssertionAudience
	if audience == "" {
		audience = s.config.TokenURL
	}
	claims, err := json.Marshal(map[string]any{
		"iss": s.config.ClientID, "sub": s.config.ClientID, "aud": audience, "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(assertionLifetime).Unix(),
	})
	if err != nil {
		return "", err
	}
	signed, err := jose.Compact(s.key, map[string]any{"typ": "JWT", "kid": s.key.ID()}, claims)
	if err != nil {
		return "", fmt.Errorf("sign the client assertion: %w", err)
	}
	return signed, nil
}

// SigningKeyFormat is for the secret slot that a transport fills SigningKey from: keys can be made, and
// their public half is what the authorization server has to be given.
func SigningKeyFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc:        "private key in PEM (PKCS#8, SEC1, PKCS#1) or as JWK: Ed25519, ECDSA P-256 or P-384, RSA",
		Algorithms: []string{"ecdsa-p256-sha256", "ed25519", "ecdsa-p384-sha384", "rsa-v1_5-sha256"},
		Generate:   keys.Generate,
		Read: func(value []byte) (plugin.SecretInfo, error) {
			k, err := keys.Parse(value)
			if err != nil {
				return plugin.SecretInfo{}, err
			}
			return plugin.SecretInfo{
				Algorithm: k.Algorithm(), PublicKey: k.PublicPEM(), JWK: k.JWK(), KeyID: k.ID(),
			}, nil
		},
	}
}
