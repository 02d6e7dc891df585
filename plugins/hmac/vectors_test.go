package hmacplugin_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	hmacplugin "github.com/grapnel/grapnel/plugins/hmac"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const (
	stripeSecret  = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	stripeOther   = "whsec_0123456789abcdef0123456789abcdef"
	githubSecret  = "It's a Secret to Everybody"
	slackSecret   = "8f742231b10e8888abcd99yyyzzz85a5"
	shopifySecret = "shpss_0123456789abcdef0123456789abcdef"
	squareSecret  = "asdf1234asdf1234asdf12"
	convoySecret  = "convoy-webhook-secret"
	outpostSecret = "5f676d196c3e49763780162994df98e66d0917976bf0554dba9859e6d6105530"
	outpostOther  = "b16b00b5b16b00b5b16b00b5b16b00b5b16b00b5b16b00b5b16b00b5b16b00b5"
	webhookx      = "QGvaZ0uPwA9nYi7jr31JtZn1EKK4pJpK"
	hook0Secret   = "a-subscription-secret"
	otherSecret   = "another-secret-of-some-length"

	slackBody = "token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id=G8PSS9T3V&channel_name=foobar" +
		"&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com" +
		"%2Fcommands%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
	convoyBody = `{"event":"charge.success","amount":1000,"currency":"NGN"}`
	hook0Body  = `{"event":"user.created"}`
)

type config map[string]any

// vector is a request and the headers it must get.
type vector struct {
	name, kind string
	config     config
	secrets    []string
	id         string
	unix       int64
	body       string
	url        string
	headers    []plugin.Header
	event      string
	want       map[string]string
}

