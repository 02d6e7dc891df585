// Package grpcplugin is the transport "grpc": it hands events to receivers that implement
// grapnel.receiver.v1.ReceiverService, at grpc (plaintext HTTP/2) and grpcs (TLS) URIs. (Its folder is
// named after the kind; a package of that name would hide grpc itself.)
//
// It guarantees, whatever the receiver does:
//   - one attempt is one call: no retries by gRPC but those of calls that the receiver says it has not
//     looked at (RFC 9113, section 8.7), no service config, no waiting for a receiver that is down;
//   - no connection to an address that the egress policy forbids, decided at dial time on the address
//     itself, and no proxy from the environment;
//   - an attempt ends by its deadline, and no response is read beyond 64 KiB;
//   - a failure says whether the call may have reached the receiver.
//
// The call's status becomes the HTTP status that means the same (status.go), so that retry rules, Retry-After
// and 410 work as they do over HTTP; the response's body is the status message. Only a status that the
// receiver itself sent counts: what gRPC makes up when a connection breaks is a failure.
//
// Instances with the same address, settings and credential share one HTTP/2 connection, which is closed
// when nobody has used it for a minute. The package does not retry, sign or keep anything.
package grpcplugin

import (
	"fmt"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// maxBody is the largest body carried: with its headers it stays below the 4 MiB that gRPC servers take
// unless told otherwise.
const maxBody = 4<<20 - 128<<10

// Config is what a subscription may say about how its receiver is called.
type Config struct {
	ConnectTimeout    plugin.Duration `json:"connect_timeout" doc:"Longest time for looking up the name, connecting and both handshakes." default:"5s" minimum:"100ms" maximum:"60s"`
	TLS               TLS             `json:"tls" doc:"For grpcs URIs."`
	CA                plugin.Secret   `slot:"ca" doc:"Authorities that the receiver's certificate may be by, instead of the system's. PEM."`
	ClientCertificate plugin.Secret   `slot:"client_certificate" doc:"Certificate chain, the leaf first, with its private key unless client_key holds that, to show to the receiver. PEM."`
	ClientKey         plugin.Secret   `slot:"client_key" doc:"Private key of client_certificate, PEM."`
	Token             plugin.Secret   `slot:"token" doc:"Sent as metadata: authorization: Bearer TOKEN."`
}

// TLS says what to expect of the receiver's certificate.
type TLS struct {
	ServerName string `json:"server_name" doc:"Name that the certificate must be valid for and that the call's authority becomes, instead of the URI's host."`
}

// Kind is the transport "grpc", the default for the schemes grpc and grpcs.
func Kind() plugin.Kind { return kind(&links{}) }

// links are the connections of a process.
type links = outbound.Pool[settings, *link]

func kind(pool *links) plugin.Kind {
	gates := gates{reading: gate.New(), shaking: gate.New()}
	build := func(c Config, t plugin.Target) (plugin.AttemptFunc, error) {
		i, err := newInstance(pool, gates, c, t)
		if err != nil {
			return nil, err
		}
		return i.attempt, nil
	}
	options := append(outbound.Formats(),
		plugin.Doc("Calls grapnel.receiver.v1.ReceiverService/Deliver over gRPC"),
		plugin.Schemes("grpc", "grpcs"),
		plugin.MaxBody(maxBody),
		plugin.Example(map[string]any{"connect_timeout": "10s", "tls": map[string]any{"server_name": "hooks.example.com"}}),
		plugin.Format("token", tokenFormat()),
		plugin.Check(check))
	return plugin.Transport("grpc", build, options...)
}

func (c Config) material() outbound.Material {
	return outbound.Material{CA: c.CA, Certificate: c.ClientCertificate, Key: c.ClientKey}
}

// parse takes URIs of the form grpc(s)://host[:port][/path].
func parse(uri string) (*outbound.Address, error) {
	return outbound.Parse(uri, map[string]uint16{"grpc": 80, "grpcs": 443})
}

// check says in words what newInstance would refuse, and what works but looks wrong.
func check(c Config, t plugin.Target) []plugin.Problem {
	address, err := parse(t.URL)
	if err != nil {
		return []plugin.Problem{outbound.Invalid(err)}
	}
	problems := address.Check(t.Egress)
	if address.Scheme == "grpcs" {
		return append(problems, c.material().Check(time.Now())...)
	}
	problems = append(problems, address.Plaintext("grpcs"))
	unused := func(pointer string) {
		problems = append(problems, plugin.Problem{
			Pointer: pointer, Code: "tls.unused", Summary: "this is for grpcs URIs, and the URI is a grpc one; change the URI or leave this out",
		})
	}
	if c.TLS.ServerName != "" {
		unused("/config/tls/server_name")
	}
	if !c.CA.Empty() {
		unused("/secrets/ca")
	}
	if !c.ClientCertificate.Empty() {
		unused("/secrets/client_certificate")
	}
	if !c.ClientKey.Empty() {
		unused("/secrets/client_key")
	}
	if !c.Token.Empty() {
		problems = append(problems, plugin.Problem{
			Pointer: "/secrets/token", Code: "token.plaintext", Warning: true,
			Summary: "grpc sends the token readable for everyone on the way; use grpcs",
		})
	}
	return problems
}

func tokenFormat() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc: "the token alone, without \"Bearer\": printable ASCII, no blanks",
		Read: func(value []byte) (plugin.SecretInfo, error) {
			for i, c := range value {
				if c <= ' ' || c > '~' {
					return plugin.SecretInfo{}, fmt.Errorf("there is a blank or a character outside printable ASCII at position %d; give the token alone, without \"Bearer\" and line breaks", i)
				}
			}
			return plugin.SecretInfo{}, nil
		},
	}
}

// settings are what instances must have in common to share a connection.
type settings struct {
	scheme, address, authority string
	connect                    time.Duration
	egress, agent              string
	credential                 outbound.Fingerprint
}
