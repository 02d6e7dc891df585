package delivery

import (
	"errors"
	"fmt"
	"os"

	"github.com/cockroachdb/pebble/v2"

	"github.com/grapnel/grapnel/server/delivery/highwater"
)

// Checkpoint makes a copy of the journal in dir, which must not exist and be on the journal's disk: all that was
// acknowledged before the call is in it, and nothing that is accepted after it has returned. Tables are linked, so the
// copy takes little room until compactions and retention would have freed theirs. Commits wait while the log is copied,
// of which little is left then. What it returns are marks that the copy reaches. An error leaves no dir.
func (j *Journal) Checkpoint(dir string) (marks highwater.State, err error) {
	leave, err := j.enter()
	if err != nil {
		return marks, err
	}
	defer leave()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("copy the journal to %s: %w", dir, err), os.RemoveAll(dir))
		}
	}()
	if err := j.db.Flush(); err != nil {
		return marks, err
	}
	// A log that is written to meanwhile would be copied with holes, which look like damage.
	j.still.Lock()
	defer j.still.Unlock()
	marks = j.Marks()
	return marks, j.db.Checkpoint(dir, pebble.WithFlushedWAL())
}
