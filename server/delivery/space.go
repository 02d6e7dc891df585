package delivery

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	defaultMinFree = 256 << 20
	defaultBallast = 64 << 20
	spaceInterval  = time.Second
	ballastName    = "ballast"
	flushDelay     = time.Minute
)

// space watches the disk. Below the watermark appends are refused, so that what is left serves settles and
// compactions. Should the disk run full all the same, the ballast file is given up.
type space struct {
	fs      vfs.FS
	dir     string
	minFree uint64
	ballast uint64
	log     *slog.Logger

	isLow   atomic.Bool
	free    atomic.Uint64
	dropped atomic.Bool // there is no ballast
}

func newSpace(o Options, log *slog.Logger) *space {
	s := &space{fs: o.fs, dir: o.Dir, log: log}
	s.dropped.Store(true)
	usage, err := o.fs.GetDiskUsage(o.Dir)
	switch {
	case o.MinFreeBytes > 0:
		s.minFree = uint64(o.MinFreeBytes)
	case o.MinFreeBytes == 0 && err == nil:
		s.minFree = min(defaultMinFree, usage.TotalBytes/10)
	}
	switch {
	case o.BallastBytes > 0:
		s.ballast = uint64(o.BallastBytes)
	case o.BallastBytes == 0:
		s.ballast = min(defaultBallast, s.minFree/4)
	}
	s.check()
	return s
}

func (s *space) low() bool { return s.isLow.Load() }

// check compares the free space with the watermark. It takes an eighth more than the watermark to be let in
// again, so that the answer does not flicker.
func (s *space) check() {
	usage, err := s.fs.GetDiskUsage(s.dir)
	if err != nil {
		if !errors.Is(err, vfs.ErrUnsupported) {
			s.log.Warn("free space of the journal's disk is unknown", "err", err)
		}
		return
	}
	s.free.Store(usage.AvailBytes)
	low := usage.AvailBytes < s.minFree
	if s.isLow.Load() {
		low = usage.AvailBytes < s.minFree+s.minFree/8
	}
	if s.isLow.Swap(low) != low {
		s.log.Warn("journal's disk space", "low", low, "free_bytes", usage.AvailBytes, "min_free_bytes", s.minFree)
	}
}

func (s *space) watch(stop <-chan struct{}) {
	tick := time.NewTicker(spaceInterval)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			s.check()
			s.fillBallast()
		}
	}
}

// full is called by the file system when a write found no room; the write is tried once more after it.
func (s *space) full() {
	s.isLow.Store(true)
	s.dropped.Store(true)
	err := s.fs.Remove(s.fs.PathJoin(s.dir, ballastName))
	s.log.Error("journal's disk is full, ballast given up", "err", err)
}

// fillBallast makes the ballast file when there is none and room enough for it. Where space cannot be reserved
// the file stays empty and the watermark alone has to do.
func (s *space) fillBallast() {
	if s.ballast == 0 || !s.dropped.Load() || s.low() || s.free.Load() < s.minFree+2*s.ballast {
		return
	}
	file, err := s.fs.Create(s.fs.PathJoin(s.dir, ballastName), vfs.WriteCategoryUnspecified)
	if err == nil {
		err = errors.Join(file.Preallocate(0, int64(s.ballast)), file.Close())
	}
	if err != nil {
		s.log.Warn("make ballast file", "err", err)
	}
	s.dropped.Store(false)
}
