package server_test

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/grapnel/grapnel/internal/required"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/webhook"
	"github.com/grapnel/grapnel/server/servertest"
)

// oracle is a node process with the official verifier of every scheme.
type oracle struct {
	mu  sync.Mutex
	in  io.WriteCloser
	out *bufio.Scanner
}

// question is what verify.mjs reads.
type question struct {
	Scheme  string            `json:"scheme"`
	URL     string            `json:"url"`
	Method  string            `json:"method"`
	Headers map[string]string `json:"headers"`
	Body    []byte            `json:"body"`
	Key     string            `json:"key"`
	KeyID   string            `json:"keyId"`
	Config  map[string]any    `json:"config"`
}

// newOracle starts it. It needs node and packages.
func newOracle(t *testing.T) *oracle {
	t.Helper()
	dir := filepath.Join("testdata", "verifiers")
	node, err := exec.LookPath("node")
	required.Tool(t, "node", err, "the official verifiers need it")
	_, err = os.Stat(filepath.Join(dir, "node_modules"))
	required.Tool(t, "node", err, "run `npm ci` in server/testdata/verifiers")
	cmd := exec.Command(node, "verify.mjs")
	cmd.Dir, cmd.Stderr = dir, testLog{t}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	o := &oracle{in: in, out: bufio.NewScanner(out)}
	o.out.Buffer(nil, 4<<20)
	return o
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("verifier: %s", p)
	return len(p), nil
}

