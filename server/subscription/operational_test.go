package subscription_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

// Operational events go to those who name their prefix, whatever else a glob covers, and never to the subscription that
// they are about; all who are asked agree.
func TestMatchOperational(t *testing.T) {
	subs := []*subscription.Subscription{
		mustNew(t, "all", globs()),
		mustNew(t, "both", globs("**", "grapnel.**")),
		mustNew(t, "end", globs("*.exhausted")),
		mustNew(t, "exact", globs("grapnel.delivery.exhausted")),
		mustNew(t, "half", globs("grapnel*")),
		mustNew(t, "inner", globs("grapnel.*.exhausted")),
		mustNew(t, "other", globs("grapnel.replay.*")),
		mustNew(t, "prefix", globs("grapnel.*")),
		mustNew(t, "star", globs("*")),
		mustNew(t, "stars", globs("**")),
	}
	snap := subscription.NewSnapshot(1, acme(), subs)
	about := func(id string) string { return "namespaces/acme/subscriptions/" + id }
	for _, tt := range []struct {
		eventType, subject string
		want               []string
	}{
		{"grapnel.delivery.exhausted", about("orders"), []string{"both", "exact", "inner", "prefix"}},
		{"grapnel.delivery.exhausted", about("exact"), []string{"both", "inner", "prefix"}},
		{"grapnel.delivery.exhausted", about("prefix"), []string{"both", "exact", "inner"}},
		{"grapnel.replay.done", "", []string{"both", "other", "prefix"}},
		{"grapnel.", "", []string{"both", "prefix"}},
		{"grapnel", "", []string{"all", "both", "half", "star", "stars"}},
		{"grapnels.x", about("all"), []string{"all", "both", "half", "star", "stars"}},
		{"order.exhausted", about("end"), []string{"all", "both", "end", "star", "stars"}},
	} {
		for range 2 { // the second comes from the cache
			c := &subscription.Candidate{Type: tt.eventType, Subject: tt.subject}
			if diff := cmp.Diff(tt.want, ids(snap.Match("acme", c))); diff != "" {
				t.Errorf("%s about %q (-want +got):\n%s", tt.eventType, tt.subject, diff)
			}
		}
		var wants, explained []string
		for _, s := range subs {
			c := &subscription.Candidate{Type: tt.eventType, Subject: tt.subject}
			if s.Wants(c) {
				wants = append(wants, s.ID)
			}
			if s.Explain(c).Verdict == subscription.Wanted {
				explained = append(explained, s.ID)
			}
		}
		if diff := cmp.Diff(tt.want, wants); diff != "" {
			t.Errorf("Wants %s about %q (-want +got):\n%s", tt.eventType, tt.subject, diff)
		}
		if diff := cmp.Diff(tt.want, explained); diff != "" {
			t.Errorf("Explain %s about %q (-want +got):\n%s", tt.eventType, tt.subject, diff)
		}
	}
	for id, says := range map[string]string{
		"all":   "it has no event_types: operational events want a type that begins with grapnel.",
		"stars": `its event_types cover "**", not "grapnel.delivery.exhausted": operational events want a type that begins with grapnel.`,
		"exact": "about the subscription itself",
	} {
		c := &subscription.Candidate{Type: "grapnel.delivery.exhausted", Subject: about("exact")}
		if got := snap.Subscription("acme", id).Explain(c).Text; !strings.Contains(got, says) {
			t.Errorf("%s: %q, want %q", id, got, says)
		}
	}
	warnings := subscription.Warnings(mustNew(t, "both", globs("**", "grapnel.**")).Proto())
	if strings.Contains(strings.Join(warnings, "\n"), "covered") {
		t.Errorf("warned of globs that cover different types: %q", warnings)
	}
}

// Whether anybody listens follows every change.
func TestListens(t *testing.T) {
	listens := func(subs ...*subscription.Subscription) bool {
		return subscription.NewSnapshot(1, acme(), subs).Listens("acme")
	}
	if listens() || listens(mustNew(t, "all", globs()), mustNew(t, "stars", globs("**", "grapnel*"))) {
		t.Error("nobody names the prefix, and somebody listens")
	}
	ops := mustNew(t, "ops", globs("order.*", "grapnel.**"))
	if !listens(ops) {
		t.Error("one names the prefix, and nobody listens")
	}
	changed := mustNew(t, "ops", func(p *grapnelv1.Subscription) { p.Uid, p.EventTypes = ops.Proto().Uid, []string{"order.*"} })
	if listens(ops, changed) || !listens(changed, ops) {
		t.Error("who listens does not follow a change")
	}
	if snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{ops}); snap.Listens("other") {
		t.Error("an absent namespace listens")
	}
}

// Who covers a type follows every change, too.
func TestCovers(t *testing.T) {
	quota := mustNew(t, "ops", globs("order.*", "grapnel.quota.*"))
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(t, "all", globs()), quota})
	for eventType, want := range map[string]bool{"grapnel.quota.near": true, "grapnel.disk.filling": false, "order.created": false, "": false} {
		for range 2 { // the second comes from the cache
			if got := snap.Covers("acme", eventType); got != want {
				t.Errorf("covers %q: %v", eventType, got)
			}
		}
	}
	if snap.Covers("other", "grapnel.quota.near") {
		t.Error("an absent namespace covers something")
	}
	changed := mustNew(t, "ops", func(p *grapnelv1.Subscription) { p.Uid, p.EventTypes = quota.Proto().Uid, []string{"grapnel.disk.*"} })
	after := subscription.NewSnapshot(2, acme(), []*subscription.Subscription{quota, changed})
	if after.Covers("acme", "grapnel.quota.near") || !after.Covers("acme", "grapnel.disk.filling") {
		t.Error("what is covered does not follow a change")
	}
}

// What nobody asked for is not looked through: many that want everything cost an operational event nothing.
func BenchmarkMatchOperational(b *testing.B) {
	subs := []*subscription.Subscription{mustNew(b, "ops", globs("grapnel.**"))}
	for i := range 10_000 {
		subs = append(subs, mustNew(b, fmt.Sprintf("s%05d", i), globs("**")))
	}
	snap := subscription.NewSnapshot(1, acme(), subs)
	i := 0
	for b.Loop() {
		if len(snap.Match("acme", &subscription.Candidate{Type: fmt.Sprint("grapnel.", i)})) != 1 {
			b.Fatal("no match")
		}
		i++
	}
}
