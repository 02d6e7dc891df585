//go:build linux

package pluginhost

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// copyOfSelf is the test binary in another place.
func copyOfSelf(t *testing.T, to string) string {
	t.Helper()
	in, err := os.Open(self().Path)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return to
}

// pinned is the plugin at path, pinned to what is there now.
func pinned(t *testing.T, path string) Spec {
	t.Helper()
	sum, err := Checksum(path)
	if err != nil {
		t.Fatal(err)
	}
	return Spec{Path: path, Args: []string{"plugin-version", "1"}, SHA256: strings.ToUpper(sum)}
}

func TestPinnedFileIsWhatRuns(t *testing.T) {
	path := copyOfSelf(t, filepath.Join(t.TempDir(), "acme"))
	spec := pinned(t, path)
	f := start(t, nil, spec)
	f.unary(t)
	pid := f.Pids()["test/all"]
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || exe != path {
		t.Errorf("runs %q (%v), want %q", exe, err, path)
	}
	// Another file under the same name is no reason to touch what runs, and is not run in its place.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("#!/bin/sh\nexec "+self().Path+" plugin-version 666\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	f.Update([]Spec{spec})
	f.unary(t)
	if f.Pids()["test/all"] != pid || f.lastError() != "" {
		t.Errorf("it was touched: %s", f.lastError())
	}
	_ = kill(pid)
	eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), "has SHA-256 ") })
	if len(f.Pids()) != 0 {
		t.Error("it runs")
	}
}

func kill(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Kill()
}

func TestPinnedFilesThatOthersCouldChange(t *testing.T) {
	dir := t.TempDir()
	real := filepath.Join(dir, "real")
	if err := os.Mkdir(real, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(real, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\nexit 9\n"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	file := write("plugin", 0o755)
	link := filepath.Join(dir, "link")
	linkToDir := filepath.Join(dir, "linktodir")
	for at, to := range map[string]string{link: file, linkToDir: real} {
		if err := os.Symlink(to, at); err != nil {
			t.Fatal(err)
		}
	}
	byGroup, byAll := pinned(t, write("group", 0o775)), pinned(t, write("all", 0o757))
	tree := pinned(t, real)
	for name, tt := range map[string]struct {
		spec Spec
		want string
	}{
		"a group may write":                  {byGroup, "mode 0775: a pinned plugin must not be writable"},
		"all may write":                      {byAll, "mode 0757: a pinned plugin must not be writable"},
		"a link":                             {pinned(t, link), "is a symbolic link"},
		"a link to a directory":              {pinned(t, linkToDir), "is a symbolic link"},
		"a directory with one of such files": {tree, "mode 0775: a pinned plugin must not be writable"},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, nil, tt.spec)
			eventually(t, "it has failed to start", func() bool { return f.lastError() != "" })
			if !strings.Contains(f.lastError(), tt.want) && !(strings.Contains(tt.want, "0775") && strings.Contains(f.lastError(), "mode 0757")) {
				t.Errorf("last error %q lacks %q", f.lastError(), tt.want)
			}
		})
	}
}

// TestPinnedFileOfAnotherOwner: who owns a file may write to it between check and start, whatever its mode.
func TestPinnedFileOfAnotherOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	file := copyOfSelf(t, filepath.Join(dir, "plugin"))
	other, tree := pinned(t, file), pinned(t, dir)
	if err := os.Chown(file, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	for _, spec := range []Spec{other, tree} {
		f := start(t, nil, spec)
		eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), "belongs to user 12345") })
		if len(f.Pids()) != 0 {
			t.Error("it runs")
		}
	}
	if err := os.Chown(file, 0, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 12345, 12345); err != nil { // who owns the directory puts another file into it
		t.Fatal(err)
	}
	f := start(t, nil, tree)
	eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), "belongs to user 12345") })
}

