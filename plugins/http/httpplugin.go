// Package httpplugin is the transport "http": it sends requests to http and https receivers. (Its folder
// is named http after the kind; a package of that name would hide net/http wherever it is used.)
//
// It guarantees, whatever the receiver does:
//   - one attempt is one request: redirects are not followed and nothing is sent a second time;
//   - no connection to an address that the egress policy forbids, decided at dial time on the address
//     itself, and no proxy from the environment;
//   - an attempt ends by its deadline, body included, and reads no more than 64 KiB of header and, past
//     what is kept, 256 KiB of body;
//   - a failure says whether the request may have reached the receiver.
//
// A response counts from its status line: when the body behind it breaks off or is late, the status
// stands and the body is marked as truncated, for the receiver has decided by then.
//
// Requests travel over HTTP/1.1 on connections of its own (h1.go), which costs half of what
// net/http's Transport does, and over net/http where it negotiates HTTP/2 or the body is large. Pools of
// connections are shared by all instances with the same settings. It does not retry, sign or keep
// anything.
package httpplugin

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription may say about how its requests are sent.
type Config struct {
	Method         string          `json:"method" doc:"HTTP method." default:"POST" enum:"POST,PUT,PATCH"`
	ConnectTimeout plugin.Duration `json:"connect_timeout" doc:"Longest time for looking up the name and connecting." default:"5s" minimum:"100ms" maximum:"60s"`
	TLSTimeout     plugin.Duration `json:"tls_timeout" doc:"Longest time for the TLS handshake." default:"5s" minimum:"100ms" maximum:"60s"`
	HeaderTimeout  plugin.Duration `json:"header_timeout" doc:"Longest time from sending the request to the end of the response's header." default:"15s" minimum:"100ms" maximum:"120s"`
	HTTP2          bool            `json:"http2" doc:"Use HTTP/2 where an https receiver offers it." default:"true"`
}

// Kind is the transport "http", the default for the schemes http and https.
func Kind() plugin.Kind { return kind(newPools(true)) }

func kind(p *pools) plugin.Kind {
	build := func(c Config, t plugin.Target) (plugin.AttemptFunc, error) {
		i, err := newInstance(p, c, t)
		if err != nil {
			return nil, err
		}
		return i.attempt, nil
	}
	return plugin.Transport("http", build,
		plugin.Doc("HTTP and HTTPS requests with pooled connections and HTTP/2"),
		plugin.Schemes("http", "https"),
		plugin.Emits("user-agent", "traceparent", "accept-encoding"),
		plugin.Example(map[string]any{"method": "PUT", "header_timeout": "10s", "http2": false}),
		plugin.Check(check))
}

// check says in words what newInstance would refuse, and what works but looks wrong.
func check(c Config, t plugin.Target) []plugin.Problem {
	const pointer = "/target/uri"
	var problems []plugin.Problem
	u, err := parseTarget(t.URL)
	if err != nil {
		problems = append(problems, plugin.Problem{Pointer: pointer, Code: "uri.invalid", Summary: err.Error()})
	} else {
		problems = append(problems, checkAddress(u, t.Egress)...)
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
				Pointer: "/target/headers/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(h.Name), Code: "header.invalid", Summary: err.Error(),
			})
		}
	}
	return problems
}

// checkAddress looks at what the URI itself gives away; names are looked up when an attempt is made.
func checkAddress(u *target, egress *plugin.Egress) []plugin.Problem {
	const pointer = "/target/uri"
	addr, err := netip.ParseAddr(u.hostname)
	if err == nil && egress.Check(netip.AddrPortFrom(addr, u.port)) != nil {
		return []plugin.Problem{{
			Pointer: pointer, Code: "uri.egress",
			Summary: fmt.Sprintf("%s, port %d, is blocked by egress policy; an operator can open it", addr, u.port),
		}}
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

// settings are what instances must have in common to share connections.
type settings struct {
	connect, tls, header time.Duration
	http2                bool
	egress               string
}

func settingsOf(c Config, egress *plugin.Egress) settings {
	return settings{
		connect: c.ConnectTimeout.Std(), tls: c.TLSTimeout.Std(), header: c.HeaderTimeout.Std(),
		http2: c.HTTP2, egress: egress.String(),
	}
}
