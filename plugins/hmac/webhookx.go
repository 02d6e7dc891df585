package hmacplugin

import "github.com/grapnel/grapnel/sdk/plugin"

type webhookxConfig struct {
	oneKey
}

// webhookx signs as the plugin webhookx-signature of WebhookX does (https://github.com/webhookx-io/webhookx).
func webhookx() plugin.Kind {
	return vendor[webhookxConfig]{
		id: "webhookx",
		doc: "Webhookx-Signature as WebhookX signs (https://github.com/webhookx-io/webhookx); one signature: sign_with says which key " +
			"signs during a rotation",
		emits:   []string{"Webhookx-Event-Id", "Webhookx-Timestamp", "Webhookx-Signature"},
		example: struct{}{},
		secret: secretText{
			doc:       "any text of 16 characters or more, as is the plugin's signing_secret",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomHex(16)) },
		},
		schemes: func(webhookxConfig, plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "hex",
				content: "{timestamp}.{body}",
				headers: []header{
					{name: "Webhookx-Event-Id", value: "{id}"}, {name: "Webhookx-Timestamp", value: "{timestamp}"},
					{name: "Webhookx-Signature", value: "v1={signature}"},
				},
			}}
		},
	}.kind()
}
