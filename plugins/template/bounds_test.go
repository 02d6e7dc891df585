package templateplugin_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/script"
	templateplugin "github.com/grapnel/grapnel/plugins/template"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// write has a template write the body for an event with this payload.
func write(t *testing.T, config map[string]any, payload string) (string, error) {
	t.Helper()
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	local, err := plugin.OpenLocal(templateplugin.Kind(script.NewGuard()), text, nil, plugin.Target{})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	made, err := local.Transform(context.Background(), &plugin.Event{ID: "1", Type: "t", Time: time.Now(), Data: []byte(payload)})
	if err != nil {
		return "", err
	}
	return string(made.Body), nil
}

// TestPretty: it is what the library writes, for people, and not much larger than it is in one line, however deep.
func TestPretty(t *testing.T) {
	for _, payload := range []string{`{}`, `[]`, `[[],{},[{}]]`, `{"a":[1,"]}[{,:\"",{"b":null}],"c":"<&>\\"}`, `"text"`, `12.50`, `{"a":{"b":[[1,2],[[3]]]}}`} {
		var v any
		d := json.NewDecoder(strings.NewReader(payload))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			t.Fatal(err)
		}
		var want strings.Builder
		e := json.NewEncoder(&want)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		if err := e.Encode(v); err != nil {
			t.Fatal(err)
		}
		if got, err := write(t, map[string]any{"template": "{{pretty .data}}", "content_type": "text/plain"}, payload); err != nil || got+"\n" != want.String() {
			t.Errorf("%s: %v, %v", payload, got, err)
		}
	}
	deep := strings.Repeat("[", 5000) + strings.Repeat("1,", 20_000) + "1" + strings.Repeat("]", 5000)
	for _, name := range []string{"slack", "teams", "discord"} {
		if got, err := write(t, map[string]any{"ready": name}, deep); err != nil || !strings.Contains(got, strings.Repeat("[", 2000)) {
			t.Errorf("%s of an event of %d bytes: %v", name, len(deep), err)
		}
	}
}

// TestTemplatesAreBounded: what would take time or memory without a loop ends, too, and is not made first.
func TestTemplatesAreBounded(t *testing.T) {
	large := `"` + strings.Repeat("x", 1<<20) + `"`
	for name, c := range map[string]struct{ template, payload, want string }{
		"recursion":   {`{{define "a"}}{{range 3}}{{template "a" .}}{{end}}{{end}}{{template "a" .}}`, `1`, "more than 100 deep"},
		"arguments":   {`{{$x := print` + strings.Repeat(" .data", 10_000) + `}}`, large, "a function has made more"},
		"escapes":     {`{{$x := urlquery` + strings.Repeat(" .data", 1000) + `}}`, large, "a function has made more"},
		"widths":      {`{{$x := printf "` + strings.Repeat("%999999d", 5000) + `"` + strings.Repeat(" 1", 5000) + `}}`, `1`, "a function has made more"},
		"indexes":     {`{{$x := printf "` + strings.Repeat("%[1]s", 5000) + `" .data}}`, large, "a function has made more"},
		"pipes":       {`{{$x := .data` + strings.Repeat("|upper", 9000) + `}}`, large, "timeout"},
		"actions":     {strings.Repeat(`{{$x := upper .data}}`, 3000), large, "timeout"},
		"conditions":  {strings.Repeat(`{{if upper .data}}{{end}}`, 2500), large, "timeout"},
		"no template": {`{{range 3}}{{template "b" .}}{{end}}{{define "b"}}b{{end}}`, `1`, ""},
	} {
		got, err := write(t, map[string]any{"template": c.template, "content_type": "text/plain"}, c.payload)
		if c.want == "" && (err != nil || got != "bbb") || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) && !strings.Contains(err.Error(), "timeout")) {
			t.Errorf("%s: %.100q, %v, want %s", name, got, err, c.want)
		}
	}
}