// TestOwnProgramSurvivesItsPath: a server whose binary has been replaced or removed goes on with the one it was started from.
func TestOwnProgramSurvivesItsPath(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"removed": os.Remove,
		"replaced": func(path string) error {
			return errors.Join(os.Remove(path), os.WriteFile(path, []byte("#!/bin/sh\nexit 9\n"), 0o755))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := copyOfSelf(t, filepath.Join(t.TempDir(), "grapnel"))
			host := exec.Command(path, "host", "own")
			out, err := host.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			host.Stderr = t.Output()
			if err := host.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = host.Process.Kill()
				_ = host.Wait()
			}()
			lines := bufio.NewScanner(out)
			pid := func() (pid int) {
				t.Helper()
				if !lines.Scan() {
					t.Fatal("the host has ended")
				}
				if _, err := fmt.Sscan(lines.Text(), &pid); err != nil {
					t.Fatalf("%v: %q", err, lines.Text())
				}
				return pid
			}
			first := pid()
			if err := spoil(path); err != nil {
				t.Fatal(err)
			}
			if err := kill(first); err != nil {
				t.Fatal(err)
			}
			if next := pid(); next == first {
				t.Error("it is the same process")
			}
		})
	}
}

// TestSocketThatIsNone: a plugin that names a link in its directory would have the host knock elsewhere.
func TestSocketThatIsNone(t *testing.T) {
	elsewhere := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	knocked := make(chan struct{})
	go func() {
		if c, err := l.Accept(); err == nil {
			_ = c.Close()
			close(knocked)
		}
	}()
	f := start(t, nil, self("plugin-link", elsewhere))
	eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), "what it names as its socket is none") })
	select {
	case <-knocked:
		t.Error("the host has dialled it")
	default:
	}
}

func TestPinnedDirectory(t *testing.T) {
	for name, build := range map[string]func(dir string){
		"program": func(dir string) { copyOfSelf(t, filepath.Join(dir, "plugin")) },
		"script beside its files": func(dir string) {
			for file, text := range map[string]string{
				"plugin":   "#!/bin/sh\nexec \"$(cat \"$(dirname \"$0\")\"/lib/path)\" \"$@\"\n",
				"lib/path": self().Path,
			} {
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			build(dir)
			spec := pinned(t, dir)
			f := start(t, nil, spec)
			f.unary(t)
			if got := f.Plugins()[0].GetInstances()[0].GetChecksum(); !strings.EqualFold(got, spec.SHA256) {
				t.Errorf("checksum %s", got)
			}
			if err := os.WriteFile(filepath.Join(dir, "more"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			_ = kill(f.Pids()["test/all"])
			eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), "has SHA-256 ") })
		})
	}
}

func TestManifest(t *testing.T) {
	learned := make(chan *pluginv1.DescribeResponse, 1)
	f := start(t, nil, version("1", "extra"))
	f.unary(t)
	c := f.processes()[0].conn.Load()
	desc, err := c.plugin.Describe(t.Context(), &pluginv1.DescribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	learned <- desc
	f.stop()
	for name, tt := range map[string]struct {
		change func(*pluginv1.DescribeResponse)
		want   string // empty: it serves
	}{
		"the same":         {func(*pluginv1.DescribeResponse) {}, ""},
		"kinds turned":     {func(d *pluginv1.DescribeResponse) { d.Kinds[0], d.Kinds[1] = d.Kinds[1], d.Kinds[0] }, ""},
		"schema laid out":  {func(d *pluginv1.DescribeResponse) { d.Kinds[0].ConfigSchema = " " + d.Kinds[0].ConfigSchema }, ""},
		"another minor":    {func(d *pluginv1.DescribeResponse) { d.ProtocolMinor++ }, ""},
		"another version":  {func(d *pluginv1.DescribeResponse) { d.Version = "2" }, `version: "2" in the manifest, "1" as described`},
		"another name":     {func(d *pluginv1.DescribeResponse) { d.Name = "acme" }, `name: "acme" in the manifest, "test/all" as described`},
		"fewer kinds":      {func(d *pluginv1.DescribeResponse) { d.Kinds = d.Kinds[:2] }, "kinds: mem, standard-webhooks in the manifest, extra, mem, standard-webhooks as described"},
		"no capability":    {func(d *pluginv1.DescribeResponse) { d.Capabilities = nil }, "capabilities: none in the manifest"},
		"another schema":   {func(d *pluginv1.DescribeResponse) { d.Kinds[0].ConfigSchema = "{}" }, `kind "mem": the config schema differs`},
		"another header":   {func(d *pluginv1.DescribeResponse) { d.Kinds[1].GetSigner().EmitsHeaders = nil }, `kind "standard-webhooks": role, headers`},
		"a slot that goes": {func(d *pluginv1.DescribeResponse) { d.Kinds[1].SecretSlots = nil }, `kind "standard-webhooks": role, headers, schemes, limits or secret slots differ`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			spec := version("1", "extra")
			spec.Manifest = proto.CloneOf(desc)
			tt.change(spec.Manifest)
			f := start(t, nil, spec)
			if tt.want == "" {
				f.unary(t)
				return
			}
			eventually(t, "it is refused", func() bool { return strings.Contains(f.lastError(), tt.want) })
			if len(f.Pids()) != 0 {
				t.Error("it serves")
			}
		})
	}
}

