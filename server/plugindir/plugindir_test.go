package plugindir_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

// shipped is what the server brings itself.
func shipped() *pluginv1.DescribeResponse {
	return &pluginv1.DescribeResponse{Name: "grapnel", Version: "1.0.0", Kinds: []*pluginv1.Kind{
		{Id: "stripe", Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{}}},
		{Id: "http", Traits: &pluginv1.Kind_Transport{Transport: &pluginv1.TransportTraits{UriSchemes: []string{"http", "https"}}}},
	}}
}

func install(t *testing.T, d plugindir.Dir, source string, m *pluginv1.DescribeResponse) plugindir.Entry {
	t.Helper()
	staged, err := d.Stage(source)
	if err != nil {
		t.Fatal(err)
	}
	defer staged.Discard()
	e, err := staged.Commit(m, shipped(), plugindir.Entry{Enabled: true, Tests: "passed"})
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
	if _, err := os.Stat(filepath.Join(dir, "installed", "acme+sign")); !errors.Is(err, os.ErrNotExist) {
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
		if _, err := staged.Commit(m, shipped(), plugindir.Entry{}); err == nil || !strings.Contains(err.Error(), name) {
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
}

// kinds is a plugin with kinds of these ids, and a transport for each scheme.
func kinds(name string, signers []string, schemes ...string) *pluginv1.DescribeResponse {
	m := &pluginv1.DescribeResponse{Name: name, Version: "1.0.0"}
	for _, id := range signers {
		m.Kinds = append(m.Kinds, &pluginv1.Kind{Id: id, Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{}}})
	}
	for _, scheme := range schemes {
		m.Kinds = append(m.Kinds, &pluginv1.Kind{Id: "to-" + scheme + "-" + filepath.Base(name), Traits: &pluginv1.Kind_Transport{
			Transport: &pluginv1.TransportTraits{UriSchemes: []string{scheme}}}})
	}
	return m
}

// TestNamesThatAreTaken: what ships and what is installed keep their kinds, schemes and names; a newcomer is refused.
func TestNamesThatAreTaken(t *testing.T) {
	d := plugindir.Open(t.TempDir())
	install(t, d, program(t, "a", "a"), kinds("acme/line", []string{"line"}, "line"))
	for _, c := range []struct {
		m     *pluginv1.DescribeResponse
		words []string
	}{
		{kinds("acme/pps", []string{"own", "stripe"}), []string{"acme/pps", `kind "stripe"`, "ships with the server"}},
		{kinds("acme/pps", nil, "https"), []string{"acme/pps", `scheme "https"`, "ships with the server"}},
		{kinds("grapnel", []string{"x"}), []string{`"grapnel"`, "ships with the server"}},
		{kinds("grapnel/x", []string{"x"}), []string{`"grapnel/x"`, "ships with the server"}},
		{kinds("acme/ppl", []string{"line"}), []string{"acme/ppl", `kind "line"`, "belongs to acme/line", "remove that one first"}},
		{kinds("acme/ppl", nil, "line"), []string{"acme/ppl", `scheme "line"`, "belongs to acme/line"}},
	} {
		staged, err := d.Stage(program(t, "x", "x"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = staged.Commit(c.m, shipped(), plugindir.Entry{Enabled: true})
		staged.Discard()
		before := d.Admit(c.m, shipped())
		for _, word := range c.words {
			if err == nil || before == nil || !strings.Contains(err.Error(), word) || err.Error() != before.Error() {
				t.Errorf("%v: %v; before: %v; want %q", c.m, err, before, word)
			}
		}
	}
	// Its own it may have again, and others' once they are gone.
	install(t, d, program(t, "a", "b"), kinds("acme/line", []string{"line", "line2"}, "line"))
	if err := d.Remove("acme/line"); err != nil {
		t.Fatal(err)
	}
	install(t, d, program(t, "a", "b"), kinds("acme/ppl", []string{"line"}, "line"))
	if lock, _, err := d.Read(); err != nil || len(lock.Plugins) != 1 {
		t.Errorf("lock = %v, %v", lock, err)
	}
}

// TestNamesHaveTheirOwnFolders: names that look alike do not share files, and removing one leaves the others.
func TestNamesHaveTheirOwnFolders(t *testing.T) {
	dir := t.TempDir()
	d := plugindir.Open(dir)
	names := []string{"acme/sign", "acme-sign", "acme.sign", "acme_sign", "acme", "installed", "plugins.lock", "plugins.lock.new"}
	for i, name := range names {
		install(t, d, program(t, "p", name), kinds(name, []string{fmt.Sprint("k", i)}))
	}
	for i, name := range names {
		if err := d.Remove(name); err != nil {
			t.Fatal(err)
		}
		if faults, err := d.Verify(); err != nil || len(faults) > 0 {
			t.Errorf("without %s: %v %v", name, faults, err)
		}
		if specs, err := d.Specs(); err != nil || len(specs) != len(names)-i-1 {
			t.Errorf("without %s: %v %v", name, specs, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(dir, "installed")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	for _, name := range []string{"acme.", "acme./sign", "a/b/c", "/a", "a/"} {
		if err := d.Admit(kinds(name, nil), shipped()); err == nil || !strings.Contains(err.Error(), "calls itself") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestRemoveLeavesForeignFiles: a path that was written into the lock file by hand is somebody else's.
func TestRemoveLeavesForeignFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), []byte("x"), 0o755); err != nil {
		t.Fatal(err)
	}
	sum, err := pluginhost.Checksum(filepath.Join(dir, "mine"))
	if err != nil {
		t.Fatal(err)
	}
	lock := fmt.Sprintf(`{"version":1,"plugins":[{"name":"acme/mine","path":"mine","sha256":%q,"enabled":true,"tests":"","install_time":"2026-01-01T00:00:00Z","manifest":null}]}`, sum)
	if err := os.WriteFile(filepath.Join(dir, plugindir.LockFile), []byte(lock), 0o644); err != nil {
		t.Fatal(err)
	}
	d := plugindir.Open(dir)
	if strays, err := d.Strays(); err != nil || len(strays) > 0 {
		t.Errorf("strays = %v, %v", strays, err)
	}
	if err := d.Remove("acme/mine"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "mine")); err != nil {
		t.Error(err)
	}
	if strays, err := d.Strays(); err != nil || !slices.Equal(strays, []string{"mine"}) {
		t.Errorf("strays = %v, %v", strays, err)
	}
}

// TestKilledHalfWay: what a process left that was killed in the middle of a change is in nobody's way and goes with the
// next one; what another one is at stays.
func TestKilledHalfWay(t *testing.T) {
	dir := t.TempDir()
	d := plugindir.Open(dir)
	install(t, d, program(t, "a", "one"), manifest("acme/sign", "1.0.0"))
	for _, left := range []string{plugindir.LockFile + ".new", ".staged-1/plugin/p", "installed/acme+gone/1.0.0-0123456789ab/p", "installed/acme+sign/1.1.0-0123456789ab/p"} {
		path := filepath.Join(dir, filepath.FromSlash(left))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("half"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if specs, err := d.Specs(); err != nil || len(specs) != 1 {
		t.Errorf("specs = %v, %v", specs, err)
	}
	at, err := d.Stage(program(t, "b", "other"))
	if err != nil {
		t.Fatal(err)
	}
	defer at.Discard()
	install(t, d, program(t, "a", "two"), manifest("acme/sign", "1.1.0"))
	if _, err := os.Stat(at.Path()); err != nil {
		t.Errorf("the copy of another one: %v", err)
	}
	at.Discard()
	var left []string
	for _, pattern := range []string{"*", ".staged*", "installed/*", "installed/acme+sign/*"} {
		found, err := filepath.Glob(filepath.Join(dir, filepath.FromSlash(pattern)))
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	if len(left) != 3+1+2 { // installed and two lock files; one plugin; two versions
		t.Errorf("there is %v", left)
	}
	// Damaged files are not written over: a process may run them.
	e := install(t, d, program(t, "a", "two"), manifest("acme/sign", "1.1.0"))
	if err := os.WriteFile(filepath.Join(dir, filepath.FromSlash(e.Path)), []byte("damaged"), 0o755); err != nil {
		t.Fatal(err)
	}
	again := install(t, d, program(t, "a", "two"), manifest("acme/sign", "1.1.0"))
	if faults, err := d.Verify(); err != nil || len(faults) > 0 || again.Path == e.Path {
		t.Errorf("installed again in %s: %v %v", again.Path, faults, err)
	}
}

// TestManyInstallsAtOnce: each one is whole, and none is lost.
func TestManyInstallsAtOnce(t *testing.T) {
	dir := t.TempDir()
	var all sync.WaitGroup
	for i := range 8 {
		source := program(t, "p", fmt.Sprint(i))
		all.Go(func() {
			d := plugindir.Open(dir)
			staged, err := d.Stage(source)
			if err != nil {
				t.Error(err)
				return
			}
			defer staged.Discard()
			if _, err := staged.Commit(kinds(fmt.Sprint("acme/p", i), []string{fmt.Sprint("k", i)}), shipped(), plugindir.Entry{Enabled: true}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	d := plugindir.Open(dir)
	specs, err := d.Specs()
	faults, verr := d.Verify()
	if err != nil || verr != nil || len(specs) != 8 || len(faults) > 0 {
		t.Errorf("specs = %v, %v; faults = %v, %v", specs, err, faults, verr)
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
