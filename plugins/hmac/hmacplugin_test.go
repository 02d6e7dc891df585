package hmacplugin_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	hmacplugin "github.com/grapnel/grapnel/plugins/hmac"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const everything = "{id}|{timestamp}|{method}|{url}|{host}|{path}|{query}|{nonce}|{type}|{header:X-Team}|{body}|{{}}"

func TestEveryVariable(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	for name, tt := range map[string]struct{ url, want string }{
		"full":      {"https://example.com:8443/a/b%20c?x=1&y", "https://example.com:8443/a/b%20c?x=1&y|example.com:8443|/a/b%20c|x=1&y"},
		"no path":   {"https://example.com", "https://example.com|example.com|/|"},
		"query":     {"https://example.com?x=/y", "https://example.com?x=/y|example.com|/|x=/y"},
		"bare mark": {"https://example.com/?", "https://example.com/?|example.com|/|"},
	} {
		t.Run(name, func(t *testing.T) {
			inst := h.Configure(plugintest.Instance{
				Kind: "hmac", Config: config{"content": everything, "headers": config{"X-Sig": "{signature}"}},
				Secrets: map[string][]string{"key": {otherSecret}}, Target: plugin.Target{URL: tt.url, Method: "PUT"},
			})
			signed, err := inst.Sign(plugin.Request{
				MessageID: "msg_1", Created: time.Unix(1700000000, 0), Nonce: []byte{0, 1, 0xfe}, Body: []byte("b\x00\xff"),
				EventType: "order.created", Headers: []plugin.Header{{Name: "x-team", Value: "blue"}},
			})
			if err != nil {
				t.Fatal(err)
			}
			mac := hmac.New(sha256.New, []byte(otherSecret))
			mac.Write([]byte("msg_1|1700000000|PUT|" + tt.want + "|0001fe|order.created|blue|b\x00\xff|{}"))
			if got, want := signed.Get("x-sig"), hex.EncodeToString(mac.Sum(nil)); got != want {
				t.Errorf("signature %s, want %s", got, want)
			}
		})
	}
}

func TestListsOfSignatures(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	keys := []string{"key-one-of-sixteen", "key-two-of-sixteen", "key-three-of-sixteen"}
	var sums []string
	for _, k := range keys {
		mac := hmac.New(sha256.New, []byte(k))
		mac.Write([]byte("body"))
		sums = append(sums, hex.EncodeToString(mac.Sum(nil)))
	}
	inst := h.Configure(plugintest.Instance{Kind: "hmac", Secrets: map[string][]string{"key": keys}, Config: config{
		"content": "{body}", "signature_each": "k{id}={signature}", "signature_join": "; ", "sign_with": "oldest",
		"headers": config{"X-All": "<{signatures}>", "X-One": "{signature}"},
	}})
	signed, err := inst.Sign(plugin.Request{MessageID: "7", Body: []byte("body")})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := signed.Get("x-all"), "<k7="+strings.Join(sums, "; k7=")+">"; got != want {
		t.Errorf("list %s, want %s", got, want)
	}
	if got := signed.Get("x-one"); got != sums[2] {
		t.Errorf("one %s, want the oldest key's %s", got, sums[2])
	}
}

