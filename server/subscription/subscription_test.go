package subscription_test

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

const ordersName = "namespaces/acme/subscriptions/orders"

func valid() *grapnelv1.Subscription {
	return &grapnelv1.Subscription{
		Name:       ordersName,
		Uri:        "https://hooks.example.com/orders",
		EventTypes: []string{"order.*"},
	}
}

func TestNewFillsDefaults(t *testing.T) {
	given := valid()
	s, err := subscription.New(given)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(valid(), given, protocmp.Transform()); diff != "" {
		t.Errorf("New changed its argument (-want +got):\n%s", diff)
	}
	want := valid()
	want.Uid = s.Proto().Uid
	want.Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/standard-webhooks"}}
	want.Transport = &grapnelv1.PluginBinding{Plugin: "plugins/http"}
	want.PayloadShape = &grapnelv1.PayloadShape{
		Format: grapnelv1.PayloadShape_FORMAT_RAW, Compression: grapnelv1.PayloadShape_COMPRESSION_NONE,
	}
	want.AttemptTimeout = durationpb.New(15 * time.Second)
	want.MaxInFlight = 16
	want.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 10, Jitter: proto.Float64(.2), MaxAge: durationpb.New(96 * time.Hour)}
	delays := []time.Duration{
		5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour,
		10 * time.Hour, 14 * time.Hour, 20 * time.Hour, 24 * time.Hour,
	}
	for _, d := range delays {
		want.RetryPolicy.Schedule = append(want.RetryPolicy.Schedule, durationpb.New(d))
	}
	want.FailurePolicy = &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(120 * time.Hour)}
	want.State = grapnelv1.Subscription_STATE_ACTIVE
	if diff := cmp.Diff(want, s.Proto(), protocmp.Transform()); diff != "" {
		t.Errorf("stored message (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(delays, s.Schedule); diff != "" {
		t.Errorf("schedule (-want +got):\n%s", diff)
	}
	if s.Namespace != "acme" || s.ID != "orders" || s.MaxAttempts != 10 || s.MaxInFlight != 16 ||
		s.AttemptTimeout != 15*time.Second || s.DisableAfter != 120*time.Hour || s.UID == [16]byte{} {
		t.Errorf("unpacked: %+v", s)
	}
}

func TestNewUnrollsBackoff(t *testing.T) {
	p := valid()
	p.RetryPolicy = &grapnelv1.RetryPolicy{
		MaxAttempts: 5, InitialBackoff: durationpb.New(time.Second), Multiplier: 3, MaxBackoff: durationpb.New(10 * time.Second),
	}
	s, err := subscription.New(p)
	if err != nil {
		t.Fatal(err)
	}
	want := []time.Duration{time.Second, 3 * time.Second, 9 * time.Second, 10 * time.Second}
	if diff := cmp.Diff(want, s.Schedule); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	p.RetryPolicy = &grapnelv1.RetryPolicy{InitialBackoff: durationpb.New(5 * time.Second)}
	if s, err = subscription.New(p); err != nil || s.MaxAttempts != 12 || len(s.Schedule) != 11 {
		t.Errorf("backoff with defaults: %d attempts, %v, %v", s.MaxAttempts, s.Schedule, err)
	}
}

