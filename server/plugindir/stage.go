package plugindir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// Staged is a copy of a plugin in the directory that no server runs yet.
type Staged struct {
	dir    Dir
	folder string // to be renamed or removed
	base   string // file in folder; empty when the plugin is the folder
	// SHA256 of the copy.
	SHA256 string
}

// Stage copies a plugin into the directory: an executable file, or a directory with an executable file
// named plugin. Symbolic links in a directory are refused, since what they lead to is not part of the hash.
// The result must be given to Commit or Discard.
func (d Dir) Stage(source string) (_ *Staged, err error) {
	info, err := os.Stat(source)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return nil, err
	}
	s := &Staged{dir: d}
	if s.folder, err = os.MkdirTemp(d.path, ".staged-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Discard()
		}
	}()
	if err := os.Chmod(s.folder, 0o755); err != nil {
		return nil, err
	}
	if info.IsDir() {
		if err := executable(filepath.Join(source, entryName)); err != nil {
			return nil, fmt.Errorf("%s: a plugin that is a directory is started by an executable file named %s in it: %w", source, entryName, err)
		}
		err = copyTree(source, s.folder)
	} else {
		if err := executable(source); err != nil {
			return nil, err
		}
		s.base = filepath.Base(source)
		err = copyFile(source, filepath.Join(s.folder, s.base), info.Mode())
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s: %w", source, err)
	}
	s.SHA256, err = pluginhost.Checksum(filepath.Join(s.folder, s.base))
	return s, err
}

// Path is the executable to start, for tests before Commit.
func (s *Staged) Path() string {
	if s.base == "" {
		return filepath.Join(s.folder, entryName)
	}
	return filepath.Join(s.folder, s.base)
}

// Discard removes the copy. It does nothing after Commit.
func (s *Staged) Discard() {
	if s.folder != "" {
		_ = os.RemoveAll(s.folder)
		s.folder = ""
	}
}

// Commit installs the copy under the name and version of its manifest, in place of a version that was there.
// Of entry, Args, Limits, User, Tests and Enabled count. The files of the version before stay until the next
// one comes: a process of it may be at work for a while.
func (s *Staged) Commit(manifest *pluginv1.DescribeResponse, entry Entry) (Entry, error) {
	entry.Name, entry.PluginVersion = manifest.GetName(), manifest.GetVersion()
	entry.SHA256, entry.InstallTime = s.SHA256, time.Now().UTC().Truncate(time.Second)
	if !validName(entry.Name) {
		return Entry{}, fmt.Errorf("the plugin calls itself %q; want lower-case letters, digits, '.', '_' and '-', and at most one '/', such as acme/sign", entry.Name)
	}
	if !regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$`).MatchString(entry.PluginVersion) {
		return Entry{}, fmt.Errorf("plugin %s says its version is %q; want a semantic version, such as 1.2.0", entry.Name, entry.PluginVersion)
	}
	var err error
	if entry.Manifest, err = manifestJSON(manifest); err != nil {
		return Entry{}, err
	}
	place := filepath.Join(folder(entry.Name), entry.PluginVersion+"-"+s.SHA256[:12])
	entry.Path = filepath.ToSlash(filepath.Join(place, s.base))
	err = s.dir.change(func(lock *Lock) error {
		var before string
		if i, err := lock.find(entry.Name); err == nil {
			before = filepath.Join(s.dir.path, filepath.FromSlash(lock.Plugins[i].Path))
			lock.Plugins = slices.Delete(lock.Plugins, i, i+1)
		}
		if err := s.move(place, before); err != nil {
			return err
		}
		lock.Plugins = append(lock.Plugins, entry)
		return nil
	})
	return entry, err
}

// move puts the copy in its place and removes versions that are neither it nor the one before.
func (s *Staged) move(place, before string) error {
	target := filepath.Join(s.dir.path, place)
	others, err := os.ReadDir(filepath.Dir(target))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, o := range others {
		path := filepath.Join(filepath.Dir(target), o.Name())
		if path != target && path != before && path != filepath.Dir(before) {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	if sum, err := pluginhost.Checksum(filepath.Join(target, s.base)); err == nil && sum == s.SHA256 {
		s.Discard() // the very same version again: its files may be in use
		return nil
	}
	if err := os.RemoveAll(target); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if err := os.Rename(s.folder, target); err != nil {
		return err
	}
	s.folder = ""
	return nil
}

func executable(path string) error {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file", path)
	case info.Mode()&0o111 == 0 && runtime.GOOS != "windows":
		return fmt.Errorf("%s is not executable; chmod +x it", path)
	}
	return nil
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil || rel == "." {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		switch {
		case e.Name() == "__pycache__" && e.IsDir():
			return fs.SkipDir // made anew by whoever runs it, and different each time
		case e.IsDir():
			return os.Mkdir(target, 0o755)
		case info.Mode()&fs.ModeSymlink != 0:
			return copyLinked(path, target)
		case info.Mode().IsRegular():
			return copyFile(path, target, info.Mode())
		}
		return fmt.Errorf("%s is neither file nor directory", rel)
	})
}

// copyLinked copies the file that a link leads to, as package managers make them; a linked directory is
// refused.
func copyLinked(path, target string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is a symbolic link to a directory; copy its content there", path)
	}
	return copyFile(path, target, info.Mode())
}

func copyFile(from, to string, mode fs.FileMode) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	perm := fs.FileMode(0o644)
	if mode&0o111 != 0 {
		perm = 0o755
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	return out.Sync()
}
