package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestReadme runs the commands of the README's five minutes as they are printed, so that they cannot rot.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	script := "serve\n"
	commands := 0
	for line := range strings.Lines(string(readme)) {
		command, ok := strings.CutPrefix(line, "bin/grapnel ")
		if !ok || strings.HasPrefix(command, "server ") {
			continue
		}
		script += "exec grapnel " + command
		commands++
	}
	if commands < 5 {
		t.Fatalf("the README has %d commands: %s", commands, script)
	}
	script += "stdout orders\n" // the last one lists the delivery
	file := filepath.Join(t.TempDir(), "readme.txtar")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	params := scripts("")
	params.Files = []string{file}
	testscript.Run(t, params)
}
