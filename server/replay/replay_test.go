package replay_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
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
		snapshot := subscription.NewSnapshot(1, []*subscription.Namespace{{ID: "acme", UID: uid, Proto: &grapnelv1.Namespace{}}}, nil)
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
