package server_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// overheard is everything that a server says to anybody who must not see secrets.
type overheard struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (o *overheard) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all.Write(p)
}

// listen keeps answers and errors of all calls, but for those whose answer is a secret.
func (o *overheard) listen(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	if err != nil {
		fmt.Fprintf(o, "%s: %v %v\n", method, err, status.Convert(err).Details())
		return err
	}
	if m, ok := reply.(proto.Message); ok && method != grapnelv1.SecretService_CreateSecret_FullMethodName {
		fmt.Fprintf(o, "%s: %s\n%v\n", method, protojson.Format(m), m)
		if list, ok := m.(*grapnelv1.ListAttemptsResponse); ok {
			for _, a := range list.GetAttempts() {
				fmt.Fprintf(o, "body: %s\n", a.GetResponseBody())
			}
		}
	}
	return nil
}

// written are the ways in which a value may be written, each without what its neighbours have a part in.
func written(value string) map[string]string {
	forms := map[string]string{
		"plain": value, "hex": hex.EncodeToString([]byte(value)), "HEX": strings.ToUpper(hex.EncodeToString([]byte(value))),
		"query": url.QueryEscape(value), "path": url.PathEscape(value), "quoted": strings.Trim(strconv.Quote(value), `"`),
	}
	for name, encoding := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
		for skip := range 3 {
			text := encoding.EncodeToString([]byte(strings.Repeat("x", skip) + value))
			forms[fmt.Sprint(name, " at ", skip)] = text[(skip*8+5)/6 : len(text)-1]
		}
	}
	return forms
}

