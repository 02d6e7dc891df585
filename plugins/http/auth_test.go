package httpplugin

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

const canary = "c4n4ry s3cret/+%"

func auth(fields ...any) map[string]any {
	m := map[string]any{}
	for i := 0; i < len(fields); i += 2 {
		m[fields[i].(string)] = fields[i+1]
	}
	return map[string]any{"auth": m}
}

// echoing answers with whatever came, as error pages do.
func echoing(t *testing.T, status int) *httptest.Server {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", r.RequestURI)
		w.Header().Set("X-Authorization", r.Header.Get("Authorization"))
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, "%s\n%v\n", r.RequestURI, r.Header)
		if user, password, ok := r.BasicAuth(); ok {
			_, _ = fmt.Fprintln(w, user, password)
		}
		for _, values := range r.URL.Query() {
			_, _ = fmt.Fprintln(w, values)
		}
		said := fmt.Sprint(r.Header, r.URL.Query())
		for _, escaped := range [][]string{{"/", `\/`}, {"+", `\u002b`, "/", `\u002F`, "=", `\u003d`}, {" ", "+", "/", "%2f", "+", "%2b", "%", "%25", "=", "%3d"}} { // PHP; Gson; Java
			_, _ = fmt.Fprintln(w, strings.NewReplacer(escaped...).Replace(said))
		}
	}))
	t.Cleanup(srv.Close)
	return srv
}

func TestCredentialsOnTheWire(t *testing.T) {
	pair := base64.StdEncoding.EncodeToString([]byte("me:" + canary))
	for _, tt := range []struct {
		name    string
		config  map[string]any
		secrets map[string][]string
		header  string
		want    string
		uri     string
	}{
		{"basic", auth("type", "basic", "username", "me"), map[string][]string{"password": {canary, "older"}}, "Authorization", "Basic " + pair, "/hook?a=1"},
		{"bearer", auth("type", "bearer"), map[string][]string{"token": {"c4n4ry.token"}}, "Authorization", "Bearer c4n4ry.token", "/hook?a=1"},
		{"api key", auth("type", "api_key"), map[string][]string{"api_key": {canary}}, "X-Api-Key", canary, "/hook?a=1"},
		{"named api key", auth("type", "api_key", "name", "Authorization"), map[string][]string{"api_key": {canary}}, "Authorization", canary, "/hook?a=1"},
		{"query", auth("type", "api_key", "in", "query", "name", "k&"), map[string][]string{"api_key": {canary}}, "X-Api-Key", "", "/hook?a=1&k%26=c4n4ry+s3cret%2F%2B%25"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				var got *http.Request
				srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r }))
				t.Cleanup(srv.Close)
				h := c.harness(t)
				inst := h.Configure(secret(srv.URL+"/hook?a=1", tt.config, tt.secrets))
				for _, suffix := range []string{"", "&signed=1"} { // a signer may have changed the query
					req := event()
					if suffix != "" {
						req.URL = srv.URL + "/hook?a=1" + suffix
					}
					resp, err := inst.Attempt(within(t, 10*time.Second), req)
					if err != nil || resp.Status != 200 {
						t.Fatalf("%v, %v", resp, err)
					}
					if v := got.Header.Get(tt.header); v != tt.want {
						t.Errorf("%s: %q, want %q", tt.header, v, tt.want)
					}
					if want := strings.Replace(tt.uri, "a=1", "a=1"+suffix, 1); got.RequestURI != want {
						t.Errorf("request target %q, want %q", got.RequestURI, want)
					}
				}
				resp, err := attempt(t, h.Configure(secret(echoing(t, 404).URL+"/hook?a=1", tt.config, tt.secrets)))
				if err != nil || resp.Status != 404 {
					t.Fatalf("%v, %v", resp, err)
				}
				if text := fmt.Sprint(string(resp.Body), resp.Headers, resp.Peer); strings.Contains(text, "c4n4ry") || strings.Contains(text, pair) || !strings.Contains(text, "[redacted]") {
					t.Errorf("the answer shows the credential: %s", text)
				}
			})
		})
	}
}

