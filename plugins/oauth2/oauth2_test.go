package oauth2_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/oauth2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const canary = "c4n4ry+s3cret/%:"

// endpoint is a token endpoint on loopback.
type endpoint struct {
	*httptest.Server
	asked atomic.Int32

	mu   sync.Mutex
	form url.Values
	auth string
}

// serve answers each request with handle, which is given its number from 1; nil issues tokens for an hour.
func serve(t *testing.T, handle func(w http.ResponseWriter, r *http.Request, n int)) *endpoint {
	t.Helper()
	e := &endpoint{}
	e.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := int(e.asked.Add(1))
		_ = r.ParseForm()
		e.mu.Lock()
		e.form, e.auth = r.PostForm, r.Header.Get("Authorization")
		e.mu.Unlock()
		if handle == nil {
			_, _ = fmt.Fprintf(w, `{"access_token":"token-%d","token_type":"Bearer","expires_in":3600}`, n)
			return
		}
		handle(w, r, n)
	}))
	t.Cleanup(e.Close)
	return e
}

func (e *endpoint) config() oauth2.Config {
	return oauth2.Config{TokenURL: e.URL + "/token", ClientID: "grapnel", ClientSecret: plugin.NewSecret(canary)}
}

func newSource(t *testing.T, c oauth2.Config) *oauth2.Source {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	s, err := oauth2.New(c, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func token(t *testing.T, s *oauth2.Source) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, err := s.Token(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func failure(t *testing.T, s *oauth2.Source) *plugin.Failure {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	got, err := s.Token(ctx)
	var f *plugin.Failure
	if !errors.As(err, &f) || got != "" {
		t.Fatalf("token %q, error %v; want a failure", got, err)
	}
	if f.WireState != plugin.NotSent {
		t.Errorf("failure %+v; nothing was sent to the receiver", *f)
	}
	if strings.Contains(f.Message, "c4n4ry") || strings.Contains(f.Message, "127.0.0.1") {
		t.Errorf("failure %+v shows a secret or an address", *f)
	}
	return f
}

func TestRequestOnTheWire(t *testing.T) {
	escaped := url.QueryEscape(canary)
	for _, tt := range []struct {
		method string
		auth   string
		form   url.Values
	}{
		{oauth2.ClientSecretBasic, "Basic " + basic("grap+nel%26", escaped), url.Values{}},
		{oauth2.ClientSecretPost, "", url.Values{"client_id": {"grap nel&"}, "client_secret": {canary}}},
		{oauth2.TLSClientAuth, "", url.Values{"client_id": {"grap nel&"}}},
	} {
		t.Run(tt.method, func(t *testing.T) {
			e := serve(t, nil)
			c := e.config()
			c.ClientID, c.ClientAuth = "grap nel&", tt.method
			c.Scopes, c.Audience, c.Params = []string{"a", "b:write"}, "https://api.example", map[string]string{"resource": "r=1"}
			if got := token(t, newSource(t, c)); got != "token-1" {
				t.Errorf("token %q", got)
			}
			tt.form.Set("grant_type", "client_credentials")
			tt.form.Set("scope", "a b:write")
			tt.form.Set("audience", "https://api.example")
			tt.form.Set("resource", "r=1")
			if diff := cmp.Diff(tt.form, e.form); diff != "" {
				t.Error(diff)
			}
			if e.auth != tt.auth {
				t.Errorf("authorization %q, want %q", e.auth, tt.auth)
			}
		})
	}
}

func basic(user, password string) string {
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(user, password)
	return strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")
}

func TestOneRequestForAnyNumberOfCallers(t *testing.T) {
	release := make(chan struct{})
	e := serve(t, func(w http.ResponseWriter, _ *http.Request, n int) {
		<-release
		_, _ = fmt.Fprintf(w, `{"access_token":"token-%d","token_type":"bearer","expires_in":"3600"}`, n)
	})
	s := newSource(t, e.config())
	// The first caller gives up; the token it asked for is not lost to the others.
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := s.Token(ctx); err == nil || !strings.Contains(err.Error(), "no access token before") {
		t.Errorf("error %v of the caller that gave up", err)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			if got, err := s.Token(t.Context()); err != nil || got != "token-1" {
				t.Errorf("token %q, %v", got, err)
			}
		})
	}
	close(release)
	wg.Wait()
	if n := e.asked.Load(); n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
}

func TestHundredRefusalsAreOneRenewal(t *testing.T) {
	e := serve(t, nil)
	s := newSource(t, e.config())
	old := token(t, s)
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			s.Refused(old)
			if got, err := s.Token(t.Context()); err != nil || got != "token-2" {
				t.Errorf("token %q, %v", got, err)
			}
		})
	}
	wg.Wait()
	s.Refused(old)
	s.Refused("another's")
	s.Refused("")
	if got := token(t, s); got != "token-2" || e.asked.Load() != 2 {
		t.Errorf("token %q after %d requests, want token-2 after 2", got, e.asked.Load())
	}
}