func TestNewNamesEveryFault(t *testing.T) {
	secrets := func(slot, name string) *grapnelv1.PluginBinding {
		return &grapnelv1.PluginBinding{Secrets: map[string]string{slot: name}}
	}
	config := func(v map[string]any) *grapnelv1.PluginBinding {
		s, err := structpb.NewStruct(v)
		if err != nil {
			t.Fatal(err)
		}
		return &grapnelv1.PluginBinding{Config: s}
	}
	type sub = grapnelv1.Subscription
	tests := []struct {
		name   string
		change func(*sub)
		// want are field, reason and a part of the description.
		want [][3]string
	}{
		{"no uri", func(p *sub) { p.Uri = "" }, [][3]string{{"subscription.uri", "uri.required", "https://"}}},
		{"relative", func(p *sub) { p.Uri = "hooks.example.com/x" }, [][3]string{
			{"subscription.uri", "uri.scheme", "no scheme"}}},
		{"no host", func(p *sub) { p.Uri = "https:///x" }, [][3]string{{"subscription.uri", "uri.host", "no host"}}},
		{"fragment", func(p *sub) { p.Uri = "https://h/x#top" }, [][3]string{{"subscription.uri", "uri.fragment", "#top"}}},
		{"control", func(p *sub) { p.Uri = "https://h/\r\nx" }, [][3]string{{"subscription.uri", "uri.characters", "position 10"}}},
		{"idn", func(p *sub) { p.Uri = "https://bücher.example/" }, [][3]string{{"subscription.uri", "uri.characters", "xn--"}}},
		{"port", func(p *sub) { p.Uri = "https://h:70000/" }, [][3]string{{"subscription.uri", "uri.port", "70000"}}},
		{"no port", func(p *sub) { p.Uri = "https://h:/" }, [][3]string{{"subscription.uri", "uri.port", "leave"}}},
		{"unknown scheme", func(p *sub) { p.Uri = "kafka://h/topic" }, [][3]string{{"subscription.transport.plugin", "transport.required", `"kafka"`}}},
		{"globs", func(p *sub) { p.EventTypes = []string{"a", "", "a\nb", "a"} }, [][3]string{
			{"subscription.event_types[1]", "event_types.length", "0 characters"},
			{"subscription.event_types[2]", "event_types.characters", "control character"},
			{"subscription.event_types[3]", "event_types.unique", "twice"}}},
		{"condition", func(p *sub) { p.Condition = "event.type == 'a' &&\n evnt.id == 'b'" }, [][3]string{
			{"subscription.condition", "cel.compile", "line 2, column 2"}}},
		{"condition field", func(p *sub) { p.Condition = "event.tipe == 'a'" }, [][3]string{{"subscription.condition", "cel.compile", "tipe"}}},
		{"condition type", func(p *sub) { p.Condition = "event.type" }, [][3]string{{"subscription.condition", "cel.compile", "string; want a boolean"}}},
		{"condition regexp", func(p *sub) { p.Condition = "event.type.matches('(')" }, [][3]string{{"subscription.condition", "cel.compile", "missing closing"}}},
		{"headers of the event", func(p *sub) {
			p.Headers = map[string]string{"X-A": "1"}
			p.HeaderTemplates = map[string]string{
				"x-a": "{event.id}", "x-b": "{event.subjekt}", "x-c": "{event.attributes.Tenant}", "x-d": "{event.type", "x-e": "}", "x-f": "plain {{text}}",
				"x-g": "a\r\nb: {event.id}", "x-h": "{event.attributes.id}", "Cookie": "{event.id}", "content-encoding": "{event.id}", "bad name": "{event.id}",
				"x-i": "{event.id} of {{{event.attributes.tenant}}}", "Content_Encoding": "{event.id}",
			}
			p.AllowedEventHeaders = []string{"X-I", "x-j", "X-J", "webhook-id", "content-length", ""}
		}, [][3]string{
			{`subscription.header_templates["Content_Encoding"]`, "headers.name", "compression"},
			{`subscription.header_templates["Cookie"]`, "headers.name", "CreateSecret"},
			{`subscription.header_templates["bad name"]`, "headers.name", "bad name"},
			{`subscription.header_templates["content-encoding"]`, "headers.name", "compression"},
			{`subscription.header_templates["x-a"]`, "headers.unique", "in headers already"},
			{`subscription.header_templates["x-b"]`, "header_templates.syntax", "{event.subjekt} is not a placeholder; there are {event.id}"},
			{`subscription.header_templates["x-c"]`, "header_templates.syntax", "lower-case letters and digits"},
			{`subscription.header_templates["x-d"]`, "header_templates.syntax", "character 1 is never closed"},
			{`subscription.header_templates["x-e"]`, "header_templates.syntax", "closes nothing"},
			{`subscription.header_templates["x-f"]`, "header_templates.syntax", "no placeholder"},
			{`subscription.header_templates["x-g"]`, "headers.value", "line break"},
			{`subscription.header_templates["x-h"]`, "header_templates.syntax", "CloudEvents' own"},
			{`subscription.allowed_event_headers[0]`, "headers.unique", "in header_templates already"},
			{`subscription.allowed_event_headers[2]`, "headers.unique", "in allowed_event_headers already"},
			{`subscription.allowed_event_headers[3]`, "headers.name", "signer"},
			{`subscription.allowed_event_headers[4]`, "headers.name", "transport"},
			{`subscription.allowed_event_headers[5]`, "headers.name", "not a header name"}}},
		{"headers of several events", func(p *sub) {
			p.Batching = &grapnelv1.Batching{}
			p.HeaderTemplates, p.AllowedEventHeaders = map[string]string{"x-a": "{event.id}"}, []string{"x-b"}
		}, [][3]string{
			{"subscription.header_templates", "batching.headers", "batching"},
			{"subscription.allowed_event_headers", "batching.headers", "batching"}}},
		{"headers", func(p *sub) {
			p.Headers = map[string]string{"Webhook-Id": "x", "X-A": "1", "x-a": "2", "bad name": "x", "X-B": "a\r\nb: c", "Authorization": "Bearer x", "X-S": "whsec_abc", "CE-Id": "1", "Host": "h", "webhook_id": "x", "Content_Length": "1", "Accept-Encoding": "br"}
		}, [][3]string{
			{`subscription.headers["Accept-Encoding"]`, "headers.reserved", "transport"},
			{`subscription.headers["Authorization"]`, "headers.reserved", "CreateSecret"},
			{`subscription.headers["CE-Id"]`, "headers.reserved", "attributes"},
			{`subscription.headers["Content_Length"]`, "headers.reserved", "transport"},
			{`subscription.headers["Host"]`, "headers.reserved", "transport"},
			{`subscription.headers["Webhook-Id"]`, "headers.reserved", "signer"},
			{`subscription.headers["X-B"]`, "headers.value", "line break"},
			{`subscription.headers["X-S"]`, "headers.secret", "CreateSecret"},
			{`subscription.headers["bad name"]`, "headers.name", "bad name"},
			{`subscription.headers["webhook_id"]`, "headers.reserved", "signer"},
			{`subscription.headers["x-a"]`, "headers.unique", "X-A"}}},
		{"labels", func(p *sub) { p.Labels = map[string]string{"": "x", "k": strings.Repeat("x", 64)} }, [][3]string{
			{`subscription.labels[""]`, "labels.key", "empty"}, {`subscription.labels["k"]`, "string.max_len", "64 characters"}}},
		{"both policies", func(p *sub) {
			p.RetryPolicy = &grapnelv1.RetryPolicy{Schedule: []*durationpb.Duration{durationpb.New(1)}, Multiplier: 2}
		}, [][3]string{{"subscription.retry_policy.schedule", "retry_policy.exclusive", "clear one"}}},
		{"backoff order", func(p *sub) {
			p.RetryPolicy = &grapnelv1.RetryPolicy{InitialBackoff: durationpb.New(time.Hour), MaxBackoff: durationpb.New(time.Minute)}
		}, [][3]string{{"subscription.retry_policy.initial_backoff", "retry_policy.order", "1h0m0s is longer than max_backoff"}}},
		{"nan", func(p *sub) { p.MaxRate = math.NaN() }, [][3]string{{"subscription.max_rate", "range", "NaN"}}},
		{"plugin name", func(p *sub) { p.Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/../x"}} }, [][3]string{{"subscription.signers[0].plugin", "plugin.name", "plugins/NAME"}}},
		{"secret elsewhere", func(p *sub) { p.Signers = []*grapnelv1.PluginBinding{secrets("key", "namespaces/other/secrets/k")} }, [][3]string{{`subscription.signers[0].secrets["key"]`, "secrets.namespace", "namespaces/acme/secrets/NAME"}}},
		{"secret path", func(p *sub) { p.Signers = []*grapnelv1.PluginBinding{secrets("key", "namespaces/acme/secrets/../x")} }, [][3]string{{`subscription.signers[0].secrets["key"]`, "secrets.name", "want namespaces/acme"}}},
		{"secret in config", func(p *sub) { p.Transport = config(map[string]any{"a": []any{map[string]any{"b": "-----BEGIN RSA"}}}) }, [][3]string{{"subscription.transport.config.a[0].b", "config.secret", "CreateSecret"}}},
		{"too big", func(p *sub) { p.Transport = config(map[string]any{"a": strings.Repeat("x", 300<<10)}) }, [][3]string{{"subscription", "size", "at most 262144"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := valid()
			tt.change(p)
			_, err := subscription.New(p)
			var invalid *subscription.InvalidError
			if !errors.As(err, &invalid) {
				t.Fatalf("got %v, want an InvalidError", err)
			}
			if len(invalid.Violations) != len(tt.want) {
				t.Fatalf("got %d violations, want %d: %v", len(invalid.Violations), len(tt.want), err)
			}
			for i, v := range invalid.Violations {
				if v.Field != tt.want[i][0] || v.Reason != tt.want[i][1] || !strings.Contains(v.Description, tt.want[i][2]) {
					t.Errorf("violation %d is %+v, want %q", i, v, tt.want[i])
				}
			}
		})
	}
}

func TestViolationsDoNotRepeatSecrets(t *testing.T) {
	const canary = "c4n4ry"
	p := valid()
	p.Uri = "https://user:" + canary + "@h/%zz"
	p.Headers = map[string]string{"Authorization": canary, "X-S": "whsec_" + canary, "X-N": canary + "\n"}
	p.Signers = []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "whsec_" + canary}}}
	_, err := subscription.New(p)
	if err == nil || strings.Contains(err.Error(), canary) {
		t.Errorf("got %v", err)
	}
	for _, uri := range []string{"https://user:" + canary + "@h/", "user:" + canary + "@h", "//u:" + canary + "@h"} {
		p.Uri = uri
		if _, err = subscription.New(p); err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: got %v", uri, err)
		}
	}
}

