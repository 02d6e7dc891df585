package plugins_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// scripts serves the kinds that run scripts.
func scripts(t testing.TB) *plugintest.Harness {
	for _, p := range plugins.Parts() {
		if p.Name == "grapnel/scripts" {
			return plugintest.New(t, p.Kinds...)
		}
	}
	t.Fatal("there is no part for scripts")
	return nil
}

func order() plugin.Event {
	return plugin.Event{
		MessageID: "evt_1", ID: "o-1", Source: "//shop", Type: "order.created", Subject: "orders/1001", ContentType: "application/json",
		Time: time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC), Attributes: map[string]string{"region": "eu"},
		Data: []byte(`{"order":1001,"big":9007199254740993,"customer":{"name":"Ada <ada@example.com>"},"items":[{"sku":"a","n":2},{"sku":"b","n":1}],"vip":true,"total":12.5}`),
	}
}

type settings = map[string]any

// Each kind makes of one event what its config says, or says that nothing is to be sent.
func TestScripts(t *testing.T) {
	h := scripts(t)
	text := plugin.Event{Type: "note", Data: []byte("just text"), ContentType: "text/plain"}
	binary := plugin.Event{Type: "blob", Data: []byte{0xff, 0}, ContentType: "application/octet-stream"}
	for _, c := range []struct {
		name, kind   string
		config       settings
		event        plugin.Event
		want, drop   string
		contentType  string
		header, fail string
	}{
		{name: "cel", kind: "cel", config: settings{"expression": `{"text": "Order " + string(event.data.order), "n": event.data.items.size(), "big": event.data.big, "eu": event.attributes.region == "eu"}`},
			event: order(), want: `{"big":9007199254740993,"eu":true,"n":2,"text":"Order 1001"}`},
		{name: "cel list", kind: "cel", config: settings{"expression": `event.data.items.filter(i, i.n > 1).map(i, i.sku)`}, event: order(), want: `["a"]`},
		{name: "cel empty", kind: "cel", config: settings{"expression": `[{}, [], null, timestamp(event.time), 1.5, b"ab"]`}, event: order(), want: `[{},[],null,"2026-11-30T12:00:00Z",1.5,"YWI="]`},
		{name: "cel drop", kind: "cel", config: settings{"expression": `event.data.vip ? drop("vips are told by phone") : event.data`}, event: order(), drop: "vips are told by phone"},
		{name: "cel null", kind: "cel", config: settings{"expression": `null`}, event: order(), drop: "the expression has given null"},
		{name: "cel markup", kind: "cel", config: settings{"expression": `"<" + event.data.customer.name`}, event: order(), want: `"<Ada <ada@example.com>"`},
		{name: "cel two of a key", kind: "cel", config: settings{"expression": `{1: 2, "1": 3}`}, event: order(), fail: "two keys that are"},
		{name: "cel request", kind: "cel", config: settings{"expression": `{"body": "a=b", "content_type": "text/plain", "headers": {"X-Order": string(event.data.order)}}`, "returns": "request"},
			event: order(), want: "a=b", contentType: "text/plain", header: "1001"},
		{name: "cel request drop", kind: "cel", config: settings{"expression": `{"drop": "no"}`, "returns": "request"}, event: order(), drop: "no"},
		{name: "cel no field", kind: "cel", config: settings{"expression": `event.data.nothing`}, event: order(), fail: "no such key: nothing"},
		{name: "cel text", kind: "cel", config: settings{"expression": `event.data`}, event: text, want: `"just text"`},
		{name: "jq", kind: "jq", config: settings{"program": `{text: "Order \(.data.order)", skus: [.data.items[].sku], big: .data.big}`}, event: order(), want: `{"big":9007199254740993,"skus":["a","b"],"text":"Order 1001"}`},
		{name: "jq text", kind: "jq", config: settings{"program": `.data | ascii_upcase`, "content_type": "text/plain; charset=utf-8"}, event: text, want: "JUST TEXT", contentType: "text/plain; charset=utf-8"},
		{name: "jq binary", kind: "jq", config: settings{"program": `.data`}, event: binary, want: `"/wA="`},
		{name: "jq empty", kind: "jq", config: settings{"program": `empty`}, event: order(), drop: "the program has no output"},
		{name: "jq drop", kind: "jq", config: settings{"program": `if .data.vip then drop("vip") else . end`}, event: order(), drop: "vip"},
		{name: "jq drop value", kind: "jq", config: settings{"program": `drop({a: [.data.order]})`}, event: order(), drop: `{"a":[1001]}`},
		{name: "jq drop null", kind: "jq", config: settings{"program": `drop(null)`}, event: order(), drop: ""},
		{name: "jq drop large", kind: "jq", config: settings{"program": `drop(reduce range(40) as $i ([1]; [., .]))`}, event: order(), drop: "a value that is too large to show"},
		{name: "jq two", kind: "jq", config: settings{"program": `1, 2`}, event: order(), fail: "more than one output"},
		{name: "jq error", kind: "jq", config: settings{"program": `error("mine")`}, event: order(), fail: "mine"},
		{name: "jq env", kind: "jq", config: settings{"program": `env | length`}, event: order(), want: "0"},
		{name: "javascript", kind: "javascript", config: settings{"script": "const up = (s) => s.toUpperCase();\nfunction transform(event) { return {text: up(`Order ${event.data.order}`), n: event.data.items.map((i) => i.n).reduce((a, b) => a + b)}; }"},
			event: order(), want: `{"text":"ORDER 1001","n":3}`},
		{name: "javascript nothing", kind: "javascript", config: settings{"script": `function transform() {}`}, event: order(), drop: "the function has returned nothing"},
		{name: "javascript drop", kind: "javascript", config: settings{"script": `let transform = (event) => { try { drop("no"); } catch (e) { return 1 } return 2; }`}, event: order(), drop: "no"},
		{name: "javascript request", kind: "javascript", config: settings{"script": `function transform(e) { return {body: "x", content_type: "text/plain", headers: {"x-order": "1001"}}; }`, "returns": "request"},
			event: order(), want: "x", contentType: "text/plain", header: "1001"},
		{name: "javascript throws", kind: "javascript", config: settings{"script": `function transform(e) { return e.data.nothing.at; }`}, event: order(), fail: "TypeError"},
		{name: "javascript deep", kind: "javascript", config: settings{"script": `function transform(e) { return transform(e); }`}, event: order(), fail: "stack"},
		{name: "template", kind: "template", config: settings{"template": `{"to": {{json .data.customer.name}}, "skus": [{{range $i, $e := .data.items}}{{if $i}},{{end}}{{json $e.sku}}{{end}}], "p": {{json .parameters.p}}}`, "parameters": settings{"p": "q"}},
			event: order(), want: `{"to":"Ada \u003cada@example.com\u003e","skus":["a","b"],"p":"q"}`},
		{name: "template text", kind: "template", config: settings{"template": `{{upper .type}} {{.data.order}} {{default "none" .data.nothing}}`, "content_type": "text/plain"}, event: order(), want: "ORDER.CREATED 1001 none", contentType: "text/plain"},
		{name: "template numbers", kind: "template", config: settings{"template": `{{printf "%06d %.2f %s %v %x" .data.order .data.total .data.big .data.vip .data.order}}`, "content_type": "text/plain"}, event: order(), want: "001001 12.50 9007199254740993 true 3e9", contentType: "text/plain"},
		{name: "template drop", kind: "template", config: settings{"template": `{{if .data.vip}}{{drop "vip"}}{{end}}{}`}, event: order(), drop: "vip"},
		{name: "template no JSON", kind: "template", config: settings{"template": `{"a": {{.type}}}`}, event: order(), fail: "not JSON"},
		{name: "pagerduty", kind: "template", config: settings{"ready": "pagerduty"}, event: order(), fail: "routing_key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			made, err := h.Configure(plugintest.Instance{Kind: c.kind, Config: c.config}).Transform(t.Context(), c.event)
			if reason, dropped := plugin.DropReason(err); dropped || c.drop != "" {
				if reason != c.drop || !dropped {
					t.Fatalf("dropped %v for %q, want %q: %v, %+v", dropped, reason, c.drop, err, made)
				}
				return
			}
			if c.fail != "" {
				if f := new(plugin.Failure); !errors.As(err, &f) || f.Code != "transform" || !strings.Contains(f.Message, c.fail) {
					t.Fatalf("%v, %+v, want a failure with %q", err, made, c.fail)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			header := ""
			for _, h := range made.Headers {
				header += h.Value
			}
			want := c.contentType
			if want == "" {
				want = "application/json"
			}
			if string(made.Body) != c.want || made.ContentType != want || header != c.header {
				t.Errorf("%s of %s with %v, want %s", made.Body, made.ContentType, made.Headers, c.want)
			}
		})
	}
}

// hostile scripts loop, take memory, or write without end.
func hostile() map[string]plugintest.Instance {
	js := func(body string) plugintest.Instance {
		return plugintest.Instance{Kind: "javascript", Config: settings{"script": "function transform(event) { " + body + " }"}}
	}
	jq := func(program string) plugintest.Instance {
		return plugintest.Instance{Kind: "jq", Config: settings{"program": program}}
	}
	cel := func(expression string) plugintest.Instance {
		return plugintest.Instance{Kind: "cel", Config: settings{"expression": expression}}
	}
	tmpl := func(text string) plugintest.Instance {
		return plugintest.Instance{Kind: "template", Config: settings{"template": text, "content_type": "text/plain"}}
	}
	list := "[" + strings.Repeat("0,", 99) + "0]"
	return map[string]plugintest.Instance{
		"javascript loops":             js(`for (;;);`),
		"javascript catches and loops": js(`for (;;) { try { for (;;); } catch (e) {} }`),
		"javascript allocates":         js(`const all = []; for (;;) all.push({a: [1, 2, 3], b: "x".repeat(1000) + all.length});`),
		"javascript doubles":           js(`let s = "x"; for (;;) s += s;`),
		"javascript repeats":           js(`return "x".repeat(2 ** 29);`),
		"javascript fills":             js(`return new Array(2 ** 30).fill(0);`),
		"javascript buffers":           js(`return new Uint8Array(2 ** 30);`),
		"javascript goes back":         js(`return /^(?=(a+)+$)b/.test("a".repeat(64) + "!") || /(a+)+\1$/.test("a".repeat(64) + "!");`),
		"javascript writes":            js(`return "x".repeat(300 * 1024);`),
		"jq loops":                     jq(`def f: f; f`),
		"jq allocates":                 jq(`[range(1e12)]`),
		"jq doubles":                   jq(`"x" | until(false; . + .)`),
		"jq repeats":                   jq(`"x" * 1e12`),
		"jq writes":                    jq(`[range(200000)]`),
		"jq refers":                    jq(`reduce range(40) as $i ([1]; [., .])`),
		"jq refers in an error":        jq(`reduce range(40) as $i ([1]; [., .]) | error`),
		"cel doubles":                  cel(`[event.data.customer.name]` + strings.Repeat(`.map(x, x + x)`, 30) + `.size()`),
		"cel loops":                    cel(list + ".map(a, " + list + ".map(b, " + list + ".map(c, " + list + ".map(d, " + list + ".map(e, a + b + c + d + e)))))"),
		"template loops":               tmpl(`{{range 1000000000000}}{{end}}`),
		"template calls":               tmpl(`{{define "a"}}{{range 100000}}{{template "b" $}}{{end}}{{end}}{{define "b"}}{{range 100000}}{{end}}{{end}}{{template "a" .}}`),
		"template doubles":             tmpl(`{{$x := "x"}}{{range 1000}}{{$x = print $x $x}}{{end}}`),
		"template writes":              tmpl(`{{range 1000000}}x{{end}}`),
	}
}

// What a script that loops, takes memory or writes without end costs is its own: it fails, in its time, and a script beside it
// does not.
func TestHostileScripts(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(512 << 20))
	h := scripts(t)
	decent := h.Configure(plugintest.Instance{Kind: "jq", Config: settings{"program": "{order: .data.order}"}})
	for name, in := range hostile() {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			ended := make(chan error, 1)
			script := h.Configure(in)
			go func() {
				made, err := script.Transform(ctx, order())
				if err == nil {
					err = fmt.Errorf("it has made %.100s", made.Body)
				}
				ended <- err
			}()
			for over := false; !over; {
				select {
				case err := <-ended:
					if f := new(plugin.Failure); !errors.As(err, &f) || f.Source != plugin.SourcePlugin {
						t.Errorf("%v, want a failure of its own", err)
					}
					over = true
				default:
				}
				if made, err := decent.Transform(ctx, order()); err != nil || string(made.Body) != `{"order":1001}` {
					t.Fatalf("a script beside it: %v", err)
				}
			}
		})
	}
}

