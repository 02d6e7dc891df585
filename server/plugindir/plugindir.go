// Package plugindir owns a directory of third-party plugins: the files of each installed version, and the
// lock file that says which there are, which of them run, and what their files must hash to.
//
//	DIR/plugins.lock                                JSON, see Lock
//	DIR/installed/acme+sign/1.2.0-0123456789ab/…    one installed version of acme/sign
//	DIR/.changing                                   locked by the process that changes the directory
//
// A change of the lock file is atomic and made by one process at a time; a server that watches the directory
// sees it within a second. Files come before the entry that names them, and go after it, so a process that is killed
// half-way leaves files that nothing names: the next change removes them. A directory without a lock file is for development: every executable file in it
// runs, whatever it hashes to. The package starts no plugin; installing is in two steps, Stage and Commit,
// so that the caller can test the very files that will run.
package plugindir

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/dirlock"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// LockFile is the name of the lock file in the directory.
const LockFile = "plugins.lock"

const (
	lockVersion = 1
	// installed has a folder for each plugin, changing is locked while one is put there or taken away.
	installed, changing = "installed", ".changing"
	// busyPatience is how long a change waits for another one's end.
	busyPatience = 10 * time.Second
	// entryName is the file that a plugin which is a directory is started by.
	entryName = "plugin"
)

var (
	// ErrNotInstalled means that the lock file has no plugin of that name.
	ErrNotInstalled = errors.New("is not installed")
	// ErrBusy means that another process has been changing the directory for as long as one waits.
	ErrBusy = errors.New("the directory is being changed")
)

// Lock is the content of the lock file.
type Lock struct {
	// Version of the format, 1.
	Version int     `json:"version"`
	Plugins []Entry `json:"plugins"`
}

// Entry is one installed plugin.
type Entry struct {
	// Name is what the plugin calls itself, for example acme/sign.
	Name          string `json:"name"`
	PluginVersion string `json:"plugin_version"`
	// Path of the executable, or of a directory with an executable named plugin, relative to the lock file.
	Path string   `json:"path"`
	Args []string `json:"args,omitempty"`
	// SHA256 is what pluginhost.Checksum must give for Path.
	SHA256  string `json:"sha256"`
	Enabled bool   `json:"enabled"`
	// Limits and User restrict the process; zero values do not.
	Limits Limits `json:"limits,omitzero"`
	User   string `json:"user,omitempty"`
	// Tests says how it fared in the conformance suite when it was installed, for people.
	Tests       string    `json:"tests"`
	InstallTime time.Time `json:"install_time"`
	// Manifest is what the plugin described itself as, in protobuf's JSON; a process that describes itself
	// otherwise is not used.
	Manifest json.RawMessage `json:"manifest"`
}

// Limits are pluginhost.Limits, as they are written in the lock file.
type Limits struct {
	MemoryBytes uint64 `json:"memory_bytes,omitempty"`
	OpenFiles   uint64 `json:"open_files,omitempty"`
	Processes   uint64 `json:"processes,omitempty"`
}

// Dir is a plugin directory. It holds nothing open and may be used concurrently.
type Dir struct{ path string }

// Open returns the directory, which need not exist until something is installed.
func Open(path string) Dir { return Dir{path: path} }

// Read returns the lock file's content, in the order of names; locked is false when there is no such file.
func (d Dir) Read() (lock Lock, locked bool, err error) {
	file := filepath.Join(d.path, LockFile)
	raw, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Lock{Version: lockVersion}, false, nil
	}
	if err != nil {
		return Lock{}, false, err
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&lock); err != nil {
		return Lock{}, true, fmt.Errorf("%s: %w", file, err)
	}
	if lock.Version != lockVersion {
		return Lock{}, true, fmt.Errorf("%s has version %d; this grapnel reads version %d", file, lock.Version, lockVersion)
	}
	for i, e := range lock.Plugins {
		if err := e.check(); err != nil {
			return Lock{}, true, fmt.Errorf("%s: plugins[%d]: %w", file, i, err)
		}
	}
	slices.SortFunc(lock.Plugins, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return lock, true, nil
}

func (e Entry) check() error {
	switch _, err := hex.DecodeString(e.SHA256); {
	case !validName(e.Name):
		return fmt.Errorf("name %q is not a plugin's name; want lower-case letters, digits, '.', '_' and '-', and at most one '/', such as acme/sign", e.Name)
	case !filepath.IsLocal(e.Path):
		return fmt.Errorf("path %q leads out of the plugin directory", e.Path)
	case err != nil || len(e.SHA256) != 64:
		return fmt.Errorf("sha256 %q is not 64 hexadecimal digits", e.SHA256)
	}
	return nil
}

