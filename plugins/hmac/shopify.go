package hmacplugin

import (
	"cmp"
	"slices"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type shopifyConfig struct {
	oneKey
	ShopDomain string `json:"shop_domain" required:"true" doc:"Value of X-Shopify-Shop-Domain, such as example.myshopify.com."`
	Topic      string `json:"topic" doc:"Value of X-Shopify-Topic, such as orders/create. Empty: the event's type."`
	APIVersion string `json:"api_version" default:"2025-10" doc:"Value of X-Shopify-API-Version."`
}

// shopify signs as Shopify does (https://shopify.dev/docs/apps/build/webhooks/verify-deliveries). Its
// libraries refuse a request that lacks one of the four headers beside the signature, and an empty body.
func shopify() plugin.Kind {
	return vendor[shopifyConfig]{
		id: "shopify",
		doc: "X-Shopify-Hmac-Sha256 as Shopify signs (https://shopify.dev/docs/apps/build/webhooks); body only, without a time; " +
			"one signature: sign_with says which key signs during a rotation",
		emits: []string{
			"X-Shopify-Hmac-Sha256", "X-Shopify-Topic", "X-Shopify-Shop-Domain", "X-Shopify-API-Version", "X-Shopify-Webhook-Id",
		},
		example: map[string]any{"shop_domain": "example.myshopify.com", "topic": "orders/create"},
		secret: secretText{
			doc:       "the app's client secret, shpss_ and 32 hexadecimal digits, used as text",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte("shpss_" + randomHex(16)) },
			mistakes: []mistake{
				{"shpat_", "an access token"}, {"shpca_", "a custom app's access token"}, {"shppa_", "a private app's password"},
			},
		},
		schemes: func(c shopifyConfig, _ plugin.Target) []scheme {
			return []scheme{{
				algorithm: "sha256", encoding: "base64",
				content: "{body}",
				headers: []header{
					{name: "X-Shopify-Topic", value: cmp.Or(quote(c.Topic), "{type}")},
					{name: "X-Shopify-Shop-Domain", value: quote(c.ShopDomain)},
					{name: "X-Shopify-API-Version", value: quote(c.APIVersion)},
					{name: "X-Shopify-Webhook-Id", value: "{id}"},
					{name: "X-Shopify-Hmac-Sha256", value: "{signature}"},
				},
			}}
		},
		check: func(c shopifyConfig, _ plugin.Target) []plugin.Problem {
			problems := headerText("topic", c.Topic)
			for _, f := range []struct{ field, value, example string }{
				{"shop_domain", c.ShopDomain, "example.myshopify.com"}, {"api_version", c.APIVersion, "2025-10"},
			} {
				problems = slices.Concat(problems, headerText(f.field, f.value))
				if f.value == "" {
					problems = append(problems, plugin.Problem{
						Pointer: "/config/" + f.field, Code: "config.missing", Summary: "is empty, want a value such as " + f.example,
					})
				}
			}
			return problems
		},
	}.kind()
}