func TestWarnings(t *testing.T) {
	key := []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/k"}}}
	tests := []struct {
		name   string
		change func(*grapnelv1.Subscription)
		want   []string
	}{
		{"none", func(*grapnelv1.Subscription) {}, nil},
		{"plain", func(p *grapnelv1.Subscription) { p.Uri = "http://h/" }, []string{"plain http"}},
		{"everything", func(p *grapnelv1.Subscription) { p.EventTypes = nil }, []string{"every event"}},
		{"covered", func(p *grapnelv1.Subscription) { p.EventTypes = []string{"order.*", "order.paid"} }, []string{`"order.paid" is already covered by "order.*"`}},
		{"unsigned", func(p *grapnelv1.Subscription) { p.Signers = nil }, []string{"no secret"}},
		{"too old", func(p *grapnelv1.Subscription) {
			p.RetryPolicy = &grapnelv1.RetryPolicy{MaxAge: durationpb.New(time.Hour)}
		}, []string{"longer than max_age"}},
		{"unused delays", func(p *grapnelv1.Subscription) { p.RetryPolicy = &grapnelv1.RetryPolicy{MaxAttempts: 3} }, []string{"only 2 of the 9 delays"}},
		{"never disabled", func(p *grapnelv1.Subscription) {
			p.FailurePolicy = &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(0)}
		}, []string{"for ever"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := valid()
			p.Signers = key
			tt.change(p)
			s, err := subscription.New(p)
			if err != nil {
				t.Fatal(err)
			}
			got := subscription.Warnings(s.Proto())
			if len(got) != len(tt.want) {
				t.Fatalf("got %q, want %q", got, tt.want)
			}
			for i := range got {
				if !strings.Contains(got[i], tt.want[i]) {
					t.Errorf("got %q, want %q", got[i], tt.want[i])
				}
			}
		})
	}
}

