package process

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Spec is what to run, and how.
type Spec struct {
	// Path of the executable, or of a directory with an executable called plugin in it; absolute.
	Path string
	Args []string
	// Own says that the program is the caller's own. On Linux it is run as it was when the caller itself was started,
	// whatever has become of Path since; elsewhere one that has changed since it was first opened is refused. Its
	// limits are set right after its start, as far as the system lets us: it is trusted to start.
	Own bool
	// SHA256 pins the program: Checksum of Path, in hex. A pinned one is opened once without following a link,
	// must not be writable by its group or by others, and on Linux what was hashed is what is run, whatever
	// happens to the path. Empty runs whatever is there.
	SHA256 string
	// SoftMemoryBytes is told to a Go program as its GOMEMLIMIT; 0 tells nine tenths of what Limits say, if anything.
	SoftMemoryBytes uint64
	// Limits of the process. Linux only: elsewhere a process with limits does not start.
	Limits Limits
	// Yields is by how much the process is nicer (nice(2)) than the caller: of processors that are short it gets less.
	// Nothing on other systems than Linux.
	Yields int
	// User to run as: a name or a number, and after a colon a group. Empty is the caller's own. It needs a
	// caller that runs as root, on Linux: otherwise the process does not start.
	User string
}

// Limits of a process; zero sets none.
type Limits struct {
	// MemoryBytes is the most private writable memory that the process gets, RLIMIT_DATA. Address space that is
	// only reserved, of which Go and Node take much, is not counted. A Go program is told nine tenths of it as its
	// GOMEMLIMIT, if nothing else, so that it collects garbage before it fails. Go programs need some 64 MiB.
	MemoryBytes uint64
	// OpenFiles is RLIMIT_NOFILE.
	OpenFiles uint64
	// Processes is RLIMIT_NPROC, of processes and threads. The kernel counts all of a user's together and exempts
	// root, so it needs a User.
	Processes uint64
}

// Image is what was found at a path. The zero Image is of nothing.
type Image struct {
	// SHA256 is the Checksum, in lower-case hex.
	SHA256 string
	stamp  stamp
}

// Current reports whether path still holds the image, as far as can be told without reading it all. Of the zero Image
// that is not known, and true.
func (i Image) Current(path string) bool { return i.stamp == nil || i.stamp.current(path) }

// Program is a Spec's program: found, opened and checked. Close it once a Child has started it.
type Program struct {
	spec Spec
	// Image is what there is, also when Open has refused it.
	Image Image
	// path is what the process is called; it is run by it, too, when there is no file.
	path string
	// file is run instead of path, so that nothing can come between check and start.
	file *os.File
	user *account // nil for the caller's own
}

// Close lets go of the opened file.
func (g *Program) Close() {
	if g.file != nil {
		_ = g.file.Close()
	}
}

// OfAnotherUser reports whether the process runs as another user than the caller.
func (g *Program) OfAnotherUser() bool { return g.user != nil }

// Open finds the spec's program, and compares it when it is pinned: one that does not match is an error, and so is
// what this system cannot do. known is what Open has seen before, which spares it to read the same again. The returned
// Program has its Image also beside an error, if there is one.
func Open(s Spec, known Image) (*Program, error) {
	g := &Program{spec: s, path: s.Path}
	if s.Own {
		return g, g.openOwn(known)
	}
	if err := s.possible(); err != nil {
		return g, err
	}
	var err error
	if g.user, err = lookUser(s.User); err != nil {
		return g, err
	}
	info, err := os.Stat(s.Path)
	if err != nil {
		return g, err
	}
	if info.IsDir() {
		g.path = filepath.Join(s.Path, programName)
	}
	seen, err := stampOf(s.Path)
	if err != nil {
		return g, err
	}
	var sum string
	switch {
	case s.SHA256 != "":
		sum, err = g.pin(info.IsDir())
	case known.SHA256 != "" && known.stamp.equal(seen):
		sum = known.SHA256
	default:
		sum, err = Checksum(s.Path)
	}
	if err != nil {
		g.Close()
		return g, err
	}
	g.Image = Image{SHA256: sum, stamp: seen}
	if s.SHA256 != "" && !strings.EqualFold(sum, s.SHA256) {
		g.Close()
		return g, fmt.Errorf("%s has SHA-256 %s, want %s", s.Path, sum, s.SHA256)
	}
	return g, nil
}

// openOwn opens the caller's own program.
func (g *Program) openOwn(known Image) error {
	f, err := openSelf(g.spec.Path)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return err
	}
	g.Image = Image{SHA256: known.SHA256, stamp: stamp{{info: info}}}
	if known.SHA256 == "" || !known.stamp.equal(g.Image.stamp) {
		if g.Image.SHA256, err = hashFile(f); err != nil {
			_ = f.Close()
			return err
		}
	}
	if known.SHA256 != "" && known.SHA256 != g.Image.SHA256 {
		_ = f.Close()
		return fmt.Errorf("%s is not the program any more that this server was started from; start the server again", g.spec.Path)
	}
	g.runFile(f)
	return nil
}

// pin opens what is to be run without following a link, and hashes what it has opened.
func (g *Program) pin(dir bool) (string, error) {
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

func (g *Program) pinTree() (string, error) {
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
	opened, err := root.Stat(".")
	if err == nil && !os.SameFile(info, opened) {
		err = fmt.Errorf("%s changes while it is read", g.spec.Path)
	}
	if err != nil {
		return "", err
	}
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
func (g *Program) runFile(f *os.File) {
	if !canRunFiles {
		_ = f.Close()
		return
	}
	g.file = f
}

// othersCannotWrite is about who could change a pinned file, or what is in a pinned directory: its owner above all.
func othersCannotWrite(path string, info fs.FileInfo) error {
	if uid, known := owner(info); known && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d: a pinned plugin must belong to root or to the server's user, %d; chown it", path, uid, os.Geteuid())
	}
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

// ownedByUs reports whether a file is the caller's, where there are owners.
func ownedByUs(info fs.FileInfo) bool {
	uid, known := owner(info)
	return !known || uid == os.Geteuid()
}

// current reports whether path still has the stamp. One that cannot be read has changed.
func (s stamp) current(path string) bool {
	now, err := stampOf(path)
	return err == nil && s.equal(now)
}
