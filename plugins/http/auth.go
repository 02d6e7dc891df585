package httpplugin

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/grapnel/grapnel/internal/header"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/plugins/oauth2"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// credential is what auth adds to each request of an instance.
type credential struct {
	// header is the name of the header that carries it, lower case; empty for none and for a query. Nobody
	// else may set it.
	header string
	// value of the header; empty for oauth2, whose tokens come and go.
	value string
	// query is the parameter, encoded; empty unless the credential travels there.
	query string
	// hide are the values that a receiver may repeat.
	hide []string
	// tokens says where oauth2 gets them.
	tokens *oauth2.Config
}

func newCredential(c Config) (credential, error) {
	newest := func(s plugin.Secret) (string, error) {
		if s.Empty() {
			return "", errors.New("auth has no secret")
		}
		return string(s.Values()[0]), nil
	}
	switch c.Auth.Type {
	case authBasic:
		password, err := newest(c.Password)
		pair := base64.StdEncoding.EncodeToString([]byte(c.Auth.Username + ":" + password))
		return credential{header: "authorization", value: "Basic " + pair, hide: []string{password, pair}}, err
	case authBearer:
		token, err := newest(c.Token)
		return credential{header: "authorization", value: "Bearer " + token, hide: []string{token}}, err
	case authAPIKey:
		key, err := newest(c.APIKey)
		if c.Auth.In == "query" {
			return credential{query: url.QueryEscape(c.Auth.Name) + "=" + url.QueryEscape(key), hide: []string{key}}, err
		}
		return credential{header: apiKeyHeader(c.Auth), value: key, hide: []string{key}}, err
	case authOAuth2:
		return credential{header: "authorization", tokens: tokenConfig(c)}, nil
	}
	return credential{}, nil
}

func apiKeyHeader(a Auth) string {
	if a.Name == "" {
		return "x-api-key"
	}
	return strings.ToLower(a.Name)
}

func tokenConfig(c Config) *oauth2.Config {
	return &oauth2.Config{
		TokenURL: c.Auth.TokenURL, ClientID: c.Auth.ClientID, ClientAuth: c.Auth.ClientAuth,
		ClientSecret: c.ClientSecret, SigningKey: c.AssertionKey, AssertionAudience: c.Auth.AssertionAudience,
		Scopes: c.Auth.Scopes, Audience: c.Auth.Audience, Params: c.Auth.Params,
	}
}

// onWire is the target as it is requested, with what auth puts into the query. Its text stays the one that
// may be shown.
func (i *instance) onWire(t *target) *target {
	if i.auth.query == "" {
		return t
	}
	out, address, u := *t, *t.Address, *t.URL
	if u.RawQuery != "" {
		u.RawQuery += "&"
	}
	u.RawQuery += i.auth.query
	address.URL = &u
	out.Address, out.path = &address, u.RequestURI()
	return &out
}

// clean takes credentials out of what the receiver says: an error page repeats the URL, an echo service
// everything.
func (i *instance) clean(resp *plugin.Response, token string) *plugin.Response {
	hide := i.auth.hide
	if token != "" {
		hide = []string{token}
	}
	if resp == nil || len(hide) == 0 {
		return resp
	}
	for n := range resp.Headers {
		resp.Headers[n].Value = outbound.Echo(resp.Headers[n].Value, hide, false)
	}
	resp.Body = []byte(outbound.Echo(string(resp.Body), hide, resp.Truncated))
	return resp
}

// checkAuth says what is missing for a type of auth, and what is there for another one.
func checkAuth(c Config, u *target, headers []plugin.Header) []plugin.Problem {
	problems := checkAuthFields(c.Auth)
	problems = append(problems, checkAuthSlots(c)...)
	cred, _ := newCredential(c) // a missing secret has been complained of
	switch c.Auth.Type {
	case authAPIKey:
		problems = append(problems, checkAPIKey(c.Auth, u)...)
	case authBasic:
		if strings.ContainsFunc(c.Auth.Username, func(r rune) bool { return r == ':' || r < ' ' || r == 0x7f }) {
			problems = append(problems, plugin.Problem{
				Pointer: "/config/auth/username", Code: "auth.username", Summary: "the user name has a colon or a control character, which RFC 7617 does not allow",
			})
		}
	}
	for _, h := range headers {
		if cred.header != "" && header.Key(h.Name) == header.Key(cred.header) {
			problems = append(problems, plugin.Problem{
				Pointer: headerPointer(h.Name), Code: "auth.header_conflict",
				Summary: fmt.Sprintf("auth type %s sets the header %s; take it out of headers", c.Auth.Type, cred.header),
			})
		}
	}
	if c.Auth.Type != "" && c.Auth.Type != authNone && u != nil && u.Scheme == "http" {
		problems = append(problems, plugin.Problem{
			Pointer: "/config/auth/type", Code: "auth.plaintext", Warning: true,
			Summary: "the URI begins with http://: everyone on the way can read the credentials; use https",
		})
	}
	return problems
}

