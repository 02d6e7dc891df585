package oauth2

import (
	"errors"

	"github.com/grapnel/grapnel/sdk/keys"
)

func compact(*keys.Key, map[string]any, []byte) (string, error) {
	return "", errors.New("private_key_jwt is not offered yet")
}
