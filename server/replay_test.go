package server_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// once has deliveries end at their first failure.
func once(sub *grapnelv1.Subscription) { sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 1} }

type replayer struct {
	t *testing.T
	*servertest.Server
	grapnelv1.ReplayServiceClient
}

func newReplayer(t *testing.T, s *servertest.Server) *replayer {
	return &replayer{t, s, grapnelv1.NewReplayServiceClient(s.Conn)}
}

func anHourAgo() *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-time.Hour)) }

// run starts a job of acme and waits for its end.
func (r *replayer) run(id string, job *grapnelv1.ReplayJob) *grapnelv1.ReplayJob {
	r.t.Helper()
	if job.StartTime == nil {
		job.StartTime = anHourAgo()
	}
	made, err := r.CreateReplayJob(r.t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/acme", ReplayJobId: id, ReplayJob: job})
	if err != nil {
		r.t.Fatalf("create %s: %v", id, err)
	}
	ended, err := r.WaitReplayJob(r.t.Context(), &grapnelv1.WaitReplayJobRequest{Name: made.GetReplayJob().GetName()})
	if err != nil {
		r.t.Fatalf("wait for %s: %v", id, err)
	}
	return ended.GetReplayJob()
}

// After an outage all that was given up is sent again by one call: with the webhook-id that it has always had, as
// deliveries of their own, once each.
func TestReplayAfterAnOutage(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	down := true
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return map[bool]int{true: 500, false: 200}[down] })
	s.Namespace("acme")
	s.Subscribe("acme", "orders", rcv.URL, once)
	for i := range 12 {
		s.Publish("acme", fmt.Sprint("o-", i), "order.created", []byte(`{}`))
	}
	servertest.Await(t, "all to be given up", func() bool { return len(s.Deliveries("acme", "state = EXHAUSTED")) == 12 })
	tried := map[string]int{}
	for _, q := range rcv.Requests() {
		tried[q.Header.Get("webhook-id")]++
	}
	down = false
	rcv.Answer(func(servertest.Request) int { return 200 })

	r := newReplayer(t, s)
	count, err := r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{
		Parent: "namespaces/acme", ReplayJob: &grapnelv1.ReplayJob{StartTime: anHourAgo()}, ValidateOnly: true,
	})
	if err != nil || count.GetReplayJob().GetCreatedCount() != 12 || count.GetReplayJob().GetName() != "" {
		t.Fatalf("count: %v, %v", count, err)
	}
	job := r.run("incident-42", &grapnelv1.ReplayJob{Subscription: "namespaces/acme/subscriptions/orders", MaxRate: 1000})
	if job.GetState() != grapnelv1.ReplayJob_STATE_SUCCEEDED || job.GetCreatedCount() != 12 || job.GetSkippedCount() != 0 || job.GetCompleteTime() == nil {
		t.Fatalf("job: %v", job)
	}
	servertest.Await(t, "all to arrive, and to be noted", func() bool {
		return rcv.Accepted() == 12 && len(s.Deliveries("acme", "state = SUCCEEDED")) == 12
	})
	for _, q := range rcv.Requests() {
		tried[q.Header.Get("webhook-id")]++
	}
	if len(tried) != 12 {
		t.Errorf("%d webhook-ids, want the 12 there were", len(tried))
	}
	again := s.Deliveries("acme", "trigger = REPLAY AND replay_job = incident-42")
	if len(again) != 12 || again[0].GetReplayJob() != job.GetName() || again[0].GetState() != grapnelv1.Delivery_STATE_SUCCEEDED {
		t.Errorf("%d deliveries of the job: %v", len(again), again[0])
	}
	if of := s.Deliveries("acme", "event = o-7"); len(of) != 2 {
		t.Errorf("%d deliveries of an event, want the first and its replay", len(of))
	}

	// The same call finds the first job, other content under the id is refused.
	same := &grapnelv1.ReplayJob{Subscription: "namespaces/acme/subscriptions/orders", MaxRate: 1000, StartTime: job.GetStartTime()}
	if found := r.run("incident-42", same); found.GetCreateTime().AsTime() != job.GetCreateTime().AsTime() {
		t.Errorf("a repeated call: %v", found)
	}
	_, err = r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/acme", ReplayJobId: "incident-42", ReplayJob: &grapnelv1.ReplayJob{StartTime: anHourAgo()}})
	if status.Code(err) != codes.AlreadyExists {
		t.Errorf("other content: %v", err)
	}
	listed, err := r.ListReplayJobs(t.Context(), &grapnelv1.ListReplayJobsRequest{Parent: "namespaces/acme", Filter: "state = SUCCEEDED AND subscription = orders"})
	if err != nil || len(listed.GetReplayJobs()) != 1 {
		t.Errorf("list: %v, %v", listed, err)
	}
	_, err = r.CancelReplayJob(t.Context(), &grapnelv1.CancelReplayJobRequest{Name: job.GetName()})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("cancel what has ended: %v", err)
	}
}