func TestOddBodies(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	inst := h.Configure(plugintest.Instance{Kind: "stripe", Secrets: map[string][]string{"key": {stripeSecret}}})
	for name, body := range map[string][]byte{
		"empty": {}, "nul": {0, 0}, "not UTF-8": {0xff, 0xfe, 0x80}, "line ends": []byte("\r\n"), "braces": []byte("{body}"),
		"large": bytes.Repeat([]byte{0xa7}, 1<<20),
	} {
		signed, err := inst.Sign(plugin.Request{Created: time.Unix(1700000000, 0), Body: body})
		if err != nil {
			t.Fatal(err)
		}
		mac := hmac.New(sha256.New, []byte(stripeSecret))
		mac.Write([]byte("1700000000."))
		mac.Write(body)
		if got, want := signed.Get("stripe-signature"), "t=1700000000,v1="+hex.EncodeToString(mac.Sum(nil)); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestSignersArePureAndConcurrent(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	var wg sync.WaitGroup
	for _, v := range vectors() {
		inst := h.Configure(v.instance())
		wg.Go(func() {
			for i := range 20 {
				other := v.request()
				other.MessageID, other.Body = "other", []byte(strconv.Itoa(i))
				if _, err := inst.Sign(other); err != nil {
					t.Error(err)
					return
				}
				before := v.request()
				after, err := inst.Sign(before)
				if err != nil {
					t.Error(err)
					return
				}
				for name, got := range added(before, after) {
					if got != v.want[name] {
						t.Errorf("%s: %s is %s at try %d, want %s", v.name, name, got, i, v.want[name])
					}
				}
			}
		})
	}
	wg.Wait()
}

func TestWhatTheRequestLacksIsNotSigned(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	secrets := map[string][]string{"key": {otherSecret}}
	for name, tt := range map[string]struct {
		in   plugintest.Instance
		with []plugin.Header
		want string
	}{
		"type":          {in: plugintest.Instance{Kind: "github", Secrets: secrets}, want: "x-github-event: {type} is the event's type"},
		"topic":         {in: plugintest.Instance{Kind: "shopify", Config: config{"shop_domain": "a"}, Secrets: secrets}, want: "x-shopify-topic"},
		"covered":       {in: plugintest.Instance{Kind: "hook0", Secrets: secrets}, want: "{header:content-type}"},
		"set by others": {in: plugintest.Instance{Kind: "slack", Secrets: secrets}, with: []plugin.Header{{Name: "x-slack-signature", Value: "x"}}, want: "set twice"},
	} {
		_, err := h.Configure(tt.in).Sign(plugin.Request{MessageID: "1", Headers: tt.with})
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), tt.want) {
			t.Errorf("%s: %v, want it to say %q", name, err, tt.want)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	good := config{"content": "{body}", "headers": config{"X-Sig": "{signature}"}}
	with := func(change config) config {
		out := config{}
		for k, v := range good {
			out[k] = v
		}
		for k, v := range change {
			out[k] = v
		}
		return out
	}
	headers := func(h config) config { return with(config{"headers": h}) }
	tests := []struct {
		name, kind string
		config     config
		secret     string
		at, says   string
	}{
		{"unknown variable", "hmac", with(config{"content": "{body}{tiemstamp}"}), "", "/config/content", "{tiemstamp} is not a variable; there are {body}"},
		{"open brace", "hmac", with(config{"content": "{body}{"}), "", "/config/content", "character 7 is never closed"},
		{"lone brace", "hmac", with(config{"content": "}{body}"}), "", "/config/content", "character 1 closes nothing"},
		{"bad header name", "hmac", with(config{"content": "{body}{header:a b}"}), "", "/config/content", "is not a header name"},
		{"signature in content", "hmac", with(config{"content": "{body}{signature}"}), "", "/config/content", "{signature} cannot stand here"},
		{"empty content", "hmac", with(config{"content": ""}), "", "/config/content", "is empty"},
		{"own header in content", "hmac", with(config{"content": "{body}{header:x-SIG}"}), "", "/config/content", "carries the signature"},
		{"no headers", "hmac", headers(config{}), "", "/config/headers", "at least one"},
		{"no signature", "hmac", headers(config{"X-A": "{id}"}), "", "/config/headers", "no header has a signature"},
		{"body in header", "hmac", headers(config{"X/A": "{signature}"}), "", "/config/headers/X~1A", "is not a header name"},
		{"body in header value", "hmac", headers(config{"X-Sig": "{signature}{body}"}), "", "/config/headers/X-Sig", "{body} cannot stand here"},
		{"line break", "hmac", headers(config{"X-Sig": "{signature}\n"}), "", "/config/headers/X-Sig", "printable ASCII"},
		{"empty value", "hmac", headers(config{"X-Sig": "{signature}", "X-A": ""}), "", "/config/headers/X-A", "is empty"},
		{"same name twice", "hmac", headers(config{"X-Sig": "{signature}", "x-sig": "1"}), "", "/config/headers/x-sig", "same header"},
		{"host's header", "hmac", headers(config{"Content-Type": "{signature}"}), "", "/config/headers/Content-Type", "set by the host"},
		{"subscription's header", "hmac", headers(config{"x-team": "{signature}"}), "", "/config/headers/x-team", "subscription's own"},
		{"entry without signature", "hmac", with(config{"signature_each": "v1"}), "", "/config/signature_each", "want {signature} in it"},
		{"list in entry", "hmac", with(config{"signature_each": "{signatures}"}), "", "/config/signature_each", "cannot stand here"},
		{"join with line break", "hmac", with(config{"signature_join": "\r\n"}), "", "/config/signature_join", "printable ASCII"},
		{"secret not hex", "hmac", with(config{"key_encoding": "hex"}), "zz112233445566778899aabbccddeeff", "/secrets/key", "not hex"},
		{"secret not base64", "hmac", with(config{"key_encoding": "base64"}), "zz11223344556677-_99aabbccddeeff", "/secrets/key", "not standard base64"},
		{"secret short when decoded", "hmac", with(config{"key_encoding": "hex"}), "00112233445566778899", "/secrets/key", "10 bytes when decoded"},
		{"unknown algorithm", "hmac", with(config{"algorithm": "md5"}), "", "/config/algorithm", "want one of"},
		{"github event", "github", config{"event": "a\r\nb"}, "", "/config/event", "printable ASCII"},
		{"shopify without shop", "shopify", nil, "", "/config/shop_domain", "missing"},
		{"shopify with empty shop", "shopify", config{"shop_domain": ""}, "", "/config/shop_domain", "is empty"},
		{"square URL", "square", config{"notification_url": "https://exämple.com"}, "", "/config/notification_url", "printable ASCII"},
		{"hook0 without headers", "hook0", config{"headers": []string{}}, "", "/config/headers", "at least one"},
		{"hook0 header name", "hook0", config{"headers": []string{"a", "b c"}}, "", "/config/headers/1", "not a header name"},
		{"hook0 header twice", "hook0", config{"headers": []string{"a", "A"}}, "", "/config/headers/1", "twice"},
		{"hook0 own header", "hook0", config{"headers": []string{"X-Hook0-Signature"}}, "", "/config/headers/0", "cannot be signed itself"},
		{"which key", "slack", config{"sign_with": "both"}, "", "/config/sign_with", "newest, oldest"},
		{"no choice where both sign", "stripe", config{"sign_with": "oldest"}, "", "/config/sign_with", "there is no field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := plugintest.Instance{
				Kind: tt.kind, Secrets: map[string][]string{"key": {otherSecret}},
				Target: plugin.Target{URL: "https://example.com/", Headers: []plugin.Header{{Name: "X-Team", Value: "1"}}},
			}
			if tt.config != nil {
				in.Config = tt.config
			}
			if tt.secret != "" {
				in.Secrets["key"] = []string{tt.secret}
			}
			problems := h.Validate(in)
			if len(problems) != 1 || problems[0].Pointer != tt.at || problems[0].Warning || !strings.Contains(problems[0].Summary, tt.says) {
				t.Fatalf("%+v, want one error at %s that says %q", problems, tt.at, tt.says)
			}
			if tt.secret != "" && strings.Contains(problems[0].Summary, tt.secret[:8]) {
				t.Errorf("%q shows the secret", problems[0].Summary)
			}
		})
	}
}

