package delivery

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/grapnel/grapnel/server/delivery/highwater"
	"github.com/grapnel/grapnel/server/delivery/salvage"
)

// markEvery is how often what is known to be durable is made to outlive a power loss.
const markEvery = time.Second

// LossError says that a journal holds less than it is known to have held, and what to do.
type LossError struct {
	// Dir is the journal's directory.
	Dir string
	// Reason names what is missing and who knows: usually a *highwater.LossError.
	Reason error
}

func (e *LossError) Error() string {
	return fmt.Sprintf("journal %s holds less than was acknowledged: %v; `grapnel journal check` shows what can be read, "+
		"`grapnel journal salvage` copies it, and --accept-loss starts with what there is", e.Dir, e.Reason)
}

// Unwrap returns the reason.
func (e *LossError) Unwrap() error { return e.Reason }

// guard has the files looked at before they are opened for writing, for then Pebble drops what it takes for the end of
// its log, and deletes what its manifest does not name. A log that may have lost its end is compared with what is known
// while it is only read.
func (j *Journal) guard(o Options) (err error) {
	if o.fs != vfs.Default || o.AcceptLoss {
		return nil
	}
	doubt, err := salvage.Guard(o.Dir)
	if err != nil || !doubt || o.HighWater == "" {
		return err
	}
	known, err := highwater.Read(o.HighWater)
	if err != nil {
		return nil // openMarks says so
	}
	seen, err := openStopped(o.Dir, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, seen.db.Close()) }()
	for _, p := range seen.partitions {
		if err := p.load(); err != nil {
			return err
		}
	}
	return seen.Check(known, false)
}

// openMarks compares what was found with what is known to have been durable, and begins to take note of what
// becomes so.
func (j *Journal) openMarks(o Options) error {
	if o.HighWater == "" {
		return nil
	}
	found := j.found()
	known, err := highwater.Read(o.HighWater)
	var damage *highwater.DamageError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if found.any() {
			j.log.Warn("there is no note of what was acknowledged; a loss before this start would not be noticed here", "file", o.HighWater)
		}
		known.Marks = make([]highwater.Mark, len(found))
	case errors.As(err, &damage):
		j.log.Error("the note of what was acknowledged cannot be read; a loss before this start would not be noticed here", "err", err)
		known.Marks = make([]highwater.Mark, len(found))
	case err != nil:
		return err
	default:
		if err := j.Check(known, o.AcceptLoss); err != nil {
			return err
		}
	}
	if doubt := known.Doubt(); doubt != nil && err == nil {
		j.log.Warn("a part of the note of what was acknowledged cannot be read", "err", doubt)
	}
	for i := range known.Marks {
		if i < len(found) && known.Marks[i].Commit > found[i].Commit {
			known.Marks[i] = found[i]
		}
	}
	j.marks, err = highwater.Create(o.HighWater, j.ID(), known.Marks[:min(len(known.Marks), len(found))])
	return err
}

type foundMarks []highwater.Mark

func (f foundMarks) any() bool {
	for _, m := range f {
		if m.Commit > 0 {
			return true
		}
	}
	return false
}

// found is what the journal holds.
func (j *Journal) found() foundMarks {
	found := make(foundMarks, len(j.partitions))
	for i, p := range j.partitions {
		found[i] = p.applied()
	}
	return found
}

// Check compares the journal with what another place remembers of it: a *LossError when something is missing,
// unless that is accepted, and an error when the place remembers another journal. Call it before Start.
func (j *Journal) Check(known highwater.State, acceptLoss bool) error {
	if err := known.CheckJournal(j.ID()); err != nil {
		return fmt.Errorf("%w: %w", ErrStranger, err)
	}
	err := known.Compare(j.found())
	if err == nil {
		return nil
	}
	if !acceptLoss {
		return &LossError{j.dir, err}
	}
	j.log.Error("started with less than was acknowledged, as was asked for", "err", err)
	return j.ForgetWatches()
}

// Marks is what is known to be durable now, to be kept in another place too. Without Options.HighWater it has no
// marks.
func (j *Journal) Marks() highwater.State {
	if j.marks == nil {
		return highwater.State{Journal: j.ID()}
	}
	return j.marks.State()
}

// applied is the newest commit of a partition that is visible.
func (p *partition) applied() highwater.Mark {
	p.visible.RLock()
	defer p.visible.RUnlock()
	return highwater.Mark{Commit: uint64(p.index), Seq: p.appliedSeq, Log: p.j.logNumber.Load()}
}

// durable notes that a partition's commits up to a mark are durable.
func (j *Journal) durable(partition uint16, m highwater.Mark) {
	if j.marks != nil {
		j.marks.Note(partition, m)
	}
}

// keepMarks makes the marks outlive a power loss, now and then.
func (j *Journal) keepMarks() {
	tick := time.NewTicker(markEvery)
	defer tick.Stop()
	for failed := false; ; {
		select {
		case <-j.stop:
			return
		case <-tick.C:
		}
		err := j.marks.Sync()
		if err != nil && !failed {
			j.log.Error("what is acknowledged is not noted any more; a loss after this would be noticed less well", "err", err)
		}
		failed = err != nil
	}
}
