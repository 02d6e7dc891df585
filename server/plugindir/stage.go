package plugindir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/dirlock"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// Staged is a copy of a plugin in the directory that no server runs yet.
type Staged struct {
	dir    Dir
	work   string // holds folder; locked, and removed
	folder string // to be renamed
	base   string // file in folder; empty when the plugin is the folder
	lock   *dirlock.Lock
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
	if err := s.make(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Discard()
		}
	}()
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

// make makes the folder to copy to, and removes those of processes that have died.
func (s *Staged) make() error {
	alone, err := s.dir.alone() // lest somebody take it for a dead one's before it is locked
	if err != nil {
		return err
	}
	defer func() { _ = alone.Release() }()
	left, err := filepath.Glob(filepath.Join(s.dir.path, staging+"*"))
	if err != nil {
		return err
	}
	for _, work := range left {
		if lock, err := dirlock.Take(filepath.Join(work, changing)); err == nil {
			_ = errors.Join(os.RemoveAll(work), lock.Release())
		}
	}
	if s.work, err = os.MkdirTemp(s.dir.path, staging); err != nil {
		return err
	}
	s.folder = filepath.Join(s.work, "plugin")
	s.lock, err = dirlock.Take(filepath.Join(s.work, changing))
	err = errors.Join(err, os.Chmod(s.work, 0o755), os.Mkdir(s.folder, 0o755))
	if err != nil {
		_ = os.RemoveAll(s.work)
	}
	return err
}

// staging begins the names of directories with copies that are not installed yet.
const staging = ".staged-"

// Path is the executable to start, for tests before Commit.
func (s *Staged) Path() string {
	if s.base == "" {
		return filepath.Join(s.folder, entryName)
	}
	return filepath.Join(s.folder, s.base)
}

// Spec is the copy as a server would run it if it were installed with entry's Args, Limits and User.
func (s *Staged) Spec(entry Entry) pluginhost.Spec {
	return pluginhost.Spec{
		Path: filepath.Join(s.folder, s.base), Args: entry.Args, SHA256: s.SHA256, Limits: pluginhost.Limits(entry.Limits), User: entry.User,
	}
}

// Discard removes what there is of the copy. It is to be called in any case; after Commit the plugin stays.
func (s *Staged) Discard() {
	if s.lock != nil {
		_ = errors.Join(os.RemoveAll(s.work), s.lock.Release())
		s.lock = nil
	}
}

// Commit installs the copy under the name and version of its manifest, in place of a version that was there, if Admit
// lets it in. Of entry, Args, Limits, User, Tests and Enabled count. The files of the version before stay until the next
// one comes: a process of it may be at work for a while.
func (s *Staged) Commit(manifest, shipped *pluginv1.DescribeResponse, entry Entry) (Entry, error) {
	entry.Name, entry.PluginVersion = manifest.GetName(), manifest.GetVersion()
	entry.SHA256, entry.InstallTime = s.SHA256, time.Now().UTC().Truncate(time.Second)
	var err error
	if entry.Manifest, err = manifestJSON(manifest); err != nil {
		return Entry{}, err
	}
	err = s.dir.change(func(lock *Lock) error {
		if err := lock.admit(manifest, shipped); err != nil {
			return err
		}
		var before Entry
		if i, err := lock.find(entry.Name); err == nil {
			before = lock.Plugins[i]
			lock.Plugins = slices.Delete(lock.Plugins, i, i+1)
		}
		place, err := s.place(entry)
		if err != nil {
			return err
		}
		entry.Path = strings.TrimSuffix(place+"/"+filepath.ToSlash(s.base), "/")
		lock.Plugins = append(lock.Plugins, entry)
		return s.removeOthers(entry, before)
	})
	return entry, err
}

// place puts the copy where it stays and returns that. The very same version may be there already, with its files in use.
func (s *Staged) place(entry Entry) (string, error) {
	base := folderPath(folder(entry.Name)) + "/" + entry.PluginVersion + "-" + s.SHA256[:12]
	for n := 1; ; n++ {
		place := base
		if n > 1 { // what is there was damaged, and may be in use all the same
			place = fmt.Sprintf("%s.%d", base, n)
		}
		target := filepath.Join(s.dir.path, filepath.FromSlash(place))
		if _, err := os.Lstat(target); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return "", err
			}
			return place, errors.Join(syncTree(s.folder), os.Rename(s.folder, target), syncDir(filepath.Dir(target)))
		}
		if sum, err := pluginhost.Checksum(filepath.Join(target, s.base)); err == nil && sum == s.SHA256 {
			return place, nil
		}
	}
}

// removeOthers removes the versions of a plugin that are neither it nor the one before.
func (s *Staged) removeOthers(entry, before Entry) error {
	place := folderPath(folder(entry.Name))
	versions, err := os.ReadDir(filepath.Join(s.dir.path, filepath.FromSlash(place)))
	if err != nil {
		return err
	}
	for _, v := range versions {
		if own := place + "/" + v.Name(); !entry.within(own) && !before.within(own) {
			if err := os.RemoveAll(filepath.Join(s.dir.path, filepath.FromSlash(own))); err != nil {
				return err
			}
		}
	}
	return nil
}

// syncTree makes the names below a directory durable; files are when they have been copied.
func syncTree(root string) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		return syncDir(path)
	})
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
