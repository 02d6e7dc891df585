package process

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// programName is the executable of a plugin that is a directory.
const programName = "plugin"

// Checksum is what Spec.SHA256 is compared with, in lower-case hex. Of a file it is the SHA-256 of its content.
// Of a directory it is the SHA-256 over the sorted lines "<SHA-256 of the content>  <path below the
// directory>\n" of all its regular files, as the shell prints it with
//
//	find . -type f -printf '%P\0' | xargs -0 sha256sum | LC_ALL=C sort | sha256sum
//
// Anything else in a directory, symbolic links above all, is refused, and so are names with a control character
// or a backslash. Modes and times do not count.
func Checksum(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		f, err := os.Open(path)
		if err != nil {
			return "", err
		}
		defer f.Close()
		return hashFile(f)
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sum, program, err := hashTree(root, func(string, fs.FileInfo) error { return nil })
	if program != nil {
		_ = program.Close()
	}
	return sum, err
}

func hashFile(f *os.File) (string, error) {
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return "", fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// hashTree hashes a directory and returns its program, open, as it was hashed; nil when there is none.
func hashTree(root *os.Root, check func(name string, info fs.FileInfo) error) (sum string, program *os.File, err error) {
	defer func() {
		if err != nil && program != nil {
			_ = program.Close()
			program = nil
		}
	}()
	var lines []string
	err = fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := root.Lstat(name)
		if err != nil {
			return err
		}
		if err := check(name, info); err != nil || info.IsDir() {
			return err
		}
		f, err := openHashed(root, name, info)
		if err != nil {
			return err
		}
		fileSum, err := hashFile(f)
		if name == programName && err == nil {
			program = f
		} else {
			_ = f.Close()
		}
		lines = append(lines, fileSum+"  "+name+"\n")
		return err
	})
	if err != nil {
		return "", program, err
	}
	slices.Sort(lines)
	hash := sha256.Sum256([]byte(strings.Join(lines, "")))
	return hex.EncodeToString(hash[:]), program, nil
}

// openHashed opens a regular file of a plugin's directory, and no other that has taken its place.
func openHashed(root *os.Root, name string, info fs.FileInfo) (*os.File, error) {
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file (%s); a plugin's directory holds files and directories only", path.Join(root.Name(), name), info.Mode().Type())
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }) {
		return nil, fmt.Errorf("%q: a file's name has a control character or a backslash", path.Join(root.Name(), name))
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	opened, err := f.Stat()
	if err == nil && !os.SameFile(info, opened) {
		err = errors.New("it changes while it is read")
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("read %s: %w", path.Join(root.Name(), name), err)
	}
	return f, nil
}