func TestFailures(t *testing.T) {
	reply := func(status int, body string) func(http.ResponseWriter, *http.Request, int) {
		return func(w http.ResponseWriter, _ *http.Request, _ int) {
			w.Header().Set("Location", "/elsewhere")
			w.WriteHeader(status)
			_, _ = io.WriteString(w, body)
		}
	}
	echo := func(status int) func(http.ResponseWriter, *http.Request, int) {
		return func(w http.ResponseWriter, r *http.Request, _ int) {
			w.WriteHeader(status)
			_, _ = fmt.Fprintf(w, `{"error":%q,"error_description":%q}`, r.PostForm.Get("client_secret"), r.PostForm.Encode())
		}
	}
	for _, tt := range []struct {
		name, code, message string
		handle              func(http.ResponseWriter, *http.Request, int)
	}{
		{"wrong secret", plugin.CodeConfig, "the token endpoint refused the client: invalid_client", reply(401, `{"error":"invalid_client"}`)},
		{"wrong scope", plugin.CodeConfig, "the token endpoint refused the client: invalid_scope", reply(400, `{"error":"invalid_scope","error_description":"x"}`)},
		{"error with 200", plugin.CodeConfig, "the token endpoint refused the client: unauthorized_client", reply(200, `{"error":"unauthorized_client"}`)},
		{"own words", plugin.CodeConfig, "the token endpoint answered 401 Unauthorized", echo(401)},
		{"own words, broken", plugin.CodeProtocol, "token endpoint: it answered 500 Internal Server Error", echo(500)},
		{"no such page", plugin.CodeConfig, "the token endpoint answered 404 Not Found", reply(404, "<html>")},
		{"overloaded", plugin.CodeProtocol, "token endpoint: it answered 503 Service Unavailable", reply(503, "")},
		{"redirect", plugin.CodeProtocol, "token endpoint: it answered 307 Temporary Redirect; redirects are not followed", reply(307, "")},
		{"page", plugin.CodeProtocol, "token endpoint: the answer is not the JSON of an access token", reply(200, "<html>")},
		{"nothing", plugin.CodeProtocol, "token endpoint: the answer has no access_token", reply(200, "{}")},
		{"endless", plugin.CodeProtocol, "token endpoint: the answer is longer than 64 KiB", reply(200, strings.Repeat(" ", 1<<20))},
		{"other type", plugin.CodeProtocol, "token endpoint: the token is not of the type Bearer, the only one that can be sent", reply(200, `{"access_token":"a","token_type":"DPoP"}`)},
		{"header in it", plugin.CodeProtocol, "token endpoint: the token has characters that a header cannot carry", reply(200, `{"access_token":"a\r\nx: y","token_type":"bearer"}`)},
		{"huge", plugin.CodeProtocol, "token endpoint: the token is longer than 16 KiB", reply(200, `{"access_token":"`+strings.Repeat("a", 17<<10)+`","token_type":"bearer"}`)},
		{"lifetime", plugin.CodeProtocol, "token endpoint: the token's expires_in is not a number of seconds", reply(200, `{"access_token":"a","token_type":"bearer","expires_in":"soon"}`)},
		{"hangs up", plugin.CodeReset, "token endpoint: the connection ended without an answer in HTTP", func(http.ResponseWriter, *http.Request, int) { panic(http.ErrAbortHandler) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := serve(t, tt.handle)
			c := e.config()
			c.ClientAuth = oauth2.ClientSecretPost
			f := failure(t, newSource(t, c))
			if f.Code != tt.code || f.Message != tt.message || f.Source != plugin.SourceEndpoint {
				t.Errorf("failure %+v, want %s: %s", *f, tt.code, tt.message)
			}
			if n := e.asked.Load(); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

func TestUnreachable(t *testing.T) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = lis.Close()
	c := oauth2.Config{TokenURL: "http://" + lis.Addr().String(), ClientID: "a", ClientSecret: plugin.NewSecret(canary)}
	if f := failure(t, newSource(t, c)); f.Code != plugin.CodeConnect || f.Source != plugin.SourceEndpoint {
		t.Errorf("%+v", *f)
	}
	c.TokenURL = "https" + strings.TrimPrefix(serve(t, nil).URL, "http")
	if f := failure(t, newSource(t, c)); f.Code != plugin.CodeTLS {
		t.Errorf("%+v", *f)
	}
	secure := httptest.NewUnstartedServer(nil)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	c.TokenURL = secure.URL
	if f := failure(t, newSource(t, c)); f.Code != plugin.CodeTLS || f.Message != "token endpoint: the certificate is by an unknown authority" {
		t.Errorf("%+v", *f)
	}
	dialer := net.Dialer{ControlContext: plugin.NewEgress(nil).Control}
	s, err := oauth2.New(c, &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext}})
	if err != nil {
		t.Fatal(err)
	}
	if f := failure(t, s); f.Code != plugin.CodeEgress || f.Source != plugin.SourcePolicy {
		t.Errorf("%+v", *f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	hanging := serve(t, func(_ http.ResponseWriter, r *http.Request, _ int) { <-r.Context().Done() })
	s = newSource(t, hanging.config())
	var f *plugin.Failure
	if _, err := s.Token(ctx); !errors.As(err, &f) || f.Code != plugin.CodeCancelled {
		t.Errorf("cancelled: %v", err)
	}
	hanging.CloseClientConnections()
}

// script answers in no time, so that a test can let hours pass.
type script struct {
	asked  int
	answer func(n int) (int, string, http.Header)
}

func (s *script) RoundTrip(*http.Request) (*http.Response, error) {
	s.asked++
	status, body, header := s.answer(s.asked)
	if header == nil {
		header = http.Header{}
	}
	return &http.Response{StatusCode: status, Header: header, Body: io.NopCloser(strings.NewReader(body))}, nil
}

func scripted(t *testing.T, s *script) *oauth2.Source {
	t.Helper()
	c := oauth2.Config{TokenURL: "https://auth.example/token", ClientID: "a", ClientSecret: plugin.NewSecret(canary)}
	src, err := oauth2.New(c, &http.Client{Transport: s})
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func lasting(seconds string) func(int) (int, string, http.Header) {
	return func(n int) (int, string, http.Header) {
		return 200, fmt.Sprintf(`{"access_token":"token-%d","token_type":"Bearer"%s}`, n, seconds), nil
	}
}

func TestTokensAreRenewedAheadOfTheirEnd(t *testing.T) {
	for _, tt := range []struct {
		expiresIn string
		renew     time.Duration // when the next one is asked for, while the old one still serves
		dead      time.Duration // when the old one serves no more
	}{
		{`,"expires_in":3600`, 59 * time.Minute, time.Hour - 10*time.Second},
		{`,"expires_in":40`, 30 * time.Second, 36 * time.Second},
		{``, 4 * time.Minute, 5*time.Minute - 10*time.Second},
		{`,"expires_in":0`, 4 * time.Minute, 5*time.Minute - 10*time.Second},
		{`,"expires_in":-1`, 4 * time.Minute, 5*time.Minute - 10*time.Second},
		{`,"expires_in":1e30`, 24*time.Hour - time.Minute, 24*time.Hour - 10*time.Second},
	} {
		t.Run(tt.expiresIn, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := &script{answer: lasting(tt.expiresIn)}
				s := scripted(t, calls)
				token(t, s)
				time.Sleep(tt.renew - time.Millisecond)
				if got := token(t, s); got != "token-1" || calls.asked != 1 {
					t.Errorf("before renewal: %q after %d requests", got, calls.asked)
				}
				time.Sleep(2 * time.Millisecond)
				if got := token(t, s); got != "token-1" {
					t.Errorf("the caller who noticed waited: %q", got)
				}
				synctest.Wait()
				if got := token(t, s); got != "token-2" || calls.asked != 2 {
					t.Errorf("after renewal: %q after %d requests", got, calls.asked)
				}

				idle := scripted(t, &script{answer: lasting(tt.expiresIn)})
				token(t, idle)
				time.Sleep(tt.dead + time.Millisecond)
				if got := token(t, idle); got != "token-2" {
					t.Errorf("an expired token was handed out: %q", got)
				}
			})
		})
	}
}

func TestFailingRenewalLeavesTheOldToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := &script{}
		calls.answer = func(n int) (int, string, http.Header) {
			if n > 1 {
				return 500, "", nil
			}
			return lasting(`,"expires_in":3600`)(n)
		}
		s := scripted(t, calls)
		token(t, s)
		time.Sleep(59*time.Minute + time.Second)
		for range 40 { // seconds
			if got := token(t, s); got != "token-1" {
				t.Fatalf("token %q", got)
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		if calls.asked < 10 || calls.asked > 42 {
			t.Errorf("%d requests in 40 s; want about one each second", calls.asked)
		}
		time.Sleep(20 * time.Second)
		failure(t, s)
	})
}

func TestFailingEndpointIsLeftAloneForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		header := http.Header{}
		calls := &script{answer: func(int) (int, string, http.Header) { return 503, "", header }}
		s := scripted(t, calls)
		for range 100 {
			failure(t, s)
		}
		if calls.asked != 1 {
			t.Errorf("%d requests at once, want 1", calls.asked)
		}
		time.Sleep(time.Second)
		header.Set("Retry-After", "30")
		failure(t, s)
		time.Sleep(29 * time.Second)
		failure(t, s)
		if calls.asked != 2 {
			t.Errorf("%d requests, want 2: Retry-After was not heeded", calls.asked)
		}
		time.Sleep(time.Second)
		header.Set("Retry-After", "99999")
		failure(t, s)
		time.Sleep(time.Minute)
		calls.answer = lasting("")
		if got := token(t, s); got != "token-4" {
			t.Errorf("token %q", got)
		}
	})
}

func TestReceiverThatRefusesEveryTokenMakesNoFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := &script{answer: lasting("")}
		s := scripted(t, calls)
		for range 600 { // a minute
			s.Refused(token(t, s))
			time.Sleep(100 * time.Millisecond)
		}
		if calls.asked > 15 {
			t.Errorf("%d tokens in a minute", calls.asked)
		}
		time.Sleep(time.Minute)
		// A token that had served for a while is renewed at once.
		before := token(t, s)
		time.Sleep(11 * time.Second)
		s.Refused(before)
		if token(t, s) == before {
			t.Error("the token was not given up")
		}
	})
}

