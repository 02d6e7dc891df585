// Package httpplugin is the transport "http": it sends requests to http and https receivers. (Its folder
// is named http after the kind; a package of that name would hide net/http wherever it is used.)
//
// It guarantees, whatever the receiver does:
//   - one attempt is one request: redirects are not followed and nothing is sent a second time but what the receiver
//     has not acted upon: a request that it says it has not looked at (HTTP/2), one whose OAuth 2.0 token it answers with
//     401, and, once, one whose connection had been idle and ended without a byte of an answer;
//   - no connection to an address that the egress policy forbids, decided at dial time on the address
//     itself, token endpoints and proxies included, and no proxy from the environment;
//   - credentials (auth.go, certificate.go) are in the request and nowhere else: not in errors, not among
//     the headers reported as sent, and cut out of what the receiver says;
//   - connections are never shared between different credentials, and never made anew for each delivery;
//   - an attempt ends by its deadline, body included, and reads no more than 64 KiB of header and, past
//     what is kept, 64 KiB of body; what follows a status that says yes is waited for a second;
//   - of a response's header no more than 4 KiB in sum are handed on;
//   - a failure says whether the request may have reached the receiver.
//
// A response counts from its status line: when what is behind it breaks off, is late or cannot be read, the status
// stands and the body is marked as truncated, for the receiver has decided by then.
//
// HTTP/1.1 is spoken by internal/h1, which costs half of what net/http's Transport does, HTTP/2 by internal/h2 over
// net/http's connections. Both know of requests and answers only; what becomes of an attempt is said here. Pools of
// connections are shared by all instances with the same settings and credentials. It does not retry, sign
// or keep anything but connections and access tokens.
package httpplugin

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// check says in words what newInstance would refuse, and what works but looks wrong.
func check(c Config, t plugin.Target) []plugin.Problem {
	var problems []plugin.Problem
	u, err := parseTarget(t.URL)
	if err != nil {
		problems = append(problems, outbound.Invalid(err))
	} else {
		problems = append(problems, checkAddress(u, t.Egress, c.Proxy)...)
		if u.Scheme == "http" {
			problems = append(problems, u.Plaintext("https"))
		}
	}
	for _, h := range t.Headers {
		if err := checkHeader(h.Name, h.Value); err != nil {
			problems = append(problems, plugin.Problem{
				Pointer: headerPointer(h.Name), Code: "header.invalid", Summary: err.Error(),
			})
		}
	}
	problems = append(problems, checkTLS(c, u)...)
	problems = append(problems, checkAuth(c, u, t.Headers)...)
	problems = append(problems, checkTokens(c, t.Egress)...)
	problems = append(problems, checkProxy(c, t.Egress)...)
	return append(problems, checkOwnership(c.Ownership, t.Headers)...)
}

// headerPointer is the RFC 6901 pointer to a header of the subscription.
func headerPointer(name string) string {
	return "/target/headers/" + outbound.Escape(name)
}

// checkAddress looks at what the URI itself gives away; names are looked up when an attempt is made, and by
// a proxy with resolve "proxy" not here at all.
func checkAddress(u *target, egress *plugin.Egress, via Proxy) []plugin.Problem {
	if _, err := netip.ParseAddr(u.Host); err != nil && via.URL != "" && via.Resolve == resolveProxy {
		return nil
	}
	return u.Check(egress)
}

// checkTLS looks at certificates and names.
func checkTLS(c Config, u *target) []plugin.Problem {
	var problems []plugin.Problem
	if c.TLS.ServerName != "" && outbound.CheckHost(c.TLS.ServerName) != nil {
		problems = append(problems, plugin.Problem{
			Pointer: "/config/tls/server_name", Code: "tls.server_name",
			Summary: fmt.Sprintf("given %q, want a host name such as hooks.example.com", c.TLS.ServerName),
		})
	}
	if u != nil && u.Scheme == "http" && c.Auth.Type != authOAuth2 {
		const why = "the URI begins with http://"
		if !c.ClientCertificate.Empty() {
			problems = append(problems, outbound.Unused("client_certificate", why))
		}
		if !c.CA.Empty() && c.Proxy.URL == "" {
			problems = append(problems, outbound.Unused("ca", why))
		}
	}
	return append(problems, c.material().Check(time.Now())...)
}
