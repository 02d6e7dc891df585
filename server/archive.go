package server

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// archiveFormat is the version of the format of backups: a tar file that begins with archivedAbout and ends with
// archivedSums, which `sha256sum -c` reads. Without that end it is cut off.
const (
	archiveFormat   = 1
	archivedAbout   = "backup.json"
	archivedConfig  = "configuration.jsonl"
	archivedMarks   = "marks"
	archivedKey     = "secret.key"
	archivedJournal = "journal"
	archivedSums    = "SHA256SUMS"
)

// maxSums bounds what is kept in memory of a backup: some hundred thousand files.
const maxSums = 32 << 20

// writeArchive writes the files in dir, and returns how many bytes that were.
func writeArchive(w io.Writer, dir string) (size int64, err error) {
	names := []string{archivedAbout, archivedConfig, archivedMarks}
	if _, err := os.Stat(filepath.Join(dir, archivedKey)); err == nil {
		names = append(names, archivedKey)
	}
	files, err := os.ReadDir(filepath.Join(dir, archivedJournal))
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		if f.Type().IsRegular() {
			names = append(names, archivedJournal+"/"+f.Name())
		}
	}
	counted := &countingWriter{w: w}
	buffered := bufio.NewWriterSize(counted, 256<<10)
	tw := tar.NewWriter(buffered)
	var sums bytes.Buffer
	for _, name := range names {
		sum, err := archiveFile(tw, dir, name)
		if err != nil {
			return counted.n, fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(&sums, "%s  %s\n", sum, name)
	}
	if err := tw.WriteHeader(archiveHeader(archivedSums, int64(sums.Len()))); err != nil {
		return counted.n, err
	}
	if _, err := tw.Write(sums.Bytes()); err != nil {
		return counted.n, err
	}
	err = errors.Join(tw.Close(), buffered.Flush())
	return counted.n, err
}

func archiveHeader(name string, size int64) *tar.Header {
	return &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: size, ModTime: time.Now().Truncate(time.Second)}
}

func archiveFile(tw *tar.Writer, dir, name string) (sum string, err error) {
	file, err := os.Open(filepath.Join(dir, filepath.FromSlash(name)))
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	if err := tw.WriteHeader(archiveHeader(name, info.Size())); err != nil {
		return "", err
	}
	hash := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(tw, hash), file, info.Size()); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// errCutOff says that a backup has no end.
var errCutOff = errors.New("the backup is cut off")

// readArchive reads a backup to its end and compares all checksums. Each file goes to create, whose result is closed; nil
// for create reads only. Names are those of a backup, and none comes twice.
func readArchive(r io.Reader, create func(name string) (io.WriteCloser, error)) (about aboutBackup, err error) {
	tr := tar.NewReader(bufio.NewReaderSize(r, 256<<10))
	seen := map[string]string{}
	for {
		header, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			return about, fmt.Errorf("%w: it has no %s at its end", errCutOff, archivedSums)
		case err != nil:
			return about, fmt.Errorf("this is no backup: %w", err)
		}
		name := header.Name
		if len(seen) == 0 && name != archivedAbout || header.Typeflag != tar.TypeReg || !archived(name) {
			return about, fmt.Errorf("this is no backup: it holds %q", name)
		}
		if _, again := seen[name]; again {
			return about, fmt.Errorf("this is no backup: it holds %s twice", name)
		}
		if name == archivedSums {
			return about, checkSums(tr, header.Size, seen)
		}
		if name == archivedAbout {
			if about, seen[name], err = readAbout(tr, create); err != nil {
				return about, err
			}
			continue
		}
		if seen[name], err = extract(tr, name, create); err != nil {
			return about, err
		}
	}
}

// archived reports whether a backup may have a file of that name.
func archived(name string) bool {
	switch name {
	case archivedAbout, archivedConfig, archivedMarks, archivedKey, archivedSums:
		return true
	}
	base, ok := strings.CutPrefix(name, archivedJournal+"/")
	return ok && base != "" && base != "." && base != ".." && !strings.ContainsAny(base, `/\:`)
}

func readAbout(r io.Reader, create func(string) (io.WriteCloser, error)) (about aboutBackup, sum string, err error) {
	var text bytes.Buffer
	if sum, err = extract(io.TeeReader(io.LimitReader(r, 1<<16), &text), archivedAbout, create); err != nil {
		return about, sum, err
	}
	if err := json.Unmarshal(text.Bytes(), &about); err != nil {
		return about, sum, fmt.Errorf("this is no backup: %s: %w", archivedAbout, err)
	}
	if about.Format != archiveFormat {
		return about, sum, fmt.Errorf("the backup has format %d, this grapnel reads format %d", about.Format, archiveFormat)
	}
	return about, sum, nil
}

func extract(r io.Reader, name string, create func(string) (io.WriteCloser, error)) (sum string, err error) {
	hash := sha256.New()
	to := io.Writer(hash)
	if create != nil {
		var file io.WriteCloser
		if file, err = create(name); err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, file.Close()) }()
		to = io.MultiWriter(hash, file)
	}
	_, err = io.Copy(to, r)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("%w in %s", errCutOff, name)
	}
	return hex.EncodeToString(hash.Sum(nil)), err
}

// checkSums compares what was read with what the end of the backup says of it.
func checkSums(r io.Reader, size int64, seen map[string]string) error {
	if size > maxSums {
		return fmt.Errorf("this is no backup: %s has %d bytes", archivedSums, size)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("%w in %s", errCutOff, archivedSums)
	}
	named := 0
	for line := range strings.Lines(string(text)) {
		sum, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		switch got, ok := seen[name]; {
		case !ok:
			return fmt.Errorf("the backup is damaged: %s is missing in it", name)
		case got != sum:
			return fmt.Errorf("the backup is damaged: %s has SHA-256 %s, and should have %s", name, got, sum)
		}
		named++
	}
	if named != len(seen) {
		return fmt.Errorf("the backup is damaged: %d of its %d files have no checksum", len(seen)-named, len(seen))
	}
	return nil
}

// Backup says what a backup is.
type Backup struct {
	// Journal is the ID of its journal, Version that of the server, Time when it was made.
	Journal, Version string
	Time             time.Time
	// SecretKey says that the key of the secrets is in it.
	SecretKey bool
	// Erasures had been completed before it was made, the newest first, 200 at the most: what they have purged is not in it.
	// What others have purged since may be.
	Erasures []Erased
}

// Erased is an erasure that has succeeded.
type Erased struct {
	// Name is namespaces/{namespace}/erasures/{erasure}.
	Name      string    `json:"name"`
	Completed time.Time `json:"completed"`
}

func (a aboutBackup) public() Backup {
	return Backup{Journal: a.Journal, Version: a.Version, Time: a.Time, SecretKey: a.SecretKey, Erasures: a.Erasures}
}

// CheckBackup reads a backup to its end, and returns an error when it is cut off, damaged, or none.
func CheckBackup(r io.Reader) (Backup, error) {
	about, err := readArchive(r, nil)
	return about.public(), err
}
