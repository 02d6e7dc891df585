package filter_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/server/api/filter"
)

type thing struct {
	state  string
	name   string
	types  []string
	labels map[string]string
	count  int64
	made   time.Time
}

func fields() []filter.Field[thing] {
	return []filter.Field[thing]{
		{Name: "state", Text: func(t thing) string { return t.state }, Values: []string{"ACTIVE", "PAUSED"}, Prefix: "STATE_"},
		{Name: "name", Text: func(t thing) string { return t.name }},
		{Name: "owner", Text: func(t thing) string { return t.name }, Canonical: func(s string) (string, error) {
			if id, ok := strings.CutPrefix(s, "people/"); ok {
				return id, nil
			}
			return "", errors.New("looks like people/NAME")
		}},
		{Name: "types", Texts: func(t thing) []string { return t.types }},
		{Name: "labels", Map: func(t thing) map[string]string { return t.labels }},
		{Name: "count", Int: func(t thing) int64 { return t.count }},
		{Name: "made", Time: func(t thing) time.Time { return t.made }},
	}
}

func at(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		panic(err)
	}
	return t
}

func sample() thing {
	return thing{
		state:  "ACTIVE",
		name:   "order.created",
		types:  []string{"a.b", "c.d"},
		labels: map[string]string{"team": "pay", "tier": "1", "stars": "a*b*"},
		count:  3,
		made:   at("2026-11-20T08:00:00.5Z"),
	}
}

func TestMatch(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                    true,
		"  ":                                  true,
		"state = ACTIVE":                      true,
		"state=ACTIVE":                        true,
		"state = STATE_ACTIVE":                true,
		"state != ACTIVE":                     false,
		"NOT state = PAUSED":                  true,
		"name = order.created":                true,
		"name = order.*":                      true,
		`name = "order.*"`:                    true,
		`name = 'order.created'`:              true,
		`name = "say \"hi\""`:                 false,
		`labels.stars = "a\*b\*"`:             true,
		`labels.stars = 'a\*b*'`:              true,
		`labels.stars = "a\*"`:                false,
		`labels.stars = "a\**"`:               true,
		"name = *":                            true,
		"name : created":                      true,
		"name:xyz":                            false,
		"name != order.*":                     false,
		"owner = people/order.created":        true,
		"types = a.b":                         true,
		"types:c.*":                           true,
		"types != a.b":                        false,
		"labels.team = pay":                   true,
		"labels.team = p*":                    true,
		"labels.none = pay":                   false,
		"labels.none != pay":                  true,
		"labels:team":                         true,
		"labels:none":                         false,
		"labels.team:*":                       true,
		"labels.none:*":                       false,
		"count > 2 AND count <= 3":            true,
		"count < 3":                           false,
		"count = -1":                          false,
		"made > 2026-11-20T08:00:00Z":         true,
		"made < 2026-11-20T08:00:00Z":         false,
		"made >= 2026-11-20T09:00:00.5+01:00": true,
		"state = PAUSED OR state = ACTIVE":    true,
		"count = 3 AND state = PAUSED OR state = ACTIVE":           true,
		"count = 4 AND state = PAUSED OR state = ACTIVE":           false,
		"(state = PAUSED OR count = 3)":                            true,
		"( state = PAUSED OR count = 4 ) AND name = order.created": false,
		"(state = ACTIVE) AND NOT count = 4":                       true,
	} {
		f, err := filter.Parse(text, fields())
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if got := f.Match(sample()); got != want {
			t.Errorf("%q: got %v", text, got)
		}
	}
}

