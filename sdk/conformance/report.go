package conformance

import (
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Report is what came of a run.
type Report struct {
	Command []string
	// Plugin is what it says about itself; nil when it did not come up.
	Plugin  *pluginv1.DescribeResponse
	Results []Result
	// Notes say what could not be tested, one line each.
	Notes []string
	// Duration of the whole run.
	Duration time.Duration
}

// Passed reports whether no case failed. A run that skipped everything has not passed.
func (r *Report) Passed() bool {
	return r.Count(Failed) == 0 && r.Count(Passed) > 0
}

// Count is how many cases ended so.
func (r *Report) Count(o Outcome) int {
	n := 0
	for i := range r.Results {
		if r.Results[i].Outcome == o {
			n++
		}
	}
	return n
}

// WriteJSON writes the report as one JSON object: command, plugin (Describe's answer as protojson),
// passed, failed, skipped, duration_ns, notes and results.
func (r *Report) WriteJSON(w io.Writer) error {
	out := struct {
		Command  []string        `json:"command"`
		Plugin   json.RawMessage `json:"plugin,omitempty"`
		Passed   int             `json:"passed"`
		Failed   int             `json:"failed"`
		Skipped  int             `json:"skipped"`
		Duration time.Duration   `json:"duration_ns"`
		Notes    []string        `json:"notes,omitempty"`
		Results  []Result        `json:"results"`
	}{
		Command: r.Command, Passed: r.Count(Passed), Failed: r.Count(Failed), Skipped: r.Count(Skipped),
		Duration: r.Duration, Notes: r.Notes, Results: r.Results,
	}
	if r.Plugin != nil {
		text, err := protojson.Marshal(r.Plugin)
		if err != nil {
			return fmt.Errorf("write what the plugin describes: %w", err)
		}
		out.Plugin = text
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(out)
}

type junitSuites struct {
	XMLName xml.Name     `xml:"testsuites"`
	Suites  []junitSuite `xml:"testsuite"`
}

type junitSuite struct {
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Skipped  int         `xml:"skipped,attr"`
	Time     string      `xml:"time,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Class   string        `xml:"classname,attr"`
	Name    string        `xml:"name,attr"`
	Time    string        `xml:"time,attr"`
	Failure *junitMessage `xml:"failure"`
	Skipped *junitMessage `xml:"skipped"`
}

type junitMessage struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

// WriteJUnit writes the report as JUnit XML: a test suite per group, a test case per case.
func (r *Report) WriteJUnit(w io.Writer) error {
	plugin := r.Plugin.GetName()
	if plugin == "" {
		plugin = "plugin"
	}
	var out junitSuites
	var took []time.Duration
	at := map[string]int{}
	for _, res := range r.Results {
		i, ok := at[res.Group]
		if !ok {
			i = len(out.Suites)
			at[res.Group] = i
			out.Suites, took = append(out.Suites, junitSuite{Name: plugin + "." + res.Group}), append(took, 0)
		}
		suite := &out.Suites[i]
		c := junitCase{Class: plugin + "." + res.Group, Name: res.ID + " " + res.Title, Time: seconds(res.Duration)}
		switch res.Outcome {
		case Failed:
			suite.Failures++
			c.Failure = &junitMessage{Message: firstLine(res.Detail), Text: fmt.Sprintf("%s\nprotects: %s\n%s\n", res.Detail, res.Protects, res.Reproduce)}
		case Skipped:
			suite.Skipped++
			c.Skipped = &junitMessage{Message: res.Detail}
		}
		suite.Tests++
		took[i] += res.Duration
		suite.Time = seconds(took[i])
		suite.Cases = append(suite.Cases, c)
	}
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	enc := xml.NewEncoder(w)
	enc.Indent("", "  ")
	if err := enc.Encode(out); err != nil {
		return fmt.Errorf("write junit: %w", err)
	}
	_, err := io.WriteString(w, "\n")
	return err
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.3f", d.Seconds()) }

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
