package dispatch_test

import (
	"context"
	"fmt"
	"iter"
	"sync/atomic"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/subscription"
)

// nullJournal counts settles and costs nothing.
type nullJournal struct {
	dispatch.Journal
	settled atomic.Int64
	want    int64
	done    chan struct{}
}

func (*nullJournal) Lanes() iter.Seq2[delivery.LaneState, error] {
	return func(func(delivery.LaneState, error) bool) {}
}

func (j *nullJournal) Settle(_ *delivery.Job, _ delivery.Step, _ *delivery.Attempt, done delivery.Settled) {
	done.Settled(1)
	if j.settled.Add(1) == j.want {
		close(j.done)
	}
}

func (*nullJournal) BlockedLanes() ([]delivery.LaneKey, error)        { return nil, nil }
func (*nullJournal) Now() time.Time                                   { return time.Now() }
func (*nullJournal) Failing() (map[delivery.LaneKey]time.Time, error) { return nil, nil }
func (*nullJournal) Hold(*delivery.Event)                             {}
func (*nullJournal) Release(*delivery.Event)                          {}
func (*nullJournal) EventBytes() int64                                { return 0 }

// pipe is an Attempter that answers from another goroutine, as the plugin host's receiver does.
type pipe chan flight

func (p pipe) Attempt(_ *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	p <- flight{job: job, sink: sink}
}

func (p pipe) AttemptBatch(_ *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink) {
	p <- flight{job: jobs[0], sink: sink}
}

type instant struct{}

func (instant) AttemptBatch(_ *subscription.Subscription, jobs []*delivery.Job, sink delivery.Sink) {
	sink.Complete(jobs[0], *ok())
}

func (instant) Attempt(_ *subscription.Subscription, job *delivery.Job, sink delivery.Sink) {
	sink.Complete(job, *ok())
}

// BenchmarkEngine reports the engine's own cost of a delivery, from Offer to Settle.
func BenchmarkEngine(b *testing.B) {
	for _, lanes := range []int{1, 10, 1000} {
		b.Run(fmt.Sprintf("instant/lanes=%d", lanes), func(b *testing.B) { benchmark(b, lanes, instant{}) })
		b.Run(fmt.Sprintf("stream/lanes=%d", lanes), func(b *testing.B) {
			p := make(pipe, 2048)
			go func() {
				for f := range p {
					f.sink.Complete(f.job, *ok())
				}
			}()
			benchmark(b, lanes, p)
			close(p)
		})
	}
}

func benchmark(b *testing.B, lanes int, attempter dispatch.Attempter) {
	journal := &nullJournal{want: int64(b.N), done: make(chan struct{})}
	reg := subs{}
	keys := make([]delivery.LaneKey, lanes)
	for i := range lanes {
		s := subscription.Of(&grapnelv1.Subscription{State: grapnelv1.Subscription_STATE_ACTIVE, Uri: "https://hooks.example.com/" + fmt.Sprint(i)})
		s.UID, s.NamespaceUID, s.MaxInFlight = uid(fmt.Sprint("sub", i)), uid("acme"), 64
		keys[i] = laneOf(s)
		reg[keys[i]] = s
	}
	e := dispatch.New(dispatch.Options{
		Journal: journal, Subscriptions: reg, Attempter: attempter, WindowBytes: 1 << 40,
	})
	go func() { _ = e.Run(context.Background()) }()
	time.Sleep(50 * time.Millisecond) // what is offered before the recovery ends is left on disk
	event := &delivery.Event{Namespace: acme(), AcceptTime: time.Now(), Payload: make([]byte, 1024)}
	b.ReportAllocs()
	b.ResetTimer()
	const group = 32
	for n := 0; n < b.N; {
		// A window's worth ahead of what is settled, so that nothing has to be left on disk.
		for int64(n)-journal.settled.Load() > 4000 {
			time.Sleep(20 * time.Microsecond)
		}
		jobs := make([]delivery.Job, min(group, b.N-n))
		partition := uint16(n / group % 16)
		for i := range jobs {
			n++
			jobs[i] = delivery.Job{
				ID:    delivery.ID{Seq: uint64(n), Partition: partition, Subscription: keys[n%lanes].Subscription},
				Event: event, Epoch: 1, MaxAttempts: 1,
			}
		}
		e.Offer(1, jobs)
	}
	<-journal.done
	b.StopTimer()
	_ = e.Stop(context.Background())
}

type subs map[delivery.LaneKey]*subscription.Subscription

func (s subs) Subscription(lane delivery.LaneKey) *subscription.Subscription { return s[lane] }
func (s subs) Deleted(delivery.LaneKey) bool                                 { return false }
func (s subs) DeadLetter(*subscription.Subscription) *delivery.DeadLetter    { return nil }
func (s subs) EndReason(delivery.LaneKey) string                             { return "subscription deleted" }
func (s subs) Weight(delivery.NamespaceKey) int                              { return 1 }
func (s subs) Closed(delivery.LaneKey) string                                { return "" }
