package hmacplugin

import (
	"cmp"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type githubConfig struct {
	oneKey
	Event string `json:"event" doc:"Value of X-GitHub-Event. Empty: the event's type."`
	SHA1  bool   `json:"sha1" default:"false" doc:"Send X-Hub-Signature with HMAC-SHA1 as well, for receivers from before 2020."`
}

// github signs as GitHub does
// (https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries). There is no
// timestamp in it, so a receiver cannot tell a replay.
func github() plugin.Kind {
	return vendor[githubConfig]{
		id: "github",
		doc: "X-Hub-Signature-256 as GitHub signs (https://docs.github.com/webhooks); body only, without a time; " +
			"one signature: sign_with says which key signs during a rotation",
		emits:   []string{"X-Hub-Signature-256", "X-Hub-Signature", "X-GitHub-Event", "X-GitHub-Delivery"},
		example: map[string]any{"event": "push"},
		secret: secretText{
			doc:       "any text of 16 characters or more, best 64 random hexadecimal digits",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomHex(32)) },
			blanks:    true,
			mistakes: []mistake{
				{"ghp_", "a personal access token"}, {"github_pat_", "a personal access token"}, {"gho_", "an OAuth token"},
				{"ghs_", "an app's token"}, {"ghu_", "an app's user token"}, {"ghr_", "a refresh token"},
			},
		},
		schemes: func(c githubConfig, _ plugin.Target) []scheme {
			event := cmp.Or(quote(c.Event), "{type}")
			schemes := []scheme{{
				algorithm: "sha256", encoding: "hex",
				content: "{body}",
				headers: []header{
					{name: "X-GitHub-Event", value: event}, {name: "X-GitHub-Delivery", value: "{id}"},
					{name: "X-Hub-Signature-256", value: "sha256={signature}"},
				},
			}}
			if c.SHA1 {
				schemes = append(schemes, scheme{
					algorithm: "sha1", encoding: "hex",
					content: "{body}",
					headers: []header{{name: "X-Hub-Signature", value: "sha1={signature}"}},
				})
			}
			return schemes
		},
		check: func(c githubConfig, _ plugin.Target) []plugin.Problem { return headerText("event", c.Event) },
	}.kind()
}
