package delivery

import (
	"errors"
	"io/fs"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	defaultMinFree = 256 << 20
	defaultBallast = 64 << 20
	spaceInterval  = time.Second
	ballastName    = "ballast"
	// exhausted is the free space below which a disk counts as full: too little for what the stores write when
	// they open or commit.
	exhausted = 1 << 20
	// roomToOpen is what the stores may need to come up on a disk that others have filled.
	roomToOpen = 16 << 20
)

// SpaceOptions of a Space. Dir is required.
type SpaceOptions struct {
	// Dir holds the ballast; its disk is watched.
	Dir string
	// Also are further directories whose disks are watched, in case they are others. They need not exist.
	Also []string
	// MinFreeBytes and BallastBytes are as in Options.
	MinFreeBytes, BallastBytes int64
	// Logger is told when space gets short, once each time; nil discards.
	Logger *slog.Logger

	fs vfs.FS // tests
}

// Space watches the disk that the stores of a server share. Below the watermark nothing new is taken, so that what
// is left serves settles, deletions and compactions. Should the disk run full all the same, the ballast file is
// given up. Its methods may be called concurrently.
type Space struct {
	fs      vfs.FS
	dirs    []string
	ballast string // the file
	minFree uint64
	reserve uint64 // bytes of the ballast
	log     *slog.Logger

	isLow atomic.Bool
	free  atomic.Uint64

	filling atomic.Pointer[func(free, watermark uint64) bool] // told that the disk fills up
	fills   atomic.Bool                                       // and has been, since it last had room

	mu    sync.Mutex // guards what follows, and the ballast file
	holds bool       // there is a ballast file
	told  bool       // that the disk is full, since it last had room
}

// NewSpace looks at the disk. When it is all but full the ballast is given up at once, for a store that cannot
// write does not even open: call it before any is opened.
func NewSpace(o SpaceOptions) *Space {
	if o.fs == nil {
		o.fs = vfs.Default
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Space{
		fs: o.fs, dirs: append([]string{o.Dir}, o.Also...), ballast: o.fs.PathJoin(o.Dir, ballastName),
		log: o.Logger.With("component", "space"),
	}
	usage, err := o.fs.GetDiskUsage(o.Dir)
	switch {
	case o.MinFreeBytes > 0:
		s.minFree = uint64(o.MinFreeBytes)
	case o.MinFreeBytes == 0 && err == nil:
		s.minFree = min(defaultMinFree, usage.TotalBytes/10)
	}
	switch {
	case o.BallastBytes > 0:
		s.reserve = uint64(o.BallastBytes)
	case o.BallastBytes == 0:
		s.reserve = min(defaultBallast, s.minFree/4)
	}
	_, err = o.fs.Stat(s.ballast)
	s.holds = err == nil
	s.check()
	if s.low() && s.free.Load() < min(roomToOpen, s.reserve) {
		s.full()
	}
	return s
}

// newSpace is the space that a journal was given, or one of its own.
func newSpace(o Options, log *slog.Logger) *Space {
	if o.Space != nil {
		return o.Space
	}
	return NewSpace(SpaceOptions{Dir: o.Dir, MinFreeBytes: o.MinFreeBytes, BallastBytes: o.BallastBytes, Logger: log, fs: o.fs})
}

// OnFilling has f told that the free space, in bytes, is below twice the watermark, while what f stores is still taken: a
// disk that fills within a second is not told of. f reports whether it was heard, and is told once a second until then. It must
// not block.
func (s *Space) OnFilling(f func(free, watermark uint64) (heard bool)) { s.filling.Store(&f) }

// Err is ErrDiskFull while nothing new is to be taken, else nil.
func (s *Space) Err() error {
	if s.low() {
		return ErrDiskFull
	}
	return nil
}

// Free is the free space in bytes, as of a moment ago.
func (s *Space) Free() uint64 { return s.free.Load() }

func (s *Space) low() bool { return s.isLow.Load() }

// check compares the free space with the watermark. It takes an eighth more than the watermark to be let in
// again, so that the answer does not flicker.
func (s *Space) check() {
	avail, ok := s.available()
	if !ok {
		return
	}
	s.free.Store(avail)
	low := avail < s.minFree
	if s.isLow.Load() {
		low = avail < s.minFree+s.minFree/8
	}
	switch was := s.isLow.Swap(low); {
	case low && !was:
		s.log.Warn("the disk is nearly full: new events and changes of configuration are refused, deliveries and deletions go on",
			"dir", s.dirs[0], "free_bytes", avail, "min_free_bytes", s.minFree)
	case was && !low:
		s.mu.Lock()
		s.told = false
		s.mu.Unlock()
		s.log.Info("the disk has room again", "dir", s.dirs[0], "free_bytes", avail)
	}
	if !low {
		s.tellFilling(avail)
	}
	if low && avail < exhausted && s.minFree > 0 {
		s.full() // before a store runs into it that cannot try again
	}
}

// tellFilling tells once that the disk fills up, until it has a quarter of the watermark more than that takes.
func (s *Space) tellFilling(avail uint64) {
	f := s.filling.Load()
	switch {
	case f == nil:
	case avail < 2*s.minFree:
		if !s.fills.Load() {
			s.fills.Store((*f)(avail, s.minFree))
		}
	case avail >= 2*s.minFree+s.minFree/4:
		s.fills.Store(false)
	}
}

// available is the least free space of the disks.
func (s *Space) available() (least uint64, known bool) {
	for _, dir := range s.dirs {
		usage, err := s.fs.GetDiskUsage(dir)
		switch {
		case err == nil && (!known || usage.AvailBytes < least):
			least, known = usage.AvailBytes, true
		case err != nil && !errors.Is(err, vfs.ErrUnsupported) && !errors.Is(err, fs.ErrNotExist):
			s.log.Warn("free space is unknown", "dir", dir, "err", err.Error())
		}
	}
	return least, known
}

func (s *Space) watch(stop <-chan struct{}) {
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

// full gives the ballast up, if there is one, and says so once until there is room again. The file system calls it
// when a write found no room; the write is tried once more after it.
func (s *Space) full() {
	s.isLow.Store(true)
	s.mu.Lock()
	defer s.mu.Unlock()
	freed := uint64(0)
	if s.holds {
		if err := s.fs.Remove(s.ballast); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Error("the ballast cannot be given up", "file", s.ballast, "err", err.Error())
			return
		} else if err == nil {
			freed = s.reserve
		}
		s.holds = false
	}
	switch {
	case freed > 0:
		s.log.Error("the disk is full, the ballast was given up: free space", "dir", s.dirs[0], "freed_bytes", freed)
	case !s.told:
		s.log.Error("the disk is full and there is no ballast to give up: free space", "dir", s.dirs[0])
	}
	s.told = true
}

// fillBallast makes the ballast file when there is none and room enough for it. Where space cannot be reserved
// the file stays empty and the watermark alone has to do.
func (s *Space) fillBallast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve == 0 || s.holds || s.low() || s.free.Load() < s.minFree+2*s.reserve {
		return
	}
	file, err := s.fs.Create(s.ballast, vfs.WriteCategoryUnspecified)
	if err == nil {
		err = errors.Join(file.Preallocate(0, int64(s.reserve)), file.Close())
	}
	if err != nil {
		s.log.Warn("make ballast file", "err", err.Error())
	}
	s.holds = true
}