// checkAuthFields finds settings of other types than the one chosen. Those with defaults are always there.
func checkAuthFields(a Auth) []plugin.Problem {
	var problems []plugin.Problem
	for _, f := range []struct {
		name, of  string
		set, must bool
	}{
		{"username", authBasic, a.Username != "", true},
		{"name", authAPIKey, a.Name != "", a.In == "query"},
		{"token_url", authOAuth2, a.TokenURL != "", false}, // what is wrong with it follows below
		{"client_id", authOAuth2, a.ClientID != "", true},
		{"scopes", authOAuth2, len(a.Scopes) > 0, false},
		{"audience", authOAuth2, a.Audience != "", false},
		{"assertion_audience", authOAuth2, a.AssertionAudience != "", false},
		{"params", authOAuth2, len(a.Params) > 0, false},
	} {
		p := plugin.Problem{Pointer: "/config/auth/" + f.name, Code: "auth.field"}
		switch {
		case f.set && a.Type != f.of:
			p.Summary = fmt.Sprintf("%s belongs to auth type %s, and the type is %q; clear one of them", f.name, f.of, a.Type)
		case f.must && !f.set && a.Type == f.of:
			p.Summary = fmt.Sprintf("%s is empty, and auth type %s needs it", f.name, f.of)
		default:
			continue
		}
		problems = append(problems, p)
	}
	return problems
}

// checkAuthSlots finds secrets that the type of auth needs and does not have, and those that it has and
// does not need.
func checkAuthSlots(c Config) []plugin.Problem {
	var problems []plugin.Problem
	method := c.Auth.ClientAuth
	if method == "" {
		method = oauth2.ClientSecretBasic
	}
	oauth := c.Auth.Type == authOAuth2
	for _, s := range []struct {
		slot   string
		secret plugin.Secret
		needed bool
	}{
		{"password", c.Password, c.Auth.Type == authBasic},
		{"token", c.Token, c.Auth.Type == authBearer},
		{"api_key", c.APIKey, c.Auth.Type == authAPIKey},
		{"client_secret", c.ClientSecret, oauth && (method == oauth2.ClientSecretBasic || method == oauth2.ClientSecretPost)},
		{"assertion_key", c.AssertionKey, oauth && method == oauth2.PrivateKeyJWT},
	} {
		kind := "auth type " + c.Auth.Type
		if oauth {
			kind += " with client_auth " + method
		}
		switch {
		case s.needed && s.secret.Empty():
			problems = append(problems, missing(s.slot, kind))
		case !s.needed && !s.secret.Empty():
			problems = append(problems, outbound.Unused(s.slot, kind+" does not need it"))
		}
	}
	if oauth && method == oauth2.TLSClientAuth && c.ClientCertificate.Empty() {
		problems = append(problems, missing("client_certificate", "auth type oauth2 with client_auth "+method))
	}
	return problems
}

func missing(slot, who string) plugin.Problem {
	return plugin.Problem{
		Pointer: "/secrets/" + slot, Code: "secret.missing",
		Summary: fmt.Sprintf("secret slot %q is empty, and %s needs it", slot, who),
	}
}

func checkAPIKey(a Auth, u *target) []plugin.Problem {
	p := plugin.Problem{Pointer: "/config/auth/name", Code: "auth.name"}
	switch {
	case a.In != "query":
		name := apiKeyHeader(a)
		if err := checkHeader(name, ""); err != nil {
			p.Summary = err.Error()
			return []plugin.Problem{p}
		}
		if taken(name) {
			p.Summary = fmt.Sprintf("the header %s says something else about each request; want one of the receiver's own, such as x-api-key", name)
			return []plugin.Problem{p}
		}
	case a.Name != "" && u != nil && u.URL.Query().Has(a.Name):
		p.Summary = fmt.Sprintf("the URI has a query parameter %q already; take it out there", a.Name)
		return []plugin.Problem{p}
	}
	return nil
}

// taken are headers that requests have anyway, or that mean something to who sends them.
func taken(name string) bool {
	switch name {
	case "content-type", "content-encoding", "user-agent", "traceparent", "tracestate",
		"idempotency-key", "x-idempotency-key": // net/http repeats requests that carry them
		return true
	}
	return strings.HasPrefix(name, "webhook-") || strings.HasPrefix(name, "ce-")
}

// checkTokens looks at the settings of oauth2.
func checkTokens(c Config, egress *plugin.Egress) []plugin.Problem {
	if c.Auth.Type != authOAuth2 {
		return nil
	}
	const pointer = "/config/auth/token_url"
	if err := oauth2.CheckURL(c.Auth.TokenURL); err != nil {
		return []plugin.Problem{{Pointer: pointer, Code: "auth.token_url", Summary: err.Error()}}
	}
	u, err := parseTarget(c.Auth.TokenURL)
	if err != nil {
		return []plugin.Problem{{Pointer: pointer, Code: "auth.token_url", Summary: strings.ReplaceAll(err.Error(), "the URI", "token_url")}}
	}
	var problems []plugin.Problem
	for _, p := range checkAddress(u, egress, c.Proxy) {
		p.Pointer, p.Code = pointer, strings.Replace(p.Code, "uri.", "token_url.", 1)
		problems = append(problems, p)
	}
	if u.Scheme == "http" {
		problems = append(problems, plugin.Problem{
			Pointer: pointer, Code: "token_url.plaintext", Warning: true,
			Summary: "everyone on the way can read the client's credentials; use https",
		})
	}
	full := tokenConfig(c)
	// Empty secrets are complained of by slot, and an empty client_id by field.
	if full.ClientSecret.Empty() && full.SigningKey.Empty() {
		full.ClientAuth = oauth2.TLSClientAuth
	}
	if err := oauth2.Check(*full); err != nil && full.ClientID != "" {
		problems = append(problems, plugin.Problem{Pointer: "/config/auth", Code: "auth.oauth2", Summary: err.Error()})
	}
	return problems
}