// vectors are those that the schemes' owners publish (the documentation of GitHub and Slack, the
// conformance files of Convoy and Hook0, the test of WebhookX), and what the libraries of Stripe and
// Square compute or accept.
func vectors() []vector {
	typed := []plugin.Header{{Name: "content-type", Value: "application/json"}}
	return []vector{
		{name: "stripe", kind: "stripe", secrets: []string{stripeSecret}, unix: 1614265330, body: `{"test": 2432232314}`,
			want: map[string]string{"stripe-signature": "t=1614265330,v1=2e37df5d4a028c51a7f3133d64ae1e300d2c2c900f1b1d49d4369ad2530f8964"}},
		{name: "stripe, both keys", kind: "stripe", secrets: []string{stripeOther, stripeSecret}, unix: 1614265330, body: `{"test": 2432232314}`,
			want: map[string]string{"stripe-signature": "t=1614265330,v1=9dce2b6cbcb52dcc2107e062fe0b449d92e3ee28ff6becaa7ea003eefc242ce0" +
				",v1=2e37df5d4a028c51a7f3133d64ae1e300d2c2c900f1b1d49d4369ad2530f8964"}},
		{name: "github", kind: "github", secrets: []string{githubSecret}, id: "msg_1", body: "Hello, World!", headers: typed, event: "order.created",
			want: map[string]string{
				"x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
				"x-github-event":      "order.created", "x-github-delivery": "msg_1"}},
		{name: "github, with sha1", kind: "github", config: config{"sha1": true, "event": "push{1}"}, secrets: []string{githubSecret}, id: "msg_1", body: "Hello, World!",
			want: map[string]string{
				"x-hub-signature-256": "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17",
				"x-hub-signature":     "sha1=01dc10d0c83e72ed246219cdd91669667fe2ca59",
				"x-github-event":      "push{1}", "x-github-delivery": "msg_1"}},
		{name: "slack", kind: "slack", secrets: []string{slackSecret}, unix: 1531420618, body: slackBody,
			want: map[string]string{"x-slack-request-timestamp": "1531420618",
				"x-slack-signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503"}},
		{name: "shopify", kind: "shopify", config: config{"shop_domain": "a.myshopify.com", "api_version": "2026-01"},
			secrets: []string{shopifySecret}, id: "msg_1", body: `{"id":820982911946154508}`, headers: typed, event: "order.created",
			want: map[string]string{"x-shopify-hmac-sha256": "EWt6OQogH/v33I55p/h7ugPPrTDtweTTHsOxSwhWnS4=",
				"x-shopify-topic": "order.created", "x-shopify-shop-domain": "a.myshopify.com",
				"x-shopify-api-version": "2026-01", "x-shopify-webhook-id": "msg_1"}},
		{name: "square", kind: "square", config: config{"notification_url": "https://perfect-signature.example/webhooks/"},
			secrets: []string{squareSecret}, body: `{"hello":"world"}`, url: "https://elsewhere.example/",
			want: map[string]string{"x-square-hmacsha256-signature": "XXhWrneDwkyg1/kL/WfGafFJidPPUFLNjvfWwOHDaLQ="}},
		{name: "square, the subscription's URI", kind: "square", secrets: []string{squareSecret}, body: `{"hello":"world"}`,
			url:  "https://perfect-signature.example/webhooks/",
			want: map[string]string{"x-square-hmacsha256-signature": "XXhWrneDwkyg1/kL/WfGafFJidPPUFLNjvfWwOHDaLQ="}},
		{name: "convoy advanced hex", kind: "convoy", secrets: []string{convoySecret}, unix: 1700000000, body: convoyBody,
			want: map[string]string{"x-convoy-signature": "t=1700000000,v1=77b8b9269f25a199846a55a2bd25b3fba151c70fdae60bb1dcd87fbbc943c55c"}},
		{name: "convoy advanced base64", kind: "convoy", config: config{"encoding": "base64"}, secrets: []string{convoySecret}, unix: 1700000000, body: convoyBody,
			want: map[string]string{"x-convoy-signature": "t=1700000000,v1=d7i5Jp8loZmEalWivSWz+6FRxw/a5gux3Nh/u8lDxVw="}},
		{name: "convoy advanced SHA512", kind: "convoy", config: config{"hash": "SHA512"}, secrets: []string{convoySecret}, unix: 1700000000, body: convoyBody,
			want: map[string]string{"x-convoy-signature": "t=1700000000,v1=b2122e252cd2582cf225cb2b8d4ceede9e34329e2fe95c02619c3ed5d4a3d9a7" +
				"3e6beaf2dff8e76d71a693ae198cee40685eed12ad4ee2e033dc2d0399ede057"}},
		{name: "convoy simple hex", kind: "convoy", config: config{"mode": "simple"}, secrets: []string{convoySecret}, body: convoyBody,
			want: map[string]string{"x-convoy-signature": "244449b7f48cbc2709060c9dcdc2b3aa47a78f540430579015c579fb12defbb4"}},
		{name: "convoy simple SHA512 base64", kind: "convoy", config: config{"mode": "simple", "hash": "SHA512", "encoding": "base64"},
			secrets: []string{convoySecret}, body: convoyBody,
			want: map[string]string{"x-convoy-signature": "bMdy3IGUKuG1/6kcOmoHsNN+3I3GvYPjUYohnx8Z/3GuG3bWsyCUDUFMI2oarX95MLY+DxkolRlV0xIZVF4bZg=="}},
		{name: "outpost", kind: "outpost", secrets: []string{outpostSecret}, id: "msg_1", unix: 1700000000, body: `{"hello":"world"}`, headers: typed, event: "order.created",
			want: map[string]string{"x-outpost-event-id": "msg_1", "x-outpost-topic": "order.created", "x-outpost-timestamp": "2023-11-14T22:13:20Z",
				"x-outpost-signature": "v0=f4407ae18df6d99c1053699c61c55925366a38e40a3335ea9f7b476f674e4215"}},
		{name: "outpost, both keys, no type", kind: "outpost", secrets: []string{outpostOther, outpostSecret}, id: "msg_1", unix: 1700000000, body: `{"hello":"world"}`,
			want: map[string]string{"x-outpost-event-id": "msg_1", "x-outpost-timestamp": "2023-11-14T22:13:20Z",
				"x-outpost-signature": "v0=5bc788f22c467c2c0aafe0677605fedc47940fcc48421309877f1bf3b07097e6," +
					"f4407ae18df6d99c1053699c61c55925366a38e40a3335ea9f7b476f674e4215"}},
		{name: "webhookx", kind: "webhookx", secrets: []string{webhookx}, id: "msg_1", unix: 1726285679, body: "foo",
			want: map[string]string{"webhookx-event-id": "msg_1", "webhookx-timestamp": "1726285679",
				"webhookx-signature": "v1=e2af2618d5ffd700eb369904b7237ec4ac7d37873cfe6654265af2e53b44da6b"}},
		{name: "hook0 v0", kind: "hook0", config: config{"version": "v0"}, secrets: []string{hook0Secret}, id: "evt-1", unix: 1800000000, body: hook0Body,
			want: map[string]string{"x-event-id": "evt-1",
				"x-hook0-signature": "t=1800000000,v0=d17d66b66fca89390c5b967c45e8928fc732db07a0aabe8167b1e98213081ffe"}},
		{name: "hook0 v1", kind: "hook0", config: config{"headers": []string{"X-Event-Id", "x-delivery-id"}}, secrets: []string{hook0Secret},
			id: "evt-1", unix: 1800000000, body: hook0Body, headers: []plugin.Header{{Name: "x-delivery-id", Value: "dlv-1"}},
			want: map[string]string{"x-event-id": "evt-1",
				"x-hook0-signature": "t=1800000000,h=x-event-id x-delivery-id,v1=19a6fb8f6581715b241a93af02a58611c3b0ac7b747a8d2a5b120ee418d0c347"}},
		{name: "hook0 v1, the other order", kind: "hook0", config: config{"headers": []string{"x-delivery-id", "x-event-id"}}, secrets: []string{hook0Secret},
			id: "evt-1", unix: 1800000000, body: hook0Body, headers: []plugin.Header{{Name: "x-delivery-id", Value: "dlv-1"}},
			want: map[string]string{"x-event-id": "evt-1",
				"x-hook0-signature": "t=1800000000,h=x-delivery-id x-event-id,v1=bf5f4e5fe0c9143510ae192f983316a09ed392d0104d2ce0faa3d7bce3687acb"}},
		{name: "hmac as stripe", kind: "hmac", secrets: []string{stripeSecret}, unix: 1614265330, body: `{"test": 2432232314}`,
			config: config{"content": "{timestamp}.{body}", "headers": config{"X-Sig": "t={timestamp},v1={signature}"}},
			want:   map[string]string{"x-sig": "t=1614265330,v1=2e37df5d4a028c51a7f3133d64ae1e300d2c2c900f1b1d49d4369ad2530f8964"}},
		{name: "hmac over the request's line", kind: "hmac", secrets: []string{"00112233445566778899aabbccddeeff"}, id: "msg_1", unix: 1614265330,
			url: "https://example.com:8443/v1/hook?a=b&c",
			config: config{"algorithm": "sha512", "encoding": "base64url", "key_encoding": "hex", "timestamp_format": "ms",
				"content": "{method}\n{path}\n{query}\n{host}\n{timestamp}\n{id}", "headers": config{"X-Sig": "{signature}", "X-Static": "{{v}}", "X-Time": "{timestamp}"}},
			want: map[string]string{"x-static": "{v}", "x-time": "1614265330987",
				"x-sig": "tAutb1zIhdke2hIhkmKh8UvGtixU8az7kEXEVKZiF-sCNGeoi-QwzBFdqsZRn9FD3tJvddSySlUD7cWrQbshpA"}},
	}
}

