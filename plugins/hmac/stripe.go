package hmacplugin

import "github.com/grapnel/grapnel/sdk/plugin"

type stripeConfig struct {
	allKeys
}

// stripe signs as Stripe does (https://docs.stripe.com/webhooks/signature). The whole secret is the key,
// whsec_ included, and its libraries take any of several v1 entries but no blank between them.
func stripe() plugin.Kind {
	return vendor[stripeConfig]{
		id:      "stripe",
		doc:     "Stripe-Signature as Stripe signs (https://docs.stripe.com/webhooks/signature); both keys sign during a rotation",
		emits:   []string{"Stripe-Signature"},
		example: struct{}{},
		secret: secretText{
			doc:       "whsec_ and letters and digits, used as text with its whsec_",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte("whsec_" + randomHex(32)) },
			mistakes: []mistake{
				{"sk_", "an API key"}, {"rk_", "a restricted API key"}, {"pk_", "a publishable API key"}, {"we_", "the id of an endpoint"},
			},
		},
		schemes: func(stripeConfig, plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "hex",
				content: "{timestamp}.{body}",
				headers: []header{{name: "Stripe-Signature", value: "t={timestamp},{signatures}"}},
				each:    "v1={signature}", join: ",",
			}}
		},
	}.kind()
}