func TestConfigWarnings(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	for content, tt := range map[string]struct{ header, says string }{
		"{id}.{body}":        {"{signature}", ""},
		"{id}":               {"{signature}", "nothing about the body"},
		"{timestamp}.{body}": {"{signature}", "{timestamp} is signed but in none of the headers"},
		"{nonce}.{body}":     {"n={nonce},s={signature}", ""},
	} {
		problems := h.Validate(plugintest.Instance{Kind: "hmac", Config: config{"content": content, "headers": config{"X-Sig": tt.header}}})
		if tt.says == "" && len(problems) == 0 {
			continue
		}
		if len(problems) != 1 || !problems[0].Warning || problems[0].Pointer != "/config/content" || !strings.Contains(problems[0].Summary, tt.says) {
			t.Errorf("%s: %+v, want a warning that says %q", content, problems, tt.says)
		}
	}
}

func TestSecretsAreReadAsTheVendorMeansThem(t *testing.T) {
	h := plugintest.New(t, hmacplugin.Kinds()...)
	const long = "0123456789abcdefXYZ"
	mistakes := map[string][]string{
		"stripe": {"sk_live_" + long, "pk_test_" + long, "we_" + long, long + " " + long}, "github": {"ghp_" + long, "github_pat_" + long},
		"slack": {"xoxb-" + long}, "shopify": {"shpat_" + long}, "square": {"EAAA" + long}, "convoy": nil, "outpost": {long + " " + long},
		"webhookx": nil, "hook0": nil, "hmac": nil,
	}
	configs := map[string]config{"shopify": {"shop_domain": "a"}, "hmac": {"content": "{body}", "headers": config{"X-Sig": "{signature}"}}}
	for kind, values := range mistakes {
		for _, value := range append(values, "short-secret", long+"\n", " "+long, "a\x00"+long, "a\n"+long, "\xff\xfe"+long) {
			in := plugintest.Instance{Kind: kind, Secrets: map[string][]string{"key": {long, value}}}
			if c := configs[kind]; c != nil {
				in.Config = c
			}
			problems := h.Validate(in)
			if len(problems) != 1 || problems[0].Pointer != "/secrets/key" || !strings.Contains(problems[0].Summary, "version 2 of 2") {
				t.Errorf("%s takes %q: %+v", kind, value, problems)
				continue
			}
			if strings.Contains(problems[0].Summary, "56789abc") || strings.Contains(problems[0].Summary, "short-") {
				t.Errorf("%s: %q shows the secret", kind, problems[0].Summary)
			}
		}
	}
}

