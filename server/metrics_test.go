package server_test

import (
	"io"
	"net/http"
	"os"
	"regexp"
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
