package client_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// methodConfig is the part of the service config that the tests look at.
type methodConfig struct {
	Name         []struct{ Service, Method string }
	Timeout      string
	WaitForReady bool
	RetryPolicy  *struct {
		MaxAttempts          int
		RetryableStatusCodes []string
	}
}

func shippedConfig(t *testing.T) map[string]methodConfig {
	t.Helper()
	var config struct{ MethodConfig []methodConfig }
	if err := json.Unmarshal([]byte(client.ServiceConfig()), &config); err != nil {
		t.Fatal(err)
	}
	methods := map[string]methodConfig{}
	for _, entry := range config.MethodConfig {
		for _, name := range entry.Name {
			methods[name.Service+"/"+name.Method] = entry
		}
	}
	return methods
}

func TestServiceConfigNamesEveryReadAndStream(t *testing.T) {
	shipped := shippedConfig(t)
	known := map[string]bool{"/": true}
	protoregistry.GlobalFiles.RangeFilesByPackage("grapnel.v1", func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				method := service.Methods().Get(j)
				name := string(service.FullName()) + "/" + string(method.Name())
				known[name] = true
				entry, listed := shipped[name]
				level := method.Options().(*descriptorpb.MethodOptions).GetIdempotencyLevel()
				if level != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN && (entry.RetryPolicy == nil || entry.Timeout == "") {
					t.Errorf("%s is %s but is not retried by the service config", name, level)
				}
				streaming := method.IsStreamingClient() || method.IsStreamingServer()
				if streaming && (!listed || entry.Timeout != "" || entry.RetryPolicy != nil) {
					t.Errorf("%s is a stream and needs an entry without timeout", name)
				}
				// Publishing is idempotent with an id only, which gRPC cannot see: clients repeat it themselves.
				if level == descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN && entry.RetryPolicy != nil {
					t.Errorf("%s is retried but not declared idempotent", name)
				}
			}
		}
		return true
	})
	for name := range shipped {
		if !known[name] {
			t.Errorf("the service config names %s, which does not exist", name)
		}
	}
	for name, entry := range shipped {
		if entry.RetryPolicy != nil && slices.Contains(entry.RetryPolicy.RetryableStatusCodes, "ABORTED") {
			t.Errorf("%s retries ABORTED", name)
		}
	}
}

func TestDialRefusesContradictions(t *testing.T) {
	token := client.WithTokenSource(func(context.Context) (string, error) { return "secret", nil })
	for name, opts := range map[string][]client.Option{
		"neither":        nil,
		"both":           {client.WithInsecure(), client.WithTLS(nil)},
		"token in clear": {client.WithInsecure(), token},
	} {
		if c, err := client.Dial(t.Context(), "127.0.0.1:1", opts...); err == nil {
			t.Errorf("%s: Dial succeeded", name)
			_ = c.Close()
		}
	}
}

func TestPublishRetriesWithTheSameID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ids []string
		f := &fake{publish: func(call int, e *grapnelv1.Event) error {
			ids = append(ids, e.GetId())
			if call < 3 {
				return failure(codes.Unavailable, "DRAINING", "the server is draining")
			}
			return nil
		}}
		c, stop := start(t, f)
		defer stop()
		r, err := c.Publish(t.Context(), "acme", client.Event{Type: "order.created"})
		if err != nil {
			t.Fatal(err)
		}
		if len(ids) != 3 || ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] {
			t.Errorf("IDs of the tries = %q, want one ID three times", ids)
		}
		if want := "namespaces/acme/events/" + ids[0]; r.GetName() != want {
			t.Errorf("name = %q, want %q", r.GetName(), want)
		}
		if !slices.ContainsFunc(f.agents, func(a string) bool { return strings.HasPrefix(a, "grapnel-go/"+client.Version) }) {
			t.Errorf("user agents = %q", f.agents)
		}
	})
}

func TestPublishWithoutIDIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{publish: func(int, *grapnelv1.Event) error {
			return failure(codes.Unavailable, "DRAINING", "the server is draining")
		}}
		c, stop := start(t, f)
		defer stop()
		r := &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: &grapnelv1.Event{Type: "order.created"}}
		if _, err := c.PublishService().Publish(t.Context(), r); !errors.Is(err, client.ErrDraining) {
			t.Errorf("err = %v, want ErrDraining", err)
		}
		if calls, _ := f.count(); calls != 1 {
			t.Errorf("%d calls, want 1: each could store another event", calls)
		}
		r.Event.Id = "o-1"
		_, _ = c.PublishService().Publish(t.Context(), r)
		if calls, _ := f.count(); calls < 3 {
			t.Errorf("%d calls in all, want an event with an id to be repeated", calls)
		}
	})
}

func TestPublishWaitsAsLongAsTheServerAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		f := &fake{publish: func(_ int, _ *grapnelv1.Event) error {
			if time.Since(begin) < 4*time.Second {
				return failure(codes.ResourceExhausted, "RATE_LIMITED", "too fast",
					&errdetails.RetryInfo{RetryDelay: durationpb.New(5 * time.Second)})
			}
			return nil
		}}
		c, stop := start(t, f)
		defer stop()
		if _, err := c.Publish(t.Context(), "acme", event(1)); err != nil {
			t.Fatalf("after %s: %v", time.Since(begin), err)
		}
		if waited := time.Since(begin); waited < 5*time.Second {
			t.Errorf("published after %s, before the 5s that the server asked for", waited)
		}
	})
}

func TestPublishDoesNotWaitForQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{publish: func(int, *grapnelv1.Event) error {
			return failure(codes.ResourceExhausted, "QUOTA_EXCEEDED", "too many open deliveries",
				&errdetails.QuotaFailure{Violations: []*errdetails.QuotaFailure_Violation{{
					Subject: "namespaces/acme", Description: "1000 of 1000 open deliveries"}}})
		}}
		c, stop := start(t, f)
		defer stop()
		begin := time.Now()
		_, err := c.Publish(t.Context(), "acme", event(1))
		if !errors.Is(err, client.ErrQuotaExceeded) || errors.Is(err, client.ErrRateLimited) {
			t.Fatalf("err = %v, want ErrQuotaExceeded only", err)
		}
		if client.FromError(err).Retryable() {
			t.Error("a quota is not retryable")
		}
		if time.Since(begin) > 10*time.Second {
			t.Errorf("gave up after %s", time.Since(begin))
		}
	})
}

func TestErrorTellsEverything(t *testing.T) {
	f := &fake{publish: func(int, *grapnelv1.Event) error {
		return failure(codes.InvalidArgument, "INVALID_FIELD", "event.type: must not be empty",
			&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
				{Field: "event.type", Description: "must not be empty", Reason: "string.min_len"},
				{Field: "event.ttl", Description: "must be at least 1s", Reason: "duration.gte"},
			}},
			&errdetails.RequestInfo{RequestId: "r-17"})
	}}
	c, stop := start(t, f)
	defer stop()
	_, err := c.Publish(t.Context(), "acme", event(1))
	wrapped := fmt.Errorf("publish order: %w", err)
	if !errors.Is(wrapped, client.ErrInvalidField) || errors.Is(wrapped, client.ErrNotFound) {
		t.Errorf("errors.Is is wrong for %v", wrapped)
	}
	if status.Code(wrapped) != codes.InvalidArgument {
		t.Errorf("status.Code = %s", status.Code(wrapped))
	}
	e := client.FromError(wrapped)
	if e.Reason != "INVALID_FIELD" || e.RequestID != "r-17" || len(e.Violations) != 2 {
		t.Errorf("error = %+v", e)
	}
	want := "event.type: must not be empty; event.ttl: must be at least 1s (INVALID_FIELD)"
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Error(diff)
	}
	if st, ok := status.FromError(errors.Unwrap(err)); !ok || len(st.Details()) != 3 {
		t.Errorf("Unwrap lost the status: %v", errors.Unwrap(err))
	}
}

func TestErrorOfAContextIsTheContextsError(t *testing.T) {
	c, stop := start(t, &fake{})
	defer stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Publish(ctx, "acme", event(1)); !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v, want context.Canceled", err)
	}
}

func TestFailFastDoesNotWaitForAServer(t *testing.T) {
	c, err := client.Dial(t.Context(), "127.0.0.1:1", client.WithInsecure(), client.WithFailFast())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Publish(t.Context(), "acme", event(1)); !errors.Is(err, client.ErrUnavailable) {
		t.Errorf("err = %v, want ErrUnavailable", err)
	}
}

