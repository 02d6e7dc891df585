package plugindir

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/grapnel/grapnel/server/pluginhost"
)

// Specs are the plugins to run: those of the lock file, pinned and in the order in which they were installed, with the
// disabled ones marked, or without a lock file every executable file in the directory. A directory that does not exist has none.
func (d Dir) Specs() ([]pluginhost.Spec, error) {
	lock, locked, err := d.Read()
	if err != nil {
		return nil, err
	}
	if !locked {
		return d.executables()
	}
	slices.SortStableFunc(lock.Plugins, func(a, b Entry) int { return a.InstallTime.Compare(b.InstallTime) })
	var specs []pluginhost.Spec
	for _, e := range lock.Plugins {
		manifest, err := e.DescribeResponse()
		if err != nil {
			if !e.Enabled {
				continue
			}
			return nil, err
		}
		specs = append(specs, pluginhost.Spec{
			Name: e.Name, Path: filepath.Join(d.path, filepath.FromSlash(e.Path)), Args: e.Args, SHA256: e.SHA256,
			Manifest: manifest, Limits: pluginhost.Limits(e.Limits), User: e.User, Disabled: !e.Enabled,
		})
	}
	return specs, nil
}

// Strays are the executable files in the directory that do not run because there is a lock file, by name. The lock file's
// own are not among them.
func (d Dir) Strays() ([]string, error) {
	lock, locked, err := d.Read()
	if err != nil || !locked {
		return nil, err
	}
	found, err := d.executables()
	if err != nil {
		return nil, err
	}
	var strays []string
	for _, f := range found {
		name := filepath.Base(f.Path)
		if !slices.ContainsFunc(lock.Plugins, func(e Entry) bool { return e.within(name) }) {
			strays = append(strays, name)
		}
	}
	return strays, nil
}

func (d Dir) executables() ([]pluginhost.Spec, error) {
	entries, err := os.ReadDir(d.path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the plugin directory: %w", err)
	}
	var specs []pluginhost.Spec
	for _, e := range entries {
		path := filepath.Join(d.path, e.Name())
		info, err := os.Stat(path)
		if err != nil || strings.HasPrefix(e.Name(), ".") {
			continue // gone since, or a link to nothing; hidden files are nobody's plugin
		}
		if info.Mode().IsRegular() && (info.Mode()&0o111 != 0 || runtime.GOOS == "windows" && filepath.Ext(path) == ".exe") {
			specs = append(specs, pluginhost.Spec{Path: path})
		}
	}
	return specs, nil
}

// Watch calls update with the plugins to run whenever the lock file changes, or without one the executable
// files, until ctx ends, and once at its start. A change of the lock file is whole and counts at once; one of other
// files counts once it has lasted from one look to the next, so that a file that is being copied is not run
// half-way. Faults in reading go to failed; what ran goes on.
func (d Dir) Watch(ctx context.Context, every time.Duration, update func([]pluginhost.Spec), failed func(error)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	current, known := "", false
	seen := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, whole := d.print()
		settled := whole || now == seen
		seen = now
		if !settled || known && now == current {
			continue
		}
		current, known = now, true
		specs, err := d.Specs()
		if err != nil {
			failed(err)
			continue
		}
		update(specs)
	}
}

// print is what there is in the directory, in a form that changes when it does; whole says that it changes in one
// step.
func (d Dir) print() (text string, whole bool) {
	if info, err := os.Stat(filepath.Join(d.path, LockFile)); err == nil {
		return printOf(info), true
	}
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return "", false
	}
	var b strings.Builder
	for _, e := range entries {
		if info, err := os.Stat(filepath.Join(d.path, e.Name())); err == nil && info.Mode().IsRegular() {
			b.WriteString(printOf(info))
		}
	}
	return b.String(), false
}

func printOf(info fs.FileInfo) string {
	return fmt.Sprintf("%s %d %d %v\n", info.Name(), info.Size(), info.ModTime().UnixNano(), info.Mode())
}
