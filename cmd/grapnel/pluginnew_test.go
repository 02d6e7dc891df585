package main

import (
	"path/filepath"
	"runtime"
	"testing"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// TestScaffoldsInRuby holds those that the guide does not run against the heart of the suite: what they say about themselves,
// and that they sign and send.
func TestScaffoldsInRuby(t *testing.T) {
	if testing.Short() || runtime.GOOS == "windows" {
		t.Skip("starts plugins")
	}
	needsLanguage(t, "Ruby")
	for kind, cases := range map[string][]string{"signer": {"CF-03", "CF-04", "CF-25", "SG-01"}, "transport": {"CF-03", "CF-04", "TR-01", "TR-20"}} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			p := &project{Kind: kind, language: "ruby"}
			if err := p.check(filepath.Join(t.TempDir(), "ruby-"+kind)); err != nil {
				t.Fatal(err)
			}
			if err := p.write(); err != nil {
				t.Fatal(err)
			}
			report, err := conformance.Run(t.Context(), conformance.Options{Command: []string{p.dir}, Only: cases}, nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range report.Results {
				if r.Outcome != conformance.Passed {
					t.Errorf("%s %s: %s", r.ID, r.Outcome, r.Detail)
				}
			}
		})
	}
}
