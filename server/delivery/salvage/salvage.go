// Package salvage looks at a journal's directory from outside, when Pebble refuses it or has found less in it than
// there was: which of its files are damaged and where, and what of them can still be read. Check only looks. Copy
// makes a new directory with every row that can be read and never changes the old one.
//
// It reads logs and tables by itself, with Pebble's own readers, because Pebble stops at the first thing that it
// cannot read.
package salvage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/objstorage/objstorageprovider"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Report is what was found, and for Copy what was made of it.
type Report struct {
	// Dir is the directory that was looked at.
	Dir      string
	Manifest Manifest
	// Logs are by number, and Tables are those that count, by number.
	Logs   []Log
	Tables []Table
	// Rows is how many there are in the end, with their keys and values counted in Bytes.
	Rows, Bytes uint64
	// To is the directory that Copy made.
	To string
}

// Damaged says whether something that was written cannot be read. That it is false does not mean that nothing is missing:
// a newest log that was cut off or deleted leaves no trace here.
func (r *Report) Damaged() bool {
	for _, l := range r.Logs {
		if l.Damaged() {
			return true
		}
	}
	for _, t := range r.Tables {
		if t.Damaged() {
			return true
		}
	}
	return !r.Manifest.Trusted()
}

// Lost is how many entries of tables and how many changes of logs are known to be missing. Where a log's gap is not
// followed by a batch, or a table does not tell, there are more.
func (r *Report) Lost() (n uint64) {
	for _, l := range r.Logs {
		if l.Needed {
			n += l.Skipped
		}
	}
	for _, t := range r.Tables {
		n += t.Lost()
	}
	return n
}

// Write says it all to people: a line for each file that matters, those that are damaged with their places.
func (r *Report) Write(w io.Writer) error {
	p := printer{w: w}
	if r.Manifest.Trusted() {
		p.printf("%s: intact", r.Manifest.Path)
	} else {
		for _, line := range r.Manifest.damage(r.Dir) {
			p.printf("%s", line)
		}
		p.printf("all tables and logs are used, so rows that were erased or changed may come back")
	}
	var whole, entries uint64
	for _, t := range r.Tables {
		if !t.Damaged() {
			whole++
			entries += t.Entries
			continue
		}
		for _, d := range t.Damage {
			p.printf("%s: DAMAGED: %s", t.Path, d)
		}
		p.printf("%s: %d of %d entries can be read", t.Path, t.Read, t.Entries)
	}
	p.printf("%d tables with %d entries are intact", whole, entries)
	for _, l := range r.Logs {
		for _, line := range l.text() {
			if l.Damaged() {
				line = "DAMAGED: " + line
			}
			p.printf("%s: %s", l.Path, line)
		}
	}
	p.printf("%d rows, %d bytes, can be read", r.Rows, r.Bytes)
	if r.To != "" {
		p.printf("they are in %s", r.To)
	}
	return p.err
}

type printer struct {
	w   io.Writer
	err error
}

func (p *printer) printf(format string, args ...any) {
	if p.err == nil {
		_, p.err = fmt.Fprintf(p.w, format+"\n", args...)
	}
}

// Check reads everything in the directory of a journal that is not open; nothing is changed but that the lock file is
// taken meanwhile. Damage is in the report; an error says that the directory itself cannot be read, is in use, or holds no
// journal (ErrNone). It
// needs memory for three times the logs, and one open file for each table.
func Check(ctx context.Context, dir string) (*Report, error) {
	r, err := look(ctx, dir, func(_, _ []byte) error { return nil })
	if err != nil {
		return nil, fmt.Errorf("check journal %s: %w", dir, err)
	}
	return r, nil
}

// Copy makes the directory to, which must not exist, with all rows that can be read in dir, in a database of the newest
// format. It is complete and durable when Copy returns; before, it has another name. Options are those that the
// database will be used with; nil means Pebble's own. What is said of Check is true of Copy, too.
func Copy(ctx context.Context, dir, to string, options *pebble.Options) (*Report, error) {
	r, err := copyRows(ctx, dir, to, options)
	if err != nil {
		return nil, fmt.Errorf("salvage journal %s: %w", dir, err)
	}
	return r, nil
}

func copyRows(ctx context.Context, dir, to string, options *pebble.Options) (*Report, error) {
	if _, err := os.Stat(to); !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%s exists already; a new directory is needed", to), err)
	}
	aside := to + ".new"
	out, err := newOutput(aside, options)
	if err != nil {
		return nil, err
	}
	r, err := look(ctx, dir, out.set)
	if err = errors.Join(err, out.close(ctx, err == nil)); err != nil {
		return nil, errors.Join(err, os.RemoveAll(aside))
	}
	if err := os.Rename(aside, to); err != nil {
		return nil, err
	}
	r.To = to
	return r, syncDir(filepath.Dir(to))
}

