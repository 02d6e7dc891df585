package hmacplugin

import (
	"crypto/rand"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type hook0Config struct {
	oneKey
	Version string   `json:"version" default:"v1" enum:"v1,v0" doc:"v1 covers the time, the named headers and the body; v0 the time and the body."`
	Headers []string `json:"headers" default:"[\"content-type\",\"x-event-id\"]" doc:"Names of the headers that v1 covers, in the order signed. A request that lacks one of them is not sent."`
}

// hook0 signs as Hook0 does
// (https://documentation.hook0.com/tutorials/webhook-authentication): v1 covers named headers too.
func hook0() plugin.Kind {
	return vendor[hook0Config]{
		id: "hook0",
		doc: "X-Hook0-Signature as Hook0 signs (https://documentation.hook0.com/tutorials/webhook-authentication), v1 or v0; " +
			"its receivers read one signature: sign_with says which key signs during a rotation",
		emits:   []string{"X-Event-Id", "X-Event-Type", "X-Hook0-Signature"},
		example: map[string]any{"version": "v1", "headers": []string{"x-event-id"}},
		secret: secretText{
			doc:       "the subscription's secret, a UUID or any text of 16 characters or more, used as text",
			algorithm: "hmac-sha256",
			make:      func() []byte { return []byte(randomUUID()) },
		},
		schemes: func(c hook0Config, _ plugin.Target) []scheme {
			s := scheme{algorithm: "sha256", encoding: "hex", headers: []header{
				{name: "X-Event-Id", value: "{id}"}, {name: "X-Event-Type", value: "{type}", optional: true},
			}}
			value := "t={timestamp},v0={signature}"
			s.content = "{timestamp}.{body}"
			if c.Version == "v1" {
				var names, values []string
				for _, name := range c.Headers {
					names = append(names, quote(strings.ToLower(name)))
					values = append(values, "{header:"+name+"}")
				}
				joined := strings.Join(names, " ")
				value = "t={timestamp},h=" + joined + ",v1={signature}"
				s.content = "{timestamp}." + joined + "." + strings.Join(values, ".") + ".{body}"
			}
			s.headers = append(s.headers, header{name: "X-Hook0-Signature", value: value})
			return []scheme{s}
		},
		check: checkHook0,
	}.kind()
}

func checkHook0(c hook0Config, _ plugin.Target) []plugin.Problem {
	if c.Version != "v1" {
		return nil
	}
	wrong := func(at, format string, args ...any) []plugin.Problem {
		return []plugin.Problem{{Pointer: "/config/headers" + at, Code: "config.header_name", Summary: fmt.Sprintf(format, args...)}}
	}
	if len(c.Headers) == 0 {
		return wrong("", "no header is named, want at least one, such as x-event-id, or version v0")
	}
	var problems []plugin.Problem
	for i, name := range c.Headers {
		at := "/" + strconv.Itoa(i)
		same := func(other string) bool { return strings.EqualFold(other, name) }
		switch {
		case !isToken(name):
			problems = append(problems, wrong(at, "%q is not a header name; want one such as x-event-id", name)...)
		case strings.EqualFold(name, "x-hook0-signature"):
			problems = append(problems, wrong(at, "%q is where the signature goes, and cannot be signed itself", name)...)
		case slices.IndexFunc(c.Headers, same) < i:
			problems = append(problems, wrong(at, "%q is named twice", name)...)
		}
	}
	return problems
}

// randomUUID is a version 4 UUID (RFC 9562).
func randomUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