// A config that cannot be run is refused with where it is wrong.
func TestScriptsAreChecked(t *testing.T) {
	h := scripts(t)
	for _, in := range []plugintest.Instance{
		{Kind: "jq", Config: settings{"program": strings.Repeat("1,", 10_000) + "1"}},
		{Kind: "cel", Config: settings{"expression": "[" + strings.Repeat("1,", 10_000) + "1]"}},
		{Kind: "javascript", Config: settings{"script": "function transform() {} " + strings.Repeat("(", 20_000)}},
	} {
		if found := h.Validate(in); len(found) != 1 || !strings.Contains(found[0].Summary, "want at most 16384") {
			t.Errorf("%s of more than 16 KiB: %+v", in.Kind, found)
		}
	}
	for pointer, in := range map[string]plugintest.Instance{
		"/config/program":      {Kind: "jq", Config: settings{"program": "{"}},
		"/config/expression":   {Kind: "cel", Config: settings{"expression": "event.data +"}},
		"/config/script":       {Kind: "javascript", Config: settings{"script": "function other() {}"}},
		"/config/template":     {Kind: "template", Config: settings{"template": "{{end}}"}},
		"/config/content_type": {Kind: "jq", Config: settings{"program": ".", "content_type": "text/plain\r\nx-a: b"}},
		"/config/title":        {Kind: "template", Config: settings{"ready": "slack", "title": "{{"}},
		"/config/ready":        {Kind: "template", Config: settings{"ready": "slack", "template": "x"}},
	} {
		found := h.Validate(in)
		if len(found) != 1 || found[0].Pointer != pointer {
			t.Errorf("%s: %+v", pointer, found)
		}
	}
}