// A new subscription gets what was published before it, where it wants it, and a job makes none twice.
func TestReplayForANewSubscription(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	for i := range 20 {
		s.Publish("acme", fmt.Sprint("o-", i), []string{"order.created", "order.paid"}[i%2], []byte(fmt.Sprintf(`{"n":%d}`, i)))
	}
	rcv := servertest.NewReceiver(t, nil)
	s.Subscribe("acme", "late", rcv.URL, func(sub *grapnelv1.Subscription) {
		sub.EventTypes, sub.Condition = []string{"order.paid"}, "event.data.n > 10"
	})
	r := newReplayer(t, s)
	want := &grapnelv1.ReplayJob{Subscription: "namespaces/acme/subscriptions/late", MissingOnly: true}
	if job := r.run("backfill", want); job.GetCreatedCount() != 5 || job.GetScannedCount() != 20 {
		t.Fatalf("job: %v", job)
	}
	servertest.Await(t, "all to arrive", func() bool { return rcv.Accepted() == 5 })
	if job := r.run("backfill-again", want); job.GetCreatedCount() != 0 {
		t.Errorf("a second one: %v", job)
	}
}

// What a subscription cannot be given goes to its dead_letter, with the reason in the event's attributes; what ends there
// goes nowhere.
func TestDeadLetterSubscription(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	failing := servertest.NewReceiver(t, func(servertest.Request) int { return 503 })
	letters := servertest.NewReceiver(t, func(servertest.Request) int { return 500 })
	s.Subscribe("acme", "letters", letters.URL, func(sub *grapnelv1.Subscription) {
		once(sub)
		sub.EventTypes = []string{"none"}
		sub.PayloadShape = &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS}
	})
	s.Subscribe("acme", "orders", failing.URL, func(sub *grapnelv1.Subscription) {
		once(sub)
		sub.DeadLetter = "namespaces/acme/subscriptions/letters"
	})
	s.Publish("acme", "o-1", "order.created", []byte(`{"n":1}`))
	servertest.Await(t, "the dead letter to end", func() bool { return len(s.Deliveries("acme", "trigger = DEAD_LETTER AND state = EXHAUSTED")) == 1 })
	var event map[string]any
	got := letters.Requests()[0]
	if err := json.Unmarshal(got.Body, &event); err != nil {
		t.Fatal(err)
	}
	if event["deadletterfrom"] != "orders" || event["deadletterstate"] != "EXHAUSTED" || event["deadlettercode"] != "503" ||
		!strings.Contains(fmt.Sprint(event["deadletterreason"]), "attempts failed") || event["deadletterattempts"] != "1" || event["id"] != "o-1" {
		t.Errorf("letter: %s", got.Body)
	}
	if got.Header.Get("webhook-id") != failing.Requests()[0].Header.Get("webhook-id") {
		t.Error("the dead letter has another webhook-id")
	}
	if all := s.Deliveries("acme", ""); len(all) != 2 {
		t.Errorf("%d deliveries: the dead letter goes on", len(all))
	}

	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	s.Subscribe("acme", "third", letters.URL, func(sub *grapnelv1.Subscription) { sub.EventTypes = []string{"none"} })
	for name, target := range map[string]string{
		"letters": "namespaces/acme/subscriptions/third",   // a chain, from its end
		"first":   "namespaces/acme/subscriptions/orders",  // from its beginning
		"orders":  "namespaces/acme/subscriptions/orders",  // itself
		"other":   "namespaces/acme/subscriptions/nothing", // nobody
	} {
		_, err := subs.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
			AllowMissing: true, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"dead_letter", "uri", "signers"}},
			Subscription: &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/" + name, Uri: failing.URL, DeadLetter: target,
				Signers: []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}},
		})
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "dead_letter") {
			t.Errorf("%s to %s: %v", name, target, err)
		}
	}
}

