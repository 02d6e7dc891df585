package hmacplugin

import (
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type convoyConfig struct {
	oneKey
	Mode     string `json:"mode" default:"advanced" enum:"advanced,simple" doc:"advanced: a time and a signature of each live key. simple: a bare signature of the body, of one key."`
	Hash     string `json:"hash" default:"SHA256" enum:"SHA256,SHA512" doc:"Hash of the HMAC, as in the Convoy project."`
	Encoding string `json:"encoding" default:"hex" enum:"hex,base64" doc:"How signatures are written, as in the Convoy project."`
}

// convoy signs as Convoy does (https://getconvoy.io/docs/product-manual/signatures): a comma stands
// between time and body, and the body is signed as it is sent.
func convoy() plugin.Kind {
	return vendor[convoyConfig]{
		id: "convoy",
		doc: "X-Convoy-Signature as Convoy signs (https://getconvoy.io/docs/product-manual/signatures); in advanced mode both keys " +
			"sign during a rotation, in simple mode sign_with says which",
		emits:   []string{"X-Convoy-Signature"},
		example: map[string]any{"mode": "advanced"},
		secret: secretText{
			doc:       "any text of 16 characters or more, as is the secret of a Convoy endpoint",
			algorithm: "hmac",
			make:      func() []byte { return []byte(randomHex(32)) },
			blanks:    true,
		},
		schemes: func(c convoyConfig, _ plugin.Target) []scheme {
			s := scheme{
				algorithm: strings.ToLower(c.Hash), encoding: c.Encoding,
				content: "{timestamp},{body}",
				headers: []header{{name: "X-Convoy-Signature", value: "t={timestamp},{signatures}"}},
				each:    "v1={signature}", join: ",",
			}
			if c.Mode == "simple" {
				s.content, s.headers = "{body}", []header{{name: "X-Convoy-Signature", value: "{signature}"}}
			}
			return []scheme{s}
		},
	}.kind()
}
