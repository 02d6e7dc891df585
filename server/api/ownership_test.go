package api_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
	"github.com/grapnel/grapnel/server/delivery"
)

// answers makes the target answer an ownership check.
func (w *world) answers(a *delivery.Attempt, err error) {
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	w.host.owner = func(context.Context, *grapnelv1.Subscription) (*delivery.Attempt, error) { return a, err }
}

// asked returns which URIs were asked since the last call.
func (w *world) asked() []string {
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	out := w.host.asked
	w.host.asked = nil
	return out
}

func agreement(rate string) *delivery.Attempt {
	a := &delivery.Attempt{Outcome: delivery.OutcomeSucceeded, ResponseCode: 200}
	if rate != "" {
		a.ResponseHeaders = []delivery.Header{{Name: "webhook-allowed-origin", Value: "*"}, {Name: "webhook-allowed-rate", Value: rate}}
	}
	return a
}

func TestTargetsAreAskedFirst(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	create := func(change func(*grapnelv1.CreateSubscriptionRequest)) (*grapnelv1.CreateSubscriptionResponse, error) {
		r := &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", SubscriptionId: "orders", Subscription: plainSubscription("acme")}
		if change != nil {
			change(r)
		}
		return w.subscriptions.CreateSubscription(t.Context(), r)
	}
	uri := plainSubscription("acme").GetUri()

	w.answers(&delivery.Attempt{Outcome: delivery.OutcomePermanent, ResponseCode: 405, Error: "no webhook-allowed-origin"}, nil)
	_, err := create(nil)
	r := refused(t, err, codes.FailedPrecondition, "OWNERSHIP_REFUSED")
	if !slices.Equal(r.blockers, []string{"subscription.uri"}) || !strings.Contains(r.message, "no webhook-allowed-origin") || r.metadata["responseCode"] != "405" {
		t.Errorf("refused: %+v", r)
	}
	if got := w.asked(); !slices.Equal(got, []string{uri}) {
		t.Errorf("asked %q", got)
	}
	_, err = w.subscriptions.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/orders"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")

	// Nothing that is refused anyway, and nothing that is only tried, bothers a receiver.
	if _, err := create(func(r *grapnelv1.CreateSubscriptionRequest) { r.ValidateOnly = true }); err != nil {
		t.Error(err)
	}
	_, err = create(func(r *grapnelv1.CreateSubscriptionRequest) { r.Subscription.Uri = "nothing" })
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
	_, err = create(func(r *grapnelv1.CreateSubscriptionRequest) {
		r.Subscription.Signers[0].Secrets["key"] = "namespaces/acme/secrets/none"
	})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	if got := w.asked(); len(got) > 0 {
		t.Errorf("asked %q", got)
	}

	w.answers(nil, api.ErrPluginUnavailable)
	_, err = create(nil)
	refused(t, err, codes.FailedPrecondition, "PLUGIN_UNAVAILABLE")
	w.answers(&delivery.Attempt{Outcome: delivery.OutcomePluginError, Error: "config refused"}, nil)
	_, err = create(nil)
	refused(t, err, codes.FailedPrecondition, "PLUGIN_UNAVAILABLE")

	w.answers(agreement("*"), nil)
	if _, err := create(nil); err != nil {
		t.Fatal(err)
	}
	w.asked()

	// Once it has agreed it is asked again about a new target only.
	update := func(path string, sub *grapnelv1.Subscription) error {
		sub.Name = "namespaces/acme/subscriptions/orders"
		_, err := w.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
			Subscription: sub, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{path}},
		})
		return err
	}
	w.answers(&delivery.Attempt{Outcome: delivery.OutcomeUnreachable, Error: "connection refused"}, nil)
	if err := update("display_name", &grapnelv1.Subscription{DisplayName: "x"}); err != nil {
		t.Error(err)
	}
	err = update("uri", &grapnelv1.Subscription{Uri: "https://other.example.com/"})
	if r := refused(t, err, codes.FailedPrecondition, "OWNERSHIP_REFUSED"); !strings.Contains(r.message, "connection refused") {
		t.Error(r.message)
	}
	if got := w.asked(); !slices.Equal(got, []string{"https://other.example.com/"}) {
		t.Errorf("asked %q", got)
	}
}

