package subscription_test

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

func acme() []*subscription.Namespace {
	return []*subscription.Namespace{{ID: "acme", State: grapnelv1.Namespace_STATE_ACTIVE}}
}

func globs(list ...string) func(*grapnelv1.Subscription) {
	return func(p *grapnelv1.Subscription) { p.EventTypes = list }
}

func condition(text string) func(*grapnelv1.Subscription) {
	return func(p *grapnelv1.Subscription) { p.EventTypes, p.Condition = nil, text }
}

func ids(subs []*subscription.Subscription) []string {
	var out []string
	for _, s := range subs {
		out = append(out, s.ID)
	}
	return out
}

func TestMatchGlobs(t *testing.T) {
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{
		mustNew(t, "all", globs()),
		mustNew(t, "exact", globs("order.created")),
		mustNew(t, "prefix", globs("order.*", "order.cr*", "user.*")),
		mustNew(t, "star", globs("*")),
		mustNew(t, "suffix", globs("*.created")),
		mustNew(t, "inner", globs("order.*.v2")),
		mustNew(t, "paused", func(p *grapnelv1.Subscription) { p.State = grapnelv1.Subscription_STATE_PAUSED }),
	})
	tests := []struct {
		eventType string
		want      []string
	}{
		{"order.created", []string{"all", "exact", "paused", "prefix", "star", "suffix"}},
		{"order.", []string{"all", "paused", "prefix", "star"}},
		{"order", []string{"all", "star"}},
		{"order.a.b.v2", []string{"all", "inner", "paused", "prefix", "star"}},
		{"user.created", []string{"all", "prefix", "star", "suffix"}},
		{"", []string{"all", "star"}},
		{"Order.created", []string{"all", "star", "suffix"}},
	}
	for _, tt := range tests {
		for range 2 { // the second comes from the cache
			if diff := cmp.Diff(tt.want, ids(snap.Match("acme", &subscription.Candidate{Type: tt.eventType}))); diff != "" {
				t.Errorf("%q (-want +got):\n%s", tt.eventType, diff)
			}
		}
	}
	if got := snap.Match("other", &subscription.Candidate{Type: "order.created"}); got != nil {
		t.Errorf("an absent namespace matched %v", ids(got))
	}
}

func TestMatchConditions(t *testing.T) {
	tests := []struct {
		condition string
		want      bool
		failed    bool
	}{
		{"event.type == 'order.paid' && event.id == 'e1' && event.source == '/shop' && event.subject == 's'", true, false},
		{"event.type.startsWith('user.')", false, false},
		{"event.time > timestamp('2026-01-01T00:00:00Z') && event.time.getFullYear() == 2026", true, false},
		{"event.attributes['tenant'] == 'blue'", true, false},
		{"event.attributes['absent'] == 'blue'", false, true},
		{"'absent' in event.attributes", false, false},
		{"has(event.attributes.tenant)", true, false},
		{"event.data_content_type == 'application/json; charset=utf-8'", true, false},
		{"event.data.amount > 10", true, false},
		{"event.data.amount == 12.5", true, false},
		{"event.data.items.exists(i, i.sku == 'b' && i.n >= 2)", true, false},
		{"event.data.items.size() == 2 && event.data['items'][0].sku == 'a'", true, false},
		{"event.data.gift", true, false},
		{"event.data.amount", false, true},
		{"event.data.absent == 1", false, true},
		{"has(event.data.absent) && event.data.absent == 1", false, false},
		{"has(event.data)", true, false},
		{"[event.data.items, event.data.items].all(l, l.size() == 2)", true, false},
	}
	for _, tt := range tests {
		t.Run(tt.condition, func(t *testing.T) {
			snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(t, "s", condition(tt.condition))})
			got := snap.Match("acme", &subscription.Candidate{
				ID: "e1", Source: "/shop", Type: "order.paid", Subject: "s", Time: time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC),
				ContentType: "application/json; charset=utf-8", Attributes: map[string]string{"tenant": "blue"},
				Data: []byte(`{"amount":12.5,"gift":true,"items":[{"sku":"a","n":1},{"sku":"b","n":2}]}`),
			})
			if (len(got) == 1) != tt.want {
				t.Errorf("matched %v, want %v", len(got) == 1, tt.want)
			}
			if n := snap.ConditionErrors(); (n == 1) != tt.failed {
				t.Errorf("%d errors were counted, want one: %v", n, tt.failed)
			}
		})
	}
}

