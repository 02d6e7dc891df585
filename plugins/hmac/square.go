package hmacplugin

import (
	"cmp"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type squareConfig struct {
	oneKey
	NotificationURL string `json:"notification_url" doc:"The notification URL that the receiver verifies with, to the letter: a slash at the end counts. Empty: the subscription's URI as it is written."`
}

// square signs as Square does (https://developer.squareup.com/docs/webhooks/step3validate).
func square() plugin.Kind {
	return vendor[squareConfig]{
		id: "square",
		doc: "x-square-hmacsha256-signature as Square signs (https://developer.squareup.com/docs/webhooks/step3validate); " +
			"URL and body, without a time; one signature: sign_with says which key signs during a rotation",
		emits:   []string{"x-square-hmacsha256-signature"},
		example: map[string]any{"notification_url": "https://example.com/square"},
		secret: secretText{
			doc:       "the subscription's signature key, letters, digits, - and _, used as text",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomHex(16)) },
			mistakes:  []mistake{{"EAAA", "an access token"}, {"sq0", "an application's id or secret"}},
		},
		schemes: func(c squareConfig, t plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "base64",
				content: quote(cmp.Or(c.NotificationURL, t.URL)) + "{body}",
				headers: []header{{name: "x-square-hmacsha256-signature", value: "{signature}"}},
			}}
		},
		check: func(c squareConfig, _ plugin.Target) []plugin.Problem {
			return headerText("notification_url", c.NotificationURL)
		},
	}.kind()
}
