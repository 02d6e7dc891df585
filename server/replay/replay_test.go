package replay_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/replay"
	"github.com/grapnel/grapnel/server/subscription"
)

// refusing is a journal with one replay, that refuses to note its end some times.
type refusing struct {
	replay.Journal
	one   delivery.Replay
	times int
	ended delivery.ReplayState
}

func (j *refusing) Partitions() int { return 1 }

func (j *refusing) Replays(delivery.NamespaceKey) ([]*delivery.Replay, error) {
	return []*delivery.Replay{&j.one}, nil
}

func (j *refusing) EndReplay(_ context.Context, _ delivery.NamespaceKey, _ uint64, state delivery.ReplayState, _ string) (*delivery.Replay, error) {
	if j.times--; j.times >= 0 {
		return nil, delivery.ErrRefused
	}
	j.ended = state
	if !j.one.State.Ended() {
		j.one.State, j.one.DoneTime = state, time.Now()
	}
	return &j.one, nil
}

type config struct{ snapshot *subscription.Snapshot }

func (c config) Snapshot() *subscription.Snapshot { return c.snapshot }

// The end of a replay is noted as soon as the journal takes it, and not only after the next start. Then it is told, and
// again after a start, for a day.
func TestEndIsNotedInTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		uid := [16]byte{15: 7}
		j := &refusing{one: delivery.Replay{Namespace: delivery.UID(uid).NamespaceKey(), Key: 1, ID: "r", State: delivery.ReplayRunning}, times: 3}
		snapshot := subscription.NewSnapshot(1, []*subscription.Namespace{{ID: "acme", UID: uid}}, nil)
		told := 0
		options := replay.Options{
			Journal: j, Registry: config{snapshot},
			Ended: func(one *delivery.Replay) {
				if told++; one.State != delivery.ReplaySucceeded {
					t.Errorf("told of %+v", one)
				}
			},
			Select: func(string, *delivery.ReplaySpec) (*replay.Selection, error) {
				return &replay.Selection{None: true}, nil
			},
		}
		run := func() {
			ctx, stop := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- replay.New(options).Run(ctx) }()
			time.Sleep(time.Minute)
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
		run()
		if j.ended != delivery.ReplaySucceeded || told != 1 {
			t.Errorf("after a minute it stands as %d, and was told %d times", j.ended, told)
		}
		if run(); told != 2 {
			t.Errorf("told %d times with another start", told)
		}
		time.Sleep(24 * time.Hour)
		if run(); told != 2 {
			t.Errorf("told %d times with a start a day later", told)
		}
	})
}

// failing is a journal with an erasure or a replay whose calls meet faults, one after the other, and then succeed.
type failing struct {
	refusing
	faults []error

	mu sync.Mutex
	// met are how many calls there were.
	met int
}

func (j *failing) call() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.met++; j.met <= len(j.faults) {
		return j.faults[j.met-1]
	}
	return nil
}

// stands is how many calls there were, and how the job has ended.
func (j *failing) stands() (met int, ended delivery.ReplayState) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.met, j.ended
}

func (j *failing) Counted() bool                                  { return true }
func (j *failing) ReplayOpen(delivery.NamespaceKey, uint64) int64 { return 0 }
func (j *failing) OpenIn(delivery.NamespaceKey) int64             { return 0 }

func (j *failing) StartReplay(context.Context, delivery.NamespaceKey, uint64) error { return j.call() }
func (j *failing) BeginErasure(context.Context, *delivery.Replay) error             { return j.call() }

func (j *failing) AdvanceReplay(context.Context, *delivery.Replay, uint16, *delivery.Picker, int) (delivery.Advance, error) {
	return delivery.Advance{Done: true}, j.call()
}

func (j *failing) AdvanceErasure(context.Context, *delivery.Replay, uint16, delivery.Selects, func()) (delivery.Advance, error) {
	return delivery.Advance{Done: true}, j.call()
}