// TestNobodySeesSecrets runs every first-party kind with every secret that it takes, succeeding and failing, before a
// receiver that sends back all it gets, at the most talkative level of the log. No secret, however it is written, is in
// log, metrics, answers of the API or what the plugins write.
func TestNobodySeesSecrets(t *testing.T) {
	if testing.Short() {
		t.Skip("runs every kind with every secret")
	}
	heard := &overheard{}
	var refuses atomic.Bool
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, values := range r.Header {
			w.Header().Set("Echo-"+name, strings.Join(values, ","))
		}
		if refuses.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
		fmt.Fprintf(w, "%v %v", r.Header, r.URL)
	}))
	t.Cleanup(receiver.Close)
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) {
		o.Logger = slog.New(slog.NewTextHandler(heard, &slog.HandlerOptions{Level: slog.LevelDebug - 4}))
	}})
	conn, err := grpc.NewClient(s.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(heard.listen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	s.Namespace("acme")
	plugins, secrets := grapnelv1.NewPluginServiceClient(conn), grapnelv1.NewSecretServiceClient(conn)
	subscriptions, deliveries := grapnelv1.NewSubscriptionServiceClient(conn), grapnelv1.NewDeliveryServiceClient(conn)
	events := grapnelv1.NewPublishServiceClient(conn)
	page, err := plugins.ListPlugins(t.Context(), &grapnelv1.ListPluginsRequest{PageSize: 1000})
	if err != nil {
		t.Fatal(err)
	}
	// uses are settings that send secrets along, or use them on the way.
	uses := map[string][]*structpb.Struct{}
	for kind, configs := range map[string][]map[string]any{
		"http": {
			{"auth": map[string]any{"type": "bearer"}}, {"auth": map[string]any{"type": "basic", "username": "me"}},
			{"auth": map[string]any{"type": "api_key"}}, {"auth": map[string]any{"type": "api_key", "in": "query", "name": "k"}},
			{"auth": map[string]any{"type": "oauth2", "client_id": "me", "token_url": receiver.URL}},
			{"auth": map[string]any{"type": "oauth2", "client_id": "me", "token_url": receiver.URL, "client_auth": "client_secret_post"}},
			{"proxy": map[string]any{"url": receiver.URL}}, {"proxy": map[string]any{"url": "socks5://127.0.0.1:1"}},
		},
		"nats": {{"user": "me"}},
	} {
		for _, c := range configs {
			config, err := structpb.NewStruct(c)
			if err != nil {
				t.Fatal(err)
			}
			uses[kind] = append(uses[kind], config)
		}
	}
	values := map[string]string{}
	secretFor := func(kind, slot string) string {
		id := kind + "-" + slot
		name := "namespaces/acme/secrets/" + id
		if _, made := values[id]; made {
			return name
		}
		r := &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: id, Plugin: "plugins/" + kind, Slot: slot}
		made, err := secrets.CreateSecret(t.Context(), r)
		if err == nil {
			values[id] = made.GetGeneratedValue()
			return name
		}
		r.Value = "canary " + rand.Text() + `/+"&`
		for _, value := range []string{r.Value, "canary-" + rand.Text(), "canary:" + rand.Text(), strings.ToLower(rand.Text()) + rand.Text()} {
			r.Value = value
			if _, err = secrets.CreateSecret(t.Context(), r); err == nil {
				values[id] = value
				return name
			}
			values[id+" refused "+value] = value // which is no reason to show it
		}
		return ""
	}
	tried := map[string]int{}
	for _, listed := range page.GetPlugins() {
		got, err := plugins.GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: listed.GetName()})
		if err != nil {
			t.Fatal(err)
		}
		p := got.GetPlugin()
		kind := strings.TrimPrefix(p.GetName(), "plugins/")
		bound := func(slots ...string) *grapnelv1.PluginBinding {
			b := &grapnelv1.PluginBinding{Plugin: p.GetName(), Config: p.GetConfigExample(), Secrets: map[string]string{}}
			for _, slot := range p.GetSecretSlots() {
				if slot.GetRequired() || slices.Contains(slots, slot.GetSlot()) {
					if name := secretFor(kind, slot.GetSlot()); name != "" {
						b.Secrets[slot.GetSlot()] = name
					}
				}
			}
			return b
		}
		each := [][]string{nil}
		for _, slot := range p.GetSecretSlots() {
			each = append(each, []string{slot.GetSlot()})
		}
		for i, slots := range each {
			for n, config := range append([]*structpb.Struct{p.GetConfigExample(), nil}, uses[kind]...) {
				sub := &grapnelv1.Subscription{Uri: receiver.URL, EventTypes: []string{"order.*"}, RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 1}}
				b := bound(slots...)
				b.Config = config
				switch {
				case slices.Contains(p.GetRoles(), grapnelv1.Plugin_ROLE_SIGNER):
					sub.Signers = []*grapnelv1.PluginBinding{b}
				case slices.Contains(p.GetRoles(), grapnelv1.Plugin_ROLE_TRANSFORMER):
					sub.Signers, sub.Transformer = []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}, b
				default:
					sub.Signers, sub.Transport = []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}}, b
					if scheme := p.GetUriSchemes()[0]; !strings.HasPrefix(scheme, "http") {
						sub.Uri = scheme + "://127.0.0.1:1/subject" // nobody is there
					}
				}
				made, err := subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
					Parent: "namespaces/acme", SubscriptionId: fmt.Sprintf("%s-%d-%d", kind, i, n), Subscription: sub,
				})
				if err != nil {
					continue // as where a slot needs another one, or a setting
				}
				tried[kind]++
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				_, _ = subscriptions.TestSubscription(ctx, &grapnelv1.TestSubscriptionRequest{Name: made.GetSubscription().GetName()})
				cancel()
			}
		}
		if tried[kind] == 0 {
			t.Errorf("no subscription of %s could be made; it takes %v", kind, p.GetSecretSlots())
		}
	}
	for _, refused := range []bool{false, true} {
		refuses.Store(refused)
		if _, err := events.Publish(t.Context(), &grapnelv1.PublishRequest{Parent: "namespaces/acme", Event: &grapnelv1.Event{Type: "order.created", Payload: &grapnelv1.Event_Text{Text: "x"}}}); err != nil {
			t.Fatal(err)
		}
		servertest.Await(t, "all deliveries to end, or to wait for a host that cannot be reached", func() bool {
			return !slices.ContainsFunc(s.Deliveries("acme", "state = PENDING OR state = SCHEDULED OR state = IN_FLIGHT"), func(d *grapnelv1.Delivery) bool {
				return !strings.HasPrefix(d.GetStateReason(), "host down")
			})
		})
	}
	for _, d := range s.Deliveries("acme", "") {
		if _, err := deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: d.GetName(), IncludeBodies: true}); err != nil {
			t.Fatal(err)
		}
		_, _ = deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: d.GetName()})
	}
	_, _ = secrets.ListSecrets(t.Context(), &grapnelv1.ListSecretsRequest{Parent: "namespaces/acme"})
	_, _ = subscriptions.ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: "namespaces/acme"})
	for _, p := range page.GetPlugins() {
		_, _ = plugins.GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: p.GetName()})
	}
	fmt.Fprint(heard, metrics(t, s))
	s.Stop()
	text := heard.all.String()
	t.Logf("%d secrets, subscriptions by kind %v, %d bytes overheard", len(values), tried, len(text))
	for _, word := range []string{"[redacted]", "OUTCOME_SUCCEEDED", "OUTCOME_RETRYABLE", "OUTCOME_UNREACHABLE"} {
		if !strings.Contains(text, word) {
			t.Errorf("%s was never said: the secrets were not where they could be seen", word)
		}
	}
	for id, value := range values {
		for how, form := range written(value) {
			if at := strings.Index(text, form); at >= 0 {
				t.Errorf("%s, %s, is in %q", id, how, text[max(0, at-200):min(len(text), at+len(form)+50)])
			}
		}
	}
}