// Dead letters keep the order of their keys where their subscription is ordered.
func TestDeadLettersToAnOrderedSubscription(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	failing := servertest.NewReceiver(t, func(servertest.Request) int { return 400 })
	var tries atomic.Int32
	letters := servertest.NewReceiver(t, func(servertest.Request) int {
		if tries.Add(1) == 1 {
			return 500 // the first letter, which the others wait for
		}
		return 200
	})
	s.Subscribe("acme", "letters", letters.URL, func(sub *grapnelv1.Subscription) {
		sub.EventTypes, sub.Ordered = []string{"none"}, true
		sub.RetryPolicy = &grapnelv1.RetryPolicy{Schedule: []*durationpb.Duration{durationpb.New(300 * time.Millisecond)}}
	})
	s.Subscribe("acme", "orders", failing.URL, func(sub *grapnelv1.Subscription) {
		once(sub)
		sub.Ordered, sub.DeadLetter = true, "namespaces/acme/subscriptions/letters"
	})
	for i := range 5 {
		if _, err := grapnelv1.NewPublishServiceClient(s.Conn).Publish(t.Context(), &grapnelv1.PublishRequest{
			Parent: "namespaces/acme",
			Event:  &grapnelv1.Event{Id: fmt.Sprint("o-", i), Type: "order.created", OrderingKey: "one", Payload: &grapnelv1.Event_Data{Data: []byte(`{}`)}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	servertest.Await(t, "all letters", func() bool {
		return len(s.Deliveries("acme", "trigger = DEAD_LETTER AND state = SUCCEEDED")) == 5
	})
	var got []string
	for _, q := range letters.Requests() {
		got = append(got, q.Header.Get("ce-id"))
	}
	if want := []string{"o-0", "o-0", "o-1", "o-2", "o-3", "o-4"}; !slices.Equal(got, want) {
		t.Errorf("letters came as %v, want %v", got, want)
	}
}

// Jobs that rest, however long, and however many of other namespaces there are, hold up none; and a rate for which no time
// is long enough is none that has no bound.
func TestReplaysThatRestHoldUpNobody(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return 500 })
	r := newReplayer(t, s)
	for n := range 13 {
		ns := fmt.Sprint("ns-", n)
		if n == 12 {
			ns = "acme"
		}
		s.Namespace(ns)
		s.Subscribe(ns, "orders", rcv.URL, once)
		for i := range 4 {
			s.Publish(ns, fmt.Sprint("o-", i), "order.created", []byte(`{}`))
		}
		servertest.Await(t, "all to be given up", func() bool { return len(s.Deliveries(ns, "state = EXHAUSTED")) == 4 })
		for i := range 3 {
			if n == 12 {
				break
			}
			made, err := r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/" + ns, ReplayJobId: fmt.Sprint("slow-", i), ReplayJob: &grapnelv1.ReplayJob{
				StartTime: anHourAgo(), MaxRate: 1e-12, Filter: "state = EXHAUSTED AND trigger = PUBLISH",
			}})
			if err != nil {
				t.Fatal(err)
			}
			servertest.Await(t, "the first delivery of a job", func() bool {
				got, err := r.GetReplayJob(t.Context(), &grapnelv1.GetReplayJobRequest{Name: made.GetReplayJob().GetName()})
				return err == nil && got.GetReplayJob().GetCreatedCount() > 0
			})
		}
	}
	if job := r.run("quick", &grapnelv1.ReplayJob{MaxRate: 1000}); job.GetState() != grapnelv1.ReplayJob_STATE_SUCCEEDED || job.GetCreatedCount() != 4 {
		t.Errorf("beside 36 that rest: %v", job)
	}
	for n := range 12 {
		if made := s.Deliveries(fmt.Sprint("ns-", n), "trigger = REPLAY"); len(made) != 3 {
			t.Errorf("%d deliveries of three jobs, want the first of each", len(made))
		}
	}
}

