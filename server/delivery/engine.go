package delivery

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	defaultMemTableBytes = 32 << 20
	// maxMemTables bounds the log that a crash leaves to be replayed, and memory while flushes are slow.
	maxMemTables  = 4
	bloomBits     = 10
	maxOpenTables = 1000
	// flushDelay is how long a range that retention has erased may wait for its table.
	flushDelay = time.Minute
	baseLevel  = 128 << 20
	// compactAt is high because compactions, not appends, take most of the processor time: waiting for more
	// tables merges the same bytes less often. Reads, which are few, look at more tables. Pebble begins at half of it: with
	// memtables of 16 MiB after some 256 MiB that were written.
	compactAt = 32
	// stopWritesAt is high because the journal's load is short bursts that compaction catches up with.
	stopWritesAt = 64
)

// pebbleOptions: most keys are written once or twice, read once soon after, and erased by range days later.
// Tables are compressed with the cheapest codec, and every one has a filter, because each append asks for an
// event id that is usually not there.
func (j *Journal) pebbleOptions(o Options) *pebble.Options {
	po := &pebble.Options{
		FS:                          vfs.OnDiskFull(reusedLogs{o.fs, j}, j.space.full),
		FormatMajorVersion:          pebble.FormatNewest,
		CacheSize:                   o.CacheBytes,
		MemTableSize:                uint64(o.MemTableBytes),
		MemTableStopWritesThreshold: maxMemTables,
		L0CompactionThreshold:       compactAt,
		L0StopWritesThreshold:       stopWritesAt,
		LBaseMaxBytes:               baseLevel,
		MaxOpenFiles:                maxOpenTables,
		FlushDelayDeleteRange:       flushDelay,
		CompactionConcurrencyRange:  func() (int, int) { return 1, 2 },
		Logger:                      pebbleLogger{j},
		EventListener:               j.listener(),
	}
	po.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionFastest })
	for i := range po.Levels {
		po.Levels[i].FilterPolicy = bloom.FilterPolicy(bloomBits)
		po.Levels[i].BlockSize = 16 << 10
	}
	return po
}

func (j *Journal) listener() *pebble.EventListener {
	return &pebble.EventListener{
		// As text: the errors print their stacks otherwise.
		BackgroundError: func(err error) { j.log.Error("journal background work", "err", err.Error()) },
		WALCreated:      func(info pebble.WALCreateInfo) { j.logNumber.Store(uint64(info.FileNum)) },
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			j.log.Error("journal corruption", "file", info.Path, "err", info.Details.Error())
		},
		DiskSlow:        func(info pebble.DiskSlowInfo) { j.log.Warn("journal's disk is slow", "file", info.Path) },
		WriteStallBegin: func(info pebble.WriteStallBeginInfo) { j.log.Warn("journal writes wait", "reason", info.Reason) },
		WriteStallEnd:   func() { j.log.Info("journal writes go on") },
	}
}

// pebbleLogger passes Pebble's messages on. After a failed write to its log Pebble calls Fatalf and goes on as
// if nothing were wrong when that returns, so it does not.
type pebbleLogger struct{ j *Journal }

func (l pebbleLogger) Infof(format string, args ...any) {
	if l.j.log.Enabled(context.Background(), slog.LevelDebug) {
		l.j.log.Debug("pebble", "detail", fmt.Sprintf(format, args...))
	}
}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.j.log.Error("pebble", "err", fmt.Sprintf(format, args...))
}

func (l pebbleLogger) Fatalf(format string, args ...any) { l.j.die(fmt.Sprintf(format, args...)) }
