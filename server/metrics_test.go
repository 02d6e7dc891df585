package server_test

import (
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/servertest"
)

// TestMetricsAreDocumented holds what a live server exports against the page for operators.
func TestMetricsAreDocumented(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	exported := metrics(t, s)
	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`(?m)^# HELP (grapnel_\w+)`).FindAllStringSubmatch(exported, -1)
	if len(names) < 20 {
		t.Fatalf("only %d metrics are exported", len(names))
	}
	for _, n := range names {
		if !strings.Contains(string(page), "`"+n[1]+"`") {
			t.Errorf("%s is not on docs/operations.md", n[1])
		}
	}
}

// TestRulesAndDashboardAskForWhatThereIs: every metric that deploy names is one that the server has, and so is every label by
// which it selects or groups, of those that are exported from the start.
func TestRulesAndDashboardAskForWhatThereIs(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{} // of each metric, as they are exported
	for _, line := range regexp.MustCompile(`(?m)^(grapnel_\w+)(\{.*\})? `).FindAllStringSubmatch(metrics(t, s), -1) {
		labels[line[1]] += line[2] + `,instance="x"`
	}
	for _, file := range []string{"../deploy/grafana/grapnel.json", "../deploy/prometheus/alerts.yml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		queries := regexp.MustCompile(`(?m)"?expr"?: (.*)$`).FindAllStringSubmatch(strings.ReplaceAll(string(text), `\"`, `"`), -1)
		if len(queries) < 10 {
			t.Errorf("%s has %d queries", file, len(queries))
		}
		for _, q := range queries {
			names := regexp.MustCompile(`grapnel_\w+`).FindAllString(q[1], -1)
			if len(names) == 0 {
				t.Errorf("%s: %s asks for nothing of ours", file, q[1])
			}
			known := ""
			for _, name := range names {
				if labels[name] == "" && !strings.Contains(string(page), "`"+name+"`") {
					t.Errorf("%s asks for %s, which there is not", file, name)
				}
				known += labels[name]
			}
			for _, by := range regexp.MustCompile(`by \(([^)]*)\)|[{,](\w+)(?:=|!=|=~)"`).FindAllStringSubmatch(q[1], -1) {
				for _, label := range strings.FieldsFunc(by[1]+by[2], func(r rune) bool { return r == ',' || r == ' ' }) {
					if known != "" && !strings.Contains(known, label+`="`) {
						t.Errorf("%s: %s: none of its metrics has the label %s", file, q[1], label)
					}
				}
			}
		}
	}
}

// TestPhasesOfAttempts: each phase that there was is told, by what happened where, and those that there were not are not.
func TestPhasesOfAttempts(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	receiver := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	s.Subscribe("acme", "plain", receiver.URL, nil)
	s.Subscribe("acme", "made", receiver.URL, transformedBy(t, "jq", map[string]any{"program": "."}))
	s.Publish("acme", "o-1", "order.created", []byte(`{"order":1001}`))
	servertest.Await(t, "both deliveries", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 2 })
	exported := metrics(t, s)
	for phase, most := range map[string]int{"queue": 2, "transform": 1, "sign": 2, "dns": 0, "connect": 2, "tls": 0, "first_byte": 2, "body": 2} {
		n, least := -1, min(most, 1)
		if m := regexp.MustCompile(`(?m)^grapnel_attempt_phase_seconds_count\{phase="` + phase + `"\} (\d+)$`).FindStringSubmatch(exported); m != nil {
			n, _ = strconv.Atoi(m[1])
		}
		if n < least || n > most {
			t.Errorf("phase %s was noted %d times, want %d to %d", phase, n, least, most)
		}
	}
}

// metrics is what the server exports.
func metrics(t *testing.T, s *servertest.Server) string {
	t.Helper()
	resp, err := http.Get("http://" + s.AdminAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
