// Package natsplugin is the transport "nats": it publishes events to streams of NATS JetStream. (Its folder
// is named after the kind; a package of that name would hide the client's.)
//
// It guarantees, whatever the server does:
//   - one attempt is one publication, with message id and subject as Nats-Msg-Id, so that a stream stores
//     repeats once within its duplicate window, and an event once under each subject;
//   - success is the stream's acknowledgement, not the server's having read the message (unless the config
//     asks for no more);
//   - no connection to an address that the egress policy forbids, decided at dial time on the address
//     itself; servers that the server advertises are not used, and there is no proxy;
//   - an attempt ends by its deadline, and ends at once when its connection does; nothing is kept to be
//     sent later;
//   - a failure says whether the message may have reached the server.
//
// Answers are put in HTTP's terms (answer.go), so that retry rules work as they do over HTTP. Instances with
// the same server, settings and credential share one connection, which is made anew when it has ended and
// closed when nobody has used it for a minute. The package does not retry, sign or keep anything.
package natsplugin

import (
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription may say about where its messages go.
type Config struct {
	Subject           string          `json:"subject" doc:"Subject to publish to, instead of the URI's path. {type} stands for the event's type."`
	Stream            string          `json:"stream" doc:"Stream that must take the messages; when another one would, they are refused (412)."`
	RequireJetStream  bool            `json:"require_jetstream" doc:"Wait for a stream's acknowledgement. Without it success (202) means that the server has read the message, whether or not anybody listens." default:"true"`
	User              string          `json:"user" doc:"User name that goes with the password."`
	InboxPrefix       string          `json:"inbox_prefix" doc:"Begin of the subjects that acknowledgements come to; the user must be allowed to subscribe to them." default:"_INBOX"`
	ConnectTimeout    plugin.Duration `json:"connect_timeout" doc:"Longest time for looking up the name, connecting and the handshake." default:"5s" minimum:"100ms" maximum:"60s"`
	TLS               TLS             `json:"tls" doc:"For tls URIs, and for servers that ask for TLS."`
	CA                plugin.Secret   `slot:"ca" doc:"Authorities that the server's certificate may be by, instead of the system's. PEM."`
	ClientCertificate plugin.Secret   `slot:"client_certificate" doc:"Certificate chain, the leaf first, with its private key unless client_key holds that, to show to the server. PEM."`
	ClientKey         plugin.Secret   `slot:"client_key" doc:"Private key of client_certificate, PEM."`
	Credentials       plugin.Secret   `slot:"credentials" doc:"Text of a .creds file: a user's JWT and its seed."`
	Token             plugin.Secret   `slot:"token" doc:"Token of a server that asks for one."`
	Password          plugin.Secret   `slot:"password" doc:"Password that goes with the config's user."`
}

// TLS says how TLS is begun and what to expect of the server's certificate.
type TLS struct {
	ServerName     string `json:"server_name" doc:"Name that the certificate must be valid for, instead of the URI's host."`
	HandshakeFirst bool   `json:"handshake_first" doc:"Begin TLS before the server's greeting, for servers with handshake_first or behind TLS proxies."`
}

// Kind is the transport "nats", the default for the schemes nats, tls and nats+tls.
func Kind() plugin.Kind { return kind(&links{}) }

// links are the connections of a process.
type links = outbound.Pool[settings, *link]

func kind(pool *links) plugin.Kind {
	shaking := gate.New()
	build := func(c Config, t plugin.Target) (plugin.AttemptFunc, error) {
		i, err := newInstance(pool, shaking, c, t)
		if err != nil {
			return nil, err
		}
		return i.attempt, nil
	}
	options := append(outbound.Formats(),
		plugin.Doc("Publishes to streams of NATS JetStream, deduplicated by message id and subject"),
		plugin.Schemes("nats", "tls", "nats+tls"),
		plugin.Example(map[string]any{"subject": "events.{type}", "stream": "EVENTS"}),
		plugin.Format("credentials", credentialsFormat()),
		plugin.Format("token", textFormat("token")),
		plugin.Format("password", textFormat("password")),
		plugin.Check(check))
	return plugin.Transport("nats", build, options...)
}

func (c Config) material() outbound.Material {
	return outbound.Material{CA: c.CA, Certificate: c.ClientCertificate, Key: c.ClientKey}
}

// parse takes URIs of the form nats://host[:port][/subject].
func parse(uri string) (*outbound.Address, error) {
	const port = 4222
	return outbound.Parse(uri, map[string]uint16{"nats": port, "tls": port, "nats+tls": port})
}

// check says in words what newInstance would refuse, and what works but looks wrong.
func check(c Config, t plugin.Target) []plugin.Problem {
	address, err := parse(t.URL)
	if err != nil {
		return []plugin.Problem{outbound.Invalid(err)}
	}
	problems := address.Check(t.Egress)
	add := func(pointer, code, summary string) {
		problems = append(problems, plugin.Problem{Pointer: pointer, Code: code, Summary: summary})
	}
	if !secure(c, address) {
		problems = append(problems, address.Plaintext("tls://, unless the server asks for TLS by itself"))
	}
	if pointer, err := checkSubject(c, address); err != nil {
		add(pointer, "subject.invalid", err.Error())
	}
	if err := checkTokens(c.InboxPrefix); err != nil {
		add("/config/inbox_prefix", "subject.invalid", err.Error())
	}
	if c.Stream != "" && !c.RequireJetStream {
		add("/config/stream", "stream.unused", "a stream is named but require_jetstream is false; leave one of them out")
	}
	if !c.Password.Empty() && c.User == "" {
		add("/config/user", "user.missing", "the slot password is filled but there is no user; give the user name")
	}
	for _, h := range t.Headers {
		if err := checkHeader(h); err != nil {
			add("/target/headers/"+outbound.Escape(h.Name), "header.invalid", err.Error())
		}
	}
	filled := 0
	for _, s := range []plugin.Secret{c.Credentials, c.Token, c.Password} {
		if !s.Empty() {
			filled++
		}
	}
	if filled > 1 {
		add("/secrets", "secret.conflict", "more than one of the slots credentials, token and password are filled; a connection has one credential")
	}
	return append(problems, c.material().Check(time.Now())...)
}

// secure reports whether the connection must be TLS; else it is when the server asks for it.
func secure(c Config, a *outbound.Address) bool {
	return a.Scheme != "nats" || c.TLS.HandshakeFirst || !c.CA.Empty() || !c.ClientCertificate.Empty()
}

// settings are what instances must have in common to share a connection.
type settings struct {
	address, serverName string
	secure, first       bool
	connect             time.Duration
	egress, name        string
	user, inboxPrefix   string
	credential          outbound.Fingerprint
}
