package oauth2

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	maxAnswer   = 64 << 10
	maxToken    = 16 << 10
	maxLifetime = float64(longestLifetime / time.Second)
)

// answer is what a token endpoint says (RFC 6749, sections 5.1 and 5.2).
type answer struct {
	AccessToken string          `json:"access_token"`
	TokenType   string          `json:"token_type"`
	ExpiresIn   json.RawMessage `json:"expires_in"`
	Error       string          `json:"error"`
}

// request asks the token endpoint once. With a failure comes how long it wants to be left alone.
func (s *Source) request(ctx context.Context) (token, *plugin.Failure, time.Duration) {
	req, err := s.newRequest(ctx)
	if err != nil {
		return token{}, configFailure("the request for an access token could not be made: " + err.Error()), 0
	}
	asked := time.Now()
	resp, err := s.client.Do(req)
	if err != nil {
		return token{}, transportFailure(ctx, err), 0
	}
	defer resp.Body.Close() //nolint:errcheck // there is nothing to lose in it
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return token{}, transportFailure(ctx, err), 0
	case len(body) > maxAnswer:
		return token{}, endpointFailure(plugin.CodeProtocol, "the answer is longer than 64 KiB"), 0
	case resp.StatusCode/100 != 2:
		return token{}, refusal(resp.StatusCode, body), retryAfter(resp, asked)
	}
	got, failed := read(body, asked)
	return got, failed, 0
}

func (s *Source) newRequest(ctx context.Context) (*http.Request, error) {
	form := url.Values{}
	for _, name := range slices.Sorted(maps.Keys(s.config.Params)) {
		form.Set(name, s.config.Params[name])
	}
	form.Set("grant_type", "client_credentials")
	if len(s.config.Scopes) > 0 {
		form.Set("scope", strings.Join(s.config.Scopes, " "))
	}
	if s.config.Audience != "" {
		form.Set("audience", s.config.Audience)
	}
	authorization := ""
	switch s.config.ClientAuth {
	case ClientSecretBasic:
		// Both halves are form-encoded first, which matters for characters such as + and %.
		pair := url.QueryEscape(s.config.ClientID) + ":" + url.QueryEscape(s.secret())
		authorization = "Basic " + base64.StdEncoding.EncodeToString([]byte(pair))
	case ClientSecretPost:
		form.Set("client_id", s.config.ClientID)
		form.Set("client_secret", s.secret())
	case PrivateKeyJWT:
		assertion, err := s.assertion(time.Now())
		if err != nil {
			return nil, err
		}
		form.Set("client_id", s.config.ClientID)
		form.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		form.Set("client_assertion", assertion)
	case TLSClientAuth:
		form.Set("client_id", s.config.ClientID)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.config.TokenURL, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, errUnreadableURL
	}
	req.GetBody = nil // never sent twice behind our back
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	return req, nil
}

func (s *Source) secret() string { return string(s.config.ClientSecret.Values()[0]) }

// read takes the token out of an answer with status 2xx.
func read(body []byte, asked time.Time) (token, *plugin.Failure) {
	var a answer
	if err := json.Unmarshal(body, &a); err != nil {
		return token{}, endpointFailure(plugin.CodeProtocol, "the answer is not the JSON of an access token")
	}
	switch {
	case a.AccessToken == "" && a.Error != "":
		return token{}, refusal(http.StatusOK, body) // some answer errors with 200
	case a.AccessToken == "":
		return token{}, endpointFailure(plugin.CodeProtocol, "the answer has no access_token")
	case !strings.EqualFold(a.TokenType, "bearer"):
		return token{}, endpointFailure(plugin.CodeProtocol, "the token is not of the type Bearer, the only one that can be sent")
	case len(a.AccessToken) > maxToken:
		return token{}, endpointFailure(plugin.CodeProtocol, "the token is longer than 16 KiB")
	case strings.ContainsFunc(a.AccessToken, func(r rune) bool { return r <= ' ' || r > '~' }):
		return token{}, endpointFailure(plugin.CodeProtocol, "the token has characters that a header cannot carry")
	}
	lifetime, ok := lifetimeOf(a.ExpiresIn)
	if !ok {
		return token{}, endpointFailure(plugin.CodeProtocol, "the token's expires_in is not a number of seconds")
	}
	return newToken(a.AccessToken, lifetime, asked), nil
}

// lifetimeOf takes numbers and, as several servers send them, numbers in quotes.
func lifetimeOf(raw json.RawMessage) (time.Duration, bool) {
	text := strings.Trim(string(raw), `"`)
	if text == "" || text == "null" {
		return unstatedLifetime, true
	}
	seconds, err := strconv.ParseFloat(text, 64)
	switch {
	case err != nil || seconds != seconds:
		return 0, false
	case seconds <= 0: // which would mean a token for each delivery; a 401 tells when it was meant so
		return unstatedLifetime, true
	}
	return time.Duration(min(max(seconds, 0), maxLifetime) * float64(time.Second)), true
}

// refusal reads an error response. Of its words only the codes that the RFCs define are repeated.
func refusal(status int, body []byte) *plugin.Failure {
	var a answer
	_ = json.Unmarshal(body, &a) // an error page is no JSON, and no less an error
	switch a.Error {
	case "invalid_client", "unauthorized_client", "invalid_scope", "invalid_grant", "unsupported_grant_type",
		"invalid_request", "invalid_target", "access_denied":
		return configFailure("the token endpoint refused the client: " + a.Error)
	case "temporarily_unavailable", "server_error", "slow_down":
		return endpointFailure(plugin.CodeProtocol, "it answered "+a.Error)
	}
	text := fmt.Sprintf("it answered %d %s", status, http.StatusText(status))
	switch {
	case status >= 300 && status <= 399:
		text += "; redirects are not followed"
	case status == http.StatusUnauthorized, status == http.StatusForbidden, status == http.StatusBadRequest, status == http.StatusNotFound:
		return configFailure("the token endpoint answered " + strings.TrimPrefix(text, "it answered "))
	}
	return endpointFailure(plugin.CodeProtocol, strings.TrimSpace(text))
}

func retryAfter(resp *http.Response, now time.Time) time.Duration {
	value := resp.Header.Get("Retry-After")
	if strings.Trim(value, "0123456789.") == "" {
		if seconds, err := strconv.ParseFloat(value, 64); err == nil || errors.Is(err, strconv.ErrRange) {
			return time.Duration(min(seconds, longestPause.Seconds()) * float64(time.Second))
		}
	}
	if at, err := http.ParseTime(value); err == nil {
		return at.Sub(now)
	}
	return 0
}
