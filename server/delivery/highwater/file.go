package highwater

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
)

// File takes the marks of a running journal. All methods may be called concurrently. There is one File for a path
// at any time, which the journal's own lock sees to.
type File struct {
	path   string
	header header
	layout layout
	salt   uint32
	parts  []part

	mu     sync.Mutex // held for Sync and Close; before a part's
	file   *os.File
	memory memory
	closed bool
}

// part is one partition's mark. It has a cache line of its own, and more.
type part struct {
	mu         sync.Mutex
	mark       Mark
	generation uint64
	noted      bool // since the last Sync
	err        error
	buf        [slotBytes]byte
}

// memory is a file's bytes. What store has returned for is in the file for every process that reads it, even if this
// one is killed; sync makes it outlive a power loss.
type memory interface {
	// store may be called concurrently for places that do not overlap.
	store(offset int, b []byte) error
	sync() error
	close() error
}

// Create makes the file at path, or puts one in the place of another, with these marks, which must be durable in
// the journal already: what is remembered after it never exceeds them and what is noted. When it returns, the
// file is on disk; when it fails or the process is killed, the one that was there still is. Journal is its id, 1
// to 32 bytes. It pairs with Close.
func Create(path, journal string, marks []Mark) (_ *File, err error) {
	if err := checkMarks(journal, marks); err != nil {
		return nil, fmt.Errorf("make high-water marks %s: %w", path, err)
	}
	f := &File{
		path: path, header: header{journal: journal, partitions: len(marks)},
		layout: layoutOf(len(marks)), salt: saltOf(journal), parts: make([]part, len(marks)),
	}
	b := make([]byte, f.layout.size)
	for c := range copies {
		copy(b[f.layout.headerOffset(c):], f.header.encode())
		for i, m := range marks {
			f.parts[i].mark = m
			f.parts[i].generation = uint64(c) + 1
			slot{Mark: m, generation: uint64(c) + 1}.encode(f.layout.slot(b, i, c), f.salt, i, c)
		}
	}
	if err := replace(path, b); err != nil {
		return nil, fmt.Errorf("make high-water marks: %w", err)
	}
	f.file, err = os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open high-water marks: %w", err)
	}
	f.memory = memoryOf(f.file, f.layout.size)
	return f, nil
}

// replace puts a file with these bytes at path, on disk as a whole or not at all. Every byte is written, for a store
// to a mapped hole would need space when there may be none.
func replace(path string, b []byte) (err error) {
	aside := path + ".new"
	f, err := os.OpenFile(aside, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(aside, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(aside))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil // a directory cannot be synced there
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Note remembers that everything up to m.Commit of a partition is durable; call it once the sync has returned. A
// mark below the last one changes nothing. It survives the process from here on, the machine after the next Sync.
// What goes wrong is returned by Sync. The partition is below the number of marks given to Create.
func (f *File) Note(partition uint16, m Mark) {
	p := &f.parts[partition]
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.Commit <= p.mark.Commit {
		return
	}
	p.mark = Mark{Commit: m.Commit, Seq: max(m.Seq, p.mark.Seq), Log: max(m.Log, p.mark.Log)}
	p.noted = true
	f.store(int(partition), p)
}

// store writes p's mark over the older of its slots; p.mu is held.
func (f *File) store(partition int, p *part) {
	if p.err != nil {
		return // what is there is true, if old
	}
	p.generation++
	c := int(p.generation-1) % copies
	slot{Mark: p.mark, generation: p.generation}.encode(p.buf[:], f.salt, partition, c)
	p.err = f.memory.store(f.layout.slotOffset(partition, c), p.buf[:])
}

// State is what the file remembers now.
func (f *File) State() State {
	f.mu.Lock()
	s := State{Source: f.path, Journal: f.header.journal, Clean: f.header.clean, Marks: make([]Mark, len(f.parts))}
	f.mu.Unlock()
	for i := range f.parts {
		p := &f.parts[i]
		p.mu.Lock()
		s.Marks[i] = p.mark
		p.mu.Unlock()
	}
	return s
}

// Sync makes what has been noted outlive a power loss, and puts it into both copies of each mark. Call it about once a
// second; it costs nothing when nothing was noted. An error means that what is remembered is true but old, and
// stays so: a later start notices less.
func (f *File) Sync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return fmt.Errorf("sync high-water marks %s: %w", f.path, os.ErrClosed)
	}
	return f.sync()
}

func (f *File) sync() error {
	var noted bool
	for i := range f.parts {
		p := &f.parts[i]
		p.mu.Lock()
		if p.noted {
			noted, p.noted = true, false
			f.store(i, p)
		}
		err := p.err
		p.mu.Unlock()
		if err != nil {
			return fmt.Errorf("note high-water mark in %s: %w", f.path, err)
		}
	}
	if !noted {
		return nil
	}
	if err := f.memory.sync(); err != nil {
		return fmt.Errorf("sync high-water marks %s: %w", f.path, err)
	}
	return nil
}

// Close syncs and closes the file. Clean says that the journal has been closed in order, with everything in it durable
// and noted; it is remembered. A Note that follows is not kept. Only the first call does anything.
func (f *File) Close(clean bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	err := f.sync()
	if clean && err == nil {
		err = f.storeClean()
	}
	f.refuse()
	return errors.Join(err, f.memory.close(), f.file.Close())
}

// refuse keeps a late Note from memory that is no longer the file's.
func (f *File) refuse() {
	for i := range f.parts {
		p := &f.parts[i]
		p.mu.Lock()
		p.err = os.ErrClosed
		p.mu.Unlock()
	}
}

// storeClean is called when the marks are on disk, so that "clean" is never there without them.
func (f *File) storeClean() error {
	f.header.clean = true
	b := f.header.encode()
	var err error
	for c := range copies {
		err = errors.Join(err, f.memory.store(f.layout.headerOffset(c), b))
	}
	if err = errors.Join(err, f.memory.sync()); err != nil {
		return fmt.Errorf("close high-water marks %s: %w", f.path, err)
	}
	return nil
}

// plain writes to the file, where it cannot be mapped.
type plain struct{ file *os.File }

func (m plain) store(offset int, b []byte) error {
	_, err := m.file.WriteAt(b, int64(offset))
	return err
}

func (m plain) sync() error { return m.file.Sync() }

func (m plain) close() error { return nil }
