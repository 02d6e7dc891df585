package templateplugin_test

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/grapnel/grapnel/plugins/internal/script"
	templateplugin "github.com/grapnel/grapnel/plugins/template"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// TestReadyMessages holds the messages that come with the kind against what the receivers' documentation says they take, which
// testdata has as schemas, for events that are usual, empty, long, and full of what means something in JSON or markup.
func TestReadyMessages(t *testing.T) {
	h := plugintest.New(t, templateplugin.Kind(script.NewGuard()))
	nasty := "\"}]\\ <!channel> & </b> @everyone *x* \u2028\u0000 ☃"
	events := map[string]plugin.Event{
		"usual": {ID: "o-1", Source: "//shop", Type: "order.created", Subject: "orders/1", Time: time.Now(), Data: []byte(`{"order":1001,"items":[1,2]}`)},
		"empty": {ID: "1", Source: "a", Type: "t"},
		"long": {
			ID: strings.Repeat("i", 1000), Source: strings.Repeat("s", 1000), Type: strings.Repeat("t", 128), Subject: strings.Repeat("ü", 1000),
			Time: time.Now(), Data: []byte(`"` + strings.Repeat("<", 100_000) + `"`),
		},
		"nasty": {ID: nasty, Source: nasty, Type: nasty, Subject: nasty, Data: []byte(nasty), ContentType: "text/plain"},
	}
	for _, name := range []string{"slack", "teams", "discord", "pagerduty"} {
		schema, err := jsonschema.NewCompiler().Compile("testdata/" + name + ".schema.json")
		if err != nil {
			t.Fatal(err)
		}
		in := plugintest.Instance{Kind: "template", Config: map[string]any{"ready": name}}
		if name == "pagerduty" {
			in.Secrets = map[string][]string{"routing_key": {"0123456789abcdef0123456789abcdef"}}
		}
		configured := h.Configure(in)
		for what, e := range events {
			made, err := configured.Transform(t.Context(), e)
			if err != nil {
				t.Errorf("%s, %s: %v", name, what, err)
				continue
			}
			var shown struct{ Text string }
			if err := json.Unmarshal(made.Body, &shown); name == "slack" && (err != nil || strings.Contains(shown.Text, "<!")) {
				t.Errorf("%s calls a channel: %q, %v", what, shown.Text, err)
			}
			body, err := jsonschema.UnmarshalJSON(bytes.NewReader(made.Body))
			if err == nil {
				err = schema.Validate(body)
			}
			if err != nil || !utf8.Valid(made.Body) {
				t.Errorf("%s, %s: %v: %.2000s", name, what, err, made.Body)
			}
		}
		// The checker does find what is wrong.
		if err := schema.Validate(map[string]any{"message": "text"}); err == nil {
			t.Errorf("%s takes anything", name)
		}
	}
	if files, err := os.ReadDir("ready"); err != nil || len(files) != 4 {
		t.Errorf("%d messages, of which 4 are tested: %v", len(files), err)
	}
}
