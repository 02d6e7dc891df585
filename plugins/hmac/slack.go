package hmacplugin

import "github.com/grapnel/grapnel/sdk/plugin"

type slackConfig struct {
	oneKey
}

// slack signs as Slack does (https://docs.slack.dev/authentication/verifying-requests-from-slack).
func slack() plugin.Kind {
	return vendor[slackConfig]{
		id: "slack",
		doc: "X-Slack-Signature as Slack signs (https://docs.slack.dev/authentication/verifying-requests-from-slack); " +
			"one signature: sign_with says which key signs during a rotation",
		emits:   []string{"X-Slack-Request-Timestamp", "X-Slack-Signature"},
		example: struct{}{},
		secret: secretText{
			doc:       "the app's signing secret, 32 hexadecimal digits, used as text",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomHex(16)) },
			mistakes: []mistake{
				{"xoxb-", "a bot token"}, {"xoxp-", "a user token"}, {"xapp-", "an app-level token"}, {"xoxe", "a configuration token"},
			},
		},
		schemes: func(slackConfig, plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "hex",
				content: "v0:{timestamp}:{body}",
				headers: []header{
					{name: "X-Slack-Request-Timestamp", value: "{timestamp}"},
					{name: "X-Slack-Signature", value: "v0={signature}"},
				},
			}}
		},
	}.kind()
}
