//go:build unix

package conformance_test

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/internal/required"
	"github.com/grapnel/grapnel/plugins"
	"github.com/grapnel/grapnel/sdk/conformance"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// TestMain turns the test binary into a plugin when its first argument says so.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "plugin-bundled":
			plugin.Main("grapnel", "0.0.0", plugins.Kinds()...)
		case "plugin-local":
			plugin.Main("local", "0.0.0", sockKind(), queueKind())
		case "bridge":
			bridge(os.Args[2], os.Args[3])
		case "consume":
			consume(os.Args[2], os.Args[3])
		case "plugin-raw":
			serveRaw(os.Args[2])
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

func self(args ...string) []string { return append([]string{os.Args[0]}, args...) }

// rawFixture has what Describe cannot tell of the raw plugin.
func rawFixture() *conformance.Fixture {
	return &conformance.Fixture{Kinds: map[string]conformance.KindFixture{
		"raw-mem": {URI: "raw-mem://anything"},
		"raw-transform": {
			Events: []conformance.EventFixture{
				{Name: "an order", Type: "order.created", Data: []byte(`{"order": 1001}`), Want: &conformance.WantFixture{
					JSON:        []byte(`{"label":"x","type":"order.created","data":{"order":1001}}`),
					ContentType: "application/vnd.raw+json", Headers: map[string]string{"x-raw-label": "x"},
				}},
				{Name: "nothing", Want: &conformance.WantFixture{Dropped: "nothing in it"}},
				{Name: "no JSON", DataBase64: []byte("a=b"), Want: &conformance.WantFixture{Failure: "no JSON"}},
				{Name: "as text", Config: []byte(`{"label":"y"}`), Data: []byte(`1`), Want: &conformance.WantFixture{Text: `{"label":"y","type":"conformance.test","data":1}`}},
			},
			Slow: &conformance.SlowFixture{Config: []byte(`{"label":"slow"}`)},
		},
		"raw-sign": {Vectors: []conformance.Vector{{
			Name: "one", MessageID: "evt_vector", Created: time.Unix(1614265330, 0), Body: "{}",
			Secrets: map[string]string{"key": "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},
			Want:    map[string]string{"x-raw-signature": "fdbf03a3f21e936ad96061855f88d9ed7c6d187b677aa63c42047501f3818fef"},
		}}},
	}}
}

func run(t *testing.T, o conformance.Options) *conformance.Report {
	t.Helper()
	report, err := conformance.Run(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// failures are the cases that did not pass, with the reasons.
func failures(r *conformance.Report) (ids []string, reasons string) {
	for _, res := range r.Results {
		if res.Outcome == conformance.Failed {
			ids = append(ids, res.ID)
			reasons += "\n" + res.ID + " " + res.Title + ": " + res.Detail
		}
	}
	return ids, reasons
}

func skipped(r *conformance.Report) []string {
	var out []string
	for _, res := range r.Results {
		if res.Outcome == conformance.Skipped {
			out = append(out, res.ID+": "+res.Detail)
		}
	}
	return out
}

func TestPluginWithoutAFaultPasses(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-raw", ""), Fixture: rawFixture()})
	if ids, reasons := failures(report); len(ids) > 0 {
		t.Errorf("failed:%s", reasons)
	}
	if diff := cmp.Diff([]string(nil), skipped(report)); diff != "" {
		t.Errorf("skipped (-want +got):\n%s", diff)
	}
	t.Logf("%d cases in %v", len(report.Results), report.Duration)
}

func TestBundledPluginPasses(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-bundled"), Fixture: &conformance.Fixture{Kinds: map[string]conformance.KindFixture{
		"javascript": {Slow: &conformance.SlowFixture{Config: []byte(`{"script": "function transform(event) { for (;;); }"}`)}},
		"jq": {Events: []conformance.EventFixture{{Type: "order.created", Data: []byte(`{"order": 1001}`), Want: &conformance.WantFixture{
			JSON: []byte(`{"text": "Order 1001 is order.created"}`),
		}}}},
	}}})
	if ids, reasons := failures(report); len(ids) > 0 {
		t.Errorf("failed:%s", reasons)
	}
	t.Logf("%d cases in %v, skipped:\n%s", len(report.Results), report.Duration, strings.Join(skipped(report), "\n"))
}

func TestExamplePluginPasses(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(t.TempDir(), "example")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".")
	build.Dir = "../../plugins/example"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the example: %v\n%s", err, out)
	}
	report := run(t, conformance.Options{Command: []string{binary}})
	if ids, reasons := failures(report); len(ids) > 0 {
		t.Errorf("failed:%s", reasons)
	}
	t.Logf("%d cases in %v, skipped:\n%s", len(report.Results), report.Duration, strings.Join(skipped(report), "\n"))
}

var allLanguages = flag.Bool("languages.all", false, "the examples in Python, JavaScript and Ruby, too, whose processes take their time to start: minutes")

// TestPluginsInOtherLanguagesPass runs the suite on the examples in Python, JavaScript and Ruby. It needs
// those. The guide's test, in cmd/grapnel, has it run on new plugins with the same runtimes.
func TestPluginsInOtherLanguagesPass(t *testing.T) {
	if !*allLanguages {
		t.Skip("set -languages.all")
	}
	t.Parallel()
	for language, installed := range map[string]func() error{
		"python": func() error { return exec.Command("/usr/bin/python3", "-c", "import grpc, google.protobuf").Run() },
		"ruby":   func() error { return exec.Command("ruby", "-e", "require 'grpc'; require 'google/protobuf'").Run() },
		"node": func() error {
			_, noNode := exec.LookPath("node")
			_, noModules := os.Stat("../../plugins/example-node/node_modules")
			return errors.Join(noNode, noModules)
		},
	} {
		t.Run(language, func(t *testing.T) { // one after another: each asks for all of a small machine
			required.Tool(t, language, installed(), "see CONTRIBUTING.md")
			report := run(t, conformance.Options{Command: []string{"../../plugins/example-" + language + "/plugin"}})
			if ids, reasons := failures(report); len(ids) > 0 {
				t.Errorf("failed:%s", reasons)
			}
			if n := report.Count(conformance.Passed); n < 90 {
				t.Errorf("only %d cases applied, skipped:\n%s", n, strings.Join(skipped(report), "\n"))
			}
		})
	}
}
