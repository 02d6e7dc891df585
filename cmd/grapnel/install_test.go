//go:build unix

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// acmePlugin serves signers of these ids, as a third party's plugin.
func acmePlugin(name string, ids ...string) func() {
	return func() {
		var kinds []plugin.Kind
		for _, id := range ids {
			kinds = append(kinds, plugin.Signer(id, func(struct{}, plugin.Target) (plugin.SignFunc, error) {
				return func(r *plugin.Request) error {
					r.Set("x-acme", "signed")
					return nil
				}, nil
			}, plugin.Emits("x-acme")))
		}
		plugin.Main(name, "1.0.0", kinds...)
	}
}

// grapnel runs a command with the environment's plugin directory and returns its exit code and what it wrote.
func grapnel(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	cmd := exec.Command("grapnel", args...)
	cmd.Env = append(os.Environ(), "GRAPNEL_PLUGIN_DIR="+dir)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

func wantIn(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(text, word) {
			t.Errorf("no %q in %s", word, text)
		}
	}
}

func lookPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestInstallRefuses what would not run, or would take what is another's, and leaves the directory as it was.
func TestInstallRefuses(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "plugins")
	if code, _, stderr := grapnel(t, dir, "plugin", "install", "--skip-tests", lookPath(t, "acme-sign")); code != 0 {
		t.Fatalf("install: %d %s", code, stderr)
	}
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{lookPath(t, "acme-stripe")}, []string{`kind "stripe"`, "ships with the server"}},
		{[]string{lookPath(t, "acme-again")}, []string{`kind "acme-v2"`, "belongs to acme/sign"}},
		{[]string{lookPath(t, "acme-grapnel")}, []string{`"grapnel/more"`, "ships with the server"}},
		{[]string{"--memory", "8MiB", lookPath(t, "acme-sign")}, []string{"could not start it with --memory 8MiB"}},
		{[]string{"--user", "nosuchuser", lookPath(t, "acme-sign")}, []string{"could not start it with --user nosuchuser", `no user "nosuchuser"`}},
		{[]string{"--open-files", "4", lookPath(t, "acme-sign")}, []string{"could not start it with --open-files 4"}},
	} {
		code, _, stderr := grapnel(t, dir, append([]string{"plugin", "install", "--skip-tests"}, c.args...)...)
		if code != 1 {
			t.Errorf("%v: exit code %d", c.args, code)
		}
		wantIn(t, stderr, append(c.words, "nothing was installed")...)
	}
	if err := os.WriteFile(filepath.Join(dir, "loose"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := grapnel(t, dir, "plugin", "list")
	if code != 0 || strings.Count(stdout, "\n") != 2 {
		t.Errorf("list: %d\n%s", code, stdout)
	}
	wantIn(t, stderr, "not in plugins.lock, and so not run: loose")
	left, err := filepath.Glob(filepath.Join(dir, ".staged-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// TestInstalledConditions are shown, and every command finds the directory in the environment.
func TestInstalledConditions(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "plugins")
	for _, verb := range [][]string{{"list"}, {"verify"}, {"remove", "acme/sign"}, {"enable", "acme/sign"}, {"disable", "acme/sign"}} {
		code, _, stderr := grapnel(t, dir, append([]string{"plugin"}, verb...)...)
		if code != 1 || !strings.Contains(stderr, dir) || !strings.Contains(stderr, "no such file or directory") {
			t.Errorf("%v without a directory: %d %s", verb, code, stderr)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a command that installs nothing made the directory")
	}
	if os.Geteuid() != 0 {
		t.Skip("limits take the right to use ptrace")
	}
	code, _, stderr := grapnel(t, dir, "plugin", "install", "--skip-tests", "--memory", "256MiB", "--open-files", "128", "--arg", "a b", lookPath(t, "acme-sign"))
	if code != 0 {
		t.Fatalf("install: %d %s", code, stderr)
	}
	_, stdout, _ := grapnel(t, dir, "plugin", "list")
	wantIn(t, stdout, "STARTED WITH", `--memory 256MiB --open-files 128 --arg "a b"`)
	for _, verb := range [][]string{{"verify"}, {"disable", "acme/sign"}, {"enable", "acme/sign"}, {"remove", "acme/sign"}} {
		if code, _, stderr := grapnel(t, dir, append([]string{"plugin"}, verb...)...); code != 0 {
			t.Errorf("%v: %d %s", verb, code, stderr)
		}
	}
}
