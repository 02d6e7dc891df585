package subscription_test

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

// asked keeps the URIs that approve was asked about.
type asked struct {
	uris   []string
	answer error
	// meanwhile, when set, happens while the first question is open.
	meanwhile func()
}

func (a *asked) approve(_ context.Context, p *grapnelv1.Subscription) error {
	a.uris = append(a.uris, p.GetUri())
	if f := a.meanwhile; f != nil {
		a.meanwhile = nil
		f()
	}
	return a.answer
}

func (a *asked) about(t *testing.T, uris ...string) {
	t.Helper()
	if diff := cmp.Diff(uris, a.uris); diff != "" {
		t.Errorf("asked about (-want +got):\n%s", diff)
	}
	a.uris = nil
}

const uri, other = "https://hooks.example.com/orders", "https://other.example.com/"

func TestApproveHasTheLastWord(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 3)
	a := &asked{answer: errors.New("no")}
	create := func(id string, o subscription.CreateOptions) error {
		o.Approve = a.approve
		_, err := r.CreateSubscription(t.Context(), "acme", id, valid(), o)
		return err
	}
	if err := create("orders", subscription.CreateOptions{}); !errors.Is(err, a.answer) {
		t.Errorf("got %v", err)
	}
	a.about(t, uri)
	if got := keys(t, "namespaces/acme/"); len(got) != 0 {
		t.Errorf("stored although refused: %v", got)
	}
	if err := create("orders", subscription.CreateOptions{ValidateOnly: true}); err != nil {
		t.Error(err)
	}
	a.about(t)

	a.answer = nil
	once := subscription.CreateOptions{RequestID: uuid.NewString()}
	for range 2 {
		if err := create("orders", once); err != nil {
			t.Error(err)
		}
	}
	a.about(t, uri) // and not for the repeated call
	if err := create("orders", subscription.CreateOptions{}); !errors.Is(err, subscription.ErrExists) {
		t.Errorf("got %v", err)
	}
	a.about(t) // other checks come first
}

func TestApproveIsAskedAboutNewTargetsOnly(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 10)
	create(t, r, "orders")
	a := &asked{}
	update := func(change func(*grapnelv1.Subscription)) error {
		_, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error {
			change(p)
			return nil
		}, subscription.UpdateOptions{Approve: a.approve})
		return err
	}
	for _, c := range []struct {
		name   string
		change func(*grapnelv1.Subscription)
		want   []string
	}{
		{"nothing", func(*grapnelv1.Subscription) {}, nil},
		{"name", func(p *grapnelv1.Subscription) { p.DisplayName = "x" }, nil},
		{"less rate", func(p *grapnelv1.Subscription) { p.MaxRate = 10 }, nil},
		{"more rate", func(p *grapnelv1.Subscription) { p.MaxRate = 11 }, []string{uri}},
		{"no limit", func(p *grapnelv1.Subscription) { p.MaxRate = 0 }, []string{uri}},
		{"uri", func(p *grapnelv1.Subscription) { p.Uri = other }, []string{other}},
		{"transport", func(p *grapnelv1.Subscription) { p.Transport.Plugin = "plugins/other" }, []string{other}},
	} {
		if err := update(c.change); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		a.about(t, c.want...)
	}
	a.answer = errors.New("no")
	if err := update(func(p *grapnelv1.Subscription) { p.Uri = uri }); !errors.Is(err, a.answer) {
		t.Errorf("got %v", err)
	}
	if got := r.Snapshot().Subscription("acme", "orders").Proto().GetUri(); got != other {
		t.Errorf("stored %s although refused", got)
	}
}

// TestApproveSeesWhatIsStored: somebody else's change while the question is open is not overwritten, and
// what was not approved is not stored.
func TestApproveSeesWhatIsStored(t *testing.T) {
	r, _ := registry(t, etcd.Client)
	withNamespace(t, r, 10)
	create(t, r, "orders")
	change := func(f func(*grapnelv1.Subscription), o subscription.UpdateOptions) error {
		_, err := r.UpdateSubscription(t.Context(), "acme", "orders", "", func(p *grapnelv1.Subscription) error { f(p); return nil }, o)
		return err
	}
	a := &asked{}
	a.meanwhile = func() {
		if err := change(func(p *grapnelv1.Subscription) { p.Transport.Plugin = "plugins/other" }, subscription.UpdateOptions{}); err != nil {
			t.Error(err)
		}
	}
	if err := change(func(p *grapnelv1.Subscription) { p.Uri = other }, subscription.UpdateOptions{Approve: a.approve}); err != nil {
		t.Fatal(err)
	}
	a.about(t, other, other) // with the first transport, then with the second
	if p := r.Snapshot().Subscription("acme", "orders").Proto(); p.GetUri() != other || p.GetTransport().GetPlugin() != "plugins/other" {
		t.Errorf("stored %v", p)
	}

	// With somebody else's change at every question it gives up.
	n := 0
	again := func(context.Context, *grapnelv1.Subscription) error {
		n++
		return change(func(p *grapnelv1.Subscription) {
			p.MaxRate = float64(100 - n)
			p.Transport.Plugin = "plugins/x" + string(rune('a'+n))
		}, subscription.UpdateOptions{})
	}
	err := change(func(p *grapnelv1.Subscription) { p.Uri = uri }, subscription.UpdateOptions{Approve: again})
	var changed *subscription.EtagError
	if !errors.As(err, &changed) || n > 10 {
		t.Errorf("asked %d times, then %v", n, err)
	}
}