func TestCredentialCutOffInABody(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			_, _ = io.WriteString(w, strings.Repeat("x", 4085)+r.Header.Get("X-Api-Key"))
		}))
		t.Cleanup(srv.Close)
		resp, err := attempt(t, c.harness(t).Configure(secret(srv.URL, auth("type", "api_key"), map[string][]string{"api_key": {canary}})))
		if err != nil || !resp.Truncated || len(resp.Body) < 4085 || strings.Contains(string(resp.Body), canary[:6]) {
			t.Errorf("%v, body ends with %q", err, resp.Body[4080:])
		}
	})
}

// TestNoSecretInFailures breaks requests in as many ways as there are and reads what is said about it.
func TestNoSecretInFailures(t *testing.T) {
	credentials := map[string]struct {
		config  map[string]any
		secrets map[string][]string
	}{
		"basic":  {auth("type", "basic", "username", "me"), map[string][]string{"password": {"c4n4ry"}}},
		"bearer": {auth("type", "bearer"), map[string][]string{"token": {"c4n4ry"}}},
		"query":  {auth("type", "api_key", "in", "query", "name", "key"), map[string][]string{"api_key": {"c4n4ry"}}},
		"proxy":  {map[string]any{"proxy": map[string]any{"url": "http://127.0.0.1:1"}}, map[string][]string{"proxy_credentials": {"me:c4n4ry"}}},
		"socks":  {map[string]any{"proxy": map[string]any{"url": "socks5://127.0.0.1:1"}}, map[string][]string{"proxy_credentials": {"me:c4n4ry"}}},
		"token": {
			auth("type", "oauth2", "token_url", "http://127.0.0.1:1/c4n4ry", "client_id", "c4n4ry"),
			map[string][]string{"client_secret": {"c4n4ry"}},
		},
	}
	direct(t, func(t *testing.T, c client) {
		h := c.harness(t)
		targets := []string{
			"http://127.0.0.1:1/", "https://127.0.0.1:1/", "http://no-such-name.invalid/", once(t, "").url, once(t, "c4n4ry\r\n\r\n").url,
			once(t, "HTTP/1.1 103 c4n4ry\r\nc4n4ry\r\n\r\n").url, "https" + strings.TrimPrefix(once(t, "c4n4ry").url, "http"),
		}
		for name, cred := range credentials {
			for _, uri := range targets {
				_, err := attempt(t, h.Configure(secret(uri, cred.config, cred.secrets)))
				if err == nil || strings.Contains(fmt.Sprintf("%+v", err), "c4n4ry") {
					t.Errorf("%s, %s: %v", name, uri, err)
				}
			}
		}
	})
}

func TestSignersKeepTheirHeaders(t *testing.T) {
	signer := plugin.Signer("house", func(struct{}, plugin.Target) (plugin.SignFunc, error) {
		return func(r *plugin.Request) error {
			r.Set("authorization", "HOUSE signature")
			return nil
		}, nil
	}, plugin.Emits("authorization"))
	direct(t, func(t *testing.T, c client) {
		var got atomic.Value
		srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			got.Store(r.Header.Values("Authorization"))
		}))
		t.Cleanup(srv.Close)
		h := c.harness(t, signer)
		house := h.Configure(plugintest.Instance{Kind: "house"})
		resp, err := h.Configure(secret(srv.URL, nil, nil)).Attempt(within(t, 10*time.Second), event(), house)
		if err != nil || resp.Status != 200 || fmt.Sprint(got.Load()) != "[HOUSE signature]" {
			t.Fatalf("%v, %v, received %v", resp, err, got.Load())
		}
		// A key in another header is no conflict.
		apiKey := secret(srv.URL, auth("type", "api_key"), map[string][]string{"api_key": {"key-1"}})
		if resp, err = h.Configure(apiKey).Attempt(within(t, 10*time.Second), event(), house); err != nil || resp.Status != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		got.Store([]string{"nothing"})
		bearer := secret(srv.URL, auth("type", "bearer"), map[string][]string{"token": {"token-1"}})
		_, err = h.Configure(bearer).Attempt(within(t, 10*time.Second), event(), house)
		f := wantFailure(t, err, plugin.CodeConfig, plugin.NotSent)
		if f.Message != "auth sets the header authorization, and so does a signer of this subscription; take out one of the two" || fmt.Sprint(got.Load()) != "[nothing]" {
			t.Errorf("%+v, received %v", *f, got.Load())
		}
	})
}

