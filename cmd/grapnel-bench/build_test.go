package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// binaries are the programs that tests run, each built once.
var binaries struct {
	mu  sync.Mutex
	dir string
}

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "etcd" {
		exit(runEtcd(os.Args[2], os.Args[3]))
	}
	code := m.Run()
	if binaries.dir != "" {
		_ = os.RemoveAll(binaries.dir)
	}
	os.Exit(code)
}

func buildGrapnel(t *testing.T) string {
	t.Helper()
	return build(t, "grapnel", "", "github.com/grapnel/grapnel/cmd/grapnel")
}

// buildStamp builds one version of the third-party plugin.
func buildStamp(t *testing.T, version string) string {
	t.Helper()
	return build(t, "stamp-"+version, "-X main.version="+version, "./testdata/stamp")
}

func build(t *testing.T, name, ldflags, pkg string) string {
	t.Helper()
	binaries.mu.Lock()
	defer binaries.mu.Unlock()
	bin, err := built(name, ldflags, pkg)
	if err != nil {
		t.Fatal(err)
	}
	return bin
}

func built(name, ldflags, pkg string) (string, error) {
	if binaries.dir == "" {
		dir, err := os.MkdirTemp("", "grapnel-bench")
		if err != nil {
			return "", err
		}
		binaries.dir = dir
	}
	bin := filepath.Join(binaries.dir, name)
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	// Without its symbols a program is linked, hashed and copied faster.
	out, err := exec.Command("go", "build", "-o", bin, "-ldflags", "-s -w "+ldflags, pkg).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", name, err, out)
	}
	return bin, nil
}