func TestErrorsSayWhatAndWhere(t *testing.T) {
	for _, c := range []struct {
		text   string
		offset int
		want   string
	}{
		{"colour = red", 0, `there is no field "colour"`},
		{"state = ACTIVE AND colour = red", 19, `there is no field "colour"`},
		{"state = GREEN", 8, "state is one of ACTIVE, PAUSED"},
		{"state < ACTIVE", 6, "state can be compared with = != only"},
		{"state", 5, "the filter ends where a comparison (= != < <= > >= :) after state should be"},
		{"state =", 7, "the filter ends where a value for state should be"},
		{"state = ACTIVE count = 3", 15, `AND should be here instead of "count"`},
		{"state = ACTIVE and count = 3", 15, "write AND in capitals"},
		{"state = ACTIVE OR count = 3", 18, "put brackets around an OR of different fields"},
		{"(state = ACTIVE OR count = 3", 0, "this bracket is not closed"},
		{"(state = ACTIVE AND count = 3)", 16, "inside brackets there can be OR only"},
		{"NOT (state = ACTIVE)", 4, "NOT stands before a single comparison"},
		{"count = three", 8, "count is compared with a whole number"},
		{"made > yesterday", 7, "RFC 3339"},
		{`name = "x`, 7, "this quote is not closed"},
		{"name = a*b", 7, "only at the end"},
		{"owner = bob", 8, "owner looks like people/NAME"},
		{"labels = x", 7, "labels can be compared with : only"},
		{"AND", 0, "there is no field"},
		{")", 0, "a field should be here instead of )"},
		{strings.Repeat("x", 2049), 2048, "longer than 2048"},
		{strings.Repeat("count = 1 AND ", 20) + "count = 1", 280, "at most 20 comparisons"},
	} {
		_, err := filter.Parse(c.text, fields())
		bad, ok := errors.AsType[*filter.Error](err)
		if !ok {
			t.Errorf("%q: got %v", c.text, err)
			continue
		}
		if bad.Offset != c.offset || !strings.Contains(bad.Message, c.want) {
			t.Errorf("%q: got %d %q, want %d %q", c.text, bad.Offset, bad.Message, c.offset, c.want)
		}
		if !strings.Contains(bad.Message, "the fields are state, name, owner, types, labels.KEY, count, made") || len(bad.Fields) != 7 {
			t.Errorf("%q: the fields are not told: %q", c.text, bad.Message)
		}
	}
}

func TestIndexablePart(t *testing.T) {
	for _, c := range []struct {
		text   string
		states []string
		known  bool
	}{
		{"", nil, false},
		{"state = ACTIVE", []string{"ACTIVE"}, true},
		{"state = ACTIVE OR state = PAUSED", []string{"ACTIVE", "PAUSED"}, true},
		{"state != ACTIVE", nil, false},
		{"NOT state = ACTIVE", nil, false},
		{"(state = ACTIVE OR count = 3)", nil, false},
		{"state = ACTIVE AND state = PAUSED", []string{}, true},
		{"count = 1 AND state = PAUSED", []string{"PAUSED"}, true},
	} {
		f, err := filter.Parse(c.text, fields())
		if err != nil {
			t.Fatal(err)
		}
		got, known := f.OneOf("state")
		if known != c.known || !cmp.Equal(got, c.states) {
			t.Errorf("%q: got %v %v", c.text, got, known)
		}
	}
	f, err := filter.Parse("made > 2026-11-20T08:00:00.0005Z AND made >= 2026-11-19T08:00:00Z AND made < 2026-11-21T08:00:00Z", fields())
	if err != nil {
		t.Fatal(err)
	}
	since, until := f.Between("made")
	if !since.Equal(at("2026-11-20T08:00:00Z")) || !until.Equal(at("2026-11-21T08:00:00.001Z")) {
		t.Errorf("got %v to %v", since, until)
	}
}

// FuzzParse: no input panics; what the index is told never hides what the predicate lets through.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"state = ACTIVE", `(name = "a\"b*" OR count >= 3) AND NOT labels.x : y`, "made > 2026-11-20T08:00:00Z", "state=PAUSED OR state=ACTIVE", "'", "((", "a.b.c:*"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		parsed, err := filter.Parse(text, fields())
		if err != nil {
			bad, ok := errors.AsType[*filter.Error](err)
			if !ok || bad.Offset < 0 || bad.Offset > len(text) || bad.Message == "" {
				t.Fatalf("bad error %#v", err)
			}
			return
		}
		if !parsed.Match(sample()) {
			return
		}
		if states, known := parsed.OneOf("state"); known && !contains(states, "ACTIVE") {
			t.Fatalf("%q matches, but the index is told %v", text, states)
		}
		since, until := parsed.Between("made")
		made := sample().made
		if made.Before(since) || !until.IsZero() && !made.Before(until) {
			t.Fatalf("%q matches, but the index is told %v to %v", text, since, until)
		}
	})
}

func contains(all []string, s string) bool {
	for _, v := range all {
		if v == s {
			return true
		}
	}
	return false
}