func TestCodeNames(t *testing.T) {
	for code := codes.OK; code <= codes.Unauthenticated; code++ {
		var parsed codes.Code
		if err := parsed.UnmarshalJSON([]byte(`"` + client.CodeName(code) + `"`)); err != nil || parsed != code {
			t.Errorf("CodeName(%d) = %q, which parses as %v, %v", code, client.CodeName(code), parsed, err)
		}
	}
}

func TestListWalksAllPagesAndYieldsTheErrorLast(t *testing.T) {
	f := &fake{list: func(token string) (*grapnelv1.ListSubscriptionsResponse, error) {
		switch token {
		case "":
			return &grapnelv1.ListSubscriptionsResponse{NextPageToken: "2", Subscriptions: []*grapnelv1.Subscription{{Name: "a"}, {Name: "b"}}}, nil
		case "2": // an empty page in the middle is allowed
			return &grapnelv1.ListSubscriptionsResponse{NextPageToken: "3"}, nil
		case "3":
			return &grapnelv1.ListSubscriptionsResponse{NextPageToken: "4", Subscriptions: []*grapnelv1.Subscription{{Name: "c"}}}, nil
		}
		return nil, failure(codes.InvalidArgument, "INVALID_PAGE_TOKEN", "no such page")
	}}
	c, stop := start(t, f)
	defer stop()
	var names []string
	var last error
	for s, err := range c.Subscriptions("acme").List(t.Context()) {
		if last = err; err == nil {
			names = append(names, s.GetName())
		}
	}
	if diff := cmp.Diff([]string{"a", "b", "c"}, names); diff != "" {
		t.Error(diff)
	}
	if !errors.Is(last, client.ErrInvalidPageToken) {
		t.Errorf("last error = %v", last)
	}
	for range c.Subscriptions("acme").List(t.Context()) {
		break // must not fetch or panic
	}
}

func TestUpdateRepeatsOnEtagMismatch(t *testing.T) {
	f := &fake{subscription: &grapnelv1.Subscription{Name: "namespaces/acme/subscriptions/orders", Etag: "1", Uri: "https://a"}}
	f.update = func(call int, s *grapnelv1.Subscription) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if call < 3 {
			f.subscription = proto.CloneOf(f.subscription)
			f.subscription.Etag = fmt.Sprint(call + 1)
			return failure(codes.Aborted, "ETAG_MISMATCH", "changed since it was read")
		}
		if s.GetEtag() != f.subscription.GetEtag() {
			return failure(codes.Aborted, "ETAG_MISMATCH", "stale")
		}
		return nil
	}
	c, stop := start(t, f)
	defer stop()
	changes := 0
	s, err := c.Subscriptions("acme").Update(t.Context(), "orders", func(s *grapnelv1.Subscription) error {
		changes++
		s.Uri = "https://b"
		return nil
	})
	if err != nil || s.GetUri() != "https://b" || changes != 3 {
		t.Errorf("Update = %v, %v after %d changes", s, err, changes)
	}
	f.update = func(int, *grapnelv1.Subscription) error {
		return failure(codes.Aborted, "ETAG_MISMATCH", "changed since it was read")
	}
	calls, _ := f.count()
	_, err = c.Subscriptions("acme").Update(t.Context(), "orders", func(s *grapnelv1.Subscription) error {
		s.Uri = "https://c"
		return nil
	})
	if again, _ := f.count(); !errors.Is(err, client.ErrEtagMismatch) || again-calls != 5 {
		t.Errorf("Update = %v after %d calls, want ErrEtagMismatch after 5", err, again-calls)
	}
	own := errors.New("own")
	if _, err := c.Subscriptions("acme").Update(t.Context(), "orders", func(*grapnelv1.Subscription) error { return own }); !errors.Is(err, own) {
		t.Errorf("err = %v, want the function's own", err)
	}
}

func TestErrorAfterAllRetriesIsTheServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{publish: func(int, *grapnelv1.Event) error {
			return failure(codes.Unavailable, "STORE_UNAVAILABLE", "the store has no quorum")
		}}
		c, stop := start(t, f)
		defer stop()
		_, err := c.Publish(t.Context(), "acme", event(1))
		e := client.FromError(err)
		if e.Reason != "STORE_UNAVAILABLE" || e.Message != "the store has no quorum" {
			t.Errorf("error = %+v", e)
		}
		if !errors.Is(err, client.ErrUnavailable) || errors.Is(err, client.ErrDraining) {
			t.Errorf("errors.Is is wrong for %v", err)
		}
	})
}