// A message that was handed out is the caller's, and has all that was stored.
func TestProtoIsTheCallers(t *testing.T) {
	s := mustNew(t, "orders", func(p *grapnelv1.Subscription) {
		p.EventTypes, p.Labels = []string{"order.*", "*.paid"}, map[string]string{"team": "shop"}
		p.ProtoReflect().SetUnknown(protoreflect.RawFields{0xf8, 0x3f, 7}) // field 1023, of a later release
	})
	before := s.Proto()
	if got := before.ProtoReflect().GetUnknown(); string(got) != "\xf8\x3f\x07" {
		t.Errorf("what a later release has stored is %x", got)
	}
	spoiled := s.Proto()
	spoiled.RetryPolicy.Schedule[0].Seconds, spoiled.EventTypes[0], spoiled.Uri = 77, "spoiled", "https://spoiled.example"
	spoiled.Labels["team"] = "spoiled"
	if diff := cmp.Diff(before, s.Proto(), protocmp.Transform()); diff != "" {
		t.Errorf("a caller has changed what is kept (-want +got):\n%s", diff)
	}
	if !s.Wants(&subscription.Candidate{Type: "order.made"}) || !s.Wants(&subscription.Candidate{Type: "x.paid"}) || s.Schedule[0] != 5*time.Second {
		t.Error("a caller has changed what is matched or dispatched")
	}
	if s.Name() != before.Name || !s.CreateTime().Equal(before.CreateTime.AsTime()) || s.State != before.State || s.DeadLetter != before.DeadLetter {
		t.Error("fields differ from the message")
	}
	if !s.Mentions("hooks.example.com") || s.Mentions("nowhere.example") {
		t.Error("what it mentions is not told")
	}
}

