package pluginhost

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// program is what a spec has run: found, opened and checked. Close it once the process has started.
type program struct {
	spec Spec
	// path is what the process is called; it is run by it, too, when there is no file.
	path string
	// file is run instead of path, so that nothing can come between check and start.
	file *os.File
	user *account // nil for the server's own
}

func (g *program) close() {
	if g.file != nil {
		_ = g.file.Close()
	}
}

// prepare finds the spec's program, and compares it when it is pinned. A pinned plugin that does not match does not
// start; it is a status like any other.
func (p *process) prepare() (*program, error) {
	g := &program{spec: p.spec, path: p.spec.Path}
	if err := p.spec.possible(); err != nil {
		return nil, err
	}
	var err error
	if g.user, err = lookUser(p.spec.User); err != nil {
		return nil, err
	}
	info, err := os.Stat(p.spec.Path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		g.path = filepath.Join(p.spec.Path, programName)
	}
	seen, err := stampOf(p.spec.Path)
	if err != nil {
		return nil, err
	}
	var sum string
	switch {
	case p.spec.SHA256 != "":
		sum, err = g.pin(info.IsDir())
	case p.unchanged(seen):
		return g, nil
	default:
		sum, err = Checksum(p.spec.Path)
	}
	if err != nil {
		g.close()
		return nil, err
	}
	p.mu.Lock()
	p.checksum, p.stamp = sum, seen
	p.mu.Unlock()
	if p.spec.SHA256 != "" && !strings.EqualFold(sum, p.spec.SHA256) {
		g.close()
		return nil, fmt.Errorf("%s has SHA-256 %s, want %s", p.spec.Path, sum, p.spec.SHA256)
	}
	return g, nil
}

func (p *process) unchanged(now stamp) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.checksum != "" && p.stamp.equal(now)
}

// pin opens what is to be run without following a link, and hashes what it has opened.
func (g *program) pin(dir bool) (string, error) {
	if dir {
		return g.pinTree()
	}
	f, err := openNoFollow(g.path)
	if err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", g.path)
	}
	if err == nil {
		err = othersCannotWrite(g.path, info)
	}
	var sum string
	if err == nil {
		sum, err = hashFile(f)
	}
	if err != nil {
		_ = f.Close()
		return "", err
	}
	g.runFile(f)
	return sum, nil
}

func (g *program) pinTree() (string, error) {
	info, err := os.Lstat(g.spec.Path)
	if err != nil {
		return "", err
	}
	if info.Mode().Type() == fs.ModeSymlink {
		return "", fmt.Errorf("%s is a symbolic link; a pinned plugin is named by its real path", g.spec.Path)
	}
	root, err := os.OpenRoot(g.spec.Path)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sum, f, err := hashTree(root, func(name string, info fs.FileInfo) error {
		return othersCannotWrite(filepath.Join(g.spec.Path, name), info)
	})
	if err != nil {
		return "", err
	}
	if f == nil {
		return "", fmt.Errorf("%s has no file called %s", g.spec.Path, programName)
	}
	head := make([]byte, 2)
	if _, err := f.ReadAt(head, 0); err == nil && string(head) == "#!" {
		// A script finds what lies beside it by its own path, so it is run by that; whoever could put another one
		// there could change those files as well.
		return sum, f.Close()
	}
	g.runFile(f)
	return sum, nil
}

// runFile has f run itself, where the system can do that.
func (g *program) runFile(f *os.File) {
	if !canRunFiles {
		_ = f.Close()
		return
	}
	g.file = f
}

func othersCannotWrite(path string, info fs.FileInfo) error {
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s has mode %04o: a pinned plugin must not be writable by its group or by others; chmod go-w it", path, info.Mode().Perm())
	}
	return nil
}

// stamp tells cheaply whether a plugin's files are still the same: which ones they are, when they were written, and
// how long they are.
type stamp []stamped

type stamped struct {
	name string
	info fs.FileInfo
}

func stampOf(path string) (stamp, error) {
	info, err := os.Stat(path)
	if err != nil || !info.IsDir() {
		return stamp{{info: info}}, err
	}
	var out stamp
	err = filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		info, err := entry.Info()
		out = append(out, stamped{name, info})
		return err
	})
	return out, err
}

func (s stamp) equal(o stamp) bool {
	return slices.EqualFunc(s, o, func(a, b stamped) bool {
		return a.name == b.name && os.SameFile(a.info, b.info) && a.info.ModTime().Equal(b.info.ModTime()) && a.info.Size() == b.info.Size()
	})
}

// current reports whether path still has the stamp. One that cannot be read has changed.
func (s stamp) current(path string) bool {
	now, err := stampOf(path)
	return err == nil && s.equal(now)
}
