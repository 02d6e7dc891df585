package server_test

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// methodAndHeaders sends by PUT, with headers of the subscription's own.
func methodAndHeaders(t *testing.T, s *stand) {
	rcv := servertest.NewReceiver(t, nil)
	s.over("put", rcv.URL+"/hook", route{config: map[string]any{"method": "PUT"}}, func(sub *grapnelv1.Subscription) {
		sub.Headers = map[string]string{"X-Tenant": "acme", "x-flags": "a, b"}
	})
	s.send("put", 2)
	for _, r := range rcv.Requests() {
		s.verified(r.Header, r.Body)
		if r.Method != http.MethodPut || r.Header.Get("X-Tenant") != "acme" || r.Header.Get("X-Flags") != "a, b" {
			t.Errorf("%s with\n%s", r.Method, headersText(r.Header))
		}
	}
	bearer := route{config: map[string]any{"auth": map[string]any{"type": "bearer"}}, secrets: map[string]string{"token": "some-token"}}
	for id, c := range map[string]struct {
		route  route
		header string
	}{
		"signature": {route{}, "Webhook-Signature"},
		"auth":      {bearer, "Authorization"},
		"framing":   {route{}, "Content-Length"},
	} {
		text := s.refuses(id, rcv.URL, c.route, func(sub *grapnelv1.Subscription) { sub.Headers = map[string]string{c.header: "x"} })
		if !strings.Contains(text, "subscription.headers") || !strings.Contains(strings.ToLower(text), strings.ToLower(c.header)) {
			t.Errorf("%s: %s", id, text)
		}
	}
}

// severalSigners signs one request in three ways, each verified by its scheme's own library.
func severalSigners(t *testing.T, s *stand) {
	o := newOracle(t)
	rcv := servertest.NewReceiver(t, nil)
	keys := map[string]receiverKey{}
	var signers []*grapnelv1.PluginBinding
	for _, plugin := range []string{"standard-webhooks", "github", "http-signature"} {
		made := s.secret(plugin, "", "")
		keys[plugin] = newReceiverKey(made.GetSecret(), made.GetGeneratedValue())
		signers = append(signers, &grapnelv1.PluginBinding{Plugin: "plugins/" + plugin, Secrets: map[string]string{"key": made.GetSecret().GetName()}})
	}
	algorithm := ""
	s.over("three", rcv.URL+"/hook", route{}, func(sub *grapnelv1.Subscription) { sub.Signers = signers })
	s.send("three", 2)
	for _, r := range rcv.Requests() {
		for plugin, key := range keys {
			v := &verifying{scheme: scheme{plugin: plugin}, oracle: o}
			if plugin == "http-signature" {
				if _, after, ok := strings.Cut(r.Header.Get("Signature-Input"), `alg="`); ok {
					algorithm, _, _ = strings.Cut(after, `"`)
				}
				v.verify = map[string]any{"algorithm": algorithm}
			}
			v.accepts(t, plugin, r, key)
			v.refuses(t, plugin+", a changed body", changed(r), key)
		}
	}
	both := func(sub *grapnelv1.Subscription) {
		sub.Signers = []*grapnelv1.PluginBinding{signers[0], {Plugin: "plugins/standard-webhooks", Secrets: signers[0].GetSecrets()}}
	}
	if text := s.refuses("conflict", rcv.URL, route{}, both); !strings.Contains(text, "subscription.signers[1]") || !strings.Contains(text, "the header webhook-") {
		t.Errorf("two signers of one header: %s", text)
	}
}

// unsignedWithBearer leaves requests unsigned; what shows the sender is the token.
func unsignedWithBearer(t *testing.T, s *stand) {
	rcv := servertest.NewReceiver(t, nil)
	token := s.canary("a token instead of signatures", "c4n4ry-unsigned-"+rand.Text())
	s.over("bare", rcv.URL, route{config: map[string]any{"auth": map[string]any{"type": "bearer"}}, secrets: map[string]string{"token": token}},
		func(sub *grapnelv1.Subscription) {
			sub.Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}
		})
	s.send("bare", 1)
	r := rcv.Requests()[0]
	for name := range r.Header {
		if strings.Contains(strings.ToLower(name), "signature") {
			t.Errorf("there is a header %s", name)
		}
	}
	if r.Header.Get("Authorization") != "Bearer "+token || !json.Valid(r.Body) {
		t.Errorf("arrived: %s\n%s", r.Body, headersText(r.Header))
	}
}

