package hmacplugin

import "github.com/grapnel/grapnel/sdk/plugin"

type outpostConfig struct {
	allKeys
}

// outpost signs as Outpost does with its default templates
// (https://hookdeck.com/docs/outpost/destinations/webhook). For others there is the kind hmac.
func outpost() plugin.Kind {
	return vendor[outpostConfig]{
		id: "outpost",
		doc: "x-outpost-signature as Outpost signs by default (https://hookdeck.com/docs/outpost/destinations/webhook); " +
			"body only, without a time; both keys sign during a rotation",
		emits:   []string{"x-outpost-event-id", "x-outpost-topic", "x-outpost-timestamp", "x-outpost-signature"},
		example: struct{}{},
		secret: secretText{
			doc:       "any text of 16 characters or more, as is Outpost's own of 64 hexadecimal digits",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomHex(32)) },
		},
		schemes: func(outpostConfig, plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "hex",
				content: "{body}",
				headers: []header{
					{name: "x-outpost-event-id", value: "{id}"},
					{name: "x-outpost-topic", value: "{type}", optional: true},
					{name: "x-outpost-timestamp", value: "{timestamp}"},
					{name: "x-outpost-signature", value: "v0={signatures}"},
				},
				each: "{signature}", join: ",", timestamp: "rfc3339",
			}}
		},
	}.kind()
}