func TestCheck(t *testing.T) {
	good := oauth2.Config{TokenURL: "https://auth.example/token", ClientID: "a", ClientSecret: plugin.NewSecret(canary)}
	for name, spoil := range map[string]func(*oauth2.Config){
		"token_url is empty":         func(c *oauth2.Config) { c.TokenURL = "" },
		"must start with https":      func(c *oauth2.Config) { c.TokenURL = "ftp://auth.example" },
		"has no host":                func(c *oauth2.Config) { c.TokenURL = "https:///x" },
		"user name or password":      func(c *oauth2.Config) { c.TokenURL = "https://u:c4n4ry@auth.example" },
		"fragment":                   func(c *oauth2.Config) { c.TokenURL += "#" },
		"client_id is empty":         func(c *oauth2.Config) { c.ClientID = "" },
		"no client secret":           func(c *oauth2.Config) { c.ClientSecret = plugin.Secret{} },
		"no signing key":             func(c *oauth2.Config) { c.ClientAuth = oauth2.PrivateKeyJWT },
		`client_auth is "mtls"`:      func(c *oauth2.Config) { c.ClientAuth = "mtls" },
		`scope "a b"`:                func(c *oauth2.Config) { c.Scopes = []string{"a b"} },
		`params has "client_secret"`: func(c *oauth2.Config) { c.Params = map[string]string{"client_secret": "c4n4ry"} },
		"the signing key of": func(c *oauth2.Config) {
			c.ClientAuth, c.SigningKey = oauth2.PrivateKeyJWT, plugin.NewSecret("c4n4ry")
		},
	} {
		c := good
		spoil(&c)
		_, err := oauth2.New(c, http.DefaultClient)
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "c4n4ry") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := oauth2.New(good, nil); err == nil {
		t.Error("no client is taken, and with it no egress policy")
	}
}