// TestMatchNumbers: identifiers of 64 bits are told apart, and numbers compare by value, as CEL defines it, whatever
// their form in JSON and in the condition.
func TestMatchNumbers(t *testing.T) {
	for _, tt := range []struct {
		condition, value string
		want             bool
	}{
		{"event.data.n == 1524831183200260097", "1524831183200260097", true},
		{"event.data.n == 1524831183200260097", "1524831183200260096", false},
		{"event.data.n == 9223372036854775807", "9223372036854775806", false},
		{"event.data.n == -9223372036854775808", "-9223372036854775807", false},
		{"event.data.n == 18446744073709551615u", "18446744073709551615", true},
		{"event.data.n == 18446744073709551615u", "18446744073709551614", false},
		{"event.data.n in [1524831183200260097]", "1524831183200260096", false},
		{"event.data.n in [1524831183200260097]", "1524831183200260097", true},
		{"event.data.n != 9007199254740993", "9007199254740992", true},
		{"string(event.data.n) == '1524831183200260097'", "1524831183200260097", true},
		{"event.data.n == 5", "5", true},
		{"event.data.n == 5", "5.0", true},
		{"event.data.n == 5.0", "5", true},
		{"event.data.n == 5000", "5e3", true},
		{"event.data.n > 5", "5.5", true},
		{"event.data.n > 5.5", "6", true},
		{"event.data.n >= 5u", "5", true},
		{"event.data.n < 5.5", "-6", true},
		{"event.data.n % 2 == 1", "7", true},
		{"double(event.data.n) * 1.5 > 10.0", "7", true},
		{"event.data.n > 1.0", "123456789012345678901234567890", true},
	} {
		snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(t, "s", condition(tt.condition))})
		c := &subscription.Candidate{Type: "order.paid", ContentType: "application/json", Data: []byte(`{"n":` + tt.value + `}`)}
		if got := snap.Match("acme", c); (len(got) == 1) != tt.want || c.FaultCount != 0 {
			t.Errorf("%s of %s: matched %v, want %v; %v", tt.condition, tt.value, len(got) == 1, tt.want, c.Faults)
		}
	}
}

// TestMatchTellsFaults: what could not be evaluated is told with the event, bounded, and at the subscription.
func TestMatchTellsFaults(t *testing.T) {
	var subs []*subscription.Subscription
	for i := range 20 {
		subs = append(subs, mustNew(t, "s"+string(rune('a'+i)), condition("event.data."+strings.Repeat("x", 1000)+" == 1")))
	}
	snap := subscription.NewSnapshot(1, acme(), subs)
	for range 3 {
		c := &subscription.Candidate{Type: "order.paid", ContentType: "application/json", Data: []byte(`{}`)}
		snap.Match("acme", c)
		if c.FaultCount != 20 || len(c.Faults) != 8 || c.Faults[0].Subscription != "sa" || len(c.Faults[0].Text) > 200 {
			t.Fatalf("%d faults, %d told: %v", c.FaultCount, len(c.Faults), c.Faults)
		}
	}
	if n, last := subs[19].ConditionErrors(); n != 3 || last == nil || !strings.Contains(last.Text, "no such key") {
		t.Errorf("%d errors, the last %v", n, last)
	}
}

func TestMatchWithoutJSON(t *testing.T) {
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{
		mustNew(t, "guarded", condition("has(event.data) && event.data.a == 1")),
		mustNew(t, "plain", condition("event.type == 'x'")),
		mustNew(t, "reads", condition("event.data.a == 1")),
	})
	for _, c := range []subscription.Candidate{
		{Type: "x", ContentType: "text/plain", Data: []byte(`{"a":1}`)},
		{Type: "x", ContentType: "application/json", Data: []byte(`{"a":`)},
		{Type: "x", ContentType: "application/json"},
	} {
		if diff := cmp.Diff([]string{"plain"}, ids(snap.Match("acme", &c))); diff != "" {
			t.Errorf("%q (-want +got):\n%s", c.Data, diff)
		}
	}
	if n := snap.ConditionErrors(); n != 3 {
		t.Errorf("%d errors were counted, want 3", n)
	}
	c := subscription.Candidate{Type: "x", ContentType: "application/vnd.acme+json", Data: []byte(`{"a":1}`)}
	if diff := cmp.Diff([]string{"guarded", "plain", "reads"}, ids(snap.Match("acme", &c))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMatchBoundsCost(t *testing.T) {
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{
		mustNew(t, "s", condition("event.data.all(a, event.data.all(b, event.data.all(c, a + b + c >= 0.0)))")),
	})
	data := "[" + strings.Repeat("1,", 999) + "1]"
	if got := snap.Match("acme", &subscription.Candidate{ContentType: "application/json", Data: []byte(data)}); got != nil {
		t.Error("a condition without end matched")
	}
	if snap.ConditionErrors() != 1 {
		t.Error("its cost was not bounded: no error was counted")
	}
}

func TestMatchAgainstNaive(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	word := func(alphabet string) string {
		var b strings.Builder
		for range 1 + rng.IntN(5) {
			b.WriteByte(alphabet[rng.IntN(len(alphabet))])
		}
		return b.String()
	}
	for round := range 60 {
		var subs []*subscription.Subscription
		for i := range rng.IntN(30) {
			list := make(map[string]bool)
			for range rng.IntN(4) {
				list[word("ab.*")] = true
			}
			var all []string
			for g := range list {
				all = append(all, g)
			}
			subs = append(subs, mustNew(t, fmt.Sprintf("s%02d", i), globs(all...)))
		}
		snap := subscription.NewSnapshot(1, acme(), subs)
		for range 100 {
			eventType := word("ab.")
			var want []string
			for _, s := range subs {
				if naive(s.Proto().EventTypes, eventType) {
					want = append(want, s.ID)
				}
			}
			if diff := cmp.Diff(want, ids(snap.Match("acme", &subscription.Candidate{Type: eventType}))); diff != "" {
				t.Fatalf("round %d, type %q (-want +got):\n%s", round, eventType, diff)
			}
		}
	}
}

