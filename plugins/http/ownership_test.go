package httpplugin

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// ask has the transport itself ask: the harness does not carry ownership checks.
func ask(t *testing.T, c client, uri string, config Config, headers ...plugin.Header) (*plugin.Response, error) {
	t.Helper()
	p := newPools()
	t.Cleanup(p.closeIdle)
	i, err := newInstance(p, config, plugin.Target{URL: uri, UserAgent: "grapnel/test", Egress: loopbackAllowed()})
	if err != nil {
		t.Fatal(err)
	}
	return i.attempt(within(t, 10*time.Second), &plugin.Request{
		URL: uri, Headers: headers, OwnershipCheck: true, MaxResponseBody: 16,
	})
}

func owning(o Ownership) Config {
	c := defaults()
	c.Method, c.Ownership = "PUT", o
	return c
}

func TestNoOwnershipCheckIsAYesWithoutIO(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		srv := serveRaw(t, func(int, net.Conn) {})
		for _, o := range []Ownership{{}, {Check: checkNone}} {
			resp, err := ask(t, c, srv.url, owning(o))
			if err != nil || resp.Status != http.StatusNoContent || srv.accepted() != 0 {
				t.Errorf("%+v, %v, %d connections", resp, err, srv.accepted())
			}
		}
	})
}

func TestCloudEventsHandshake(t *testing.T) {
	for _, tt := range []struct {
		name    string
		rate    int
		status  int
		headers map[string]string
		granted []plugin.Header // when it is a yes
		code    int             // when it is a no by status
		message string          // when it is a no by failure
	}{
		{
			name: "granted", status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "events.example.com", "WebHook-Allowed-Rate": "100"},
			granted: []plugin.Header{{Name: "webhook-allowed-origin", Value: "events.example.com"}, {Name: "webhook-allowed-rate", Value: "100"}},
		},
		{
			name: "everybody at any rate", rate: 120, status: 204, headers: map[string]string{"WebHook-Allowed-Origin": "*", "WebHook-Allowed-Rate": "*"},
			granted: []plugin.Header{{Name: "webhook-allowed-origin", Value: "*"}, {Name: "webhook-allowed-rate", Value: "*"}},
		},
		{
			name: "names know no case", status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "Events.Example.com"},
			granted: []plugin.Header{{Name: "webhook-allowed-origin", Value: "Events.Example.com"}},
		},
		{
			name: "the status does not count", status: 405, headers: map[string]string{"WebHook-Allowed-Origin": "*"},
			granted: []plugin.Header{{Name: "webhook-allowed-origin", Value: "*"}},
		},
		{name: "a plain yes is none", status: 200, headers: map[string]string{"Allow": "POST", "Access-Control-Allow-Origin": "*"}, message: "the receiver answered 200 without WebHook-Allowed-Origin, which means no"},
		{name: "another origin", status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "c4n4ry.example"}, message: "the receiver's WebHook-Allowed-Origin names another origin; want events.example.com or *"},
		{name: "part of the origin", status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "example.com"}, message: "the receiver's WebHook-Allowed-Origin names another origin; want events.example.com or *"},
		{name: "no rate", rate: 120, status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "*"}, message: "the receiver granted no WebHook-Allowed-Rate although a rate was asked for"},
		{name: "rate 0", status: 200, headers: map[string]string{"WebHook-Allowed-Origin": "*", "WebHook-Allowed-Rate": "0"}, message: "the receiver's WebHook-Allowed-Rate is neither * nor a positive number of requests per minute"},
		{name: "not supported", status: 405, code: 405},
		{name: "not found", status: 404, code: 404},
		{name: "gone", status: 410, headers: map[string]string{"WebHook-Allowed-Origin": "*"}, code: 410},
		{name: "redirect", status: 307, headers: map[string]string{"WebHook-Allowed-Origin": "*", "Location": "/other"}, code: 307},
		{name: "broken", status: 503, headers: map[string]string{"WebHook-Allowed-Origin": "*"}, code: 503},
		{name: "later", status: 429, headers: map[string]string{"Retry-After": "30"}, code: 429},
	} {
		t.Run(tt.name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				var got *http.Request
				srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					got = r
					for name, value := range tt.headers {
						w.Header().Set(name, value)
					}
					w.WriteHeader(tt.status)
				}))
				t.Cleanup(srv.Close)
				o := Ownership{Check: checkCloudEvents, Origin: "events.example.com", Rate: tt.rate}
				resp, err := ask(t, c, srv.URL+"/hook?a=1", owning(o), plugin.Header{Name: "x-static", Value: "s"})
				want := ""
				if tt.rate > 0 {
					want = fmt.Sprint(tt.rate)
				}
				if got.Method != "OPTIONS" || got.RequestURI != "/hook?a=1" || got.Header.Get("WebHook-Request-Origin") != "events.example.com" ||
					got.Header.Get("WebHook-Request-Rate") != want || got.Header.Get("X-Static") != "s" || got.ContentLength != 0 {
					t.Errorf("asked with %s %s %v", got.Method, got.RequestURI, got.Header)
				}
				switch {
				case tt.message != "":
					if f := wantFailure(t, err, "ownership", plugin.Sent); f.Message != tt.message || f.Source != plugin.SourceEndpoint {
						t.Errorf("%+v, want %q", *f, tt.message)
					}
				case err != nil:
					t.Error(err)
				case tt.code != 0:
					if resp.Status != tt.code {
						t.Errorf("%+v, want status %d", resp, tt.code)
					}
				default:
					if diff := cmp.Diff(&plugin.Response{Status: 200, Headers: tt.granted, Peer: srv.Listener.Addr().String()}, resp); diff != "" {
						t.Error(diff)
					}
				}
			})
		})
	}
}

