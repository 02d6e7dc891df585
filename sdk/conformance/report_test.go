//go:build unix

package conformance_test

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/conformance"
)

func TestCasesAreNamedOnce(t *testing.T) {
	seen := map[string]bool{}
	groups := map[string]string{
		conformance.GroupHandshake: "HS", conformance.GroupConfig: "CF", conformance.GroupSigner: "SG",
		conformance.GroupTransport: "TR", conformance.GroupTransformer: "TF", conformance.GroupFlow: "FL", conformance.GroupSoak: "SO",
	}
	for _, c := range conformance.Cases() {
		if seen[c.ID] || !regexp.MustCompile(`^[A-Z]{2}-[0-9]{2}$`).MatchString(c.ID) || !strings.HasPrefix(c.ID, groups[c.Group]+"-") {
			t.Errorf("%s in group %s: not of the form, or not the first", c.ID, c.Group)
		}
		if c.Title == "" || c.Protects == "" {
			t.Errorf("%s says not what it promises and protects", c.ID)
		}
		seen[c.ID] = true
	}
}

func TestOnlyPicksCasesAndGroups(t *testing.T) {
	t.Parallel()
	var came []string
	report, err := conformance.Run(t.Context(), conformance.Options{
		Command: self("plugin-raw", "banner"), Only: []string{"hs-03", "SG-01"}, Workers: 1,
	}, func(r conformance.Result) { came = append(came, r.ID) })
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(came, []string{"HS-03", "SG-01"}) || len(report.Results) != 2 || report.Passed() {
		t.Errorf("%v came of %+v", came, report.Results)
	}
	if r := report.Results[0]; r.Outcome != conformance.Failed || !strings.Contains(r.Reproduce, "grapnel plugin test --only HS-03 -- ") {
		t.Errorf("%+v", r)
	}
	if _, err := conformance.Run(t.Context(), conformance.Options{Command: self("plugin-raw", ""), Only: []string{"XX-99"}}, nil); err == nil {
		t.Error("a case that there is not is no error")
	}
}

func TestPluginThatDoesNotStart(t *testing.T) {
	t.Parallel()
	if _, err := conformance.Run(t.Context(), conformance.Options{Command: []string{"no-such-plugin"}}, nil); err == nil {
		t.Error("a command that there is not is no error")
	}
	if _, err := conformance.Describe(t.Context(), self("plugin-raw", "exits")); err == nil || !strings.Contains(err.Error(), "ended before the handshake") {
		t.Errorf("describe: %v", err)
	}
	d, err := conformance.Describe(t.Context(), self("plugin-raw", ""))
	if err != nil || d.GetName() != "raw" {
		t.Errorf("describe: %v, %v", d, err)
	}
}

// A plugin without streams of attempts runs what applies to it.
func TestUnaryPluginPasses(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-raw", "unary"), Fixture: rawFixture()})
	if ids, reasons := failures(report); len(ids) > 0 {
		t.Errorf("failed:%s", reasons)
	}
	for _, line := range skipped(report) {
		if !strings.HasPrefix(line, "FL-") {
			t.Errorf("skipped %s", line)
		}
	}
}

func TestReportsInJSONAndJUnit(t *testing.T) {
	t.Parallel()
	report := run(t, conformance.Options{Command: self("plugin-raw", "banner"), Only: []string{"handshake"}})
	var text bytes.Buffer
	if err := report.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Plugin  struct{ Name string }
		Failed  int
		Results []struct{ ID, Group, Outcome, Detail, Reproduce string }
	}
	if err := json.Unmarshal(text.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Plugin.Name != "raw" || got.Failed != 1 || got.Results[2].ID != "HS-03" || got.Results[2].Outcome != "failed" || got.Results[2].Detail == "" {
		t.Errorf("%s", text.String())
	}
	text.Reset()
	if err := report.WriteJUnit(&text); err != nil {
		t.Fatal(err)
	}
	var suites struct {
		Suites []struct {
			Tests    int `xml:"tests,attr"`
			Failures int `xml:"failures,attr"`
			Cases    []struct {
				Name    string  `xml:"name,attr"`
				Failure *string `xml:"failure"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text.Bytes(), &suites); err != nil {
		t.Fatal(err)
	}
	if len(suites.Suites) != 1 || suites.Suites[0].Failures != 1 || suites.Suites[0].Tests != 13 || suites.Suites[0].Cases[2].Failure == nil {
		t.Errorf("%s", text.String())
	}
}

func TestReadFixture(t *testing.T) {
	f, err := conformance.ReadFixture(strings.NewReader(`{"kinds":{"acme":{"config":{"a":1},"secrets":{"key":"k"},"uri":"x://y",
		"vectors":[{"name":"n","message_id":"m","created":"2026-01-02T03:04:05Z","body":"{}","want":{"h":"v"}}]}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if k := f.Kinds["acme"]; k.URI != "x://y" || len(k.Vectors) != 1 || !k.Vectors[0].Created.Equal(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)) {
		t.Errorf("%+v", f)
	}
	if _, err := conformance.ReadFixture(strings.NewReader(`{"kind":{}}`)); err == nil {
		t.Error("a misspelt field is no error")
	}
}

func TestSoakFindsALeak(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes a while")
	}
	for fault, want := range map[string]conformance.Outcome{"": conformance.Passed, "leaks": conformance.Failed} {
		report := run(t, conformance.Options{Command: self("plugin-raw", fault), Fixture: rawFixture(), Only: []string{"SO-02"}})
		if got := report.Results[0]; got.Outcome != want {
			t.Errorf("fault %q: %s %s", fault, got.Outcome, got.Detail)
		}
	}
}

func TestBench(t *testing.T) {
	t.Parallel()
	report, err := conformance.Bench(t.Context(), conformance.BenchOptions{
		Command: self("plugin-raw", ""), Fixture: rawFixture(), Duration: 200 * time.Millisecond, Window: 64,
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Rows) != 3 {
		t.Fatalf("%+v", report)
	}
	for _, row := range report.Rows {
		if row.Attempts < 10 || row.Failed > 0 || row.Rate <= 0 {
			t.Errorf("%+v", row)
		}
	}
}