// mistakes makes the mistakes that people make, and holds what they are told: the field, and what would be
// right.
func mistakes(t *testing.T, s *stand) {
	ca := newAuthority(t)
	certificate, _ := ca.issue("nobody")
	for id, c := range map[string]struct {
		uri   string
		route route
		says  []string
	}{
		"http-method":      {uri: "https://hooks.example.com", route: route{config: map[string]any{"method": "GET"}}, says: []string{"subscription.transport.config.method", "POST", "PUT", "PATCH"}},
		"http-field":       {uri: "https://hooks.example.com", route: route{config: map[string]any{"metod": "PUT"}}, says: []string{"subscription.transport.config", "metod"}},
		"http-auth":        {uri: "https://hooks.example.com", route: route{config: map[string]any{"auth": map[string]any{"type": "bearer"}}}, says: []string{"subscription.transport.secrets", "token"}},
		"http-token-url":   {uri: "https://hooks.example.com", route: route{config: map[string]any{"auth": map[string]any{"type": "oauth2", "client_id": "me"}}, secrets: map[string]string{"client_secret": "s3cret-value"}}, says: []string{"subscription.transport.config.auth.token_url", "is empty"}},
		"http-proxy":       {uri: "https://hooks.example.com", route: route{config: map[string]any{"proxy": map[string]any{"url": "proxy.example.com:3128"}}}, says: []string{"subscription.transport.config.proxy.url", "http://"}},
		"http-timeout":     {uri: "https://hooks.example.com", route: route{config: map[string]any{"connect_timeout": "5 seconds"}}, says: []string{"subscription.transport.config.connect_timeout", "5 seconds"}},
		"http-origin":      {uri: "https://hooks.example.com", route: route{config: map[string]any{"ownership": map[string]any{"check": "cloudevents"}}}, says: []string{"subscription.transport.config.ownership.origin", "is empty"}},
		"http-certificate": {uri: "https://hooks.example.com", route: route{secrets: map[string]string{"client_certificate": certificate}}, says: []string{`subscription.transport.secrets["client_certificate"]`, "without its private key"}},
		"http-slot":        {uri: "https://hooks.example.com", route: route{secrets: map[string]string{"cert": "namespaces/" + s.ns + "/secrets/key"}}, says: []string{`subscription.transport.secrets["cert"]`, "client_certificate"}},
		"http-scheme":      {uri: "ftp://hooks.example.com", route: route{}, says: []string{"subscription.uri", "http"}},
		"grpc-scheme":      {uri: "https://hooks.example.com", route: route{plugin: "grpc"}, says: []string{"subscription.uri", "https", "scheme"}},
		"grpc-tls":         {uri: "grpc://hooks.example.com", route: route{plugin: "grpc", config: map[string]any{"tls": map[string]any{"server_name": "x.example.com"}}}, says: []string{"subscription.transport.config.tls.server_name", "grpcs"}},
		"grpc-method":      {uri: "grpcs://hooks.example.com", route: route{plugin: "grpc", config: map[string]any{"method": "PUT"}}, says: []string{"subscription.transport.config", "method"}},
		"nats-subject":     {uri: "tls://nats.example.com", route: route{plugin: "nats"}, says: []string{"subscription.uri", "no subject"}},
		"nats-wildcard":    {uri: "tls://nats.example.com", route: route{plugin: "nats", config: map[string]any{"subject": "orders.*"}}, says: []string{"subscription.transport.config.subject", "wildcard"}},
		"nats-two":         {uri: "tls://nats.example.com/orders", route: route{plugin: "nats", secrets: map[string]string{"token": "a-token", "password": "a-password"}, config: map[string]any{"user": "me"}}, says: []string{"subscription.transport.secrets", "one credential"}},
		"nats-scheme":      {uri: "https://nats.example.com/orders", route: route{plugin: "nats"}, says: []string{"subscription.uri", "https", "scheme"}},
	} {
		text := s.refuses(id, c.uri, c.route, nil)
		for _, want := range c.says {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %q does not say %q", id, text, want)
			}
		}
	}
	for name, c := range map[string]struct{ plugin, slot, value, want string }{
		"token with word":     {"http", "token", "Bearer abcdef", "the word Bearer"},
		"line break":          {"http", "api_key", "c4n4ry-line\n", "line break"},
		"no PEM":              {"http", "client_certificate", "c4n4ry-pem", "no certificate"},
		"key without PEM":     {"http", "assertion_key", "c4n4ry-key", "PEM"},
		"made by nobody":      {"http", "password", "", "value"},
		"proxy without colon": {"http", "proxy_credentials", "c4n4ry-proxy", "user:password"},
		"gRPC token":          {"grpc", "token", "Bearer abcdef", "Bearer"},
		"gRPC certificate":    {"grpc", "client_certificate", certificate + certificate[:len(certificate)-40], "broken off"},
		"NATS credentials":    {"nats", "credentials", "c4n4ry-creds", "creds"},
	} {
		_, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
			Parent: "namespaces/" + s.ns, SecretId: "refused", Plugin: "plugins/" + c.plugin, Slot: c.slot, Value: c.value,
		})
		switch {
		case err == nil:
			t.Errorf("%s: taken", name)
		case !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "value") || strings.Contains(err.Error(), "c4n4ry"):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		default:
			t.Logf("%s: %v", name, err)
		}
	}
	// Nothing of all that is stored.
	got, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/" + s.ns})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(got.GetSubscriptions()); n > 0 {
		t.Errorf("%d subscriptions are stored", n)
	}
}