func TestGeneratedSecretsAreGoodAndDiffer(t *testing.T) {
	client := serve(t)
	h := plugintest.New(t, hmacplugin.Kinds()...)
	desc, err := client.Describe(t.Context(), &pluginv1.DescribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	begins := map[string]string{"stripe": "whsec_", "shopify": "shpss_"}
	lengths := map[string]int{"slack": 32, "shopify": 38, "hook0": 36, "github": 64}
	for _, k := range desc.GetKinds() {
		var example config
		if err := json.Unmarshal([]byte(k.GetConfigExample()), &example); err != nil {
			t.Fatalf("%s: example: %v", k.GetId(), err)
		}
		seen := map[string]bool{}
		for range 3 {
			resp, err := client.PrepareSecret(t.Context(), &pluginv1.PrepareSecretRequest{Kind: k.GetId(), Slot: "key"})
			if err != nil || len(resp.GetDiagnostics()) > 0 {
				t.Fatalf("%s: %v %v", k.GetId(), err, resp.GetDiagnostics())
			}
			value := string(resp.GetValue())
			if seen[value] || !strings.HasPrefix(value, begins[k.GetId()]) || lengths[k.GetId()] != 0 && len(value) != lengths[k.GetId()] {
				t.Errorf("%s: made %q", k.GetId(), value)
			}
			if resp.GetAlgorithm() != k.GetSecretSlots()[0].GetAlgorithms()[0] {
				t.Errorf("%s: algorithm %q, want one of %v", k.GetId(), resp.GetAlgorithm(), k.GetSecretSlots()[0].GetAlgorithms())
			}
			seen[value] = true
			encodings := []string{""}
			if k.GetId() == "hmac" {
				encodings = []string{"raw", "hex", "base64"}
			}
			for _, e := range encodings {
				if e != "" {
					example["key_encoding"] = e
				}
				inst := h.Configure(plugintest.Instance{Kind: k.GetId(), Config: example, Secrets: map[string][]string{"key": {value}}})
				if _, err := inst.Sign(plugin.Request{MessageID: "msg_1"}); err != nil {
					t.Errorf("%s: sign with the example and a generated secret: %v", k.GetId(), err)
				}
			}
		}
	}
}

// serve offers the kinds to a bare client, for what the harness does not ask.
func serve(t *testing.T) pluginv1.PluginServiceClient {
	t.Helper()
	server, stop, err := plugin.NewGRPCServer("test", "0", hmacplugin.Kinds()...)
	if err != nil {
		t.Fatal(err)
	}
	lis := bufconn.Listen(1 << 16)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(lis) })
	conn, err := grpc.NewClient("passthrough:test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		stop()
		serving.Wait()
	})
	return pluginv1.NewPluginServiceClient(conn)
}
