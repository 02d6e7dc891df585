package delivery

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// lockedLog is a log that may be written to and read at once.
type lockedLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedLog) lines(containing string) (found []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.text.String()) {
		if strings.Contains(line, containing) {
			found = append(found, line)
		}
	}
	return found
}

// TestBallastIsGivenUpBeforeStoresOpen: on a full disk a store that cannot write does not even open.
func TestBallastIsGivenUpBeforeStoresOpen(t *testing.T) {
	fs := vfs.NewMem()
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30})
	log := &lockedLog{}
	o := SpaceOptions{MinFreeBytes: 1 << 30, BallastBytes: 64 << 20, Logger: slog.New(slog.NewTextHandler(log, nil)), fs: fs}
	s := NewSpace(o)
	s.fillBallast()
	if _, err := fs.Stat(ballastName); err != nil || s.Err() != nil {
		t.Fatalf("with room: ballast %v, refused %v", err, s.Err())
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 500 << 20, TotalBytes: 20 << 30})
	s = NewSpace(o)
	if _, err := fs.Stat(ballastName); err != nil || !errors.Is(s.Err(), ErrDiskFull) {
		t.Fatalf("below the watermark: ballast %v, refused %v", err, s.Err())
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 0, TotalBytes: 20 << 30})
	s = NewSpace(o)
	if _, err := fs.Stat(ballastName); err == nil || !errors.Is(s.Err(), ErrDiskFull) {
		t.Fatalf("on a full disk: the ballast is still there, refused %v", s.Err())
	}
	fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30})
	s.check()
	s.fillBallast()
	if _, err := fs.Stat(ballastName); err != nil || s.Err() != nil {
		t.Errorf("with room again: ballast %v, refused %v", err, s.Err())
	}
}

// TestFullDiskIsToldOnce: an episode is one line, which claims what was done, and another one has its own.
func TestFullDiskIsToldOnce(t *testing.T) {
	mem := vfs.NewMem()
	roomy := vfs.DiskUsage{AvailBytes: 10 << 30, TotalBytes: 20 << 30}
	mem.TestingSetDiskUsage(roomy)
	fs := &faultFS{FS: mem}
	log := &lockedLog{}
	b := newBench(t, func(o *Options) {
		o.fs, o.MinFreeBytes, o.BallastBytes, o.Logger = fs, 1<<30, 1<<20, slog.New(slog.NewTextHandler(log, nil))
	})
	for episode := 1; episode <= 2; episode++ {
		mem.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: 0, TotalBytes: 20 << 30})
		var full error = syscall.ENOSPC
		for range 48 {
			fs.err.Store(&full)
			b.space.full() // as the file system does at each write that finds no room
			fs.err.Store(nil)
			b.space.check()
			b.space.fillBallast()
		}
		told := log.lines("level=ERROR")
		if len(told) != episode || !strings.Contains(told[episode-1], "the ballast was given up") || !strings.Contains(told[episode-1], "freed_bytes=1048576") {
			t.Fatalf("episode %d is told as %q", episode, told)
		}
		mem.TestingSetDiskUsage(roomy)
		b.space.check()
		b.space.fillBallast()
	}
	if told := log.lines("has room again"); len(told) != 2 {
		t.Errorf("the ends are told as %q", told)
	}
}

// A disk that fills up is told of while there is still room for what is made of that, until it is heard, and once each time.
func TestFillingDiskIsTold(t *testing.T) {
	fs := vfs.NewMem()
	room := func(mib uint64) { fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: mib << 20, TotalBytes: 20 << 30}) }
	room(10_000)
	s := NewSpace(SpaceOptions{MinFreeBytes: 1000 << 20, fs: fs})
	told, heard := 0, false
	s.OnFilling(func(free, watermark uint64) bool {
		if told++; free != s.Free() || watermark != 1000<<20 || s.Err() != nil {
			t.Errorf("told of %d of %d, refused %v", free, watermark, s.Err())
		}
		return heard
	})
	for _, step := range []struct {
		mib   uint64
		heard bool
		want  int
	}{{2000, true, 0}, {1999, false, 1}, {1800, true, 1}, {1500, true, 0}, {2100, true, 0}, {1900, true, 0}, {2250, true, 0}, {900, true, 0}, {1200, true, 1}} {
		told, heard = 0, step.heard
		room(step.mib)
		s.check()
		if told != step.want {
			t.Errorf("at %d MiB it was told %d times, want %d", step.mib, told, step.want)
		}
	}
}