func TestDeliveriesCarryTheOrigin(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		var got http.Header
		srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r.Header }))
		t.Cleanup(srv.Close)
		config := map[string]any{"ownership": map[string]any{"check": "cloudevents", "origin": "events.example.com", "rate": 5}}
		if resp, err := attempt(t, c.instance(t, srv.URL, config)); err != nil || resp.Status != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		if v := got.Values("WebHook-Request-Origin"); len(v) != 1 || v[0] != "events.example.com" || got.Get("WebHook-Request-Rate") != "" {
			t.Errorf("received %v", got)
		}
	})
}

func TestChallenge(t *testing.T) {
	var mu sync.Mutex
	asked := map[string]bool{}
	for _, tt := range []struct {
		name    string
		answer  func(word string, body []byte) (int, string)
		code    int
		message string
	}{
		{"plain", func(word string, _ []byte) (int, string) { return 200, word + "\n" }, 200, ""},
		{"JSON", func(word string, _ []byte) (int, string) { return 201, `{"challenge":"` + word + `"}` }, 200, ""},
		{"form", func(word string, _ []byte) (int, string) { return 200, "a=b&challenge=" + url.QueryEscape(word) }, 200, ""},
		{"nothing", func(string, []byte) (int, string) { return 200, "" }, 0, "the receiver's answer is not the challenge, as plain text, as form field or as JSON field challenge"},
		{"ok", func(string, []byte) (int, string) { return 200, `{"ok":true}` }, 0, "the receiver's answer is not the challenge, as plain text, as form field or as JSON field challenge"},
		{"another word", func(word string, _ []byte) (int, string) { return 200, "x" + word[1:] }, 0, "the receiver's answer is not the challenge, as plain text, as form field or as JSON field challenge"},
		{"somewhere in it", func(word string, _ []byte) (int, string) { return 200, "<p>" + word + "</p>" }, 0, "the receiver's answer is not the challenge, as plain text, as form field or as JSON field challenge"},
		{"parrot", func(_ string, body []byte) (int, string) { return 200, string(body) }, 0, "the receiver sends back whatever it is sent; want the challenge alone"},
		{"huge", func(word string, _ []byte) (int, string) { return 200, word + strings.Repeat(" ", 1<<20) }, 0, "the receiver's answer to the challenge is broken off or longer than 16 KiB"},
		{"right word, wrong status", func(word string, _ []byte) (int, string) { return 403, word }, 403, ""},
		{"redirect", func(word string, _ []byte) (int, string) { return 302, word }, 302, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			direct(t, func(t *testing.T, c client) {
				srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					var sent map[string]string
					if err := json.Unmarshal(body, &sent); err != nil || r.Method != "POST" || r.Header.Get("Content-Type") != "application/json" ||
						sent["type"] != "url_verification" || len(sent["challenge"]) < 32 {
						t.Errorf("asked with %s %v %q", r.Method, r.Header, body)
					}
					mu.Lock()
					if asked[sent["challenge"]] {
						t.Errorf("the challenge %q comes again", sent["challenge"])
					}
					asked[sent["challenge"]] = true
					mu.Unlock()
					status, text := tt.answer(sent["challenge"], body)
					w.WriteHeader(status)
					_, _ = io.WriteString(w, text)
				}))
				t.Cleanup(srv.Close)
				resp, err := ask(t, c, srv.URL, owning(Ownership{Check: checkChallenge}))
				switch {
				case tt.message != "":
					if f := wantFailure(t, err, "ownership", plugin.Sent); f.Message != tt.message {
						t.Errorf("%+v, want %q", *f, tt.message)
					}
				case err != nil || resp.Status != tt.code:
					t.Errorf("%+v, %v, want status %d", resp, err, tt.code)
				}
			})
		})
	}
	direct(t, func(t *testing.T, c client) {
		mute := serveRaw(t, func(int, net.Conn) {})
		config := owning(Ownership{Check: checkChallenge})
		config.HeaderTimeout = 1e8
		_, err := ask(t, c, mute.url, config)
		wantFailure(t, err, plugin.CodeTimeout, plugin.Sent)
	})
}

