package api_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

type watchingSubscriptions = grpc.ServerStreamingClient[grapnelv1.WatchSubscriptionsResponse]

// watchSubscriptions opens a watch and reads the heartbeat that it begins with.
func (st *station) watchSubscriptions(t *testing.T, filter, token string) (watchingSubscriptions, string) {
	t.Helper()
	return st.watchSubscriptionsOf(t, "acme", filter, token)
}

func (st *station) watchSubscriptionsOf(t *testing.T, ns, filter, token string) (watchingSubscriptions, string) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := st.subscriptions.WatchSubscriptions(ctx, &grapnelv1.WatchSubscriptionsRequest{
		Parent: "namespaces/" + ns, Filter: filter, ResumeToken: token, Heartbeat: durationpb.New(time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if first.GetSubscription() != nil || first.GetResumeToken() == "" {
		t.Fatalf("the first message is %v", first)
	}
	return stream, first.GetResumeToken()
}

// toldOf reads a change, whatever heartbeats come before it, as "name uri" or "name deleted".
func toldOf(t *testing.T, stream watchingSubscriptions) (what, token string) {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if s := m.GetSubscription(); s != nil {
			what := strings.TrimPrefix(s.GetName(), "namespaces/acme/subscriptions/") + " "
			if m.GetDeleted() {
				return what + "deleted", m.GetResumeToken()
			}
			return what + s.GetDisplayName(), m.GetResumeToken()
		}
	}
}

func (st *station) rename(t *testing.T, id, name string) *grapnelv1.Subscription {
	t.Helper()
	resp, err := st.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
		Subscription: &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/" + id, DisplayName: name},
		UpdateMask:   &fieldmaskpb.FieldMask{Paths: []string{"display_name"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetSubscription()
}

func TestWatchSubscriptions(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.namespace(t, "other")
	st.subscribe(t, "acme", "before", nil)
	all, _ := st.watchSubscriptions(t, "", "")
	blue, _ := st.watchSubscriptions(t, "display_name = blue", "")
	expect := func(stream watchingSubscriptions, want string) (token string) {
		t.Helper()
		what, token := toldOf(t, stream)
		if what != want {
			t.Errorf("told %q, want %q", what, want)
		}
		return token
	}
	st.subscribe(t, "other", "elsewhere", nil)
	st.subscribe(t, "acme", "orders", nil)
	expect(all, "orders ")
	st.rename(t, "orders", "blue")
	middle := expect(all, "orders blue")
	expect(blue, "orders blue")
	st.rename(t, "before", "red")
	expect(all, "before red")
	changed := st.rename(t, "orders", "red")
	expect(all, "orders red")
	expect(blue, "orders red") // it does not match any more, which is told once
	st.rename(t, "orders", "green")
	if _, err := st.subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: changed.GetName()}); err != nil {
		t.Fatal(err)
	}
	expect(all, "orders green")
	expect(all, "orders deleted")
	st.subscribe(t, "acme", "orders", nil) // another one
	last := expect(all, "orders ")
	// Whoever comes back is told what followed, and nothing twice.
	again, _ := st.watchSubscriptions(t, "", middle)
	for _, want := range []string{"before red", "orders red", "orders green", "orders deleted", "orders "} {
		expect(again, want)
	}
	st.rename(t, "before", "blue")
	expect(blue, "before blue") // and nothing of what was never blue
	expect(again, "before blue")
	from, _ := st.watchSubscriptions(t, "", last)
	expect(from, "before blue")
}

// A watch of all namespaces tells of each, of those that come meanwhile, too, and of nothing but subscriptions; its tokens are no
// others'.
func TestWatchSubscriptionsOfAll(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	all, begin := st.watchSubscriptionsOf(t, "-", "", "")
	blue, _ := st.watchSubscriptionsOf(t, "-", "display_name = blue", "")
	expect := func(stream watchingSubscriptions, want ...string) {
		t.Helper()
		for _, want := range want {
			if what, _ := toldOf(t, stream); what != want {
				t.Errorf("told %q, want %q", what, want)
			}
		}
	}
	st.subscribe(t, "acme", "orders", nil)
	st.namespace(t, "later")
	const later = "namespaces/later/subscriptions/orders"
	made := st.subscribe(t, "later", "orders", nil)
	st.rename(t, "orders", "blue")
	if _, err := st.subscriptions.DeleteSubscription(t.Context(), &grapnelv1.DeleteSubscriptionRequest{Name: made.GetName()}); err != nil {
		t.Fatal(err)
	}
	want := []string{"orders ", later + " ", "orders blue", later + " deleted"}
	expect(all, want...)
	expect(blue, "orders blue")
	again, token := st.watchSubscriptionsOf(t, "-", "", begin)
	expect(again, want...)
	for _, tt := range []struct{ ns, token string }{{"acme", token}, {"-", func() string { _, token := st.watchSubscriptions(t, "", ""); return token }()}} {
		stream, err := st.subscriptions.WatchSubscriptions(t.Context(), &grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/" + tt.ns, ResumeToken: tt.token})
		if err == nil {
			_, err = stream.Recv()
		}
		refused(t, err, codes.OutOfRange, "RESUME_TOKEN_EXPIRED")
	}
}

// A watch shows what Get shows.
func TestWatchedSubscriptionIsTheOneThatIsStored(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	stream, _ := st.watchSubscriptions(t, "", "")
	st.subscribe(t, "acme", "orders", nil)
	want := st.rename(t, "orders", "blue")
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if m.GetSubscription().GetDisplayName() == "blue" {
			if diff := cmp.Diff(want, m.GetSubscription(), protocmp.Transform()); diff != "" {
				t.Errorf("-read +watched:\n%s", diff)
			}
			return
		}
	}
}

func TestWatchSubscriptionsRefuses(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	st.namespace(t, "other")
	_, token := st.watchSubscriptions(t, "", "")
	for name, c := range map[string]struct {
		r      *grapnelv1.WatchSubscriptionsRequest
		code   codes.Code
		reason string
		words  string
	}{
		"no namespace":      {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/nobody"}, codes.NotFound, "RESOURCE_NOT_FOUND", "namespaces/nobody"},
		"filter":            {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", Filter: "colour = red"}, codes.InvalidArgument, "INVALID_FILTER", "colour"},
		"token":             {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", ResumeToken: "what?"}, codes.InvalidArgument, "INVALID_FIELD", "resume_token"},
		"another's token":   {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/other", ResumeToken: token}, codes.OutOfRange, "RESUME_TOKEN_EXPIRED", "list"},
		"token to come":     {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", ResumeToken: token[:len(token)-8] + "AAD_____"}, codes.OutOfRange, "RESUME_TOKEN_EXPIRED", "list"},
		"token of long ago": {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", ResumeToken: token[:len(token)-8] + "AAAAAAAB"}, codes.OutOfRange, "RESUME_TOKEN_EXPIRED", "list"},
		"heartbeat":         {&grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", Heartbeat: durationpb.New(time.Hour)}, codes.InvalidArgument, "INVALID_FIELD", "heartbeat"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "token of long ago" {
				st.compact(t)
			}
			stream, err := st.subscriptions.WatchSubscriptions(t.Context(), c.r)
			for err == nil {
				_, err = stream.Recv()
			}
			if refused(t, err, c.code, c.reason); !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v does not say %q", err, c.words)
			}
		})
	}
}

// TestQuietWatchOfSubscriptionsIsKept: where nothing changes, the token moves on with what happens elsewhere in etcd.
func TestQuietWatchOfSubscriptionsIsKept(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	stream, token := st.watchSubscriptions(t, "", "")
	st.namespace(t, "other")
	first := token
	for token == first {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		token = m.GetResumeToken()
	}
	st.compact(t)
	st.subscribe(t, "acme", "orders", nil)
	again, _ := st.watchSubscriptions(t, "", token)
	if what, _ := toldOf(t, again); what != "orders " {
		t.Errorf("told %q", what)
	}
}

// TestWatchOfSubscriptionsThatNobodyReads is cut off and told.
func TestWatchOfSubscriptionsThatNobodyReads(t *testing.T) {
	st := startStation(t, func(o *api.Options) { o.WatchPatience, o.MaxCallsPerNamespace = 50*time.Millisecond, 1 })
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "orders", nil)
	slow, token := st.watchSubscriptions(t, "", "")
	const changes = 700
	long := strings.Repeat("x", 50)
	cut := func() bool { // as long as it is not cut off, its room is taken
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := st.subscriptions.WatchSubscriptions(ctx, &grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme"})
		if err == nil {
			_, err = stream.Recv()
		}
		return err == nil
	}
	n := 0
	for ; n < changes && !cut(); n++ {
		st.rename(t, "orders", fmt.Sprint(long, n))
	}
	eventually(t, cut)
	next := 0
	read := func(stream watchingSubscriptions) error {
		for next < n {
			m, err := stream.Recv()
			if err != nil {
				return err
			}
			token = m.GetResumeToken()
			if s := m.GetSubscription(); s != nil {
				if want := fmt.Sprint(long, next); s.GetDisplayName() != want {
					t.Fatalf("%q follows, want %q", s.GetDisplayName(), want)
				}
				next++
			}
		}
		return nil
	}
	if err := read(slow); err == nil {
		t.Fatalf("it was not cut off after %d changes", n)
	} else {
		refused(t, err, codes.Aborted, "SLOW_CONSUMER")
	}
	var again watchingSubscriptions
	eventually(t, func() bool { // the one before has left
		stream, err := st.subscriptions.WatchSubscriptions(t.Context(), &grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", ResumeToken: token})
		if err == nil {
			_, err = stream.Recv()
		}
		again = stream
		return err == nil
	})
	if err := read(again); err != nil {
		t.Fatal(err)
	}
}

// TestWatchOfAnErasedNamespaceTellsNothingOfTheNext that has its name.
func TestWatchOfAnErasedNamespaceTellsNothingOfTheNext(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	stream, token := st.watchSubscriptions(t, "", "")
	if _, err := st.registry.DeleteNamespace(t.Context(), "acme", "", true); err != nil {
		t.Fatal(err)
	}
	if err := st.registry.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	st.namespace(t, "acme")
	st.subscribe(t, "acme", "secretive", nil)
	var err error
	for err == nil {
		var m *grapnelv1.WatchSubscriptionsResponse
		if m, err = stream.Recv(); m.GetSubscription() != nil {
			t.Errorf("told %v", m)
		}
	}
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	again, err := st.subscriptions.WatchSubscriptions(t.Context(), &grapnelv1.WatchSubscriptionsRequest{Parent: "namespaces/acme", ResumeToken: token})
	if err == nil {
		_, err = again.Recv()
	}
	refused(t, err, codes.OutOfRange, "RESUME_TOKEN_EXPIRED")
}

// TestWatchOfAllGoesOnAmongChangesThatWereMadeAtOnce: a namespace that is erased has its subscriptions deleted together, and each is told
// once, to those who come back in the middle and to those who read slowly.
func TestWatchOfAllGoesOnAmongChangesThatWereMadeAtOnce(t *testing.T) {
	st := startStation(t)
	st.namespace(t, "acme")
	const all = 120
	for i := range all {
		st.subscribe(t, "acme", fmt.Sprintf("s-%03d", i), func(sub *grapnelv1.Subscription) {
			sub.Headers = map[string]string{"X-Long": strings.Repeat("x", 4000)}
		})
	}
	slow, begin := st.watchSubscriptionsOf(t, "-", "", "")
	if _, err := st.registry.DeleteNamespace(t.Context(), "acme", "", true); err != nil {
		t.Fatal(err)
	}
	if err := st.registry.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	quick, _ := st.watchSubscriptionsOf(t, "-", "", begin)
	for i := range all { // as much as may wait for the slow one has come long before the last of these
		want := fmt.Sprintf("s-%03d deleted", i)
		what, token := toldOf(t, quick)
		if what != want {
			t.Fatalf("told %q, want %q", what, want)
		}
		if i%50 == 1 {
			quick, _ = st.watchSubscriptionsOf(t, "-", "", token)
		}
	}
	for i := range all {
		if what, _ := toldOf(t, slow); what != fmt.Sprintf("s-%03d deleted", i) {
			t.Fatalf("the slow one is told %q after %d", what, i)
		}
	}
}
