package httpplugin

import (
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription may say about how its requests are sent.
type Config struct {
	Method         string          `json:"method" doc:"HTTP method." default:"POST" enum:"POST,PUT,PATCH"`
	ConnectTimeout plugin.Duration `json:"connect_timeout" doc:"Longest time for looking up the name and connecting, through a proxy where there is one." default:"5s" minimum:"100ms" maximum:"60s"`
	TLSTimeout     plugin.Duration `json:"tls_timeout" doc:"Longest time for the TLS handshake." default:"5s" minimum:"100ms" maximum:"60s"`
	HeaderTimeout  plugin.Duration `json:"header_timeout,omitempty" doc:"Longest time from sending the request to the end of the response's header, where that is to be shorter than attempt_timeout." minimum:"100ms" maximum:"120s"`
	HTTP2          bool            `json:"http2" doc:"Use HTTP/2 where an https receiver offers it." default:"true"`

	TLS       TLS       `json:"tls,omitzero" doc:"TLS to the receiver."`
	Auth      Auth      `json:"auth,omitzero" doc:"Credentials that each request carries."`
	Proxy     Proxy     `json:"proxy,omitzero" doc:"Forward proxy to go through."`
	Ownership Ownership `json:"ownership,omitzero" doc:"How to ask the receiver whether it wants deliveries, before there are any."`

	ClientCertificate plugin.Secret `json:"-" slot:"client_certificate" doc:"TLS client certificate: PEM, the leaf first, with its private key unless client_key holds that."`
	ClientKey         plugin.Secret `json:"-" slot:"client_key" doc:"Private key of client_certificate, PEM."`
	CA                plugin.Secret `json:"-" slot:"ca" doc:"Certificate authorities that the receiver's certificate may be by, PEM, instead of the system's."`
	Password          plugin.Secret `json:"-" slot:"password" doc:"Password of auth type basic."`
	Token             plugin.Secret `json:"-" slot:"token" doc:"Token of auth type bearer."`
	APIKey            plugin.Secret `json:"-" slot:"api_key" doc:"Key of auth type api_key."`
	ClientSecret      plugin.Secret `json:"-" slot:"client_secret" doc:"Client secret of auth type oauth2."`
	AssertionKey      plugin.Secret `json:"-" slot:"assertion_key" doc:"Signing key of auth type oauth2 with private_key_jwt."`
	ProxyCredentials  plugin.Secret `json:"-" slot:"proxy_credentials" doc:"Credentials for the proxy, user:password."`
}

// TLS is about connections to the receiver. Verification cannot be turned off.
type TLS struct {
	ServerName string `json:"server_name,omitempty" doc:"Name to ask for and to verify instead of the URI's host."`
	MinVersion string `json:"min_version,omitempty" doc:"Oldest version of TLS." default:"1.2" enum:"1.2,1.3"`
}

// Types of Auth.
const (
	authNone   = "none"
	authBasic  = "basic"
	authBearer = "bearer"
	authAPIKey = "api_key"
	authOAuth2 = "oauth2"
)

// Auth is how requests are authorized.
type Auth struct {
	Type     string `json:"type,omitempty" doc:"none, basic (RFC 7617), bearer (RFC 6750), api_key, or oauth2 (client credentials, RFC 6749 section 4.4)." default:"none" enum:"none,basic,bearer,api_key,oauth2"`
	Username string `json:"username,omitempty" doc:"User name of type basic."`
	Name     string `json:"name,omitempty" doc:"Header or query parameter of type api_key; x-api-key for a header when empty."`
	In       string `json:"in,omitempty" doc:"Where type api_key puts the key." default:"header" enum:"header,query"`

	TokenURL          string            `json:"token_url,omitempty" doc:"Token endpoint of type oauth2."`
	ClientID          string            `json:"client_id,omitempty" doc:"Client id of type oauth2."`
	ClientAuth        string            `json:"client_auth,omitempty" doc:"How the client authenticates to the token endpoint." default:"client_secret_basic" enum:"client_secret_basic,client_secret_post,private_key_jwt,tls_client_auth"`
	Scopes            []string          `json:"scopes,omitempty" doc:"Scopes to ask for."`
	Audience          string            `json:"audience,omitempty" doc:"Parameter audience of the token request."`
	AssertionAudience string            `json:"assertion_audience,omitempty" doc:"Claim aud of private_key_jwt; token_url when empty."`
	Params            map[string]string `json:"params,omitempty" doc:"Further parameters of the token request, such as resource."`
}

// Who turns the receiver's name into an address.
const (
	resolveLocal = "local"
	resolveProxy = "proxy"
)

// Proxy is a forward proxy.
type Proxy struct {
	URL     string `json:"url,omitempty" doc:"http://HOST:PORT or https://HOST:PORT (CONNECT, for http receivers too), or socks5://HOST:PORT."`
	Resolve string `json:"resolve,omitempty" doc:"local: the receiver's name is looked up here, and the proxy is asked for the address that the egress policy has allowed. proxy: the proxy is given the name, and with it the decision where it may lead." default:"local" enum:"local,proxy"`
}

// Kinds of Ownership check.
const (
	checkNone        = "none"
	checkCloudEvents = "cloudevents"
	checkChallenge   = "challenge"
)

// Ownership is how to ask the receiver whether it wants to be delivered to.
type Ownership struct {
	Check  string `json:"check,omitempty" doc:"none, cloudevents (OPTIONS handshake of CloudEvents web hooks 1.0.2), or challenge (url_verification as Slack sends it)." default:"none" enum:"none,cloudevents,challenge"`
	Origin string `json:"origin,omitempty" doc:"DNS name of the sender, for cloudevents; each delivery carries it as WebHook-Request-Origin."`
	Rate   int    `json:"rate,omitempty" doc:"Requests per minute to ask for, for cloudevents." minimum:"1" maximum:"1000000"`
}

// Kind is the transport "http", the default for the schemes http and https.
func Kind() plugin.Kind { return kind(newPools()) }

func kind(p *pools) plugin.Kind {
	build := func(c Config, t plugin.Target) (plugin.AttemptFunc, error) {
		i, err := newInstance(p, c, t)
		if err != nil {
			return nil, err
		}
		return i.attempt, nil
	}
	options := append(formats(),
		plugin.Doc("HTTP and HTTPS requests with pooled connections and HTTP/2; mTLS, OAuth 2.0, basic, bearer and API key credentials, forward proxies"),
		plugin.Schemes("http", "https"),
		// authorization is not among them: it is added only where auth is configured, and signers that set
		// it (jwt, sigv4) are welcome everywhere else. Where both want it, the attempt is refused.
		plugin.Emits("user-agent", "traceparent", "tracestate", "accept-encoding", originHeader),
		plugin.Example(map[string]any{"method": "PUT", "header_timeout": "10s", "http2": false}),
		plugin.OwnershipCheck(), plugin.Batches(),
		plugin.Check(check))
	return plugin.Transport("http", build, options...)
}