func (v *vector) instance() plugintest.Instance {
	in := plugintest.Instance{Kind: v.kind, Secrets: map[string][]string{"key": v.secrets}, Target: plugin.Target{URL: v.url}}
	if v.config != nil {
		in.Config = v.config
	}
	return in
}

func (v *vector) request() plugin.Request {
	return plugin.Request{
		EventType: v.event,
		MessageID: v.id, Created: time.Unix(v.unix, 987_654_321), Body: []byte(v.body), Headers: v.headers,
		Nonce: []byte("0123456789abcdef"),
	}
}

// added are the headers that signing added.
func added(before, after plugin.Request) map[string]string {
	out := map[string]string{}
	for _, h := range after.Headers[len(before.Headers):] {
		out[h.Name] += h.Value // twice the same name would show
	}
	return out
}

func TestVectors(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	for _, v := range vectors() {
		t.Run(v.name, func(t *testing.T) {
			inst, problems := h.TryConfigure(v.instance())
			if inst == nil {
				t.Fatalf("%+v", problems)
			}
			before := v.request()
			after, err := inst.Sign(before)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(v.want, added(before, after)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if emits := h.Kind(v.kind).GetSigner().GetEmitsHeaders(); v.kind != "hmac" {
				for name := range v.want {
					if !strings.Contains(" "+strings.Join(emits, " ")+" ", " "+name+" ") {
						t.Errorf("sets %s, but says it emits only %v", name, emits)
					}
				}
			}
		})
	}
}

func TestOneSignatureIsOfTheKeyAskedFor(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	for _, v := range vectors() {
		several := strings.Contains(v.name, "both") || v.kind == "stripe" || v.kind == "outpost" || v.kind == "convoy" && v.config["mode"] != "simple"
		if several || v.kind == "hmac" && v.config["key_encoding"] == "hex" {
			continue
		}
		t.Run(v.name, func(t *testing.T) {
			for want, secrets := range map[string][]string{"newest": {v.secrets[0], otherSecret}, "oldest": {otherSecret, v.secrets[0]}} {
				for _, with := range []string{"newest", "oldest", ""} {
					two := v
					two.secrets, two.config = secrets, config{}
					for name, value := range v.config {
						two.config[name] = value
					}
					if with != "" {
						two.config["sign_with"] = with
					}
					before := two.request()
					after, err := h.Configure(two.instance()).Sign(before)
					if err != nil {
						t.Fatal(err)
					}
					right := with == want || with == "" && want == "newest"
					if got := cmp.Equal(v.want, added(before, after)); got != right {
						t.Errorf("sign_with %q, the %s key expected to sign: %v, want %v", with, want, got, right)
					}
				}
			}
		})
	}
}
