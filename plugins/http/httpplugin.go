// Package httpplugin is the transport "http": it sends requests to http and https receivers. (Its folder
// is named http after the kind; a package of that name would hide net/http wherever it is used.)
//
// It guarantees, whatever the receiver does:
//   - one attempt is one request: redirects are not followed and nothing is sent a second time, but for one
//     case: a receiver that answers 401 to an OAuth 2.0 token has refused the request before it looked at it,
//     so the same bytes go out once more with a new token;
//   - no connection to an address that the egress policy forbids, decided at dial time on the address
//     itself, token endpoints and proxies included, and no proxy from the environment;
//   - credentials (auth.go, certificate.go) are in the request and nowhere else: not in errors, not among
//     the headers reported as sent, and cut out of what the receiver says;
//   - connections are never shared between different credentials, and never made anew for each delivery;
//   - an attempt ends by its deadline, body included, and reads no more than 64 KiB of header and, past
//     what is kept, 256 KiB of body;
//   - a failure says whether the request may have reached the receiver.
//
// A response counts from its status line: when the body behind it breaks off or is late, the status
// stands and the body is marked as truncated, for the receiver has decided by then.
//
// Requests travel over HTTP/1.1 on connections of its own (h1.go), which costs half of what
// net/http's Transport does, and over net/http where it negotiates HTTP/2 or the body is large. Pools of
// connections are shared by all instances with the same settings and credentials. It does not retry, sign
// or keep anything but connections and access tokens.
package httpplugin

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// check says in words what newInstance would refuse, and what works but looks wrong.
func check(c Config, t plugin.Target) []plugin.Problem {
	const pointer = "/target/uri"
	var problems []plugin.Problem
	u, err := parseTarget(t.URL)
	if err != nil {
		problems = append(problems, plugin.Problem{Pointer: pointer, Code: "uri.invalid", Summary: err.Error()})
	} else {
		problems = append(problems, checkAddress(u, t.Egress, c.Proxy)...)
		if u.scheme == "http" {
			problems = append(problems, plugin.Problem{
				Pointer: pointer, Code: "uri.plaintext", Warning: true,
				Summary: "http sends the payload readable for everyone on the way; use https",
			})
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
	return "/target/headers/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}

// checkAddress looks at what the URI itself gives away; names are looked up when an attempt is made, and by
// a proxy with resolve "proxy" not here at all.
func checkAddress(u *target, egress *plugin.Egress, via Proxy) []plugin.Problem {
	const pointer = "/target/uri"
	addr, err := netip.ParseAddr(u.hostname)
	if err == nil && egress.Check(netip.AddrPortFrom(addr, u.port)) != nil {
		return []plugin.Problem{{
			Pointer: pointer, Code: "uri.egress",
			Summary: fmt.Sprintf("%s, port %d, is blocked by egress policy; an operator can open it", addr, u.port),
		}}
	}
	if err != nil && via.URL != "" && via.Resolve == resolveProxy {
		return nil
	}
	anyPublic := netip.AddrFrom4([4]byte{1, 1, 1, 1})
	if err != nil && egress.Check(netip.AddrPortFrom(anyPublic, u.port)) != nil {
		return []plugin.Problem{{
			Pointer: pointer, Code: "uri.port", Warning: true,
			Summary: fmt.Sprintf("port %d is open only for addresses that an operator has allowed", u.port),
		}}
	}
	return nil
}
