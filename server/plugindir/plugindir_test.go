package plugindir_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/plugindir"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// program writes an executable file and returns its path.
func program(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func manifest(name, version string) *pluginv1.DescribeResponse {
	return &pluginv1.DescribeResponse{
		Name: name, Version: version, ProtocolMinor: 2, Capabilities: []string{"sign.stream"},
		Kinds: []*pluginv1.Kind{{Id: "acme-v2", Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{EmitsHeaders: []string{"acme"}}}}},
	}
}

func install(t *testing.T, d plugindir.Dir, source string, m *pluginv1.DescribeResponse) plugindir.Entry {
	t.Helper()
	staged, err := d.Stage(source)
	if err != nil {
		t.Fatal(err)
	}
	e, err := staged.Commit(m, plugindir.Entry{Enabled: true, Tests: "passed"})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	d := plugindir.Open(dir)
	first := install(t, d, program(t, "acme", "one"), manifest("acme/sign", "1.0.0"))
	specs, err := d.Specs()
	if err != nil || len(specs) != 1 {
		t.Fatalf("specs = %v, %v", specs, err)
	}
	s := specs[0]
	if s.Name != "acme/sign" || s.SHA256 != first.SHA256 || s.Path != filepath.Join(dir, filepath.FromSlash(first.Path)) || s.Manifest.GetVersion() != "1.0.0" {
		t.Errorf("spec = %+v", s)
	}
	if got, _ := os.ReadFile(s.Path); string(got) != "one" {
		t.Errorf("installed file = %q", got)
	}
	if kept, err := first.DescribeResponse(); err != nil || !proto.Equal(kept, manifest("acme/sign", "1.0.0")) {
		t.Errorf("kept manifest = %v, %v", kept, err)
	}

	// The next version takes its place; the files of the one before stay for processes that are at work.
	second := install(t, d, program(t, "acme", "two"), manifest("acme/sign", "1.1.0"))
	third := install(t, d, program(t, "acme", "three"), manifest("acme/sign", "1.2.0"))
	for path, want := range map[string]bool{first.Path: false, second.Path: true, third.Path: true} {
		if _, err := os.Stat(filepath.Join(dir, path)); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", path, err == nil, want)
		}
	}
	again := install(t, d, program(t, "acme", "three"), manifest("acme/sign", "1.2.0"))
	if again.Path != third.Path || again.SHA256 != third.SHA256 {
		t.Errorf("the same version again is %v, was %v", again, third)
	}
	if faults, err := d.Verify(); err != nil || len(faults) != 0 {
		t.Errorf("verify = %v, %v", faults, err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".staged-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestInstallDirectory(t *testing.T) {
	source := t.TempDir()
	for name, mode := range map[string]os.FileMode{"plugin": 0o755, "lib/helper.py": 0o644} {
		path := filepath.Join(source, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	d := plugindir.Open(dir)
	e := install(t, d, source, manifest("acme/py", "0.1.0"))
	if got, _ := os.ReadFile(filepath.Join(dir, e.Path, "lib/helper.py")); string(got) != "lib/helper.py" {
		t.Errorf("installed file = %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, e.Path, "lib/helper.py"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	faults, err := d.Verify()
	if err != nil || faults["acme/py"] == nil || !strings.Contains(faults["acme/py"].Error(), e.SHA256) {
		t.Errorf("verify = %v, %v", faults, err)
	}
}

func TestEnableAndRemove(t *testing.T) {
	dir := t.TempDir()
	d := plugindir.Open(dir)
	install(t, d, program(t, "acme", "one"), manifest("acme/sign", "1.0.0"))
	if err := d.Enable("acme/sign", false); err != nil {
		t.Fatal(err)
	}
	if specs, err := d.Specs(); err != nil || len(specs) != 1 || !specs[0].Disabled {
		t.Errorf("disabled, specs = %v, %v", specs, err)
	}
	if err := d.Enable("acme/sing", true); !errors.Is(err, plugindir.ErrNotInstalled) || !strings.Contains(err.Error(), "acme/sign") {
		t.Errorf("a wrong name: %v", err)
	}
	if err := d.Remove("acme/sign"); err != nil {
		t.Fatal(err)
	}
	if lock, locked, err := d.Read(); err != nil || !locked || len(lock.Plugins) != 0 {
		t.Errorf("removed, lock = %v, %v, %v", lock, locked, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "acme-sign")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its files: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	plain := program(t, "acme", "x")
	if err := os.Chmod(plain, 0o644); err != nil {
		t.Fatal(err)
	}
	d := plugindir.Open(t.TempDir())
	if _, err := d.Stage(plain); err == nil || !strings.Contains(err.Error(), "chmod +x") {
		t.Errorf("a file that is not executable: %v", err)
	}
	if _, err := d.Stage(t.TempDir()); err == nil || !strings.Contains(err.Error(), "executable file named plugin") {
		t.Errorf("a directory without an entry: %v", err)
	}
	for name, m := range map[string]*pluginv1.DescribeResponse{
		"../escape": manifest("../escape", "1.0.0"), "1.0/../..": manifest("acme/sign", "1.0/../.."), "Big": manifest("Big", "1.0.0"),
	} {
		staged, err := d.Stage(program(t, "acme", "x"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := staged.Commit(m, plugindir.Entry{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		staged.Discard()
	}
}

func TestLockFile(t *testing.T) {
	hash := strings.Repeat("a", 64)
	for content, want := range map[string]string{
		`{`:                            "unexpected EOF",
		`{"version":2}`:                "version 2",
		`{"version":1,"plugin":[]}`:    `unknown field "plugin"`,
		`{"version":1,"plugins":[{}]}`: "plugins[0]",
		`{"version":1,"plugins":[{"name":"a","path":"../x","sha256":"` + hash + `"}]}`: "leads out",
		`{"version":1,"plugins":[{"name":"a","path":"x","sha256":"abc"}]}`:             "64 hexadecimal digits",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, plugindir.LockFile), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := plugindir.Open(dir).Specs(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q in it", content, err, want)
		}
	}
	dir := t.TempDir()
	d := plugindir.Open(dir)
	install(t, d, program(t, "acme", "one"), manifest("acme/sign", "1.0.0"))
	if err := os.WriteFile(filepath.Join(dir, plugindir.LockFile+".new"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := d.Enable("acme/sign", false); !errors.Is(err, plugindir.ErrBusy) {
		t.Errorf("while another one writes: %v", err)
	}
}

// TestWatch follows a directory from development, where any executable runs, to a locked one.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	d := plugindir.Open(dir)
	updates := make(chan []string)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.Watch(ctx, time.Millisecond, func(specs []pluginhost.Spec) {
			var names []string
			for _, s := range specs {
				if !s.Disabled {
					names = append(names, s.Name+":"+filepath.Base(s.Path))
				}
			}
			select {
			case updates <- names:
			case <-ctx.Done():
			}
		}, func(err error) { t.Errorf("watch: %v", err) })
	}()
	next := func(want ...string) {
		t.Helper()
		deadline := time.After(10 * time.Second)
		for {
			select {
			case got := <-updates:
				if slices.Equal(got, want) {
					return
				}
			case <-deadline:
				t.Fatalf("no update to %v", want)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "loose"), []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	next(":loose")
	install(t, d, program(t, "acme", "one"), manifest("acme/sign", "1.0.0"))
	next("acme/sign:acme")
	if err := d.Enable("acme/sign", false); err != nil {
		t.Fatal(err)
	}
	next()
	stop()
	<-done
}
