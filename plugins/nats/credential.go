package natsplugin

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nkeys"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// credentialsFormat is that of .creds files
// (https://docs.nats.io/using-nats/developer/connecting/creds).
func credentialsFormat() plugin.SecretFormat {
	return plugin.SecretFormat{Doc: "text of a .creds file, with the blocks NATS USER JWT and USER NKEY SEED", Read: readCredentials}
}

func readCredentials(value []byte) (plugin.SecretInfo, error) {
	text := string(value)
	if !strings.Contains(text, "-----BEGIN NATS USER JWT-----") || !strings.Contains(text, "-----BEGIN USER NKEY SEED-----") {
		return plugin.SecretInfo{}, errors.New("the blocks NATS USER JWT and USER NKEY SEED are not both there; give the whole text of the .creds file")
	}
	token, err := nkeys.ParseDecoratedJWT(value)
	if err != nil {
		return plugin.SecretInfo{}, errors.New("the block NATS USER JWT cannot be read")
	}
	pair, err := nkeys.ParseDecoratedUserNKey(value)
	if err != nil {
		return plugin.SecretInfo{}, errors.New("the block USER NKEY SEED holds no seed of a user, which begins with SU")
	}
	defer pair.Wipe()
	public, err := pair.PublicKey()
	if err != nil {
		return plugin.SecretInfo{}, errors.New("the block USER NKEY SEED cannot be read")
	}
	subject, err := subjectOfJWT(token)
	switch {
	case err != nil:
		return plugin.SecretInfo{}, err
	case subject != public:
		return plugin.SecretInfo{}, errors.New("the seed is not the one that the JWT was made for; give both blocks of one .creds file")
	}
	return plugin.SecretInfo{Algorithm: "ed25519", PublicKey: public, KeyID: public}, nil
}

// subjectOfJWT reads whom the JWT is for. Its signature is the server's to check.
func subjectOfJWT(token string) (string, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return "", errors.New("the block NATS USER JWT holds no JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Subject string `json:"sub"`
	}
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil {
		return "", errors.New("the JWT in the block NATS USER JWT cannot be read")
	}
	return claims.Subject, nil
}

// textFormat is for what people type, where a line break at the end is a slip that nobody sees.
func textFormat(what string) plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "the " + what + " as one line of text",
		Read: func(value []byte) (plugin.SecretInfo, error) {
			for i, c := range value {
				if c < ' ' || c == 0x7f {
					return plugin.SecretInfo{}, fmt.Errorf("there is a line break or another control character at position %d; give the %s as one line", i, what)
				}
			}
			return plugin.SecretInfo{}, nil
		},
	}
}