// A job makes way for publishers whose namespace has a quota of open deliveries.
func TestReplayLeavesRoomInTheQuota(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return 500 })
	s.Subscribe("acme", "orders", rcv.URL, once)
	for i := range 20 {
		s.Publish("acme", fmt.Sprint("o-", i), "order.created", []byte(`{}`))
	}
	servertest.Await(t, "all to be given up", func() bool { return len(s.Deliveries("acme", "state = EXHAUSTED")) == 20 })
	if _, err := grapnelv1.NewNamespaceServiceClient(s.Conn).UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{
		Namespace:  &grapnelv1.Namespace{Name: "namespaces/acme", Quota: &grapnelv1.Quota{MaxOpenDeliveries: 10}},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"quota.max_open_deliveries"}},
	}); err != nil {
		t.Fatal(err)
	}
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	const name = "namespaces/acme/subscriptions/orders"
	if _, err := subs.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	r := newReplayer(t, s)
	made, err := r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/acme", ReplayJobId: "j", ReplayJob: &grapnelv1.ReplayJob{StartTime: anHourAgo(), MaxRate: 10_000}})
	if err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "the job to wait", func() bool {
		got, err := r.GetReplayJob(t.Context(), &grapnelv1.GetReplayJobRequest{Name: made.GetReplayJob().GetName()})
		return err == nil && strings.Contains(got.GetReplayJob().GetWaitReason(), "max_open_deliveries")
	})
	if n := len(s.Deliveries("acme", "trigger = REPLAY")); n != 5 {
		t.Errorf("%d of a quota of 10 are the job's", n)
	}
	s.Publish("acme", "live", "order.created", []byte(`{}`))
	rcv.Answer(nil)
	if _, err := subs.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	servertest.Await(t, "all of it", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 21 })
}

