package replay

import (
	"context"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// erase makes the steps of an erasure in all partitions, and then has the files written anew that held what it has purged,
// until nothing is left; 0 says that ctx has ended.
func (r *Runner) erase(ctx context.Context, j *job) (delivery.ReplayState, string) {
	selects, err := r.erases(&j.Spec)
	if err != nil {
		return delivery.ReplayFailed, "what it selects cannot be read: " + err.Error()
	}
	wait := waiting{j: j}
	for {
		err := r.journal.BeginErasure(context.WithoutCancel(ctx), j.Replay)
		if err == nil {
			break
		}
		if state, reason, ok := r.again(ctx, &wait, err, lookLatest); !ok {
			return state, reason
		}
	}
	for partition := 0; partition < r.journal.Partitions(); {
		if reason := r.without(j.Namespace); reason != "" {
			return delivery.ReplayFailed, reason
		}
		began := time.Now()
		made, err := r.eraseStep(ctx, j, uint16(partition), selects)
		switch {
		case ctx.Err() != nil:
			return 0, ""
		case err != nil:
			if state, reason, ok := r.again(ctx, &wait, err, lookLatest); !ok {
				return state, reason
			}
			continue
		case made.Done:
			partition++
		}
		wait.over()
		if !sleep(ctx, min(restFor*time.Since(began), restMost)) {
			return 0, ""
		}
	}
	return r.prove(ctx, j, selects)
}

// without says that a namespace is deleted, with all that is in it.
func (r *Runner) without(ns delivery.NamespaceKey) string {
	snapshot := r.registry.Snapshot()
	if _, gone := snapshot.Deleted(uint64(ns)); gone {
		return "the namespace is deleted"
	}
	return ""
}

// eraseStep makes one step, when it is this erasure's turn.
func (r *Runner) eraseStep(ctx context.Context, j *job, partition uint16, selects delivery.Selects) (delivery.Advance, error) {
	select {
	case r.step <- struct{}{}:
		defer func() { <-r.step }()
	case <-ctx.Done():
		return delivery.Advance{}, context.Cause(ctx)
	}
	// Whoever cancels, or stops, waits for a step that has begun.
	whole := context.WithoutCancel(ctx)
	if err := r.note(whole, j); err != nil {
		return delivery.Advance{}, err
	}
	began := time.Now()
	return r.journal.AdvanceErasure(whole, j.Replay, partition, selects, func() {
		if ctx.Err() != nil {
			return
		}
		<-r.step // others have their turns meanwhile
		sleep(ctx, min(restFor*time.Since(began), restMost))
		r.step <- struct{}{}
		began = time.Now()
	})
}

// prove has files written anew until none holds anything that the erasure selects.
func (r *Runner) prove(ctx context.Context, j *job, selects delivery.Selects) (delivery.ReplayState, string) {
	wait := waiting{j: j}
	for {
		proof, err := r.look(ctx, j, selects)
		if err == nil {
			j.proof = proof
			break
		}
		if state, reason, ok := r.again(ctx, &wait, err, faultLatest); !ok {
			return state, reason
		}
	}
	// One that has begun since has what is there now.
	for r.copied() {
		if !wait.on(ctx, "a backup is being taken", lookLatest) {
			return 0, ""
		}
	}
	return delivery.ReplaySucceeded, ""
}

// look has files looked through, when it is this erasure's turn.
func (r *Runner) look(ctx context.Context, j *job, selects delivery.Selects) (delivery.Proof, error) {
	select {
	case r.scrub <- struct{}{}:
		defer func() { <-r.scrub }()
	case <-ctx.Done():
		return delivery.Proof{}, context.Cause(ctx)
	}
	j.waits("files are being looked through, and written anew")
	return r.journal.Scrub(ctx, j.Replay, selects)
}