func validName(name string) bool {
	// A dot at the end is lost where Windows makes a path of it.
	return len(name) <= 128 && regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?(/[a-z0-9]([a-z0-9._-]*[a-z0-9_-])?)?$`).MatchString(name)
}

// Enable has a plugin run, or not; its files stay. It returns an error that is ErrNotInstalled for a name
// that the lock file does not have.
func (d Dir) Enable(name string, enabled bool) error {
	return d.change(func(lock *Lock) error {
		i, err := lock.find(name)
		if err != nil {
			return err
		}
		lock.Plugins[i].Enabled = enabled
		return nil
	})
}

// Remove takes a plugin out of the lock file and removes its files, all versions. Files that were not installed here, but
// named by hand, stay.
func (d Dir) Remove(name string) error {
	return d.change(func(lock *Lock) error {
		i, err := lock.find(name)
		if err != nil {
			return err
		}
		lock.Plugins = slices.Delete(lock.Plugins, i, i+1)
		return nil // its files are named by nothing now
	})
}

func (l *Lock) find(name string) (int, error) {
	i := slices.IndexFunc(l.Plugins, func(e Entry) bool { return e.Name == name })
	if i >= 0 {
		return i, nil
	}
	names := make([]string, len(l.Plugins))
	for i, e := range l.Plugins {
		names[i] = e.Name
	}
	if len(names) == 0 {
		return 0, fmt.Errorf("plugin %q %w: there are none", name, ErrNotInstalled)
	}
	return 0, fmt.Errorf("plugin %q %w; there are %s", name, ErrNotInstalled, strings.Join(names, ", "))
}

// Verify hashes the files of every installed plugin and returns what is wrong, by name; an empty map means
// that all are as they were installed.
func (d Dir) Verify() (map[string]error, error) {
	lock, _, err := d.Read()
	if err != nil {
		return nil, err
	}
	faults := map[string]error{}
	for _, e := range lock.Plugins {
		sum, err := pluginhost.Checksum(filepath.Join(d.path, e.Path))
		switch {
		case err != nil:
			faults[e.Name] = err
		case !strings.EqualFold(sum, e.SHA256):
			faults[e.Name] = fmt.Errorf("%s has SHA-256 %s, and the lock file says %s", e.Path, sum, e.SHA256)
		}
	}
	return faults, nil
}

// change edits the lock file, alone, and then removes what it names no more. The new content is written beside it and
// renamed over it.
func (d Dir) change(edit func(*Lock) error) (err error) {
	alone, err := d.alone()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, alone.Release()) }()
	lock, _, err := d.Read()
	if err != nil {
		return err
	}
	if err := edit(&lock); err != nil {
		return err
	}
	slices.SortFunc(lock.Plugins, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	if err := d.write(lock); err != nil {
		return err
	}
	return d.sweep(lock)
}

// alone waits until nobody else changes the directory.
func (d Dir) alone() (*dirlock.Lock, error) {
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return nil, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(busyPatience); ; <-tick.C {
		lock, err := dirlock.Take(filepath.Join(d.path, changing))
		held := new(dirlock.HeldError)
		switch {
		case !errors.As(err, &held):
			return lock, err
		case time.Now().After(end):
			return nil, fmt.Errorf("%s: %w by %s", d.path, ErrBusy, held.Holder)
		}
	}
}

func (d Dir) write(lock Lock) (err error) {
	file := filepath.Join(d.path, LockFile)
	next := file + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(next)
		}
	}()
	enc := json.NewEncoder(f)
	enc.SetIndent("", "  ")
	if err := errors.Join(enc.Encode(lock), f.Sync(), f.Close()); err != nil {
		return err
	}
	return errors.Join(os.Rename(next, file), syncDir(d.path))
}

// sweep removes the files of plugins that are not in the lock file, whoever left them.
func (d Dir) sweep(lock Lock) error {
	folders, err := os.ReadDir(filepath.Join(d.path, installed))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range folders {
		if !slices.ContainsFunc(lock.Plugins, func(e Entry) bool { return e.within(folderPath(f.Name())) || folder(e.Name) == f.Name() }) {
			errs = append(errs, os.RemoveAll(filepath.Join(d.path, installed, f.Name())))
		}
	}
	return errors.Join(errs...)
}

// within reports whether the entry's files are in a folder of the directory.
func (e Entry) within(folder string) bool {
	return strings.HasPrefix(filepath.ToSlash(filepath.Clean(filepath.FromSlash(e.Path)))+"/", folder+"/")
}

// syncDir makes the names in a directory durable, where the system can.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && runtime.GOOS != "windows" {
		return err
	}
	return nil
}

// manifestJSON is a manifest as it is kept: without whitespace that means nothing.
func manifestJSON(m *pluginv1.DescribeResponse) (json.RawMessage, error) {
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	var compact bytes.Buffer
	err = json.Compact(&compact, raw)
	return compact.Bytes(), err
}

// DescribeResponse reads the entry's manifest; nil when it has none.
func (e Entry) DescribeResponse() (*pluginv1.DescribeResponse, error) {
	if len(e.Manifest) == 0 {
		return nil, nil
	}
	m := &pluginv1.DescribeResponse{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(e.Manifest, m); err != nil {
		return nil, fmt.Errorf("manifest of %s: %w", e.Name, err)
	}
	return m, nil
}

// folder is where the versions of a plugin are: no two names have the same, as a name has no '+'.
func folder(name string) string { return strings.ReplaceAll(name, "/", "+") }

// folderPath is a folder's place in the directory, with slashes.
func folderPath(folder string) string { return installed + "/" + folder }
