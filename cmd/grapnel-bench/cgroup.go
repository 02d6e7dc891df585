package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// memoryGroup is a control group of our own that bounds the memory of a server and its plugins together.
type memoryGroup struct {
	dir string
	// what the two versions of control groups call it
	limit, peak, events string
}

// newMemoryGroup makes one with so many MiB, below the root of version 2 or else of version 1. It fails where this
// process may not, for example for want of root's rights.
func newMemoryGroup(mib int) (*memoryGroup, error) {
	name := fmt.Sprintf("grapnel-bench-%d-%d", os.Getpid(), mib)
	v2 := &memoryGroup{dir: filepath.Join("/sys/fs/cgroup", name), limit: "memory.max", peak: "memory.peak", events: "memory.events"}
	v1 := &memoryGroup{
		dir: filepath.Join("/sys/fs/cgroup/memory", name), limit: "memory.limit_in_bytes",
		peak: "memory.max_usage_in_bytes", events: "memory.oom_control",
	}
	var errs []error
	for _, g := range []*memoryGroup{v2, v1} {
		err := g.make(mib)
		if err == nil {
			return g, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

func (g *memoryGroup) make(mib int) error {
	// Where no controllers are, a directory could be made all the same and would bound nothing.
	if _, err := os.Stat(filepath.Join(filepath.Dir(g.dir), "cgroup.procs")); err != nil {
		return err
	}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return err
	}
	limit := strconv.Itoa(mib << 20)
	if err := g.write(g.limit, limit); err != nil {
		return errors.Join(err, g.remove())
	}
	if got := g.read(g.limit); strings.TrimSpace(got) != limit {
		return errors.Join(fmt.Errorf("%s of %s is %q, want %s", g.limit, g.dir, got, limit), g.remove())
	}
	return nil
}

// take puts a process into the group; the processes that it starts from then on are in it too.
func (g *memoryGroup) take(pid int) error { return g.write("cgroup.procs", strconv.Itoa(pid)) }

// kills is how many processes of the group were ended for want of memory.
func (g *memoryGroup) kills() int {
	for line := range strings.Lines(g.read(g.events)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			kills, _ := strconv.Atoi(strings.TrimSpace(n))
			return kills
		}
	}
	return 0
}

// most is the highest use of the group in MiB, with the files that the kernel keeps for it in memory; 0 when it is not told.
func (g *memoryGroup) most() float64 {
	n, _ := strconv.ParseFloat(strings.TrimSpace(g.read(g.peak)), 64)
	return n / (1 << 20)
}

// emptied removes the group once the processes in it are gone: a plugin notices the end of its server a little later.
func (g *memoryGroup) emptied(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	for {
		err := g.remove()
		if err == nil {
			return nil
		}
		if sleep(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("remove the control group: %w", err)
		}
	}
}

// remove needs a group without processes.
func (g *memoryGroup) remove() error { return os.Remove(g.dir) }

func (g *memoryGroup) write(file, value string) error {
	return os.WriteFile(filepath.Join(g.dir, file), []byte(value), 0o644)
}

func (g *memoryGroup) read(file string) string {
	raw, _ := os.ReadFile(filepath.Join(g.dir, file))
	return string(raw)
}