func tenLines() map[string]plugintest.Instance {
	return map[string]plugintest.Instance{
		"cel": {Kind: "cel", Config: settings{"expression": `{
  "text": "Order " + string(event.data.order) + " of " + event.data.customer.name,
  "kind": event.type,
  "region": has(event.attributes.region) ? event.attributes.region : "none",
  "vip": event.data.vip,
  "skus": event.data.items.map(i, i.sku),
  "many": event.data.items.exists(i, i.n > 1),
  "total": event.data.total * 1.19,
  "at": event.time
}`}},
		"jq": {Kind: "jq", Config: settings{"program": `{
  text: "Order \(.data.order) of \(.data.customer.name)",
  kind: .type,
  region: (.attributes.region // "none"),
  vip: .data.vip,
  skus: [.data.items[].sku],
  many: any(.data.items[]; .n > 1),
  total: (.data.total * 1.19),
  at: .time
}`}},
	}
}

// BenchmarkScripts is what a ten-line script takes of a processor, without the protocol.
func BenchmarkScripts(b *testing.B) {
	for _, p := range plugins.Parts() {
		for _, k := range p.Kinds {
			in, ok := tenLines()[k.ID()]
			if !ok {
				continue
			}
			b.Run(k.ID(), func(b *testing.B) {
				config, err := json.Marshal(in.Config)
				if err != nil {
					b.Fatal(err)
				}
				local, err := plugin.OpenLocal(k, config, nil, plugin.Target{})
				if err != nil {
					b.Fatal(err)
				}
				defer local.Close()
				e := order()
				b.ReportAllocs()
				for b.Loop() {
					if _, err := local.Transform(context.Background(), &e); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
