// Package oauth2 gets access tokens by the client credentials grant of OAuth 2.0 (RFC 6749, section 4.4)
// for transports that send them.
//
// It guarantees:
//   - a token is kept until shortly before it expires, and renewed before that while callers go on with the
//     old one;
//   - one request to the token endpoint is in flight for any number of callers;
//   - a token that a receiver refused is given up once, whoever says so and however often, and a receiver
//     that refuses every token does not make a flood of requests for new ones;
//   - a failure says whose fault it is, always with wire state NotSent, and holds no secret, no address and
//     none of the token endpoint's own words;
//   - the answer read is bounded, redirects are not followed, and no request takes longer than ten seconds.
//
// It does not dial: the http.Client that it is given does, and with it the egress policy.
package oauth2

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Ways for the client to authenticate to the token endpoint.
const (
	// ClientSecretBasic sends id and secret as RFC 6749, section 2.3.1, says; the default.
	ClientSecretBasic = "client_secret_basic"
	// ClientSecretPost sends them in the body.
	ClientSecretPost = "client_secret_post"
	// PrivateKeyJWT sends an assertion signed with SigningKey (RFC 7523).
	PrivateKeyJWT = "private_key_jwt"
	// TLSClientAuth sends the id alone; the http.Client presents a certificate (RFC 8705).
	TLSClientAuth = "tls_client_auth"
)

const (
	requestTimeout = 10 * time.Second
	// unstatedLifetime is for tokens whose lifetime the token endpoint leaves out.
	unstatedLifetime = 5 * time.Minute
	longestLifetime  = 24 * time.Hour
	// pauseAfterFailure keeps waiting deliveries from hammering a token endpoint that fails.
	pauseAfterFailure = time.Second
	longestPause      = time.Minute
	// quickRefusal is how young a token is when its refusal says more about settings than about its age.
	quickRefusal = 10 * time.Second
	// freeRefusals of quickly refused tokens in a row are replaced at once, further ones after a pause that
	// doubles.
	freeRefusals = 3
)

// Config says which token to ask for. Of secrets with several live versions the newest is used.
type Config struct {
	// TokenURL is the token endpoint: https, or http for tests; no fragment, no user name.
	TokenURL string
	// ClientID is the client's name at the authorization server.
	ClientID string
	// ClientAuth is one of the constants above; empty means ClientSecretBasic.
	ClientAuth string
	// ClientSecret is for ClientSecretBasic and ClientSecretPost.
	ClientSecret plugin.Secret
	// SigningKey is for PrivateKeyJWT: what sdk/keys reads.
	SigningKey plugin.Secret
	// AssertionAudience is the aud of assertions; empty means TokenURL.
	AssertionAudience string
	// Scopes are asked for, separated by spaces; none leaves them to the authorization server.
	Scopes []string
	// Audience is sent as the parameter audience when not empty.
	Audience string
	// Params are further parameters, such as resource. They cannot replace those of the grant itself.
	Params map[string]string
}

// Source hands out one client's access tokens. Safe for concurrent use.
type Source struct {
	config Config
	key    *keys.Key // of PrivateKeyJWT
	client *http.Client

	mu     sync.Mutex // guards what follows
	token  token
	flight *flight // at work, or nil
	// failed and its retryAt keep the last failure while it is fresh.
	failed  *plugin.Failure
	retryAt time.Time
	// quick counts quickly refused tokens in a row; the next one is kept until holdUntil.
	quick     int
	holdUntil time.Time
}

// token is one access token. The zero token is none.
type token struct {
	value  string
	issued time.Time
	// renewAt is when to ask for the next one, deadAt when to stop using this one.
	renewAt, deadAt time.Time
	// doubtful tokens were refused soon after they were issued.
	doubtful bool
}

// flight is one request to the token endpoint. value and err are set before done is closed.
type flight struct {
	done  chan struct{}
	value string
	err   *plugin.Failure
}

// New checks the config and makes no request. client is used as it is but for redirects, which are never
// followed; it must not be nil, for it holds the egress policy.
func New(c Config, client *http.Client) (*Source, error) {
	if err := Check(c); err != nil {
		return nil, err
	}
	if client == nil {
		return nil, errors.New("oauth2: no http client is given")
	}
	if c.ClientAuth == "" {
		c.ClientAuth = ClientSecretBasic
	}
	own := *client
	own.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	s := &Source{config: c, client: &own}
	if c.ClientAuth == PrivateKeyJWT {
		key, err := keys.Parse(c.SigningKey.Values()[0])
		if err != nil {
			return nil, fmt.Errorf("the signing key of private_key_jwt: %w", err)
		}
		s.key = key
	}
	return s, nil
}

