package server_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// cloudEventsHandshake asks receivers as "HTTP 1.1 Web Hooks for Event Delivery" has it, before there are
// deliveries to them.
func cloudEventsHandshake(t *testing.T, s *stand) {
	var mu sync.Mutex
	origins := map[string][]string{} // of deliveries, by path
	asked := map[string]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		if r.Method != http.MethodOptions {
			s.verified(r.Header, body)
			origins[r.URL.Path] = append(origins[r.URL.Path], r.Header.Get("WebHook-Request-Origin"))
			return
		}
		asked[r.URL.Path]++
		if r.Header.Get("WebHook-Request-Origin") != "events.example.com" || r.Header.Get("Webhook-Signature") != "" {
			t.Errorf("asked with\n%s", headersText(r.Header))
		}
		switch r.URL.Path {
		case "/granted":
			w.Header().Set("WebHook-Allowed-Origin", "events.example.com")
			w.Header().Set("WebHook-Allowed-Rate", "120")
		case "/any":
			w.Header().Set("WebHook-Allowed-Origin", "*")
			w.Header().Set("WebHook-Allowed-Rate", "*")
		case "/other":
			w.Header().Set("WebHook-Allowed-Origin", "somebody.example.net")
		case "/forbidden":
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, "not on our list")
		case "/broken":
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	t.Cleanup(srv.Close)
	asks := func(rate int) route {
		ownership := map[string]any{"check": "cloudevents", "origin": "events.example.com"}
		if rate > 0 {
			ownership["rate"] = rate
		}
		return route{config: map[string]any{"ownership": ownership}}
	}
	rated := func(rate float64) func(*grapnelv1.Subscription) {
		return func(sub *grapnelv1.Subscription) { sub.MaxRate = rate }
	}
	s.over("granted", srv.URL+"/granted", asks(120), rated(2))
	s.over("any", srv.URL+"/any", asks(0), nil)
	for _, id := range []string{"granted", "any"} {
		s.send(id, 2)
		mu.Lock()
		if got := strings.Join(origins["/"+id], " "); got != "events.example.com events.example.com" || asked["/"+id] != 1 {
			t.Errorf("%s: asked %d times, delivered from %q", id, asked["/"+id], got)
		}
		mu.Unlock()
	}
	for id, c := range map[string]struct {
		path string
		rate float64
		want []string
	}{
		"other":     {"/other", 0, []string{"subscription.uri", "did not agree", "names another origin", "events.example.com"}},
		"silent":    {"/silent", 0, []string{"subscription.uri", "did not agree", "answered 200 without WebHook-Allowed-Origin"}},
		"forbidden": {"/forbidden", 0, []string{"subscription.uri", "answered 403"}},
		"broken":    {"/broken", 0, []string{"subscription.uri", "answered 500"}},
		"too-fast":  {"/granted", 10, []string{"subscription.max_rate", "10 a second", "120 requests a minute", "at most 2"}},
		"unlimited": {"/granted", 0, []string{"subscription.max_rate", "0 is no limit", "120 requests a minute"}},
	} {
		text := s.refuses(id, srv.URL+c.path, asks(0), rated(c.rate))
		for _, want := range c.want {
			if !strings.Contains(text, want) {
				t.Errorf("%s: %q does not say %q", id, text, want)
			}
		}
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	if text := s.refuses("gone", gone.URL, asks(0), nil); !strings.Contains(text, "subscription.uri") || !strings.Contains(text, "connection refused") {
		t.Errorf("gone: %s", text)
	}
}

// slackChallenge has receivers say a word back.
func slackChallenge(t *testing.T, s *stand) {
	var mu sync.Mutex
	delivered := map[string]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct{ Type, Challenge string }
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			t.Error(err)
		}
		switch {
		case in.Type != "url_verification":
			mu.Lock()
			delivered[r.URL.Path]++
			mu.Unlock()
		case len(in.Challenge) < 32:
			t.Errorf("the challenge is %q", in.Challenge)
		case r.URL.Path == "/plain":
			_, _ = io.WriteString(w, in.Challenge)
		case r.URL.Path == "/json":
			_ = json.NewEncoder(w).Encode(map[string]string{"challenge": in.Challenge})
		case r.URL.Path == "/wrong":
			_, _ = io.WriteString(w, "ok")
		case r.URL.Path == "/failing":
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(srv.Close)
	r := route{config: map[string]any{"ownership": map[string]any{"check": "challenge"}}}
	for _, id := range []string{"plain", "json"} {
		s.over(id, srv.URL+"/"+id, r, nil)
		s.send(id, 1)
		mu.Lock()
		if delivered["/"+id] != 1 {
			t.Errorf("%s: %d deliveries", id, delivered["/"+id])
		}
		mu.Unlock()
	}
	for id, want := range map[string]string{"wrong": "answer is not the challenge", "failing": "answered 503"} {
		if text := s.refuses(id, srv.URL+"/"+id, r, nil); !strings.Contains(text, "subscription.uri") || !strings.Contains(text, want) {
			t.Errorf("%s: %s", id, text)
		}
	}
	// A target that changes is asked again, and one that says no leaves the subscription as it was.
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	name := fmt.Sprintf("namespaces/%s/subscriptions/plain", s.ns)
	_, err := subs.UpdateSubscription(t.Context(), &grapnelv1.UpdateSubscriptionRequest{
		Subscription: &grapnelv1.Subscription{Name: name, Uri: srv.URL + "/wrong"},
	})
	if err == nil || !strings.Contains(err.Error(), "answer is not the challenge") {
		t.Errorf("an update to a receiver that does not agree: %v", err)
	}
	got, err := subs.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name})
	if err != nil || got.GetSubscription().GetUri() != srv.URL+"/plain" {
		t.Errorf("after it: %v, %v", got, err)
	}
}