func naive(globs []string, eventType string) bool {
	for _, g := range globs {
		if globRegexp(g).MatchString(eventType) {
			return true
		}
	}
	return len(globs) == 0
}

func globRegexp(glob string) *regexp.Regexp {
	return regexp.MustCompile(`^(?s:` + strings.ReplaceAll(regexp.QuoteMeta(glob), `\*`, `.*`) + `)$`)
}

func TestMatchCacheIsBounded(t *testing.T) {
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(t, "s", globs("a*"))})
	for i := range 5000 {
		if len(snap.Match("acme", &subscription.Candidate{Type: fmt.Sprint("a", i)})) != 1 {
			t.Fatal("no match")
		}
	}
}

func TestMatchFromManyGoroutines(t *testing.T) {
	snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{
		mustNew(t, "c", condition("event.data.n >= 0.0")), mustNew(t, "s", globs("a*")),
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 200 {
				c := subscription.Candidate{Type: fmt.Sprint("a", i%7), ContentType: "application/json", Data: []byte(`{"n":1}`)}
				if got := snap.Match("acme", &c); len(got) != 2 {
					t.Errorf("matched %v", ids(got))
				}
			}
		})
	}
	wg.Wait()
}

func TestSnapshotOrder(t *testing.T) {
	namespaces := append(acme(), &subscription.Namespace{ID: "beta"}, &subscription.Namespace{ID: "a"})
	snap := subscription.NewSnapshot(7, namespaces, []*subscription.Subscription{
		mustNew(t, "c", globs()), mustNew(t, "a", globs()), mustNew(t, "b", globs()),
	})
	var got []string
	for s := range snap.Subscriptions("acme", "a") {
		got = append(got, s.ID)
	}
	for n := range snap.Namespaces("") {
		got = append(got, n.ID)
	}
	for n := range snap.Namespaces("aa") {
		got = append(got, n.ID)
		break
	}
	for s := range snap.Subscriptions("none", "") {
		got = append(got, s.ID)
	}
	if diff := cmp.Diff([]string{"b", "c", "a", "acme", "beta", "acme"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if snap.Revision() != 7 || snap.Subscription("acme", "b") == nil || snap.Subscription("acme", "x") != nil || snap.Namespace("x") != nil {
		t.Error("lookups")
	}
}

func FuzzGlob(f *testing.F) {
	f.Add("order.*", "order.created")
	f.Add("*a*b*c*", "abcabc")
	f.Add("**", "")
	f.Fuzz(func(t *testing.T, glob, eventType string) {
		if len(glob) > 64 || strings.Trim(glob, "ab.*_-Z9") != "" || glob == "" || !regexp.MustCompile(`^[\x00-\x7f]*$`).MatchString(eventType) {
			t.Skip()
		}
		snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(t, "s", globs(glob))})
		got := len(snap.Match("acme", &subscription.Candidate{Type: eventType})) == 1
		if want := globRegexp(glob).MatchString(eventType); got != want {
			t.Errorf("glob %q, type %q: %v, want %v", glob, eventType, got, want)
		}
	})
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		var subs []*subscription.Subscription
		for i := range n {
			subs = append(subs, mustNew(b, fmt.Sprintf("s%05d", i), globs(fmt.Sprintf("app%d.order.*", i))))
		}
		snap := subscription.NewSnapshot(1, acme(), subs)
		b.Run(fmt.Sprintf("subscriptions=%d/cached", n), func(b *testing.B) {
			c := &subscription.Candidate{Type: "app77.order.created"}
			b.ReportAllocs()
			for b.Loop() {
				if len(snap.Match("acme", c)) != 1 {
					b.Fatal("no match")
				}
			}
		})
		types := make([]string, 4096)
		for i := range types {
			types[i] = fmt.Sprintf("app%d.order.t%d", i%n, i)
		}
		b.Run(fmt.Sprintf("subscriptions=%d/uncached", n), func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if len(snap.Match("acme", &subscription.Candidate{Type: types[i%len(types)]})) != 1 {
					b.Fatal("no match")
				}
				i++
			}
		})
	}
	b.Run("condition", func(b *testing.B) {
		snap := subscription.NewSnapshot(1, acme(), []*subscription.Subscription{mustNew(b, "s", condition("event.data.amount > 10 && event.type.startsWith('o')"))})
		b.ReportAllocs()
		for b.Loop() {
			c := &subscription.Candidate{Type: "order.paid", ContentType: "application/json", Data: []byte(`{"amount":12.5}`)}
			if len(snap.Match("acme", c)) != 1 {
				b.Fatal("no match")
			}
		}
	})
}
