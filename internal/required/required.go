// Package required is for tests that need a tool which not every machine has: a language, a web server. Such a test is
// skipped where the tool is missing, unless the environment says that it is to be there, as CI does.
package required

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// variable lists what must not be missing, with commas between.
const variable = "GRAPNEL_REQUIRE"

// Named reports whether a tool is to be there.
func Named(tool string) bool {
	return slices.Contains(strings.Split(os.Getenv(variable), ","), tool)
}

// Tool ends the test when missing, what came of looking for the tool, is not nil: as skipped, or as failed where the tool
// is Named. how says what to do about it.
func Tool(t testing.TB, tool string, missing error, how string) {
	t.Helper()
	switch {
	case missing == nil:
	case Named(tool):
		t.Fatalf("%s: %v; %s", tool, missing, how)
	default:
		t.Skipf("%s: %v; %s", tool, missing, how)
	}
}