func TestShapedBodiesPassUntouched(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		var body []byte
		var header http.Header
		srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			header = r.Header
			body, _ = io.ReadAll(r.Body)
		}))
		t.Cleanup(srv.Close)
		for _, method := range []string{"POST", "PUT", "PATCH"} {
			req := event()
			req.Body = []byte("\x1f\x8b\x08not really gzip")
			req.Headers = []plugin.Header{{Name: "content-type", Value: "application/xml"}, {Name: "content-encoding", Value: "gzip"}}
			resp, err := c.instance(t, srv.URL, map[string]any{"method": method}).Attempt(within(t, 10*time.Second), req)
			if err != nil || resp.Status != 200 {
				t.Fatalf("%v, %v", resp, err)
			}
			if string(body) != string(req.Body) || header.Get("Content-Encoding") != "gzip" || header.Get("Content-Type") != "application/xml" {
				t.Errorf("%s: received %q with %v", method, body, header)
			}
		}
	})
}

// grants is a token endpoint that gives out token-1, token-2, …, and a receiver that takes only the
// newest, unless it is told to refuse all.
type grants struct {
	endpoint, receiver *httptest.Server
	issued             atomic.Int32
	refuse             atomic.Bool
	delivered          atomic.Int32
	seen               atomic.Int32
}

