package pluginhost

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// What receivers say of batches is read whatever it is, and names nobody who is not named.
func TestWhoAnAnswerNames(t *testing.T) {
	for name, tt := range map[string]struct {
		body string
		want []string // ids
		err  error
	}{
		"nothing":           {"", nil, nil},
		"text":              {"ok", nil, nil},
		"another array":     {`["evt_1"]`, nil, nil},
		"another object":    {`{"status": {"failed": ["evt_1"]}}`, nil, nil},
		"texts":             {`{"failed": ["evt_1", "evt_2"]}`, []string{"evt_1", "evt_2"}, nil},
		"objects":           {` {"n": [1, {}], "failed": [{"id": "evt_1", "reason": 7}, {"ID": "evt_2"}]}`, []string{"evt_1", ""}, nil},
		"null":              {`{"failed": null}`, nil, nil},
		"false":             {`{"failed": false}`, nil, nil},
		"empty":             {`{"failed": ""}`, nil, nil},
		"a number":          {`{"failed": 2}`, nil, errNoList},
		"true":              {`{"failed": true}`, nil, errNoList},
		"an object":         {`{"failed": {"evt_1": "no"}}`, nil, errNoList},
		"cut in the list":   {`{"failed": ["evt_1", "ev`, nil, errCut},
		"cut before a list": {`{"failed": `, nil, errCut},
		"cut before it":     {`{"done": ["evt_1", "ev`, nil, nil},
		"cut behind it":     {`{"failed": ["evt_1"], "more": "`, []string{"evt_1"}, nil},
		"two lists":         {`{"failed": ["evt_1"], "failed": ["evt_2"]}`, []string{"evt_1", "evt_2"}, nil},
		"two, the last cut": {`{"failed": [], "failed": ["evt_2"`, nil, errCut},
		"a byte order mark": {"\uFEFF" + `{"failed": ["evt_1"]}`, []string{"evt_1"}, nil},
		"deep":              {`{"failed": ` + strings.Repeat("[", 20_000), nil, errCut},
	} {
		got, err := failedIn([]byte(tt.body))
		var ids []string
		for _, n := range got {
			ids = append(ids, n.id)
		}
		if !errors.Is(err, tt.err) || err == nil && !slices.Equal(ids, tt.want) {
			t.Errorf("%s: %q, %v; want %q, %v", name, ids, err, tt.want, tt.err)
		}
	}
}

func FuzzWhoAnAnswerNames(f *testing.F) {
	f.Add(`{"failed": [{"id": "evt_1", "reason": "x"}, "evt_2"]}`, 20)
	f.Fuzz(func(t *testing.T, body string, cut int) {
		whole, err := failedIn([]byte(body))
		if err != nil || cut < 0 || cut >= len(body) {
			return
		}
		// Of an answer that is cut off, nobody is forgotten whom the whole one names, or it is not taken for one.
		part, err := failedIn([]byte(body[:cut]))
		if err == nil && len(part) > 0 && fmt.Sprint(part) != fmt.Sprint(whole) && json.Valid([]byte(body)) {
			t.Errorf("%q cut at %d names %v, the whole %v", body, cut, part, whole)
		}
	})
}