// ask returns what the library says against the request, empty when it accepts it.
func (o *oracle) ask(t *testing.T, q question) string {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	line, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.in.Write(append(line, '\n')); err != nil {
		t.Fatalf("ask the verifier: %v", err)
	}
	if !o.out.Scan() {
		t.Fatalf("the verifier is gone: %v", o.out.Err())
	}
	var verdict struct {
		OK    bool   `json:"ok"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal(o.out.Bytes(), &verdict); err != nil {
		t.Fatalf("the verifier said %q: %v", o.out.Text(), err)
	}
	if verdict.OK {
		return ""
	}
	return cmp.Or(verdict.Error, "no, without a reason")
}

// scheme is one signing scheme as a subscription uses it.
type scheme struct {
	name   string // of the test; the plugin's where plugin is empty
	plugin string
	// algorithm and value make the secret; both empty has the plugin make its first algorithm's.
	algorithm, value, next string
	config                 map[string]any
	// verify is what the verifier is told beside the request.
	verify map[string]any
	// several says that receivers with the old key and with the new one verify the same request.
	several bool
	// path of the URL, contentType and body of the event.
	path, contentType, body string
	// loose verifiers leave something out that this test would change.
	loose bool
	// method of the request, POST when empty.
	method string
	// shape of the body.
	shape *grapnelv1.PayloadShape
}

func schemes() []scheme {
	jwt := map[string]any{"issuer": "grapnel", "audience": []any{"receiver"}}
	with := func(m map[string]any, more map[string]any) map[string]any {
		m = maps.Clone(m)
		maps.Copy(m, more)
		return m
	}
	return []scheme{
		{name: "standard-webhooks", several: true},
		{name: "standard-webhooks-v1a", plugin: "standard-webhooks", algorithm: "ed25519", several: true},
		{name: "svix", several: true},
		{name: "stripe", several: true},
		{name: "github"},
		{name: "github-cloudevent", plugin: "github", shape: &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS}},
		{name: "slack"},
		{name: "shopify", config: map[string]any{"shop_domain": "acme.myshopify.com"}},
		{name: "twilio-json", plugin: "twilio", path: "/hooks?foo=1&bar=a%20b"},
		{name: "twilio-form", plugin: "twilio", contentType: "application/x-www-form-urlencoded", path: "/hooks?foo=1",
			body: "CallSid=CA1234567890ABCDE&Caller=%2B14158675309&Digits=1234&From=%2B14158675309&To=%2B18005551212"},
		{name: "square", config: map[string]any{"notification_url": "https://example.com/hooks/"},
			verify: map[string]any{"notification_url": "https://example.com/hooks/"}},
		{name: "convoy", several: true},
		{name: "outpost", several: true},
		{name: "webhookx"},
		{name: "hook0"},
		{name: "hook0-v1", plugin: "hook0", config: map[string]any{"headers": []any{"webhook-id", "content-type"}}},
		{name: "hmac", value: "a-key-of-our-own-house-0001", next: "a-key-of-our-own-house-0002", config: map[string]any{
			"algorithm": "sha512", "encoding": "base64url", "content": "{timestamp}:{body}",
			"headers": map[string]any{"x-house-time": "{timestamp}", "x-house-signature": "v9 {signature}"},
		}},
		{name: "http-signature-hmac", plugin: "http-signature", algorithm: "hmac-sha256", several: true,
			verify: map[string]any{"algorithm": "hmac-sha256"}},
		{name: "http-signature-ed25519", plugin: "http-signature", algorithm: "ed25519", several: true, method: "PUT",
			verify: map[string]any{"algorithm": "ed25519"}},
		{name: "http-signature-ecdsa", plugin: "http-signature", algorithm: "ecdsa-p256-sha256", several: true,
			verify: map[string]any{"algorithm": "ecdsa-p256-sha256"}},
		{name: "http-signature-rsa-pss", plugin: "http-signature", algorithm: "rsa-pss-sha512", several: true,
			verify: map[string]any{"algorithm": "rsa-pss-sha512"}},
		{name: "http-signature-rsa", plugin: "http-signature", algorithm: "rsa-v1_5-sha256", several: true,
			config: map[string]any{"algorithm": "rsa-v1_5-sha256"}, verify: map[string]any{"algorithm": "rsa-v1_5-sha256"}},
		{name: "sigv4", method: "PATCH", path: "/hooks/a%20b?b=2&a=1&a=0&c", value: "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
			next:   "xJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
			config: map[string]any{"region": "us-east-1", "service": "execute-api", "access_key_id": "AKIDEXAMPLE"}},
		{name: "jws-hs256", plugin: "jws", algorithm: "HS256", verify: map[string]any{"alg": "HS256"}},
		{name: "jws-eddsa", plugin: "jws", algorithm: "EdDSA", verify: map[string]any{"alg": "EdDSA"}},
		{name: "jws-es256", plugin: "jws", algorithm: "ES256", verify: map[string]any{"alg": "ES256"}},
		{name: "jws-rs256", plugin: "jws", algorithm: "RS256", config: map[string]any{"algorithm": "RS256"}, verify: map[string]any{"alg": "RS256"}},
		{name: "jws-b64-false", plugin: "jws", algorithm: "EdDSA", config: map[string]any{"b64": false}, verify: map[string]any{"alg": "EdDSA"}},
		{name: "jwt-hs256", plugin: "jwt", algorithm: "HS256", config: jwt, verify: with(jwt, map[string]any{"alg": "HS256"}), loose: true},
		{name: "jwt-eddsa", plugin: "jwt", algorithm: "EdDSA", config: jwt, verify: with(jwt, map[string]any{"alg": "EdDSA"}), loose: true},
	}
}

// TestSchemes delivers through a live server by every scheme, before and during a rotation, and
// has the scheme's own library verify what arrived.
func TestSchemes(t *testing.T) {
	t.Parallel()
	o := newOracle(t)
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, nil)
	s.Namespace("acme")
	for _, c := range schemes() {
		t.Run(c.name, func(t *testing.T) {
			v := &verifying{scheme: c, oracle: o, server: s, receiver: rcv}
			v.run(t)
		})
	}
}

// verifying is one scheme under test.
type verifying struct {
	scheme
	oracle   *oracle
	server   *servertest.Server
	receiver *servertest.Receiver
	count    int
}

func (v *verifying) run(t *testing.T) {
	v.plugin = cmp.Or(v.plugin, v.name)
	secrets := grapnelv1.NewSecretServiceClient(v.server.Conn)
	made, err := secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/acme", SecretId: v.name, Plugin: "plugins/" + v.plugin, Algorithm: v.algorithm, Value: v.value,
	})
	if err != nil {
		t.Fatalf("create secret: %v", err)
	}
	first := newReceiverKey(made.GetSecret(), cmp.Or(made.GetGeneratedValue(), v.value))
	config, err := structpb.NewStruct(v.config)
	if err != nil {
		t.Fatal(err)
	}
	v.server.Subscribe("acme", v.name, v.receiver.URL+"/"+v.name+v.path, func(sub *grapnelv1.Subscription) {
		sub.EventTypes = []string{v.name + ".test"}
		sub.Signers = []*grapnelv1.PluginBinding{{
			Plugin: "plugins/" + v.plugin, Config: config, Secrets: map[string]string{"key": made.GetSecret().GetName()},
		}}
		sub.PayloadShape = v.shape
		if v.method != "" {
			sub.Transport = &grapnelv1.PluginBinding{Config: &structpb.Struct{Fields: map[string]*structpb.Value{
				"method": structpb.NewStringValue(v.method),
			}}}
		}
	})
	got := v.deliver(t)
	v.accepts(t, "the only key", got, first)
	if !v.loose {
		v.refuses(t, "a changed body", changed(got), first)
	}
	rotated, err := secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{
		Name: made.GetSecret().GetName(), Value: v.next, Overlap: durationpb.New(time.Hour),
	})
	if err != nil {
		t.Fatalf("rotate secret: %v", err)
	}
	second := newReceiverKey(rotated.GetSecret(), cmp.Or(rotated.GetGeneratedValue(), v.next))
	if first == second {
		t.Fatal("the rotation gave the same key")
	}
	got = v.deliver(t)
	v.accepts(t, "the new key of two", got, second)
	if v.several {
		v.accepts(t, "the old key of two", got, first)
	} else {
		v.refuses(t, "the old key of two", got, first)
	}
}

// receiverKey is what a receiver has of a secret: the public key, else the value, and what signatures call it.
type receiverKey struct{ key, id string }

func newReceiverKey(s *grapnelv1.Secret, value string) receiverKey {
	newest := s.GetVersions()[0]
	if public := newest.GetPublicKey(); public != "" {
		value = public
	}
	return receiverKey{key: value, id: newest.GetKeyId()}
}

// deliver publishes an event and returns what the receiver got.
func (v *verifying) deliver(t *testing.T) servertest.Request {
	t.Helper()
	v.count++
	id := fmt.Sprintf("%s-%d", v.name, v.count)
	_, err := grapnelv1.NewPublishServiceClient(v.server.Conn).Publish(t.Context(), &grapnelv1.PublishRequest{
		Parent: "namespaces/acme",
		Event: &grapnelv1.Event{Id: id, Type: v.name + ".test", DataContentType: cmp.Or(v.contentType, "application/json"),
			Payload: &grapnelv1.Event_Data{Data: []byte(cmp.Or(v.body, `{"order": 1001, "note": "höher"}`))}},
	})
	if err != nil {
		t.Fatalf("publish: %v", err)
	}
	var got servertest.Request
	servertest.Await(t, "the delivery of "+id, func() bool {
		all := v.receiver.Requests()
		i := slices.IndexFunc(all, func(r servertest.Request) bool {
			return r.Header.Get("Ce-Id") == id || strings.Contains(string(r.Body), `"id":"`+id+`"`)
		})
		if i >= 0 {
			got = all[i]
		}
		for _, d := range v.server.Deliveries("acme", fmt.Sprintf("event=%q", id)) {
			if last := d.GetLastAttempt(); last.GetError() != "" {
				t.Fatalf("attempt: %s", last.GetError())
			}
		}
		return i >= 0
	})
	return got
}

func changed(r servertest.Request) servertest.Request {
	r.Body = slices.Clone(r.Body)
	r.Body[len(r.Body)/2] ^= 1
	return r
}

func (v *verifying) ask(t *testing.T, r servertest.Request, key receiverKey) string {
	t.Helper()
	q := question{Scheme: v.plugin, URL: r.URL, Method: r.Method, Headers: map[string]string{}, Body: r.Body, Key: key.key, KeyID: key.id, Config: v.verify}
	for name, values := range r.Header {
		q.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
	}
	q.Headers["host"] = strings.Split(strings.TrimPrefix(r.URL, "http://"), "/")[0]
	return v.oracle.ask(t, q)
}

func (v *verifying) accepts(t *testing.T, what string, r servertest.Request, key receiverKey) {
	t.Helper()
	if why := v.ask(t, r, key); why != "" {
		t.Errorf("%s: the verifier refuses it: %s\n%s", what, why, headersText(r.Header))
	}
}

func (v *verifying) refuses(t *testing.T, what string, r servertest.Request, key receiverKey) {
	t.Helper()
	if v.ask(t, r, key) == "" {
		t.Errorf("%s: the verifier accepts it\n%s", what, headersText(r.Header))
	}
}

func headersText(h http.Header) string {
	var b strings.Builder
	_ = h.Write(&b)
	return b.String()
}

// TestPayloadShapes delivers in every shape and has the CloudEvents SDK, or the Standard Webhooks library, read it.
func TestPayloadShapes(t *testing.T) {
	t.Parallel()
	o := newOracle(t)
	s := servertest.Start(t, servertest.Options{})
	rcv := servertest.NewReceiver(t, nil)
	key := s.Namespace("acme")
	shapes := map[string]*grapnelv1.PayloadShape{
		"raw":        nil,
		"structured": {Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS},
		"envelope":   {Format: grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS},
		"gzip":       {Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP},
		"retyped":    {ContentType: "application/vnd.acme+json"},
	}
	for id, shape := range shapes {
		s.Subscribe("acme", id, rcv.URL+"/"+id, func(sub *grapnelv1.Subscription) { sub.PayloadShape = shape })
	}
	data := `{"order": 1001, "note": "höher"}`
	s.Publish("acme", "e~1", "order.created", []byte(data))
	got := map[string]servertest.Request{}
	servertest.Await(t, "all shapes", func() bool {
		for _, r := range rcv.Requests() {
			got[strings.TrimPrefix(r.Path, "/")] = r
		}
		return len(got) == len(shapes)
	})
	want := map[string]any{"id": "e~1", "type": "order.created", "source": "//grapnel/acme", "specversion": "1.0", "data": data}
	ask := func(scheme, id, key string, config map[string]any) {
		t.Helper()
		r := got[id]
		q := question{Scheme: scheme, URL: r.URL, Method: r.Method, Headers: map[string]string{}, Body: r.Body, Key: key, Config: config}
		for name, values := range r.Header {
			q.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
		}
		if why := o.ask(t, q); why != "" {
			t.Errorf("%s: %s refuses it: %s\n%s\n%s", id, scheme, why, headersText(r.Header), r.Body)
		}
	}
	ask("cloudevents", "raw", "", map[string]any{"expect": want})
	ask("cloudevents", "structured", "", map[string]any{"expect": want})
	for _, id := range []string{"raw", "structured", "envelope", "retyped"} {
		ask("standard-webhooks", id, key, nil)
	}
	for name, values := range got["structured"].Header {
		if strings.HasPrefix(name, "Ce-") {
			t.Errorf("structured: there is a header %s: %q", name, values)
		}
	}
	var envelope struct {
		Type      string          `json:"type"`
		Timestamp time.Time       `json:"timestamp"`
		Data      json.RawMessage `json:"data"`
	}
	if err := json.Unmarshal(got["envelope"].Body, &envelope); err != nil || envelope.Type != "order.created" ||
		envelope.Timestamp.IsZero() || string(envelope.Data) != data {
		t.Errorf("envelope: %s (%v)", got["envelope"].Body, err)
	}
	if got := got["retyped"].Header.Get("Content-Type"); got != "application/vnd.acme+json" {
		t.Errorf("retyped: content-type %q", got)
	}
	zipped := got["gzip"]
	if zipped.Header.Get("Content-Encoding") != "gzip" {
		t.Errorf("gzip: content-encoding %q", zipped.Header.Get("Content-Encoding"))
	}
	// The signature covers the bytes on the wire.
	verifier, err := webhook.NewVerifier(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := verifier.Verify(zipped.Header, zipped.Body); err != nil {
		t.Errorf("gzip: %v", err)
	}
	plain, err := gzip.NewReader(bytes.NewReader(zipped.Body))
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(plain); err != nil || string(text) != data {
		t.Errorf("gzip: %q, %v", text, err)
	}
}

// TestHeadersThatConfigsChoose refuses two signers whose configs have them set the same header.
func TestHeadersThatConfigsChoose(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	secrets := grapnelv1.NewSecretServiceClient(s.Conn)
	names := map[string]string{}
	for _, plugin := range []string{"jws", "hmac"} {
		made, err := secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{Parent: "namespaces/acme", SecretId: plugin, Plugin: "plugins/" + plugin})
		if err != nil {
			t.Fatal(err)
		}
		names[plugin] = made.GetSecret().GetName()
	}
	create := func(header string) error {
		jws, _ := structpb.NewStruct(map[string]any{"header": "X-Acme"})
		hmac, _ := structpb.NewStruct(map[string]any{"content": "{body}", "headers": map[string]any{header: "{signature}"}})
		_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", Subscription: &grapnelv1.Subscription{Uri: "https://example.com/", Signers: []*grapnelv1.PluginBinding{
				{Plugin: "plugins/jws", Config: jws, Secrets: map[string]string{"key": names["jws"]}},
				{Plugin: "plugins/hmac", Config: hmac, Secrets: map[string]string{"key": names["hmac"]}},
			}},
		})
		return err
	}
	if err := create("X-Other"); err != nil {
		t.Errorf("different headers: %v", err)
	}
	if err := create("x-acme"); err == nil || !strings.Contains(err.Error(), "subscription.signers[1].plugin: plugins/hmac sets the header x-acme, and so does plugins/jws") {
		t.Errorf("the same header: %v", err)
	}
}
