package api_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
)

// TestPagesFitIntoMessages: a page is smaller than what grpc's clients take by default, whatever its items are made of,
// and its token goes on behind its last item.
func TestPagesFitIntoMessages(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	conn := st.dial(t, grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(4<<20)))
	const subs, events = 40, 450
	for i := range subs {
		st.subscribe(t, "acme", fmt.Sprintf("s%02d", i), func(s *grapnelv1.Subscription) {
			s.EventTypes, s.Headers = []string{"none"}, map[string]string{}
			for k := range 28 {
				s.Headers[fmt.Sprint("X-", k)] = strings.Repeat("h", 4000)
			}
		})
	}
	attributes := map[string]string{}
	for k := range 32 {
		attributes[fmt.Sprint("a", k)] = strings.Repeat("v", 256)
	}
	for n := 0; n < events; n += 90 {
		batch := &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme"}
		for range 90 {
			e := publishText("acme", "", "x").Event
			e.Attributes = attributes
			batch.Events = append(batch.Events, e)
		}
		out, err := st.publish.BatchPublish(t.Context(), batch)
		if err != nil || out.GetFailedCount() > 0 {
			t.Fatal(out.GetResults()[0], err)
		}
	}
	all := func(name string, want int, page func(token string) (names []string, next string, size int, err error)) {
		t.Helper()
		seen := map[string]bool{}
		pages := 0
		for token := ""; ; pages++ {
			names, next, size, err := page(token)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			if size > 3<<20+4096 {
				t.Errorf("%s: a page has %d bytes", name, size)
			}
			for _, n := range names {
				if seen[n] {
					t.Errorf("%s: %s is listed twice", name, n)
				}
				seen[n] = true
			}
			if token = next; token == "" {
				break
			}
		}
		if len(seen) != want || pages == 0 {
			t.Errorf("%s: %d items on %d pages, want %d on some", name, len(seen), pages+1, want)
		}
	}
	all("subscriptions", subs, func(token string) (names []string, next string, size int, err error) {
		r, err := grapnelv1.NewSubscriptionServiceClient(conn).ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/acme", PageToken: token})
		for _, s := range r.GetSubscriptions() {
			names = append(names, s.GetName())
		}
		return names, r.GetNextPageToken(), proto.Size(r), err
	})
	all("events", events, func(token string) (names []string, next string, size int, err error) {
		r, err := grapnelv1.NewEventServiceClient(conn).ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", PageToken: token, PageSize: 1000})
		for _, e := range r.GetEvents() {
			names = append(names, e.GetName())
		}
		return names, r.GetNextPageToken(), proto.Size(r), err
	})
}

// TestPageOfAttempts: the attempts of one delivery, with what receivers said, take several pages.
func TestPageOfAttempts(t *testing.T) {
	st := startStation(t)
	name := st.oneDelivery(t)
	id, err := delivery.ParseID(strings.TrimPrefix(name, "namespaces/acme/deliveries/"))
	if err != nil {
		t.Fatal(err)
	}
	event, err := st.journal.Event(st.key("acme"), "e1")
	if err != nil {
		t.Fatal(err)
	}
	due := time.Now().Add(time.Hour)
	job := &delivery.Job{ID: id, Event: event, Epoch: 1, MaxAttempts: 100, Expire: time.Now().Add(time.Hour)}
	const attempts = 30
	for n := 1; n <= attempts; n++ {
		st.journal.Settle(job, delivery.Step{State: delivery.Scheduled, Due: due}, &delivery.Attempt{
			Number: n, Start: time.Now(), Outcome: delivery.OutcomeRetryable, ResponseCode: 500,
			ResponseBody: make([]byte, 4096), ResponseHeaders: []delivery.Header{{Name: "x", Value: strings.Repeat("h", 250_000)}},
		}, nil)
		if err := st.journal.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		job.Attempts, job.Kind, job.Due, job.Epoch = n, delivery.Timer, delivery.InstantOf(due), uint32(n+1)
		due = due.Add(time.Second)
	}
	got, pages := 0, 0
	for token := ""; ; {
		r, err := st.deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: name, IncludeBodies: true, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		got, pages = got+len(r.GetAttempts()), pages+1
		if token = r.GetNextPageToken(); token == "" {
			break
		}
	}
	if got != attempts || pages < 2 {
		t.Errorf("%d attempts on %d pages", got, pages)
	}
}