func newGrants(t *testing.T) *grants {
	g := &grants{}
	g.endpoint = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"access_token":"c4n4ry-%d","token_type":"Bearer","expires_in":3600}`, g.issued.Add(1))
	}))
	g.receiver = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.seen.Add(1)
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("Authorization") != fmt.Sprintf("Bearer c4n4ry-%d", g.issued.Load()) || g.refuse.Load() {
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, r.Header.Get("Authorization"))
			return
		}
		if string(body) == `{"n":1}` && r.Header.Get("Webhook-Id") == "evt_1" {
			g.delivered.Add(1)
		}
	}))
	t.Cleanup(g.endpoint.Close)
	t.Cleanup(g.receiver.Close)
	return g
}

func (g *grants) instance(uri string) plugintest.Instance {
	return secret(uri, auth("type", "oauth2", "token_url", g.endpoint.URL, "client_id", "grapnel"), map[string][]string{"client_secret": {canary}})
}

func TestTokensAreFetchedOnceAndRenewedOnce(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		g := newGrants(t)
		h := c.harness(t)
		// Two subscriptions of one client share its token.
		first, second := h.Configure(g.instance(g.receiver.URL+"/a")), h.Configure(g.instance(g.receiver.URL+"/b"))
		storm := func() {
			var wg sync.WaitGroup
			for n := range 100 {
				wg.Go(func() {
					inst := first
					if n%2 == 1 {
						inst = second
					}
					if resp, err := inst.Attempt(within(t, 20*time.Second), event()); err != nil || resp.Status != 200 {
						t.Errorf("%v, %v", resp, err)
					}
				})
			}
			wg.Wait()
		}
		storm()
		if n := g.issued.Load(); n != 1 || g.delivered.Load() != 100 {
			t.Fatalf("%d tokens for %d deliveries, want 1 for 100", n, g.delivered.Load())
		}
		g.issued.Add(100) // the token that is in use no longer holds
		storm()
		if n := g.issued.Load() - 100; n != 2 || g.delivered.Load() != 200 {
			t.Errorf("%d tokens for %d deliveries, want 2 for 200", n, g.delivered.Load())
		}
	})
}

func TestRefusedTwiceIsTheAnswer(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		g := newGrants(t)
		g.refuse.Store(true)
		resp, err := attempt(t, c.harness(t).Configure(g.instance(g.receiver.URL)))
		if err != nil || resp.Status != 401 || headerValue(resp, "www-authenticate") == "" {
			t.Fatalf("%v, %v; the receiver's answer stands", resp, err)
		}
		if strings.Contains(string(resp.Body), "c4n4ry") {
			t.Errorf("body %q shows the token", resp.Body)
		}
		if g.seen.Load() != 2 || g.issued.Load() != 2 {
			t.Errorf("%d requests, %d tokens; want two of each", g.seen.Load(), g.issued.Load())
		}
		// When there is no other token, there is nothing to send again.
		g.endpoint.Close()
		resp, err = attempt(t, c.harness(t).Configure(g.instance(g.receiver.URL)))
		if f := wantFailure(t, err, plugin.CodeConnect, plugin.NotSent); resp != nil || f.Message != "token endpoint: connection refused" {
			t.Errorf("%+v, %v", *f, resp)
		}
		if g.seen.Load() != 2 {
			t.Error("a request went out without a token")
		}
	})
}

func TestTokenEndpointIsGuardedAsReceiversAre(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		g := newGrants(t)
		in := g.instance("https://1.1.1.1/")
		in.Target.Egress = plugin.NewEgress(nil)
		problems := c.harness(t).Validate(in)
		if len(problems) == 0 || problems[0].Code != "token_url.egress" || problems[0].Pointer != "/config/auth/token_url" {
			t.Errorf("problems %+v", problems)
		}
		// A name gives nothing away when it is saved, so it must be caught when it is dialled.
		in.Config = auth("type", "oauth2", "token_url", strings.Replace(g.endpoint.URL, "127.0.0.1", "localhost", 1), "client_id", "a")
		p := newPools()
		i, err := newInstance(p, Config{
			Method: "POST", ConnectTimeout: 5e9, TLSTimeout: 5e9, HeaderTimeout: 5e9, ClientSecret: plugin.NewSecret(canary),
			Auth: Auth{Type: authOAuth2, ClientID: "a", TokenURL: strings.Replace(g.endpoint.URL, "127.0.0.1", "localhost", 1)},
		}, plugin.Target{URL: "https://1.1.1.1/", Egress: plugin.NewEgress(nil)})
		if err != nil {
			t.Fatal(err)
		}
		req := event()
		_, err = i.attempt(within(t, 10*time.Second), &req)
		if f := wantFailure(t, err, plugin.CodeDNS, plugin.NotSent); f.Source != plugin.SourceEndpoint || !strings.HasPrefix(f.Message, "token endpoint: the host name does not exist, or egress") {
			t.Errorf("%+v", *f)
		}
		if g.issued.Load() != 0 {
			t.Error("the token endpoint was reached")
		}
	})
}

func TestTokenByClientCertificate(t *testing.T) {
	ca := newAuthority(t)
	direct(t, func(t *testing.T, c client) {
		uri, clients, _ := mutual(t, ca, 0, false) // answers 200 with nothing in it
		config := auth("type", "oauth2", "token_url", uri, "client_id", "a", "client_auth", "tls_client_auth")
		inst := c.harness(t).Configure(secret("http://127.0.0.1:1/", config, map[string][]string{
			"ca": {ca.pem()}, "client_certificate": {ca.client(t, "the client")},
		}))
		_, err := attempt(t, inst)
		if f := wantFailure(t, err, plugin.CodeProtocol, plugin.NotSent); f.Message != "token endpoint: the answer is not the JSON of an access token" {
			t.Errorf("%+v", *f)
		}
		if seen := clients(); len(seen) != 1 || seen[0] != "the client" {
			t.Errorf("the token endpoint saw %v", seen)
		}
	})
}

func TestSlowTokenEndpointEndsAtTheDeadline(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		g := newGrants(t)
		release := make(chan struct{})
		slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-release }))
		t.Cleanup(slow.Close)
		t.Cleanup(func() { close(release) })
		g.endpoint = slow
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := c.harness(t).Configure(g.instance(g.receiver.URL)).Attempt(ctx, event())
		wantFailure(t, err, plugin.CodeTimeout, plugin.NotSent)
	})
}

func TestCheckAuth(t *testing.T) {
	h := plugintest.New(t, Kind())
	for _, tt := range []struct {
		name    string
		config  map[string]any
		secrets map[string][]string
		headers []plugin.Header
		want    string // pointer and code, "warning" behind
	}{
		{name: "basic", config: auth("type", "basic", "username", "me"), secrets: map[string][]string{"password": {"p"}}},
		{name: "no password", config: auth("type", "basic", "username", "me"), want: "/secrets/password secret.missing"},
		{name: "no user", config: auth("type", "basic"), secrets: map[string][]string{"password": {"p"}}, want: "/config/auth/username auth.field"},
		{name: "colon", config: auth("type", "basic", "username", "a:b"), secrets: map[string][]string{"password": {"p"}}, want: "/config/auth/username auth.username"},
		{name: "line break", config: auth("type", "basic", "username", "a"), secrets: map[string][]string{"password": {"c4n4ry\n"}}, want: "/secrets/password secret.malformed"},
		{name: "scheme in token", config: auth("type", "bearer"), secrets: map[string][]string{"token": {"Bearer c4n4ry"}}, want: "/secrets/token secret.malformed"},
		{name: "unused", config: map[string]any{}, secrets: map[string][]string{"token": {"t"}}, want: "/secrets/token secret.unused warning"},
		{name: "other type's field", config: auth("type", "bearer", "client_id", "a"), secrets: map[string][]string{"token": {"t"}}, want: "/config/auth/client_id auth.field"},
		{name: "unknown type", config: auth("type", "digest"), want: "/config/auth/type config.enum"},
		{name: "header taken", config: auth("type", "bearer"), secrets: map[string][]string{"token": {"t"}}, headers: []plugin.Header{{Name: "Authorization", Value: "x"}}, want: "/target/headers/authorization auth.header_conflict"},
		{name: "header taken for some", config: auth("type", "api_key"), secrets: map[string][]string{"api_key": {"t"}}, headers: []plugin.Header{{Name: "X_Api_Key", Value: "x"}}, want: "/target/headers/x_api_key auth.header_conflict"},
		{name: "reserved", config: auth("type", "api_key", "name", "Host"), secrets: map[string][]string{"api_key": {"t"}}, want: "/config/auth/name auth.name"},
		{name: "says something else", config: auth("type", "api_key", "name", "Webhook-Id"), secrets: map[string][]string{"api_key": {"t"}}, want: "/config/auth/name auth.name"},
		{name: "no parameter", config: auth("type", "api_key", "in", "query"), secrets: map[string][]string{"api_key": {"t"}}, want: "/config/auth/name auth.field"},
		{name: "parameter taken", config: auth("type", "api_key", "in", "query", "name", "q"), secrets: map[string][]string{"api_key": {"t"}}, want: "/config/auth/name auth.name"},
		{name: "no token endpoint", config: auth("type", "oauth2", "client_id", "a"), secrets: map[string][]string{"client_secret": {"t"}}, want: "/config/auth/token_url auth.token_url"},
		{name: "no client", config: auth("type", "oauth2", "token_url", "https://a.example/"), secrets: map[string][]string{"client_secret": {"t"}}, want: "/config/auth/client_id auth.field"},
		{name: "no secret", config: auth("type", "oauth2", "token_url", "https://a.example/", "client_id", "a"), want: "/secrets/client_secret secret.missing"},
		{name: "no key", config: auth("type", "oauth2", "token_url", "https://a.example/", "client_id", "a", "client_auth", "private_key_jwt"), want: "/secrets/assertion_key secret.missing"},
		{name: "no certificate", config: auth("type", "oauth2", "token_url", "https://a.example/", "client_id", "a", "client_auth", "tls_client_auth"), want: "/secrets/client_certificate secret.missing"},
		{name: "bad scope", config: auth("type", "oauth2", "token_url", "https://a.example/", "client_id", "a", "scopes", []string{"a b"}), secrets: map[string][]string{"client_secret": {"t"}}, want: "/config/auth auth.oauth2"},
		{name: "plain endpoint", config: auth("type", "oauth2", "token_url", "http://a.example/", "client_id", "a"), secrets: map[string][]string{"client_secret": {"t"}}, want: "/config/auth/token_url token_url.plaintext warning"},
	} {
		problems := h.Validate(plugintest.Instance{Kind: "http", Config: tt.config, Secrets: tt.secrets, Target: plugin.Target{
			URL: "https://hooks.example.com/?q=1", Headers: tt.headers,
		}})
		got := ""
		for _, p := range problems {
			got += p.Pointer + " " + p.Code
			if p.Warning {
				got += " warning"
			}
			if strings.Contains(p.Summary, "c4n4ry") {
				t.Errorf("%s: %q shows a secret", tt.name, p.Summary)
			}
		}
		if got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
