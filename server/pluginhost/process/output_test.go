package process_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/pluginhost/process"
)

func TestWhatIsKeptOfTheOutput(t *testing.T) {
	write := func(lines ...string) *process.Output {
		out := process.NewOutput(func(line string) string { return line }, func(string, int) {})
		_, _ = out.Writer().Write([]byte(strings.Join(append(lines, ""), "\n")))
		return out
	}
	many := strings.Split(strings.Repeat("line,", 40), ",")
	for name, tt := range map[string]struct {
		lines []string
		brief string
		last  []string
	}{
		"nothing":      {nil, "", nil},
		"a few lines":  {[]string{"a", "", "b\r", "\x1b[31mred"}, "a; b; \uFFFD[31mred", []string{"a", "b", "\uFFFD[31mred"}},
		"the last":     {append(many, "1", "2", "3", "4", "5"), "1; 2; 3; 4; 5", append(many[:15:15], "1", "2", "3", "4", "5")},
		"invalid text": {[]string{"\xff\xfe"}, "\uFFFD", []string{"\uFFFD"}},
		"a panic": {
			[]string{"ready", "panic: boom", "[signal SIGSEGV]", "goroutine 7 [running]:", "main.f()", "\t/f.go:1", "goroutine 8 [select]:", "main.g()"},
			"panic: boom; [signal SIGSEGV]",
			[]string{"ready", "panic: boom", "[signal SIGSEGV]", "goroutine 7 [running]:", "main.f()", "\t/f.go:1"},
		},
		"a hang": {
			[]string{
				"stuck?", "SIGQUIT: quit", "PC=0x1", "goroutine 1 [select]:", "main.main()",
				"goroutine 7 [select]:", "google.golang.org/grpc.x()", "github.com/grapnel/grapnel/sdk/plugin.(*server).run(0x1)",
				"goroutine 8 [chan receive]:", "example.com/acme.(*signer).wait(...)", "github.com/grapnel/grapnel/sdk/plugin.(*server).run(0x1)",
			},
			"stuck?",
			[]string{"stuck?", "SIGQUIT: quit", "goroutine 8 [chan receive]:", "example.com/acme.(*signer).wait(...)", "github.com/grapnel/grapnel/sdk/plugin.(*server).run(0x1)"},
		},
		"a report cut off": {[]string{"fatal error: x"}, "fatal error: x", []string{"fatal error: x"}},
	} {
		t.Run(name, func(t *testing.T) {
			out := write(tt.lines...)
			if got := out.Brief(); got != tt.brief {
				t.Errorf("brief %q, want %q", got, tt.brief)
			}
			if diff := cmp.Diff(tt.last, out.Last()); diff != "" {
				t.Errorf("last (-want +got):\n%s", diff)
			}
		})
	}
}
