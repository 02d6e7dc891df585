package plugin

import (
	"encoding/json"
	"fmt"
	"go/parser"
	"go/token"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/grapnel/grapnel/internal/redact"
)

type nested struct {
	Size int `json:"size" default:"3" minimum:"1"`
}

type testConfig struct {
	Name   string            `json:"name" required:"true" doc:"What to call it."`
	Mode   string            `json:"mode" default:"fast" enum:"fast,safe"`
	Wait   Duration          `json:"wait" default:"5s" minimum:"1s" maximum:"1m"`
	Ratio  float64           `json:"ratio" minimum:"0" maximum:"1"`
	Tries  uint8             `json:"tries"`
	Tags   []string          `json:"tags"`
	Labels map[string]string `json:"labels"`
	Inner  nested            `json:"inner"`
	Key    Secret            `slot:"key" required:"true"`
	_      int               // not exported, so not part of the schema
}

func decodeTest(t *testing.T, config string) (testConfig, []Problem) {
	t.Helper()
	s, slots, err := schemaOf[testConfig]()
	if err != nil {
		t.Fatal(err)
	}
	return decode[testConfig](s, slots, spec{config: []byte(config), secrets: map[string][][]byte{"key": {[]byte("k")}}}, nil)
}

func TestConfigDefaults(t *testing.T) {
	got, problems := decodeTest(t, `{"name":"n","tags":["a"]}`)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	want := testConfig{Name: "n", Mode: "fast", Wait: Duration(5 * time.Second), Tags: []string{"a"}, Inner: nested{Size: 3}}
	got.Key = Secret{}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(testConfig{}, Secret{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestConfigProblems(t *testing.T) {
	for config, want := range map[string]string{
		`{"nam":"x","name":"n"}`:          `/config/nam config.unknown_field there is no field "nam"; there are name, mode, wait, ratio, tries, tags, labels, inner`,
		`{}`:                              `/config/name config.missing field "name" is missing and required`,
		`{"name":7}`:                      `/config/name config.type given the number 7, want a string`,
		`{"name":"n","mode":"slow"}`:      `/config/mode config.enum given "slow", want one of fast, safe`,
		`{"name":"n","wait":"2m"}`:        `/config/wait config.range given 2m, want at most 1m`,
		`{"name":"n","wait":5}`:           `/config/wait config.type given the number 5, want a duration such as "1m30s"`,
		`{"name":"n","ratio":1.5}`:        `/config/ratio config.range given 1.5, want at most 1`,
		`{"name":"n","tries":-1}`:         `/config/tries config.range given -1, want at least 0`,
		`{"name":"n","tries":1.5}`:        `/config/tries config.type given 1.5, want an integer`,
		`{"name":"n","tries":256}`:        `/config/tries config.type given a JSON number 256 that does not fit uint8`,
		`{"name":"n","tags":["a",null]}`:  `/config/tags/1 config.type given null, want a string`,
		`{"name":"n","labels":{"a/b":1}}`: `/config/labels/a~1b config.type given the number 1, want a string`,
		`{"name":"n","inner":{"size":0}}`: `/config/inner/size config.range given 0, want at least 1`,
		`[]`:                              `/config config.type given an array, want an object`,
		`{"name":"n"`:                     `/config config.syntax the config is not JSON: unexpected EOF`,
		`{"name":"n"} {}`:                 `/config config.syntax the config is not JSON: there is text after the value`,
	} {
		_, problems := decodeTest(t, config)
		if len(problems) != 1 {
			t.Errorf("%s: %v", config, problems)
			continue
		}
		p := problems[0]
		if got := p.Pointer + " " + p.Code + " " + p.Summary; got != want {
			t.Errorf("%s:\n got %s\nwant %s", config, got, want)
		}
	}
}

func TestSchemaAgreesWithDecode(t *testing.T) {
	s, _, err := schemaOf[testConfig]()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := s.document()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jsonschema.UnmarshalJSON(strings.NewReader(string(doc)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("s.json", parsed); err != nil {
		t.Fatal(err)
	}
	compiled, err := c.Compile("s.json")
	if err != nil {
		t.Fatal(err)
	}
	for config, valid := range map[string]bool{
		`{"name":"n"}`: true, `{"name":"n","wait":"1h30m"}`: true, `{"name":"n","labels":{"a":"b"}}`: true,
		`{}`: false, `{"name":"n","x":1}`: false, `{"name":"n","mode":"no"}`: false, `{"name":"n","wait":"5"}`: false,
		`{"name":"n","tries":-1}`: false, `{"name":"n","inner":{"y":1}}`: false,
	} {
		var v any
		if err := json.Unmarshal([]byte(config), &v); err != nil {
			t.Fatal(err)
		}
		if err := compiled.Validate(v); (err == nil) != valid {
			t.Errorf("%s: %v", config, err)
		}
	}
}

func TestBadDeclarations(t *testing.T) {
	type bad struct {
		C chan int `json:"c"`
	}
	type badDefault struct {
		N int `json:"n" default:"x"`
	}
	build := func(any, Target) (SignFunc, error) { return nil, nil }
	for want, k := range map[string]Kind{
		"must match":         Signer("Bad_ID", func(struct{}, Target) (SignFunc, error) { return nil, nil }),
		"has no JSON Schema": Signer("a", func(c bad, t Target) (SignFunc, error) { return build(c, t) }),
		`default "x"`:        Signer("a", func(c badDefault, t Target) (SignFunc, error) { return build(c, t) }),
		"option Check takes": Signer("a", func(struct{}, Target) (SignFunc, error) { return nil, nil }, Check(func(testConfig, Target) []Problem { return nil })),
	} {
		if _, err := newServer("n", "v", []Kind{k}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if _, err := newServer("n", "v", nil); err == nil {
		t.Error("a plugin without kinds is taken")
	}
}

func TestSecretNeverShows(t *testing.T) {
	s := NewSecret("canary")
	holder := struct{ S Secret }{s}
	j, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("m", "s", s, "h", holder)
	for _, text := range []string{
		fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q %x %d", s, s, s, s, s, s, s), fmt.Sprintf("%+v %#v", holder, holder),
		fmt.Sprintf("%v", &holder), string(j), logged.String(),
	} {
		if strings.Contains(text, "canary") || strings.Contains(text, "99 97") || strings.Contains(text, "63616e") {
			t.Errorf("shows: %s", text)
		}
	}
	if got := redact.Text("with canary-key inside, or MfKQ9r8GKYqrTw", [][]byte{[]byte("canary-key"), []byte("whsec_MfKQ9r8GKYqrTw")}); got != "with [redacted] inside, or [redacted]" {
		t.Error(got)
	}
}

func TestRequestHeaders(t *testing.T) {
	r := &Request{Headers: []Header{{"a", "1"}, {"b", "2"}, {"a", "3"}}}
	r.Set("A", "9")
	r.Add("X-Y", "z")
	if diff := cmp.Diff([]Header{{"a", "9"}, {"b", "2"}, {"x-y", "z"}}, r.Headers); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if r.Get("B") != "2" || r.Get("none") != "" {
		t.Error("Get")
	}
}

type boundedConfig struct {
	Code  string            `json:"code" minLength:"2" maxLength:"4" pattern:"^[a-zé]+$"`
	Hook  string            `json:"hook" format:"uri"`
	When  string            `json:"when" format:"date-time"`
	Mail  string            `json:"mail" format:"email"`
	Host  string            `json:"host" format:"hostname"`
	Four  string            `json:"four" format:"ipv4"`
	Six   string            `json:"six" format:"ipv6"`
	Sizes []int             `json:"sizes" minItems:"1" maxItems:"2" minimum:"3"`
	Modes []string          `json:"modes" enum:"a,b"`
	Names map[string]string `json:"names" maxLength:"3"`
}

func decodeBounded(t *testing.T, config string) []Problem {
	t.Helper()
	s, slots, err := schemaOf[boundedConfig]()
	if err != nil {
		t.Fatal(err)
	}
	_, problems := decode[boundedConfig](s, slots, spec{config: []byte(config)}, nil)
	return problems
}

func TestConfigBounds(t *testing.T) {
	for config, want := range map[string]string{
		`{"code":"a"}`:           `/config/code config.length given 1 characters, want at least 2`,
		`{"code":"ééééé"}`:       `/config/code config.length given 5 characters, want at most 4`,
		`{"code":"a1"}`:          `/config/code config.pattern given "a1", want text that matches ^[a-zé]+$`,
		`{"hook":"/path"}`:       `/config/hook config.format given "/path", want uri: such as https://example.com/path`,
		`{"when":"today"}`:       `/config/when config.format given "today", want date-time: such as 2026-01-02T15:04:05Z`,
		`{"mail":"A <a@b.c>"}`:   `/config/mail config.format given "A <a@b.c>", want email: such as events@example.com`,
		`{"host":"a..b"}`:        `/config/host config.format given "a..b", want hostname: such as events.example.com`,
		`{"four":"::1"}`:         `/config/four config.format given "::1", want ipv4: such as 192.0.2.1`,
		`{"six":"fe80::1%eth0"}`: `/config/six config.format given "fe80::1%eth0", want ipv6: such as 2001:db8::1`,
		`{"sizes":[]}`:           `/config/sizes config.length given 0 elements, want at least 1`,
		`{"sizes":[3,4,5]}`:      `/config/sizes config.length given 3 elements, want at most 2`,
		`{"sizes":[2]}`:          `/config/sizes/0 config.range given 2, want at least 3`,
		`{"modes":["a","c"]}`:    `/config/modes/1 config.enum given "c", want one of a, b`,
		`{"names":{"x":"long"}}`: `/config/names/x config.length given 4 characters, want at most 3`,
	} {
		problems := decodeBounded(t, config)
		if len(problems) != 1 {
			t.Errorf("%s: %v", config, problems)
			continue
		}
		p := problems[0]
		if got := p.Pointer + " " + p.Code + " " + p.Summary; got != want {
			t.Errorf("%s:\n got %s\nwant %s", config, got, want)
		}
	}
	good := `{"code":"éé","hook":"https://a.b/c","when":"2026-01-02T15:04:05Z","mail":"a@b.c","host":"a-1.b","four":"192.0.2.1","six":"2001:db8::1","sizes":[3,9],"modes":["b"],"names":{"x":"abc"}}`
	if problems := decodeBounded(t, good); len(problems) > 0 {
		t.Error(problems)
	}
}

// TestBoundsInTheSchema: what the kit refuses a validator of JSON Schema refuses too, by the document alone.
func TestBoundsInTheSchema(t *testing.T) {
	s, _, err := schemaOf[boundedConfig]()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := s.document()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jsonschema.UnmarshalJSON(strings.NewReader(string(doc)))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	if err := c.AddResource("schema.json", parsed); err != nil {
		t.Fatal(err)
	}
	compiled, err := c.Compile("schema.json")
	if err != nil {
		t.Fatal(err)
	}
	for config, good := range map[string]bool{
		`{}`: true, `{"code":"ab"}`: true, `{"code":"a"}`: false, `{"code":"a1"}`: false, `{"hook":"/path"}`: false, `{"sizes":[]}`: false,
		`{"sizes":[3,4,5]}`: false, `{"sizes":[2]}`: false, `{"modes":["c"]}`: false, `{"names":{"x":"long"}}`: false,
	} {
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(config))
		if err != nil {
			t.Fatal(err)
		}
		if err := compiled.Validate(v); (err == nil) != good {
			t.Errorf("%s: %v", config, err)
		}
		if problems := decodeBounded(t, config); (len(problems) == 0) != good {
			t.Errorf("%s: %v", config, problems)
		}
	}
}

func TestTagsThatDoNotFitAreRefused(t *testing.T) {
	for want, kind := range map[string]Kind{
		"pattern and format are for strings": Signer("k", nilSigner[struct {
			N int `json:"n" pattern:"x"`
		}]),
		`format "url": want one of date-time`: Signer("k", nilSigner[struct {
			S string `json:"s" format:"url"`
		}]),
		"want a number, 0 or more, of a string": Signer("k", nilSigner[struct {
			N int `json:"n" minLength:"1"`
		}]),
		"want a number, 0 or more, of an array": Signer("k", nilSigner[struct {
			S string `json:"s" maxItems:"1"`
		}]),
		"a string has none": Signer("k", nilSigner[struct {
			S string `json:"s" minimum:"1"`
		}]),
		"missing closing": Signer("k", nilSigner[struct {
			S string `json:"s" pattern:"(x"`
		}]),
	} {
		if kind.err == nil || !strings.Contains(kind.err.Error(), want) {
			t.Errorf("%v, want %q in it", kind.err, want)
		}
	}
}

func nilSigner[C any](C, Target) (SignFunc, error) { return nil, nil }

// TestExampleMayBeAConfigStruct: what Example documents.
func TestExampleMayBeAConfigStruct(t *testing.T) {
	for want, example := range map[string]any{
		`{"name":"n"}`:                        testConfig{Name: "n", Key: NewSecret("secret")},
		`{"mode":"safe","name":"n"}`:          &testConfig{Name: "n", Mode: "safe"},
		`{"inner":{"size":7},"name":""}`:      testConfig{Inner: nested{Size: 7}},
		`{"name":"n","tries":0,"wait":"10s"}`: map[string]any{"name": "n", "tries": 0, "wait": "10s"},
	} {
		k := Signer("k", nilSigner[testConfig], Example(example))
		if k.err != nil || string(k.example) != want {
			t.Errorf("%s: %v, want %s", k.example, k.err, want)
		}
	}
	k := Signer("k", nilSigner[testConfig], Example(map[string]any{"name": "n", "mode": "slow"}))
	if k.err == nil || !strings.Contains(k.err.Error(), `kind "k": the example: /config/mode: given "slow", want one of fast, safe`) {
		t.Errorf("an example that does not pass: %v", k.err)
	}
}

// TestEveryTagIsDocumented: the tags that the kit reads stand in the package comment and in the authors' page.
func TestEveryTagIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), "plugin.go", nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("schema.go")
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`[tT]ag\.(?:Get|Lookup)\("(\w+)"\)`).FindAllStringSubmatch(string(source), -1)
	if len(found) < 10 {
		t.Fatalf("%d tags found", len(found))
	}
	for _, m := range found {
		if tag := m[1]; tag != "json" {
			if !strings.Contains(string(page), "`"+tag+"`") {
				t.Errorf("docs/plugins.md does not explain the tag `%s`", tag)
			}
			if !regexp.MustCompile(`(?m)^\t.*\b` + tag + `\b`).MatchString(file.Doc.Text()) {
				t.Errorf("the package comment does not explain the tag %s", tag)
			}
		}
	}
}
