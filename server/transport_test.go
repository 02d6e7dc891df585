package server_test

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// lab is one server that all transports are tried through, each test in a namespace of its own, and what
// must not be seen of them afterwards.
type lab struct {
	server *servertest.Server
	log    lockedBuffer

	mu         sync.Mutex
	namespaces []string
	// canaries are secrets, and what they are.
	canaries map[string]string
}

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.buf.Bytes())
}

// TestTransports delivers through a live server and its plugin process to real counterparts. When all are
// done, no secret of any of them may be found anywhere.
func TestTransports(t *testing.T) {
	t.Parallel()
	l := &lab{canaries: map[string]string{}}
	l.server = servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) {
		o.Logger = slog.New(slog.NewTextHandler(&l.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}})
	t.Run("all", func(t *testing.T) {
		for name, test := range map[string]func(*testing.T, *stand){
			"mtls-http1": clientCertificates(false), "mtls-http2": clientCertificates(true),
			"oauth2-secret": clientSecret, "oauth2-jwt": privateKeyJWT, "oauth2-tls": tlsClientAuth,
			"credentials": credentialsInRequests, "proxies": forwardProxies,
			"cloudevents": cloudEventsHandshake, "challenge": slackChallenge,
			"grpc": grpcReceivers, "grpc-tls": grpcOverTLS, "nats": natsStream,
			"put": methodAndHeaders, "signers": severalSigners, "unsigned": unsignedWithBearer, "mistakes": mistakes,
			"batches": batchesOnEveryStack, "partial": partialAnswers, "poison": poisonedBatch, "contradictions": batchContradictions,
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				test(t, l.stand(t, name))
			})
		}
	})
	l.checkLeaks(t)
}

// stand is one test's part of the lab.
type stand struct {
	*servertest.Server
	t   *testing.T
	lab *lab
	ns  string
	key string // that requests are signed with
	// made counts secrets and events, which need names.
	made int
}

func (l *lab) stand(t *testing.T, ns string) *stand {
	t.Helper()
	l.mu.Lock()
	l.namespaces = append(l.namespaces, ns)
	l.mu.Unlock()
	s := &stand{Server: l.server.In(t), t: t, lab: l, ns: ns}
	s.key = s.Namespace(ns)
	return s
}

// canary has the end of the test look for a secret where it must not be.
func (s *stand) canary(what, value string) string {
	s.lab.mu.Lock()
	defer s.lab.mu.Unlock()
	s.lab.canaries[value] = s.ns + ": " + what
	return value
}

// secret stores a value for a plugin's slot; an empty one has the plugin make it.
func (s *stand) secret(plugin, slot, value string) *grapnelv1.CreateSecretResponse {
	s.t.Helper()
	s.made++
	made, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(s.t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/" + s.ns, SecretId: fmt.Sprintf("s%d", s.made), Plugin: "plugins/" + plugin, Slot: slot, Value: value,
	})
	if err != nil {
		s.t.Fatalf("create a secret for %s of %s: %v", slot, plugin, err)
	}
	return made
}

// route is how a subscription's requests travel.
type route struct {
	plugin  string // http when empty
	config  map[string]any
	secrets map[string]string // slot: value, or the name of a secret
}

func (s *stand) binding(r route) *grapnelv1.PluginBinding {
	s.t.Helper()
	b := &grapnelv1.PluginBinding{Plugin: "plugins/" + cmp.Or(r.plugin, "http"), Secrets: map[string]string{}}
	var err error
	if b.Config, err = structpb.NewStruct(r.config); err != nil {
		s.t.Fatal(err)
	}
	for _, slot := range slices.Sorted(maps.Keys(r.secrets)) {
		value := r.secrets[slot]
		if !strings.HasPrefix(value, "namespaces/") {
			value = s.secret(cmp.Or(r.plugin, "http"), slot, value).GetSecret().GetName()
		}
		b.Secrets[slot] = value
	}
	return b
}

// over subscribes, for events of the type that is the subscription's id.
func (s *stand) over(id, uri string, r route, change func(*grapnelv1.Subscription)) *grapnelv1.Subscription {
	s.t.Helper()
	b := s.binding(r)
	return s.Subscribe(s.ns, id, uri, func(sub *grapnelv1.Subscription) {
		sub.EventTypes, sub.Transport, sub.RetryPolicy = []string{id}, b, fastRetries()
		if change != nil {
			change(sub)
		}
	})
}

// refuses has a subscription refused when it is saved, and returns what is said.
func (s *stand) refuses(id, uri string, r route, change func(*grapnelv1.Subscription)) string {
	s.t.Helper()
	sub := &grapnelv1.Subscription{
		Uri: uri, Transport: s.binding(r),
		Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/" + s.ns + "/secrets/key"}}},
	}
	if change != nil {
		change(sub)
	}
	subs := grapnelv1.NewSubscriptionServiceClient(s.Conn)
	_, err := subs.CreateSubscription(s.t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/" + s.ns, SubscriptionId: id, Subscription: sub,
	})
	if err == nil {
		s.t.Errorf("%s was taken", id)
		return ""
	}
	name := "namespaces/" + s.ns + "/subscriptions/" + id
	if _, err := subs.GetSubscription(s.t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name}); err == nil {
		s.t.Errorf("%s was refused and is stored", id)
	}
	s.t.Logf("%s: %v", id, err)
	return err.Error()
}

// send publishes n events for the subscription and waits until they are delivered, each by one attempt
// unless more are expected.
func (s *stand) send(id string, n int) {
	s.t.Helper()
	before := len(s.of(id, "state = SUCCEEDED"))
	for range n {
		s.publish(id)
	}
	s.succeed(id, before+n)
}

