package salvage

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// DamageError says that files of a journal are damaged, and what to do.
type DamageError struct {
	// Dir is the journal's directory.
	Dir string
	// Files are the findings, each beginning with the path of the file.
	Files []string
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("journal %s is damaged: %s; `grapnel journal check %s` shows all of it, and "+
		"`grapnel journal salvage %s NEW-DIR` copies what can be read", e.Dir, strings.Join(e.Files, "; "), e.Dir, e.Dir)
}

// Guard looks at logs and manifest of dir before Pebble opens them, and returns a *DamageError for what Pebble would
// pass over in silence, or refuse without naming file and place: Pebble drops what is behind damage, and deletes
// tables of which a damaged manifest does not know. A directory that is not there, or holds no journal, is none of
// its business. It reads the logs once, and has one at a time in memory; of tables it only looks at their
// size.
//
// Doubt says that the newest log has readable batches behind something that cannot be read, and that nothing in it
// proves that they had been synced. A power loss leaves that, where nothing is lost that was promised, and so does
// damage. Opening the journal for writing drops them for good: if high-water marks are kept, compare them with a journal
// that has been opened for reading only, first.
func Guard(dir string) (doubt bool, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at journal: %w", err)
	}
	names := fileNames(entries)
	if !slices.ContainsFunc(names, isOfJournal) {
		return false, nil
	}
	lock, err := pebble.LockDirectory(dir, vfs.Default)
	if err != nil {
		return false, fmt.Errorf("journal %s is in use: %w", dir, err)
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	logs, v, err := readDir(dir, names, false)
	if err != nil {
		return false, fmt.Errorf("look at journal: %w", err)
	}
	damage := &DamageError{Dir: dir}
	if !v.Trusted() && !empty(names, logs) {
		damage.Files = append(damage.Files, v.Manifest.damage(dir)...)
	}
	for _, l := range logs {
		if text := l.certain(); text != "" {
			damage.Files = append(damage.Files, l.Path+": "+text)
		}
		doubt = doubt || l.Needed && l.Behind > 0
	}
	damage.Files = append(damage.Files, v.cutTables(dir)...)
	if len(damage.Files) > 0 {
		return false, damage
	}
	return doubt, nil
}

// cutTables are tables that do not have the size with which they were made.
func (v version) cutTables(dir string) (found []string) {
	for _, n := range slices.Sorted(maps.Keys(v.tables)) {
		path := filepath.Join(dir, fmt.Sprintf("%06d.sst", n))
		info, err := os.Stat(path)
		if want := v.tables[n].bytes; err == nil && want != 0 && info.Size() != want {
			found = append(found, fmt.Sprintf("%s: it has %d bytes, and had %d", path, info.Size(), want))
		}
	}
	return found
}

// empty says whether nothing was ever written: the database was not yet made completely.
func empty(names []string, logs []*logFile) bool {
	table := slices.ContainsFunc(names, func(name string) bool { _, ok := numbered(name, ".sst"); return ok })
	return !table && !slices.ContainsFunc(logs, func(l *logFile) bool { return l.Batches > 0 || len(l.Gaps) > 0 })
}

// isOfJournal says whether a file is a log, a table, or tells of a manifest.
func isOfJournal(name string) bool {
	_, log := numbered(name, ".log")
	_, table := numbered(name, ".sst")
	return log || table || isMarker(name) || strings.HasPrefix(name, "MANIFEST-")
}

// certain says what of a log had been synced, or closed, and cannot be read.
func (l Log) certain() string {
	if !l.Needed {
		return ""
	}
	for _, g := range l.Gaps {
		if g.Synced || !l.Newest {
			return fmt.Sprintf("%s; %d batches behind it can be read", g, l.Behind)
		}
	}
	switch {
	case l.Ending == Cut && !l.Newest:
		return fmt.Sprintf("its end is missing from offset %d on", l.End)
	case l.Skipped > 0 && len(l.Gaps) == 0:
		return fmt.Sprintf("%d changes before it or in it are missing; is a log with a lower number missing?", l.Skipped)
	}
	return ""
}