func (j *failing) Scrub(context.Context, *delivery.Replay, delivery.Selects) (delivery.Proof, error) {
	return delivery.Proof{Bytes: 7}, j.call()
}

func (j *failing) EndErasure(_ context.Context, _ delivery.NamespaceKey, _ uint64, proof delivery.Proof) (*delivery.Replay, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.one.Proof, j.one.State, j.ended = proof, delivery.ReplaySucceeded, delivery.ReplaySucceeded
	return &j.one, nil
}

func (j *failing) EndReplay(ctx context.Context, ns delivery.NamespaceKey, key uint64, state delivery.ReplayState, reason string) (*delivery.Replay, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.one.Reason = reason
	return j.refusing.EndReplay(ctx, ns, key, state, reason)
}

// A fault that may pass is waited for, which a job says, with pauses that grow; only what cannot pass ends it.
func TestFaultsThatPassEndNoJob(t *testing.T) {
	uid := [16]byte{15: 7}
	snapshot := subscription.NewSnapshot(1, []*subscription.Namespace{{ID: "acme", UID: uid}}, nil)
	passing := []error{
		fmt.Errorf("flush: %w", syscall.ENOSPC), syscall.EMFILE, syscall.EIO, io.ErrUnexpectedEOF, context.Canceled,
		delivery.ErrRefused, delivery.ErrDiskFull, delivery.ErrStale,
	}
	for _, erase := range []bool{true, false} {
		for _, last := range []error{nil, fmt.Errorf("look: %w", &delivery.CorruptError{Reason: io.EOF}), delivery.ErrNotFound} {
			t.Run(fmt.Sprintf("erase %v, then %v", erase, last), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					j := &failing{refusing: refusing{one: delivery.Replay{
						Namespace: delivery.UID(uid).NamespaceKey(), Key: 1, ID: "r", State: delivery.ReplayRunning, Spec: delivery.ReplaySpec{Erase: erase},
					}}}
					// Each of the calls of a job meets all of them.
					for range 4 {
						j.faults = append(append(j.faults, passing...), nil)
					}
					if j.faults = j.faults[:len(j.faults)-1]; last != nil {
						j.faults = append(j.faults[:12], last)
					}
					r := replay.New(replay.Options{
						Journal: j, Registry: config{snapshot},
						Select: func(string, *delivery.ReplaySpec) (*replay.Selection, error) { return &replay.Selection{}, nil },
						Erases: func(*delivery.ReplaySpec) (delivery.Selects, error) {
							return func(*delivery.Event) bool { return true }, nil
						},
					})
					ctx, stop := context.WithCancel(t.Context())
					ended := make(chan error, 1)
					go func() { ended <- r.Run(ctx) }()
					for began, before := time.Now(), 0; time.Since(began) < time.Hour; time.Sleep(50 * time.Millisecond) {
						synctest.Wait()
						met, ended := j.stands()
						if ended != 0 {
							break
						}
						if met > before && r.WaitReason(j.one.Namespace, 1) == "" {
							t.Errorf("it does not say what it waits for after %v", j.faults[met-1])
						}
						before = met
					}
					stop()
					if err := <-ended; err != nil {
						t.Error(err)
					}
					switch {
					case last == nil && (j.ended != delivery.ReplaySucceeded || erase && j.one.Proof.Bytes != 7):
						t.Errorf("after %d calls it stands as %d: %s", j.met, j.ended, j.one.Reason)
					case last != nil && (j.ended != delivery.ReplayFailed || j.met != 13 || j.one.Reason == ""):
						t.Errorf("after %d calls it stands as %d: %s", j.met, j.ended, j.one.Reason)
					}
					if errors.Is(last, delivery.ErrNotFound) && j.one.Reason != "it was erased" {
						t.Errorf("it failed: %s", j.one.Reason)
					}
				})
			})
		}
	}
}
