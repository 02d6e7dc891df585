package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
)

// hostile are bytes that a stranger may send, and how they are shown.
func hostile() map[string]string {
	return map[string]string{
		"\x1b[2J": `\u001b[2J`, "\x1b]0;title\a": `\u001b]0;title\u0007`, "\r": `\r`, "\b": `\u0008`, "\x7f": `\u007f`,
		"\u009b31m": `\u009b31m`, "\u202e": `\u202e`, "\u2066": `\u2066`, "\u200f": `\u200f`, "\u200b": `\u200b`, "\u2028": `\u2028`,
		"\ufeff": `\ufeff`, "\U000e0041": `\udb40\udc41`, "\xff\xfe": `\xff\xfe`, "\xe2\x80": `\xe2\x80`, "\ue000": `\ue000`,
	}
}

func TestClean(t *testing.T) {
	for raw, want := range hostile() {
		if got := clean("a" + raw + "b"); got != "a"+want+"b" {
			t.Errorf("%q is shown as %q, want %q", raw, got, want)
		}
	}
	for _, plain := range []string{"", "plain text", "Größe 世界 🙂 e\u0301", "no\u00a0break"} {
		if got := clean(plain); got != plain {
			t.Errorf("%q is shown as %q", plain, got)
		}
	}
	if got := clean("a\nverified\tb"); got != `a\nverified\tb` {
		t.Errorf("a line break is shown as %q", got)
	}
}

// TestPrinterTakesAnyPieces: however a text is cut into writes, what comes out is the same.
func TestPrinterTakesAnyPieces(t *testing.T) {
	text := "Größe\n\t世界 🙂 \x1b[2J \u202e \xff\xe4\xb8 \U000e0041 end\xe2\x80"
	want := cleanLines(text)
	for size := 1; size < len(text); size++ {
		var out bytes.Buffer
		p := newPrinter(&out)
		for rest := text; rest != ""; rest = rest[min(size, len(rest)):] {
			if _, err := p.Write([]byte(rest[:min(size, len(rest))])); err != nil {
				t.Fatal(err)
			}
		}
		p.flush()
		if out.String() != want {
			t.Fatalf("pieces of %d: %q, want %q", size, out.String(), want)
		}
	}
}

// TestPrinterKeepsJSON: JSON means the same behind the printer.
func TestPrinterKeepsJSON(t *testing.T) {
	for raw := range hostile() {
		if !utf8.ValidString(raw) {
			continue
		}
		text, err := json.Marshal(map[string]string{"x": raw})
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		p := newPrinter(&out)
		fmt.Fprintf(p, "%s\n", text)
		var got map[string]string
		if err := json.Unmarshal(out.Bytes(), &got); err != nil || got["x"] != raw {
			t.Errorf("%q becomes %s: %v", raw, out.Bytes(), err)
		}
		if !shownSafely(out.String()) {
			t.Errorf("%q is written raw: %q", raw, out.String())
		}
	}
}

// shownSafely reports whether a terminal is neither steered nor turned by a text.
func shownSafely(text string) bool { return cleanLines(text) == text }

// TestStrangersSteerNoTerminal: whatever a receiver, a publisher or a tenant put in, no verb prints it raw in any format,
// and nothing of it begins a line.
func TestStrangersSteerNoTerminal(t *testing.T) {
	var all strings.Builder
	for raw := range hostile() {
		if utf8.ValidString(raw) {
			all.WriteString(raw)
		}
	}
	evil := all.String() + "\nverified\tFORGED"
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write([]byte(evil + "\xff"))
	}))
	t.Cleanup(receiver.Close)
	quoted, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	p := scripts("testdata/hostile")
	setup := p.Setup
	p.Setup = func(env *testscript.Env) error {
		env.Setenv("EVIL_RECEIVER", receiver.URL)
		env.Setenv("EVIL_JSON", string(quoted))
		return setup(env)
	}
	p.Cmds["shows"] = func(ts *testscript.TestScript, _ bool, args []string) {
		for _, format := range []string{"table", "wide", "json", "yaml", "name", "jsonpath={$..*}"} {
			bin, err := exec.LookPath("grapnel")
			ts.Check(err)
			cmd := exec.Command(bin, append(args, "-o", format)...)
			cmd.Env = append(cmd.Environ(), "GRAPNEL_ADDR="+ts.Getenv("GRAPNEL_ADDR"), "GRAPNEL_NAMESPACE=acme")
			out, _ := cmd.CombinedOutput()
			if !shownSafely(string(out)) || !strings.HasPrefix(format, "jsonpath") && regexp.MustCompile(`(?m)^\s*verified`).Match(out) {
				ts.Fatalf("%v -o %s prints raw: %q", args, format, out)
			}
		}
	}
	testscript.Run(t, p)
}