func TestAllowedRateBoundsMaxRate(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	for _, c := range []struct {
		allowed string
		rate    float64
		// text of the violation of max_rate, of the warning.
		fault, warning string
	}{
		{"*", 0, "", ""},
		{"", 0, "", ""},
		{"120", 2, "", ""},
		{"120", 1, "", ""},
		{"120", 0, "0 is no limit, and the receiver takes 120 requests a minute (webhook-allowed-rate); want more than 0 and at most 2", ""},
		{"120", 2.5, "given 2.5 a second, and the receiver takes 120 requests a minute (webhook-allowed-rate); want more than 0 and at most 2", ""},
		{"100", 0, "at most 1.6666", ""},
		{"100", 1.6666, "", ""},
		{"many", 0, "", `"many", is no number`},
		{"0", 0, "", `"0", is no number`},
	} {
		w.answers(agreement(c.allowed), nil)
		sub := plainSubscription("acme")
		sub.MaxRate = c.rate
		made, err := w.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", Subscription: sub})
		if c.fault != "" {
			r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
			if r.names(t, "subscription.max_rate"); !strings.Contains(r.message, c.fault) {
				t.Errorf("%q with %v: %q lacks %q", c.allowed, c.rate, r.message, c.fault)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q with %v: %v", c.allowed, c.rate, err)
			continue
		}
		if got := strings.Join(made.GetWarnings(), "; "); !strings.Contains(got, c.warning) || c.warning == "" && got != "" {
			t.Errorf("%q with %v: warnings %q", c.allowed, c.rate, got)
		}
	}
}

// TestOwnershipCheckIsBounded: a receiver, or a plugin, that never answers ends a call when attempt_timeout
// has passed.
func TestOwnershipCheckIsBounded(t *testing.T) {
	w := startWorld(t)
	w.namespace(t, "acme")
	w.host.owner = func(ctx context.Context, sub *grapnelv1.Subscription) (*delivery.Attempt, error) {
		deadline, ok := ctx.Deadline()
		if left := time.Until(deadline); !ok || left > 4*time.Second || left < time.Second {
			t.Errorf("%v is left", left)
		}
		return nil, context.DeadlineExceeded
	}
	sub := plainSubscription("acme")
	sub.AttemptTimeout = durationpb.New(time.Second)
	_, err := w.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{Parent: "namespaces/acme", Subscription: sub})
	if r := refused(t, err, codes.FailedPrecondition, "OWNERSHIP_REFUSED"); !strings.Contains(r.message, "no answer within") {
		t.Error(r.message)
	}
}

// TestSignersMask: the list of signers is replaced as a whole, and what goes into it is refused in words.
func TestSignersMask(t *testing.T) {
	w := startWorld(t)
	twoSigners(w)
	key := w.namespace(t, "acme")
	sub := w.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) {
		s.Signers = append(s.Signers, &grapnelv1.PluginBinding{Plugin: "plugins/plain", Secrets: key})
	})
	update := func(signers []*grapnelv1.PluginBinding, paths ...string) (*grapnelv1.UpdateSubscriptionResponse, error) {
		return w.subscriptions.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
			Subscription: &grapnelv1.Subscription{Name: sub.GetName(), Signers: signers}, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths},
		})
	}
	names := func(r *grapnelv1.UpdateSubscriptionResponse) (out []string) {
		for _, b := range r.GetSubscription().GetSigners() {
			out = append(out, b.GetPlugin())
		}
		return out
	}
	for _, path := range []string{"signers.plugin", "signers.secrets.key"} {
		_, err := update([]*grapnelv1.PluginBinding{{Plugin: "plugins/pair"}}, path)
		if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.fields["update_mask"], `goes inside "signers", which can only be replaced as a whole`) {
			t.Errorf("%s: %q", path, r.fields)
		}
	}
	_, err := update(nil, "signers[0]")
	if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.fields["update_mask"], "signers, transport") {
		t.Errorf("%q", r.fields)
	}
	r, err := update([]*grapnelv1.PluginBinding{{Plugin: "plugins/pair", Secrets: key}}, "signers")
	if err != nil || !slices.Equal(names(r), []string{"plugins/pair"}) {
		t.Errorf("replaced by one: %v, %v", names(r), err)
	}
	if r, err = update(nil, "signers"); err != nil || !slices.Equal(names(r), []string{"plugins/standard-webhooks"}) {
		t.Errorf("replaced by none, which is the default: %v, %v", names(r), err)
	}
	if r, err = update(nil, "payload_shape.compression"); err != nil || r.GetSubscription().GetPayloadShape().GetFormat() != grapnelv1.PayloadShape_FORMAT_RAW {
		t.Errorf("inside payload_shape: %v, %v", r, err)
	}
}
