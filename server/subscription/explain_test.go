package subscription_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestExplain(t *testing.T) {
	type seen = subscription.Seen
	tests := []struct {
		name   string
		globs  []string
		text   string
		want   subscription.Verdict
		says   string
		seen   []seen
		noJSON bool
	}{
		{name: "everything"},
		{name: "a glob that covers", globs: []string{"invoice.*", "order.*"}},
		{
			name: "globs that do not", globs: []string{"invoice.*", "user.*", "a", "b", "c", "d"}, want: subscription.OtherType,
			says: `its event_types cover "invoice.*", "user.*", "a", "b" and 2 more, not "order.paid"`,
		},
		{
			name: "the type before the condition", globs: []string{"a"}, text: "event.data.absent == 1", want: subscription.OtherType,
			says: `its event_types cover "a", not "order.paid"`,
		},
		{name: "a condition that holds", text: "event.data.amount > 10", seen: []seen{{"event.data.amount", "12.5"}}},
		{
			name: "one that does not", text: "event.data.amount > 20 || event.data.customer.country in ['DE', 'FR']",
			want: subscription.ConditionFalse, says: "its condition does not hold",
			seen: []seen{{"event.data.amount", "12.5"}, {"event.data.customer.country", `"US"`}},
		},
		{
			name: "what was not read is not told", text: "event.data.amount > 20 && event.data.customer.country == 'DE'",
			want: subscription.ConditionFalse, says: "its condition does not hold",
			seen: []seen{{"event.data.amount", "12.5"}},
		},
		{
			name: "each once", text: "event.type == 'a' || event.type == 'b' || event.attributes['tenant'] == 'red'",
			want: subscription.ConditionFalse, says: "its condition does not hold",
			seen: []seen{{"event.type", `"order.paid"`}, {`event.attributes["tenant"]`, `"blue"`}},
		},
		{
			name: "lists and objects by their size", text: "event.data.items == [] || event.data.customer == {}",
			want: subscription.ConditionFalse, says: "its condition does not hold",
			seen: []seen{{"event.data.items", "a list of 2"}, {"event.data.customer", "an object of 1"}},
		},
		{
			name: "within a macro", text: "event.data.items.exists(i, i.sku == 'c')", want: subscription.ConditionFalse,
			says: "its condition does not hold", seen: []seen{{"event.data.items", "a list of 2"}},
		},
		{
			name: "one that fails", text: "event.data.amount > 10 && event.data.absent == 1", want: subscription.ConditionFails,
			says: "its condition cannot be evaluated for the event: no such key: absent",
			seen: []seen{{"event.data.amount", "12.5"}, {"event.data", "an object of 3"}},
		},
		{
			name: "a payload that is none", text: "event.data.amount > 10", noJSON: true, want: subscription.ConditionFails,
			says: `its condition cannot be evaluated for the event: the payload is not JSON: its content type is "text/plain"`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := &subscription.Candidate{
				Type: "order.paid", ContentType: "application/json", Attributes: map[string]string{"tenant": "blue"},
				Data: []byte(`{"amount":12.5,"customer":{"country":"US"},"items":[{"sku":"a"},{"sku":"b"}]}`),
			}
			if tt.noJSON {
				c.ContentType = "text/plain"
			}
			sub := mustNew(t, "s", func(s *grapnelv1.Subscription) { s.EventTypes, s.Condition = tt.globs, tt.text })
			got := sub.Explain(c)
			if diff := cmp.Diff(subscription.Opinion{Verdict: tt.want, Text: tt.says, Seen: tt.seen}, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if wants := sub.Wants(c); wants != (got.Verdict == subscription.Wanted) {
				t.Errorf("Wants says %v", wants)
			}
			if n, _ := sub.ConditionErrors(); n > 1 { // that of Wants
				t.Errorf("%d errors were counted", n)
			}
		})
	}
}

// TestExplainIsBounded: whatever the event and the condition hold, an opinion stays small.
func TestExplainIsBounded(t *testing.T) {
	long := strings.Repeat("ü\x00", 10_000)
	var terms []string
	for range 40 {
		terms = append(terms, "event.data.k"+strings.Repeat("x", len(terms))+" == '"+"v'")
	}
	sub := mustNew(t, "s", condition(strings.Join(terms, " || ")))
	data := `{"k":"` + strings.Repeat("ü", 10_000) + `"`
	for i := 1; i < 40; i++ {
		data += `,"k` + strings.Repeat("x", i) + `":1`
	}
	got := sub.Explain(&subscription.Candidate{Type: "a", ContentType: "application/json", Data: []byte(data + "}")})
	if len(got.Seen) != 16 {
		t.Errorf("%d readings", len(got.Seen))
	}
	for _, s := range got.Seen {
		if len(s.Expression) > 128 || len(s.Value) > 2*128 {
			t.Errorf("%d and %d bytes: %s", len(s.Expression), len(s.Value), s.Expression)
		}
	}
	text := mustNew(t, "s", globs("a.*")).Explain(&subscription.Candidate{Type: long}).Text
	if len(text) > 1024 || strings.ContainsRune(text, 0) {
		t.Errorf("%d bytes: %q", len(text), text)
	}
}