func TestReplayIsRefused(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	gone := servertest.NewReceiver(t, func(servertest.Request) int { return http.StatusGone })
	s.Subscribe("acme", "gone", gone.URL, nil)
	s.Publish("acme", "o-1", "order.created", []byte(`{}`))
	servertest.Await(t, "the subscription to be disabled", func() bool { return len(s.Deliveries("acme", "state = REJECTED")) == 1 })
	r := newReplayer(t, s)
	for name, c := range map[string]struct {
		job  *grapnelv1.ReplayJob
		code codes.Code
		says string
	}{
		"no start":      {&grapnelv1.ReplayJob{}, codes.InvalidArgument, "replay_job.start_time"},
		"end first":     {&grapnelv1.ReplayJob{StartTime: timestamppb.Now(), EndTime: anHourAgo()}, codes.InvalidArgument, "replay_job.end_time"},
		"filter":        {&grapnelv1.ReplayJob{StartTime: anHourAgo(), Filter: "colour = red"}, codes.InvalidArgument, "colour"},
		"missing to":    {&grapnelv1.ReplayJob{StartTime: anHourAgo(), MissingOnly: true}, codes.InvalidArgument, "replay_job.subscription"},
		"rate":          {&grapnelv1.ReplayJob{StartTime: anHourAgo(), MaxRate: 10_001}, codes.InvalidArgument, "max_rate"},
		"nobody":        {&grapnelv1.ReplayJob{StartTime: anHourAgo(), Subscription: "namespaces/acme/subscriptions/nobody"}, codes.NotFound, "nobody"},
		"other space":   {&grapnelv1.ReplayJob{StartTime: anHourAgo(), Subscription: "namespaces/other/subscriptions/x"}, codes.InvalidArgument, "replay_job.subscription"},
		"disabled":      {&grapnelv1.ReplayJob{StartTime: anHourAgo(), Subscription: "namespaces/acme/subscriptions/gone"}, codes.FailedPrecondition, "disabled"},
		"retry missing": {&grapnelv1.ReplayJob{StartTime: anHourAgo(), Subscription: "namespaces/acme/subscriptions/gone", MissingOnly: true, Retry: true}, codes.InvalidArgument, "replay_job.retry"},
	} {
		_, err := r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/acme", ReplayJob: c.job})
		if status.Code(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A job on a paused subscription makes its deliveries, some thousands at most; three jobs go on at once; one whose
// subscription is deleted fails with the reason.
func TestReplayOfAPausedSubscription(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	rcv := servertest.NewReceiver(t, func(servertest.Request) int { return 500 })
	s.Subscribe("acme", "orders", rcv.URL, once)
	for i := range 12 {
		s.Publish("acme", fmt.Sprint("o-", i), "order.created", []byte(`{}`))
	}
	servertest.Await(t, "all to be given up", func() bool { return len(s.Deliveries("acme", "state = EXHAUSTED")) == 12 })
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	const name = "namespaces/acme/subscriptions/orders"
	if _, err := subs.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	r := newReplayer(t, s)
	job := r.run("paused", &grapnelv1.ReplayJob{Subscription: name, MaxRate: 10_000})
	if job.GetState() != grapnelv1.ReplayJob_STATE_SUCCEEDED || job.GetCreatedCount() != 12 || job.GetOpenCount() != 12 {
		t.Errorf("job: %v", job)
	}
	slow := func(id string) (*grapnelv1.CreateReplayJobResponse, error) {
		return r.CreateReplayJob(t.Context(), &grapnelv1.CreateReplayJobRequest{Parent: "namespaces/acme", ReplayJobId: id, ReplayJob: &grapnelv1.ReplayJob{
			Subscription: name, StartTime: anHourAgo(), MaxRate: 0.5,
		}})
	}
	for _, id := range []string{"a", "b", "c"} {
		if _, err := slow(id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := slow("d"); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a fourth: %v", err)
	}
	cancelled, err := r.CancelReplayJob(t.Context(), &grapnelv1.CancelReplayJobRequest{Name: "namespaces/acme/replayJobs/a"})
	if err != nil || cancelled.GetReplayJob().GetState() != grapnelv1.ReplayJob_STATE_CANCELLED {
		t.Errorf("cancel: %v, %v", cancelled, err)
	}
	begun := time.Now()
	waited, err := r.WaitReplayJob(t.Context(), &grapnelv1.WaitReplayJobRequest{Name: "namespaces/acme/replayJobs/b", Timeout: durationpb.New(50 * time.Millisecond)})
	if err != nil || waited.GetReplayJob().GetState() != grapnelv1.ReplayJob_STATE_RUNNING || time.Since(begun) < 50*time.Millisecond {
		t.Errorf("wait: %v, %v", waited, err)
	}
	if _, err := subs.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: name}); err != nil {
		t.Fatal(err)
	}
	waited, err = r.WaitReplayJob(t.Context(), &grapnelv1.WaitReplayJobRequest{Name: "namespaces/acme/replayJobs/b"})
	if err != nil || waited.GetReplayJob().GetState() != grapnelv1.ReplayJob_STATE_FAILED || !strings.Contains(waited.GetReplayJob().GetError().GetMessage(), "deleted") {
		t.Errorf("after the deletion: %v, %v", waited, err)
	}
}

// A delivery that has succeeded is sent again by hand, where that is asked for.
func TestRetryOfASuccess(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	rcv := servertest.NewReceiver(t, nil)
	s.Subscribe("acme", "orders", rcv.URL, nil)
	s.Publish("acme", "o-1", "order.created", []byte(`{}`))
	servertest.Await(t, "the delivery", func() bool { return len(s.Deliveries("acme", "state = SUCCEEDED")) == 1 })
	d := s.Deliveries("acme", "")[0]
	client := grapnelv1.NewDeliveryServiceClient(s.Conn)
	if _, err := client.RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: d.GetName()}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("without allow_succeeded: %v", err)
	}
	again, err := client.RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: d.GetName(), AllowSucceeded: true})
	if err != nil || again.GetDelivery().GetName() == d.GetName() || again.GetDelivery().GetTrigger() != grapnelv1.Delivery_TRIGGER_REPLAY {
		t.Fatalf("%v, %v", again, err)
	}
	servertest.Await(t, "the second delivery", func() bool { return len(rcv.Requests()) == 2 })
	if a, b := rcv.Requests()[0], rcv.Requests()[1]; a.Header.Get("webhook-id") != b.Header.Get("webhook-id") {
		t.Error("it has another webhook-id")
	}
}