// body makes an attempt in a mode that tells something, and returns what.
func (f *fixture) body(t *testing.T, mode string) string {
	t.Helper()
	got := f.attempt(t, newSub(t, byte(100+len(mode)), map[string]any{"mode": mode}), newJob(0, "x"))
	if got.ResponseCode != 500 {
		t.Fatalf("%+v", got)
	}
	return string(got.ResponseBody)
}

// underRace: the race detector maps far more memory than any limit that means something.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

// nice is the field of a file stat in /proc.
func nice(t *testing.T, path string) int {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, behind, _ := strings.Cut(string(text), ") ") // the name of the program, which may have blanks in it
	n, err := strconv.Atoi(strings.Fields(behind)[16])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestLimits(t *testing.T) {
	if underRace() {
		t.Skip("the race detector needs more memory than the limit")
	}
	spec := version("1")
	spec.Limits, spec.Yields = Limits{MemoryBytes: 200 << 20, OpenFiles: 123}, 3
	f := start(t, nil, spec)
	f.unary(t)
	limits := f.body(t, "files")
	for _, want := range []string{
		`Max data size +209715200 +209715200`, `Max open files +123 +123`, `Max core file size +0 +0`,
	} {
		if !regexp.MustCompile(want).MatchString(limits) {
			t.Errorf("limits lack %s:\n%s", want, limits)
		}
	}
	if status := f.body(t, "status"); !strings.Contains(status, "NoNewPrivs:\t1") || !strings.Contains(status, "TracerPid:\t0") {
		t.Errorf("status:\n%s", status)
	}
	pid := f.Pids()["test/all"]
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) < 2 {
		t.Errorf("threads %v, %v", threads, err)
	}
	for _, path := range threads {
		if got, own := nice(t, path), nice(t, "/proc/self/stat"); got != own+3 {
			t.Errorf("%s: nice is %d, the server's is %d", path, got, own)
		}
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil || !strings.Contains(string(env), "GOMEMLIMIT=188743680") {
		t.Errorf("environment %q (%v)", env, err)
	}
	// One that takes more than it may ends, and says of what.
	got := f.attempt(t, newSub(t, 1, map[string]any{"mode": "hog"}), newJob(0, "x"))
	if got.Cause != delivery.CausePlugin {
		t.Errorf("got %+v", got)
	}
	eventually(t, "it is noted", func() bool {
		p, _ := f.Plugin("mem")
		return strings.Contains(strings.Join(p.GetInstances()[0].GetLastOutput(), "\n"), "out of memory")
	})
	f.unary(t)
	if pid == f.Pids()["test/all"] {
		t.Error("it did not end")
	}
}

func TestPluginOfAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	spec := pinned(t, copyOfSelf(t, filepath.Join(t.TempDir(), "acme"))) // pinned: the path need not be open to it
	spec.User, spec.Limits.Processes = "65534:65533", 200
	f := start(t, nil, spec)
	f.unary(t)
	status := f.body(t, "status")
	for _, want := range []string{"Uid:\t65534\t65534\t65534\t65534", "Gid:\t65533\t65533\t65533\t65533", "Groups:\t \n", "CapEff:\t0000000000000000"} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	if limits := f.body(t, "files"); !regexp.MustCompile(`Max processes +200 +200`).MatchString(limits) {
		t.Errorf("limits:\n%s", limits)
	}
	dir, err := f.dirs.ForOthers()
	if err != nil {
		t.Fatal(err)
	}
	f.stop()
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("directory %q is left: %v", dir, err)
	}
}