func (s *stand) publish(id string) {
	s.t.Helper()
	s.made++
	s.Publish(s.ns, fmt.Sprintf("e%d", s.made), id, fmt.Appendf(nil, `{"n": %d}`, s.made))
}

// succeed waits until n deliveries have succeeded.
func (s *stand) succeed(id string, n int) {
	s.t.Helper()
	last := ""
	defer func() {
		if s.t.Failed() && last != "" {
			s.t.Logf("%s: last attempt: %s", id, last)
		}
	}()
	servertest.Await(s.t, fmt.Sprintf("%d deliveries of %s", n, id), func() bool {
		for _, d := range s.of(id, "state = SCHEDULED OR state = EXHAUSTED OR state = REJECTED") {
			last = fmt.Sprintf("%v %v: %s", d.GetState(), d.GetLastAttempt().GetOutcome(), d.GetLastAttempt().GetError())
		}
		return len(s.of(id, "state = SUCCEEDED")) >= n
	})
}

// fail publishes an event whose delivery must end in vain and returns how.
func (s *stand) fail(id string) *grapnelv1.Delivery {
	s.t.Helper()
	before := len(s.of(id, "state = EXHAUSTED OR state = REJECTED"))
	s.publish(id)
	var ended []*grapnelv1.Delivery
	servertest.Await(s.t, "the delivery to fail", func() bool {
		ended = s.of(id, "state = EXHAUSTED OR state = REJECTED")
		return len(ended) > before
	})
	s.t.Logf("%s: %v, %v: %s", id, ended[0].GetState(), ended[0].GetLastAttempt().GetOutcome(), ended[0].GetLastAttempt().GetError())
	return ended[0]
}

// of lists the deliveries of a subscription, newest first.
func (s *stand) of(id, filter string) []*grapnelv1.Delivery {
	s.t.Helper()
	return s.Deliveries(s.ns, "event_type = "+id+" AND ("+filter+")")
}

func (s *stand) attempts(delivery string) []*grapnelv1.Attempt {
	s.t.Helper()
	got, err := grapnelv1.NewDeliveryServiceClient(s.Conn).ListAttempts(s.t.Context(), &grapnelv1.ListAttemptsRequest{
		Parent: delivery, IncludeBodies: true,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return got.GetAttempts()
}

// once asserts that no delivery of a subscription has taken more than one attempt.
func (s *stand) once(id string) {
	s.t.Helper()
	for _, d := range s.of(id, "attempt_count > 1") {
		s.t.Errorf("%s took %d attempts, the last said %q", d.GetName(), d.GetAttemptCount(), d.GetLastAttempt().GetError())
	}
}

// verified asserts that a request is signed with the namespace's key.
func (s *stand) verified(header http.Header, body []byte) {
	s.t.Helper()
	v, err := webhook.NewVerifier(s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := v.Verify(header, body); err != nil {
		s.t.Errorf("signature: %v\n%s", err, headersText(header))
	}
}

func oneTry(sub *grapnelv1.Subscription) { sub.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 1} }

// checkLeaks looks for the canaries in all that the server shows, says and keeps.
func (l *lab) checkLeaks(t *testing.T) {
	t.Helper()
	places := map[string][]byte{"the log": l.log.bytes(), "/metrics": metricsText(t, l.server)}
	for _, ns := range l.namespaces {
		l.collect(t, ns, places)
	}
	plugins, err := grapnelv1.NewPluginServiceClient(l.server.Conn).ListPlugins(t.Context(), &grapnelv1.ListPluginsRequest{})
	add(t, places, "the list of plugins", plugins, err)
	err = filepath.WalkDir(l.server.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // compactions take files away
		}
		if text, err := os.ReadFile(path); err == nil {
			places[path] = text
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for place, text := range places {
		for canary, what := range l.canaries {
			if i := bytes.Index(text, []byte(canary)); i >= 0 {
				t.Errorf("%s shows the secret of %s: …%q", place, what, text[max(0, i-80):i])
			}
		}
	}
	if len(places["the log"]) == 0 {
		t.Error("the log is empty: it is not the server's")
	}
}

// collect gathers what the API shows of a namespace.
func (l *lab) collect(t *testing.T, ns string, places map[string][]byte) {
	t.Helper()
	parent := "namespaces/" + ns
	subs, err := grapnelv1.NewSubscriptionServiceClient(l.server.Conn).ListSubscriptions(t.Context(), &grapnelv1.ListSubscriptionsRequest{Parent: parent})
	add(t, places, "the subscriptions of "+ns, subs, err)
	secrets, err := grapnelv1.NewSecretServiceClient(l.server.Conn).ListSecrets(t.Context(), &grapnelv1.ListSecretsRequest{Parent: parent})
	add(t, places, "the secrets of "+ns, secrets, err)
	deliveries := grapnelv1.NewDeliveryServiceClient(l.server.Conn)
	for _, d := range l.server.Deliveries(ns, "") {
		one, err := deliveries.GetDelivery(t.Context(), &grapnelv1.GetDeliveryRequest{Name: d.GetName()})
		add(t, places, d.GetName(), one, err)
		attempts, err := deliveries.ListAttempts(t.Context(), &grapnelv1.ListAttemptsRequest{Parent: d.GetName(), IncludeBodies: true})
		add(t, places, "the attempts of "+d.GetName(), attempts, err)
	}
}

// add keeps a message as it is on the wire, where texts and bytes stand as they are.
func add(t *testing.T, places map[string][]byte, name string, m proto.Message, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if places[name], err = proto.Marshal(m); err != nil {
		t.Fatal(err)
	}
}

func metricsText(t *testing.T, s *servertest.Server) []byte {
	t.Helper()
	resp, err := http.Get("http://" + s.AdminAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return text
}
