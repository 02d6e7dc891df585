package api_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestRefusalsFitIntoTrailers: whatever is wrong with a request, its refusal arrives at a client that takes 4 KiB of
// trailers, with reason and the first faults, and says how many more there are.
func TestRefusalsFitIntoTrailers(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	conn, err := grpc.NewClient(st.conn.Target(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDisableRetry(), grpc.WithMaxHeaderListSize(4<<10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	subscriptions, publish, events := grapnelv1.NewSubscriptionServiceClient(conn), grapnelv1.NewPublishServiceClient(conn), grapnelv1.NewEventServiceClient(conn)
	create := func(change func(*grapnelv1.Subscription)) error {
		sub := plainSubscription("acme")
		change(sub)
		_, err := subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", Subscription: sub})
		return err
	}
	labels := func(n int, key string) map[string]string {
		m := make(map[string]string, n)
		for i := range n {
			m[fmt.Sprint(key, i)] = strings.Repeat("ü", 100)
		}
		return m
	}
	users := make([]string, 40)
	for i := range users {
		users[i] = fmt.Sprintf("%s-%d", strings.Repeat("u", 55), i)
		st.subscribe(t, "acme", users[i], nil)
	}
	for name, c := range map[string]struct {
		err  error
		code codes.Code
		want string
	}{
		"15 event types": {create(func(s *grapnelv1.Subscription) {
			s.EventTypes = nil
			for i := range 64 {
				s.EventTypes = append(s.EventTypes, fmt.Sprintf("%s\n%d", strings.Repeat("x", 100), i))
			}
		}), codes.InvalidArgument, " more"},
		"20 delays": {create(func(s *grapnelv1.Subscription) {
			s.RetryPolicy = &grapnelv1.RetryPolicy{}
			for range 99 {
				s.RetryPolicy.Schedule = append(s.RetryPolicy.Schedule, durationpb.New(1000*time.Hour))
			}
		}), codes.InvalidArgument, " more"},
		"64 labels":     {create(func(s *grapnelv1.Subscription) { s.Labels = labels(64, strings.Repeat("k", 62)) }), codes.InvalidArgument, " more"},
		"10 000 labels": {create(func(s *grapnelv1.Subscription) { s.Labels = labels(10_000, "\n") }), codes.InvalidArgument, "has 10000 entries; at most 64"},
		"headers":       {create(func(s *grapnelv1.Subscription) { s.Headers = labels(32, "no header ") }), codes.InvalidArgument, ""},
		"a long name": {create(func(s *grapnelv1.Subscription) {
			s.Transport = &grapnelv1.PluginBinding{Plugin: strings.Repeat("\x01", 100_000)}
		}), codes.InvalidArgument, "plugin"},
		"attributes": {func() error {
			r := publishText("acme", "", "x")
			r.Event.Attributes = labels(32, strings.Repeat("A", 100))
			_, err := publish.Publish(t.Context(), r)
			return err
		}(), codes.InvalidArgument, " more"},
		"an event's id": {func() error {
			_, err := events.GetEvent(t.Context(), &grapnelv1.GetEventRequest{Name: "namespaces/acme/events/" + strings.Repeat("ü", 5000)})
			return err
		}(), codes.InvalidArgument, "name"},
		"a filter": {func() error {
			_, err := events.ListEvents(t.Context(), &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", Filter: strings.Repeat("ü", 1000) + " = 1"})
			return err
		}(), codes.InvalidArgument, "filter"},
		"a mask": {func() error {
			paths := make([]string, 100)
			for i := range paths {
				paths[i] = fmt.Sprint(strings.Repeat("p", 100), i)
			}
			_, err := subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
				Subscription: &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/" + users[0]}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
			})
			return err
		}(), codes.InvalidArgument, " more"},
		"users of a secret": {func() error {
			_, err := grapnelv1.NewSecretServiceClient(conn).DeleteSecret(t.Context(), &grapnelv1.DeleteSecretRequest{Name: "namespaces/acme/secrets/key"})
			return err
		}(), codes.FailedPrecondition, users[0]},
		"a method": {conn.Invoke(t.Context(), "/grapnel.v1.X/"+strings.Repeat("y", 8000), &grapnelv1.PublishRequest{}, &grapnelv1.PublishResponse{}), codes.Unimplemented, "does not serve"},
	} {
		reason := map[codes.Code]string{codes.InvalidArgument: "INVALID_FIELD", codes.FailedPrecondition: "RESOURCE_IN_USE", codes.Unimplemented: "UNKNOWN_METHOD"}[c.code]
		if name == "a filter" {
			reason = "INVALID_FILTER"
		}
		t.Run(name, func(t *testing.T) {
			if r := refused(t, c.err, c.code, reason); !strings.Contains(r.message, c.want) {
				t.Errorf("message = %q, want %q in it", r.message, c.want)
			}
		})
	}
}
