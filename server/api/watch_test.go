package api_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
)

type watching = grpc.ServerStreamingClient[grapnelv1.WatchDeliveriesResponse]

// watch opens one and reads the heartbeat that it begins with.
func (st *station) watch(t *testing.T, filter, token string) (watching, string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := st.deliveries.WatchDeliveries(ctx, &grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", Filter: filter, ResumeToken: token})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if first.GetDelivery() != nil || first.GetResumeToken() == "" {
		t.Fatalf("the first message is %v", first)
	}
	return stream, first.GetResumeToken()
}

// told reads a change, whatever heartbeats come before it, as "event STATE".
func told(t *testing.T, stream watching) (what, token string) {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if d := m.GetDelivery(); d != nil {
			return strings.TrimPrefix(d.GetEvent(), "namespaces/acme/events/") + " " + strings.TrimPrefix(d.GetState().String(), "STATE_"), m.GetResumeToken()
		}
	}
}

func TestWatchDeliveries(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	all, begun := st.watch(t, "", "")
	failed, _ := st.watch(t, "state = EXHAUSTED AND event_type = order.created", "")
	none, _ := st.watch(t, "subscription = nobody", "")
	for _, id := range []string{"e1", "e2"} {
		if _, err := st.publish.Publish(t.Context(), publishText("acme", id, id)); err != nil {
			t.Fatal(err)
		}
		if what, _ := told(t, all); what != id+" PENDING" {
			t.Errorf("told %q", what)
		}
	}
	middle := ""
	jobs := st.takeJobs(t, 2)
	slices.SortFunc(jobs, func(a, b delivery.Job) int { return strings.Compare(a.Event.ID, b.Event.ID) })
	for _, job := range jobs {
		step, a := delivery.Step{State: delivery.Succeeded}, &delivery.Attempt{Number: 1, Start: time.Now(), Outcome: delivery.OutcomeSucceeded, ResponseCode: 204}
		if job.Event.ID == "e2" {
			step, a = delivery.Step{State: delivery.Exhausted, Reason: "attempts used up"}, &delivery.Attempt{Number: 1, Start: time.Now(), Outcome: delivery.OutcomeRetryable, ResponseCode: 503}
		}
		st.journal.Settle(&job, step, a, nil)
		what, token := told(t, all)
		if want := job.Event.ID + " " + map[string]string{"e1": "SUCCEEDED", "e2": "EXHAUSTED"}[job.Event.ID]; what != want {
			t.Errorf("told %q, want %q", what, want)
		}
		if middle == "" {
			middle = token
		}
	}
	m, err := failed.Recv()
	if err != nil || m.GetDelivery().GetLastAttempt().GetResponseCode() != 503 || m.GetDelivery().GetStateReason() != "attempts used up" {
		t.Errorf("told %v, %v", m, err)
	}
	// What follows a token comes once, in whatever order that of several deliveries is.
	if _, err := st.publish.Publish(t.Context(), publishText("acme", "e3", "last")); err != nil {
		t.Fatal(err)
	}
	for token, want := range map[string][]string{
		begun:  {"e1 PENDING", "e1 SUCCEEDED", "e2 EXHAUSTED", "e2 PENDING", "e3 PENDING"},
		middle: {"e2 EXHAUSTED", "e3 PENDING"},
	} {
		again, _ := st.watch(t, "", token)
		var got []string
		for range want {
			what, _ := told(t, again)
			got = append(got, what)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("told %q, want %q", got, want)
		}
	}
	st.server.Drain()
	if _, err := none.Recv(); err == nil {
		t.Error("told of another's delivery")
	} else {
		refused(t, err, codes.Unavailable, "DRAINING")
	}
}

// TestWatchRefuses says what is wrong, and how it would be right.
func TestWatchRefuses(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	for name, c := range map[string]struct {
		r      *grapnelv1.WatchDeliveriesRequest
		code   codes.Code
		reason string
		words  string
	}{
		"no namespace":  {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/nobody"}, codes.NotFound, "RESOURCE_NOT_FOUND", "namespaces/nobody"},
		"all of them":   {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/-"}, codes.InvalidArgument, "INVALID_FIELD", "namespaces/NAME"},
		"filter":        {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", Filter: "colour = red"}, codes.InvalidArgument, "INVALID_FILTER", "colour"},
		"in flight":     {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", Filter: "state = IN_FLIGHT"}, codes.InvalidArgument, "INVALID_FILTER", "PENDING or SCHEDULED"},
		"token":         {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", ResumeToken: "what?"}, codes.InvalidArgument, "INVALID_FIELD", "resume_token"},
		"another token": {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", ResumeToken: "AAAAAAAAAAEBAA"}, codes.OutOfRange, "RESUME_TOKEN_EXPIRED", "list"},
		"heartbeat":     {&grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", Heartbeat: durationpb.New(time.Hour)}, codes.InvalidArgument, "INVALID_FIELD", "heartbeat"},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := st.deliveries.WatchDeliveries(t.Context(), c.r)
			if err == nil {
				_, err = stream.Recv()
			}
			if refused(t, err, c.code, c.reason); !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v does not say %q", err, c.words)
			}
		})
	}
}

// TestWatchBeats: silence is told apart from a connection that is gone.
func TestWatchBeats(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	stream, err := st.deliveries.WatchDeliveries(t.Context(), &grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", Heartbeat: durationpb.New(time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if m, err := stream.Recv(); err != nil || m.GetDelivery() != nil || m.GetResumeToken() == "" {
			t.Errorf("%v, %v", m, err)
		}
	}
}

// TestWatchOfOneWhoDoesNotRead is cut off and told, and nothing is lost to whoever comes back.
func TestWatchOfOneWhoDoesNotRead(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.WatchPatience, o.MaxCallsPerNamespace = 50*time.Millisecond, 1 })
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	slow, token := st.watch(t, "", "")
	const events = 3000
	for i := 0; i < events; i += 100 {
		r := &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme"}
		for k := range 100 {
			r.Events = append(r.Events, publishText("acme", fmt.Sprint("e", i+k), "x").GetEvent())
		}
		if _, err := st.publish.BatchPublish(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { // as long as it is not cut off, its room is taken
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := st.deliveries.WatchDeliveries(ctx, &grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme"})
		if err == nil {
			_, err = stream.Recv()
		}
		return err == nil
	})
	seen := map[string]int{}
	var err error
	for {
		var m *grapnelv1.WatchDeliveriesResponse
		if m, err = slow.Recv(); err != nil {
			break
		}
		if token = m.GetResumeToken(); m.GetDelivery() != nil {
			seen[m.GetDelivery().GetName()]++
		}
	}
	r := refused(t, err, codes.Aborted, "SLOW_CONSUMER")
	if len(seen) == 0 || len(seen) >= events {
		t.Errorf("%d seen, then %+v", len(seen), r)
	}
	resumed := func() (again watching) {
		eventually(t, func() bool { // the one before has left
			stream, err := st.deliveries.WatchDeliveries(t.Context(), &grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme", ResumeToken: token})
			if err == nil {
				_, err = stream.Recv()
			}
			again = stream
			return err == nil
		})
		return again
	}
	for again := resumed(); len(seen) < events; {
		m, err := again.Recv()
		if status.Code(err) == codes.Aborted { // this reader is slow, too, where the machine is
			again = resumed()
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if token = m.GetResumeToken(); m.GetDelivery() != nil {
			seen[m.GetDelivery().GetName()]++
		}
	}
	for name, n := range seen {
		if n != 1 {
			t.Errorf("%s was told %d times", name, n)
		}
	}
}