func syncDir(dir string) error {
	d, err := vfs.Default.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// look reads all there is and visits every row.
func look(ctx context.Context, dir string, visit func(key, value []byte) error) (_ *Report, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(entries, ofDatabase) {
		return nil, fmt.Errorf("%w: %d files are in it, and none of a journal", ErrNone, len(entries))
	}
	defer LeaveAsFound(dir)()
	lock, err := pebble.LockDirectory(dir, vfs.Default)
	if err != nil {
		return nil, fmt.Errorf("it is in use: %w", err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	names := fileNames(entries)
	logs, v, err := readDir(dir, names, true)
	if err != nil {
		return nil, err
	}
	tables, err := openTables(dir, names, v)
	defer func() {
		for _, t := range tables {
			_ = t.close() // it was only read
		}
	}()
	if err != nil {
		return nil, err
	}
	r := &Report{Dir: dir, Manifest: v.Manifest}
	if err := r.count(ctx, logs, tables, visit); err != nil {
		return nil, err
	}
	for _, l := range logs {
		r.Logs = append(r.Logs, l.Log)
	}
	for _, t := range tables {
		r.Tables = append(r.Tables, t.Table)
	}
	return r, nil
}

// ErrNone says that there is no journal in a directory.
var ErrNone = errors.New("this is no journal")

// ofDatabase reports whether a file is one that only a database has.
func ofDatabase(e os.DirEntry) bool {
	name := e.Name()
	return strings.HasPrefix(name, "MANIFEST-") || strings.HasPrefix(name, "marker.") || slices.Contains([]string{".sst", ".log"}, filepath.Ext(name))
}

// LeaveAsFound returns what takes the lock file of a database away again, if there is none yet: who only looks leaves no
// trace. It is called when nothing holds the lock any more.
func LeaveAsFound(dir string) func() {
	const lock = "LOCK"
	if _, err := os.Lstat(filepath.Join(dir, lock)); !errors.Is(err, fs.ErrNotExist) {
		return func() {}
	}
	return func() { _ = os.Remove(filepath.Join(dir, lock)) } // one that stays does no harm
}

func fileNames(entries []os.DirEntry) (names []string) {
	for _, e := range entries {
		if e.Type().IsRegular() {
			names = append(names, e.Name())
		}
	}
	return names
}

// readDir reads logs and manifest, with what is in the logs if that is to be kept.
func readDir(dir string, names []string, keep bool) ([]*logFile, version, error) {
	logs, err := readLogs(dir, names, keep)
	if err != nil {
		return nil, version{}, err
	}
	v := readManifest(dir, names, logs)
	if v.Trusted() {
		v.takeIn(logs)
	} else {
		for _, l := range logs {
			l.Needed = true
		}
		v.after = 0
	}
	linkLogs(logs, v.after, v.taken())
	return logs, v, nil
}

func openTables(dir string, names []string, v version) (tables []*tableFile, err error) {
	for _, name := range names {
		n, ok := numbered(name, ".sst")
		if !ok {
			continue
		}
		r, ok := v.counts(n)
		if !ok {
			continue
		}
		t, err := openTable(filepath.Join(dir, name), r)
		if err != nil {
			return tables, err
		}
		tables = append(tables, t)
	}
	return tables, nil
}

// count visits the rows.
func (r *Report) count(ctx context.Context, logs []*logFile, tables []*tableFile, visit func(key, value []byte) error) error {
	recent, erased := ofLogs(logs)
	sources := []source{recent}
	for _, t := range tables {
		sources = append(sources, t)
		erased = append(erased, t.erased...)
	}
	return newMerged(sources, erased).each(func(key, value []byte) error {
		r.Rows++
		r.Bytes += uint64(len(key) + len(value))
		if r.Rows%4096 == 0 && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return visit(key, value)
	})
}

// tableBytes is about how large the tables of a copy are.
const tableBytes = 64 << 20

// output makes a database of rows that come in order.
type output struct {
	dir     string
	options *pebble.Options
	db      *pebble.DB
	writer  *sstable.Writer
	size    int
	paths   []string
}

func newOutput(dir string, options *pebble.Options) (*output, error) {
	if options == nil {
		options = &pebble.Options{}
	}
	options = options.Clone()
	options.FS, options.FormatMajorVersion, options.ErrorIfExists = vfs.Default, pebble.FormatNewest, true
	if options.Logger == nil {
		options.Logger = silent{}
	}
	if err := os.RemoveAll(dir); err != nil { // an interrupted copy
		return nil, err
	}
	db, err := pebble.Open(dir, options)
	if err != nil {
		return nil, err
	}
	options.EnsureDefaults()
	return &output{dir: dir, options: options, db: db}, nil
}

// set adds a row.
func (o *output) set(key, value []byte) error {
	if o.writer != nil && o.size > tableBytes {
		if err := o.finish(); err != nil {
			return err
		}
	}
	if o.writer == nil {
		path := filepath.Join(o.dir, fmt.Sprintf("rows-%06d", len(o.paths)))
		f, err := vfs.Default.Create(path, vfs.WriteCategoryUnspecified)
		if err != nil {
			return err
		}
		o.paths = append(o.paths, path)
		const bottom = 6
		o.writer = sstable.NewWriter(objstorageprovider.NewFileWritable(f), o.options.MakeWriterOptions(bottom, o.db.TableFormat()))
		o.size = 0
	}
	o.size += len(key) + len(value)
	return o.writer.Set(key, value)
}

func (o *output) finish() error {
	w := o.writer
	o.writer = nil
	if w == nil {
		return nil
	}
	return w.Close()
}

// close takes the rows into the database if complete is set.
func (o *output) close(ctx context.Context, complete bool) error {
	err := o.finish()
	if err == nil && complete && len(o.paths) > 0 {
		err = o.db.Ingest(ctx, o.paths)
	}
	return errors.Join(err, o.db.Close())
}