func TestQuotaDefaults(t *testing.T) {
	n, err := subscription.NewNamespace(&grapnelv1.Namespace{Name: "namespaces/acme", Quota: &grapnelv1.Quota{MaxPublishRate: 5}})
	if err != nil {
		t.Fatal(err)
	}
	standard := 72 * time.Hour
	want := subscription.Quota{
		MaxPublishRate: 5, MaxEventBytes: 262144, Retention: standard, DeadLetterRetention: standard, PayloadRetention: standard, AttemptRetention: standard,
	}
	if diff := cmp.Diff(want, n.Quota()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Dead letters are kept at least as long as the rest, parts at most.
func TestQuotaBringsRetentionsIntoOrder(t *testing.T) {
	for _, tt := range []struct{ all, dead, payloads, attempts, wantDead, wantPayloads, wantAttempts time.Duration }{
		{48, 24, 72, 1, 48, 48, 1},
		{48, 96, 24, 0, 96, 24, 48},
	} {
		n, err := subscription.NewNamespace(&grapnelv1.Namespace{Name: "namespaces/acme", Quota: &grapnelv1.Quota{
			Retention: durationpb.New(tt.all * time.Hour), DeadLetterRetention: durationpb.New(tt.dead * time.Hour),
			PayloadRetention: durationpb.New(tt.payloads * time.Hour), AttemptRetention: durationpb.New(tt.attempts * time.Hour),
		}})
		if err != nil {
			t.Fatal(err)
		}
		q := n.Quota()
		got := [...]time.Duration{q.DeadLetterRetention / time.Hour, q.PayloadRetention / time.Hour, q.AttemptRetention / time.Hour}
		if want := [...]time.Duration{tt.wantDead, tt.wantPayloads, tt.wantAttempts}; got != want {
			t.Errorf("%+v: %v hours, want %v", tt, got, want)
		}
	}
}

func mustNew(t testing.TB, id string, change func(*grapnelv1.Subscription)) *subscription.Subscription {
	t.Helper()
	p := valid()
	p.Name = "namespaces/acme/subscriptions/" + id
	change(p)
	s, err := subscription.New(p)
	if err != nil {
		t.Fatal(fmt.Errorf("%s: %w", id, err))
	}
	return s
}

// What a transformer makes sets no header of others, however that is spelled.
func TestMadeHeadersAreNobodyElses(t *testing.T) {
	for name, want := range map[string]string{
		"content-encoding": "compression does", "content_encoding": "compression does", "x-house": "a signer does", "X_House": "a signer does",
		"webhook_id": "set by the signer", "x-houses": "",
	} {
		got := subscription.MadeFault("text/plain", [][2]string{{name, "x"}}, []string{"x-house"})
		if !strings.Contains(got, want) || (got == "") != (want == "") {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