// Check says what New would refuse, but for the form of the signing key.
func Check(c Config) error {
	if err := CheckURL(c.TokenURL); err != nil {
		return err
	}
	if c.ClientID == "" {
		return errors.New("client_id is empty; want the name that the authorization server gave the client")
	}
	switch c.ClientAuth {
	case "", ClientSecretBasic, ClientSecretPost:
		if c.ClientSecret.Empty() {
			return errors.New("there is no client secret; want one, or another client_auth")
		}
	case PrivateKeyJWT:
		if c.SigningKey.Empty() {
			return errors.New("private_key_jwt has no signing key; want one, or another client_auth")
		}
	case TLSClientAuth:
	default:
		return fmt.Errorf("client_auth is %q, want %s, %s, %s or %s",
			c.ClientAuth, ClientSecretBasic, ClientSecretPost, PrivateKeyJWT, TLSClientAuth)
	}
	for _, scope := range c.Scopes {
		if scope == "" || strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' }) {
			return fmt.Errorf("scope %q is not one word of visible ASCII", scope)
		}
	}
	for name := range c.Params {
		switch name {
		case "grant_type", "client_id", "client_secret", "client_assertion", "client_assertion_type", "scope", "audience", "":
			return fmt.Errorf("params has %q, which has a field of its own or is set by the grant", name)
		}
	}
	return nil
}

// CheckURL says what is wrong with a token endpoint's URL, without repeating it.
func CheckURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case text == "":
		return errors.New("token_url is empty; want the token endpoint, such as https://auth.example.com/oauth/token")
	case err != nil:
		return errors.New("token_url is not a URL; want https://host/path")
	case u.Scheme != "https" && u.Scheme != "http":
		return errors.New("token_url must start with https:// or http://")
	case u.Opaque != "" || u.Hostname() == "":
		return errors.New("token_url has no host; want https://host/path")
	case u.User != nil:
		return errors.New("token_url holds a user name or password; want client_id and a secret instead")
	case u.Fragment != "" || strings.Contains(text, "#"):
		return errors.New("token_url has a fragment (#…), which is never sent; remove it")
	}
	return nil
}

// Token returns an access token, asking for one when there is none. Its error is a *plugin.Failure.
// The wait ends with ctx; the request goes on for others and for later.
func (s *Source) Token(ctx context.Context) (string, error) {
	s.mu.Lock()
	now := time.Now()
	if s.token.value != "" && now.Before(s.token.deadAt) {
		value := s.token.value
		if !now.Before(s.token.renewAt) && s.mayAsk(now) {
			s.ask()
		}
		s.mu.Unlock()
		return value, nil
	}
	if s.flight == nil && !s.mayAsk(now) {
		err := *s.failed
		s.mu.Unlock()
		return "", &err
	}
	f := s.flight
	if f == nil {
		f = s.ask()
	}
	s.mu.Unlock()
	select {
	case <-f.done:
	case <-ctx.Done():
		return "", abandoned(ctx)
	}
	if f.err != nil {
		err := *f.err
		return "", &err
	}
	return f.value, nil
}

// Refused says that a receiver answered 401 to the token. The token is given up if it is still the one in
// use; the next call of Token asks for another.
func (s *Source) Refused(value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value == "" || s.token.value != value {
		return
	}
	now := time.Now()
	if now.Sub(s.token.issued) < quickRefusal {
		s.token.doubtful = true
	}
	if !s.token.doubtful {
		s.quick = 0
	} else {
		if now.Before(s.holdUntil) {
			return
		}
		if s.quick++; s.quick >= freeRefusals {
			s.holdUntil = now.Add(min(time.Second<<min(s.quick-freeRefusals, 6), longestPause))
		}
	}
	s.token = token{}
}

// mayAsk reports whether no flight is at work and no failure is fresh. The lock is held.
func (s *Source) mayAsk(now time.Time) bool {
	return s.flight == nil && (s.failed == nil || !now.Before(s.retryAt))
}

// ask begins a flight. It has a time of its own, so that the first caller's end does not take the token
// from those behind. The lock is held.
func (s *Source) ask() *flight {
	f := &flight{done: make(chan struct{})}
	s.flight = f
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		defer cancel()
		got, failed, pause := s.request(ctx)
		s.land(f, got, failed, pause)
	}()
	return f
}

// land ends a flight.
func (s *Source) land(f *flight, got token, failed *plugin.Failure, pause time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flight, s.failed = nil, failed
	if failed != nil {
		s.retryAt = time.Now().Add(min(max(pause, pauseAfterFailure), longestPause))
	} else {
		s.token = got
	}
	f.value, f.err = got.value, failed
	close(f.done)
}

// newToken works out when to renew: a quarter of the lifetime ahead, one minute at most.
func newToken(value string, lifetime time.Duration, now time.Time) token {
	lifetime = min(lifetime, longestLifetime)
	return token{
		value: value, issued: now,
		renewAt: now.Add(lifetime - min(lifetime/4, time.Minute)),
		deadAt:  now.Add(lifetime - min(lifetime/10, 10*time.Second)),
	}
}

// abandoned is the failure of a caller whose time was up before a token came.
func abandoned(ctx context.Context) *plugin.Failure {
	if errors.Is(ctx.Err(), context.Canceled) {
		return &plugin.Failure{Source: plugin.SourcePlugin, Code: plugin.CodeCancelled, Message: "cancelled by the host", WireState: plugin.NotSent}
	}
	return endpointFailure(plugin.CodeTimeout, "no access token before the attempt's time was up")
}