func TestOwnershipChecksCarryCredentials(t *testing.T) {
	direct(t, func(t *testing.T, c client) {
		for _, check := range []string{checkCloudEvents, checkChallenge} {
			var got http.Header
			srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r.Header }))
			t.Cleanup(srv.Close)
			config := owning(Ownership{Check: check, Origin: "events.example.com"})
			config.Auth.Type, config.Token = authBearer, plugin.NewSecret("token-1")
			_, err := ask(t, c, srv.URL, config)
			wantFailure(t, err, "ownership", plugin.Sent)
			if got.Get("Authorization") != "Bearer token-1" {
				t.Errorf("%s: received %v", check, got)
			}
		}
	})
}

func TestCheckOwnership(t *testing.T) {
	h := plugintest.New(t, Kind())
	for _, tt := range []struct {
		config  map[string]any
		headers []plugin.Header
		want    string
	}{
		{map[string]any{"check": "cloudevents", "origin": "events.example.com", "rate": 120}, nil, ""},
		{map[string]any{"check": "challenge"}, nil, ""},
		{map[string]any{"check": "cloudevents"}, nil, "/config/ownership/origin ownership.origin"},
		{map[string]any{"check": "cloudevents", "origin": "https://events.example.com"}, nil, "/config/ownership/origin ownership.origin"},
		{map[string]any{"check": "cloudevents", "origin": "a\r\nb"}, nil, "/config/ownership/origin ownership.origin"},
		{map[string]any{"check": "challenge", "origin": "a"}, nil, "/config/ownership/origin ownership.field"},
		{map[string]any{"rate": 3}, nil, "/config/ownership/rate ownership.field"},
		{map[string]any{"check": "cloudevents", "origin": "a", "rate": 0}, nil, "/config/ownership/rate config.range"},
		{map[string]any{"check": "dns"}, nil, "/config/ownership/check config.enum"},
		{map[string]any{"check": "cloudevents", "origin": "a"}, []plugin.Header{{Name: "webhook-request-origin", Value: "b"}}, "/target/headers/webhook-request-origin ownership.header_conflict"},
	} {
		problems := h.Validate(plugintest.Instance{Kind: "http", Config: map[string]any{"ownership": tt.config}, Target: plugin.Target{
			URL: "https://hooks.example.com/", Headers: tt.headers,
		}})
		got := ""
		for _, p := range problems {
			got += p.Pointer + " " + p.Code
		}
		if got != tt.want {
			t.Errorf("%v: %q, want %q", tt.config, got, tt.want)
		}
	}
}
