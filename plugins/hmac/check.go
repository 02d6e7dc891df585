package hmacplugin

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// check says what is wrong with the config of a house format.
func check(c Config, t plugin.Target) []plugin.Problem {
	s, faults := compile(c.scheme(), nil, false)
	var problems []plugin.Problem
	for _, f := range faults {
		problems = append(problems, complaint("/config/"+pointer(f.at), "config.template", "%v", f.err))
	}
	problems = append(problems, checkHeaders(c, t)...)
	if _, problem := c.decodeKeys(); problem != nil {
		problems = append(problems, *problem)
	}
	if len(problems) > 0 {
		return problems
	}
	switch {
	case len(c.Headers) == 0:
		return []plugin.Problem{complaint("/config/headers", "config.template",
			"no header is set, want at least one, such as X-Signature with t={timestamp},v1={signature}")}
	case len(s.signed) == 0:
		return []plugin.Problem{complaint("/config/headers", "config.template",
			"no header has a signature in it, want {signature} or {signatures} in one of them")}
	case c.Content == "":
		return []plugin.Problem{complaint("/config/content", "config.template", "is empty, want a template such as {id}.{timestamp}.{body}")}
	case !s.each.has(signature):
		return []plugin.Problem{complaint("/config/signature_each", "config.template",
			"given %q, want {signature} in it, such as v1={signature}", c.SignatureEach)}
	}
	for _, h := range s.signed {
		if reads(s.content, h.name) {
			problems = append(problems, complaint("/config/content", "config.template",
				"{header:%s} is a header that carries the signature; want another in the content", strings.ToLower(h.name)))
		}
	}
	return append(problems, warnings(s)...)
}

// warnings are about what works but can hardly be meant.
func warnings(s *signer) []plugin.Problem {
	var problems []plugin.Problem
	warn := func(code, format string, args ...any) {
		p := complaint("/config/content", code, format, args...)
		p.Warning = true
		problems = append(problems, p)
	}
	if !s.content.has(body) {
		warn("config.unsigned_body", "there is no {body} in it, so the signature says nothing about the body")
	}
	headers := slices.Concat(s.plain, s.signed)
	for _, v := range []variable{timestamp, nonce} {
		sent := slices.ContainsFunc(headers, func(h compiled) bool { return h.value.has(v) }) || s.wantsEach && s.each.has(v)
		if s.content.has(v) && !sent {
			name := map[variable]string{timestamp: "{timestamp}", nonce: "{nonce}"}[v]
			warn("config.unsent_value", "%s is signed but in none of the headers, so receivers have nothing to verify with", name)
		}
	}
	return problems
}

// checkHeaders looks at the names, and at what is sent beside the variables.
func checkHeaders(c Config, t plugin.Target) []plugin.Problem {
	var problems []plugin.Problem
	wrong := func(name, code, format string, args ...any) {
		problems = append(problems, complaint("/config/headers/"+escape(name), code, format, args...))
	}
	seen := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		lower := strings.ToLower(name)
		inTarget := slices.ContainsFunc(t.Headers, func(h plugin.Header) bool { return strings.EqualFold(h.Name, name) })
		switch {
		case !isToken(name):
			wrong(name, "config.header_name", "%q is not a header name; want letters, digits and hyphens, such as X-Signature", name)
		case seen[lower] != "":
			wrong(name, "config.header_name", "%q and %q are the same header; names do not depend on case", seen[lower], name)
		case reserved(lower):
			wrong(name, "config.header_name", "%q is set by the host or the transport; want a name of its own, such as X-Signature", name)
		case inTarget:
			wrong(name, "config.header_name", "%q is among the subscription's own headers too; take it out there, or rename it here", name)
		case c.Headers[name] == "":
			wrong(name, "config.header_value", "is empty, want a template such as t={timestamp},v1={signature}")
		case !isFieldValue(c.Headers[name]):
			wrong(name, "config.header_value", "given %q, want printable ASCII without a blank at either end", c.Headers[name])
		}
		seen[lower] = name
	}
	for _, f := range []struct{ field, text string }{{"signature_each", c.SignatureEach}, {"signature_join", c.SignatureJoin}} {
		if !isFieldValue("|" + f.text + "|") { // a blank at an end is no fault here
			problems = append(problems, complaint("/config/"+f.field, "config.header_value",
				"given %q, want printable ASCII: it is sent in a header", f.text))
		}
	}
	return problems
}

// reserved are the headers that frame a request, belong to its connection, or say what is sent.
func reserved(name string) bool {
	return strings.HasPrefix(name, "ce-") || slices.Contains([]string{
		"accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host", "keep-alive",
		"proxy-authorization", "proxy-connection", "te", "traceparent", "tracestate", "trailer", "transfer-encoding", "upgrade",
		"user-agent", "webhook-id",
	}, name)
}

// reads reports whether the template takes the value of the header.
func reads(t template, name string) bool {
	return slices.ContainsFunc(t, func(p part) bool { return p.variable == headerValue && strings.EqualFold(p.text, name) })
}

func complaint(pointer, code, format string, args ...any) plugin.Problem {
	return plugin.Problem{Pointer: pointer, Code: code, Summary: fmt.Sprintf(format, args...)}
}

// pointer is a fault's place as JSON Pointer (RFC 6901), but for the slash in front.
func pointer(at string) string {
	if name, ok := strings.CutPrefix(at, "headers/"); ok {
		return "headers/" + escape(name)
	}
	return at
}

func escape(segment string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(segment)
}
