package api

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestPageTokens(t *testing.T) {
	p := pager{key: []byte("key")}
	token := p.seal("last\x00key", "List", "acme", "a = b")
	if got, err := p.open(token, "List", "acme", "a = b"); err != nil || got != "last\x00key" {
		t.Fatalf("got %q %v", got, err)
	}
	if p.seal("", "List") != "" {
		t.Error("there is a token after the last page")
	}
	if got, err := p.open(""); err != nil || got != "" {
		t.Errorf("no token: %q %v", got, err)
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		t.Fatal(err)
	}
	var bad []string
	for i := range raw { // every byte, changed
		c := []byte(string(raw))
		c[i] ^= 1
		bad = append(bad, base64.RawURLEncoding.EncodeToString(c))
	}
	for i := range raw { // every length
		bad = append(bad, base64.RawURLEncoding.EncodeToString(raw[:i]))
	}
	bad = append(bad, token+"A", token+"=", " "+token, "%", strings.Repeat("A", 100), pager{key: []byte("other")}.seal("last\x00key", "List", "acme", "a = b"))
	for _, b := range bad {
		if b == "" {
			continue
		}
		if _, err := p.open(b, "List", "acme", "a = b"); reasonOf(err) != "INVALID_PAGE_TOKEN" {
			t.Fatalf("%q is taken: %v", b, err)
		}
	}
	for _, query := range [][]string{nil, {"List", "acme"}, {"List", "acme", "a = c"}, {"List", "acm", "ea = b"}, {"Lista", "cme", "a = b"}} {
		if _, err := p.open(token, query...); reasonOf(err) != "INVALID_PAGE_TOKEN" || !strings.Contains(err.Error(), "another query") {
			t.Errorf("%q: %v", query, err)
		}
	}
}

func TestPageTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pager{key: []byte("key")}
		token := p.seal("x")
		time.Sleep(3*24*time.Hour - time.Second)
		if _, err := p.open(token); err != nil {
			t.Error("too early:", err)
		}
		time.Sleep(3 * time.Second)
		if _, err := p.open(token); reasonOf(err) != "INVALID_PAGE_TOKEN" || !strings.Contains(err.Error(), "3 days") {
			t.Error(err)
		}
	})
}

func FuzzPageToken(f *testing.F) {
	p := pager{key: []byte("key")}
	f.Add(p.seal("x"))
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, token string) {
		if last, err := p.open(token); err == nil && token != "" && last != "x" {
			t.Fatalf("%q opens to %q", token, last)
		}
	})
}

func TestPageSize(t *testing.T) {
	for n, want := range map[int32]int{0: 50, 1: 1, 1000: 1000, 1001: 1000, 1 << 30: 1000} {
		if got, err := pageSize(n); err != nil || got != want {
			t.Errorf("%d: %d %v", n, got, err)
		}
	}
	if _, err := pageSize(-1); reasonOf(err) != "INVALID_FIELD" {
		t.Error(err)
	}
}

func reasonOf(err error) string {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return ""
	}
	return e.Reason()
}

func TestApplyMask(t *testing.T) {
	stored := &grapnelv1.Subscription{
		Name: "n", DisplayName: "old", Uri: "https://a", MaxInFlight: 3, Labels: map[string]string{"a": "1"}, Etag: "7",
		EventTypes:  []string{"x"},
		RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 5, MaxAge: durationpb.New(time.Hour), Jitter: proto.Float64(0)},
	}
	outputOnly := []string{"name", "etag"}
	for _, c := range []struct {
		name  string
		sent  *grapnelv1.Subscription
		paths []string
		want  func(*grapnelv1.Subscription)
	}{
		{"absent takes what is set", &grapnelv1.Subscription{Name: "other", Etag: "8", DisplayName: "new", EventTypes: []string{"y"}}, nil,
			func(s *grapnelv1.Subscription) { s.DisplayName, s.EventTypes = "new", []string{"y"} }},
		{"star takes all", &grapnelv1.Subscription{Name: "other", Etag: "8", Uri: "https://b"}, []string{"*"},
			func(s *grapnelv1.Subscription) {
				proto.Reset(s)
				s.Name, s.Etag, s.Uri = "n", "7", "https://b"
			}},
		{"named and empty is cleared", &grapnelv1.Subscription{Uri: "https://b"}, []string{"display_name", "labels"},
			func(s *grapnelv1.Subscription) { s.DisplayName, s.Labels = "", nil }},
		{"inside a message", &grapnelv1.Subscription{RetryPolicy: &grapnelv1.RetryPolicy{MaxAttempts: 9}}, []string{"retry_policy.max_attempts", "retry_policy.jitter"},
			func(s *grapnelv1.Subscription) { s.RetryPolicy.MaxAttempts, s.RetryPolicy.Jitter = 9, nil }},
		{"inside a message not sent", &grapnelv1.Subscription{}, []string{"retry_policy.max_age", "failure_policy.ignore_gone"},
			func(s *grapnelv1.Subscription) { s.RetryPolicy.MaxAge = nil }},
		{"inside a message not stored", &grapnelv1.Subscription{FailurePolicy: &grapnelv1.FailurePolicy{IgnoreGone: true}}, []string{"failure_policy.ignore_gone"},
			func(s *grapnelv1.Subscription) { s.FailurePolicy = &grapnelv1.FailurePolicy{IgnoreGone: true} }},
		{"output only is ignored", &grapnelv1.Subscription{Etag: "8", MaxInFlight: 4}, []string{"etag", "max_in_flight"},
			func(s *grapnelv1.Subscription) { s.MaxInFlight = 4 }},
	} {
		got, want := proto.CloneOf(stored), proto.CloneOf(stored)
		c.want(want)
		if err := applyMask(got, c.sent, &fieldmaskpb.FieldMask{Paths: c.paths}, outputOnly...); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
	}
	got := proto.CloneOf(stored)
	err := applyMask(got, &grapnelv1.Subscription{DisplayName: "new"}, &fieldmaskpb.FieldMask{Paths: []string{"display_name", "colour", "labels.a", "retry_policy.x", "attempt_timeout.seconds", ""}}, outputOnly...)
	e, _ := errors.AsType[*Error](err)
	if reasonOf(err) != "INVALID_FIELD" || e.field != "update_mask" {
		t.Fatal(err)
	}
	for _, want := range []string{`path "colour" names no field; the fields are uid, display_name`, `inside "labels"`, "initial_backoff", `inside "attempt_timeout"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	if !proto.Equal(got, stored) {
		t.Error("a refused mask changed something")
	}
	if err := applyMask(got, stored, &fieldmaskpb.FieldMask{Paths: []string{"*", "uri"}}); reasonOf(err) != "INVALID_FIELD" {
		t.Error(err)
	}
}

func TestNames(t *testing.T) {
	id := strings.Repeat("0", 29)
	for name, collection := range map[string]string{
		"namespaces/a/subscriptions/b-1": collectionSubscriptions, "namespaces/a/secrets/b": collectionSecrets,
		"namespaces/a/events/A._~-": collectionEvents, "namespaces/a/deliveries/" + id: collectionDeliveries,
	} {
		ns, got, err := parseName("name", name, collection)
		if err != nil || resourceName(ns, collection, got) != name {
			t.Errorf("%s: %q %q %v", name, ns, got, err)
		}
		if !isResourceName(name) {
			t.Errorf("%s may not be logged", name)
		}
	}
	for _, name := range []string{"", "x", "namespaces/a", "namespaces/a/events/", "namespaces//events/b", "namespaces/-/events/b", "namespaces/a/secrets/b",
		"namespaces/a/events/b/", "/namespaces/a/events/b", "namespaces/a/events/b c", "namespaces/A/events/b", "namespaces/a/events/" + strings.Repeat("x", 129)} {
		_, _, err := parseName("name", name, collectionEvents)
		if reasonOf(err) != "INVALID_FIELD" || !strings.Contains(err.Error(), "namespaces/NAME/events/ID") {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, _, err := parseName("name", "namespaces/a/deliveries/zz", collectionDeliveries); err == nil {
		t.Error("not an id")
	}
	for _, name := range []string{"whsec_abc", "namespaces/whsec_abc", "namespaces/a/secrets/whsec_abc", "a/b", "namespaces/a/other/b", "namespaces/a\nb"} {
		if isResourceName(name) {
			t.Errorf("%q would be logged", name)
		}
	}
}

func TestRedact(t *testing.T) {
	const canary = "canary"
	unknown := &grapnelv1.GetSecretRequest{Name: "n"}
	unknown.ProtoReflect().SetUnknown(append([]byte{0xfa, 0x01, byte(len(canary))}, canary...)) // field 31
	for _, m := range []proto.Message{
		&grapnelv1.CreateSecretRequest{Parent: "n", Value: canary},
		&grapnelv1.RotateSecretRequest{Name: "n", Value: canary},
		&grapnelv1.CreateSecretResponse{Secret: &grapnelv1.Secret{Name: "n"}, GeneratedValue: canary},
		&grapnelv1.BatchPublishRequest{Parent: "n", Events: []*grapnelv1.Event{{Payload: &grapnelv1.Event_Data{Data: []byte(canary)}}, {Payload: &grapnelv1.Event_Text{Text: canary}}}},
		&grapnelv1.ListAttemptsResponse{NextPageToken: "n", Attempts: []*grapnelv1.Attempt{{ResponseBody: []byte(canary), RequestHeaders: map[string]string{canary: canary}}}},
		unknown,
	} {
		before := proto.Clone(m)
		text := redactedText(m)
		if strings.Contains(text, canary) || !strings.Contains(text, `"n"`) {
			t.Errorf("%T: %s", m, text)
		}
		if !proto.Equal(m, before) {
			t.Errorf("%T was changed", m)
		}
	}
	if n := len(redactedText(&grapnelv1.GetEventRequest{Name: strings.Repeat("x", 10000)})); n > 2100 {
		t.Errorf("%d bytes of log", n)
	}
}

// TestSecretFieldsAreMarked: what sounds like a secret and can hold one carries debug_redact, or is known not
// to be one.
func TestSecretFieldsAreMarked(t *testing.T) {
	harmless := map[string]bool{
		"secrets": true, "secret_id": true, // names
		"page_token": true, "next_page_token": true,
		"public_key": true, "public_keys": true, "key_id": true, "ordering_key": true, // made to be shown
	}
	marked := 0
	var walk func(protoreflect.MessageDescriptors)
	walk = func(messages protoreflect.MessageDescriptors) {
		for i := range messages.Len() {
			m := messages.Get(i)
			walk(m.Messages())
			for j := range m.Fields().Len() {
				f := m.Fields().Get(j)
				options, _ := f.Options().(*descriptorpb.FieldOptions)
				if options.GetDebugRedact() {
					marked++
					continue
				}
				if harmless[string(f.Name())] || m.IsMapEntry() || !holdsText(f) {
					continue // an entry is judged by the map, a message of ours by its own fields
				}
				for _, word := range []string{"secret", "token", "password", "key", "value", "credential", "payload"} {
					if strings.Contains(string(f.Name()), word) {
						t.Errorf("%s has no debug_redact", f.FullName())
					}
				}
			}
		}
	}
	protoregistry.GlobalFiles.RangeFilesByPackage("grapnel.v1", func(f protoreflect.FileDescriptor) bool {
		walk(f.Messages())
		return true
	})
	if marked < 8 {
		t.Errorf("only %d fields are marked", marked)
	}
}

// holdsText reports whether whatever a caller writes can be in a field itself, and not in fields below it that
// have names of their own: text, bytes, a map's values, or JSON.
func holdsText(f protoreflect.FieldDescriptor) bool {
	switch f.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind:
		return true
	case protoreflect.MessageKind:
		if f.IsMap() {
			return holdsText(f.MapValue())
		}
		switch f.Message().FullName() {
		case "google.protobuf.Struct", "google.protobuf.Value", "google.protobuf.ListValue", "google.protobuf.Any",
			"google.protobuf.StringValue", "google.protobuf.BytesValue":
			return true
		}
	}
	return false
}

// TestEventChecksAgreeWithProto: what the hand-written checks let through, the rules of the proto do too.
func TestEventChecksAgreeWithProto(t *testing.T) {
	rules := newRules()
	texts := []string{"", "a", "A.b_c~d-1", "-x", "x-", "a b", "a/b", "a/b; c=d", "/b", "a/", "ü/x", "a\nb", strings.Repeat("x", 128), strings.Repeat("x", 129), strings.Repeat("ü", 256), strings.Repeat("ü", 257), "id", "specversion", "abc1", "Abc", strings.Repeat("a", 20), strings.Repeat("a", 21)}
	for _, s := range texts {
		for field, e := range map[string]*grapnelv1.Event{
			"id": {Id: s, Type: "a"}, "type": {Type: s}, "source": {Type: "a", Source: s}, "subject": {Type: "a", Subject: s},
			"content": {Type: "a", DataContentType: s}, "schema": {Type: "a", DataSchema: s},
			"name": {Type: "a", Attributes: map[string]string{s: ""}}, "value": {Type: "a", Attributes: map[string]string{"a": s}},
		} {
			_, faults := eventOf("acme", e, time.Now())
			err := rules.Validate(e)
			if len(faults) == 0 && err != nil {
				t.Errorf("%s %q: the checks take what the proto refuses: %v", field, s, err)
			}
			if len(faults) > 0 && err == nil && field != "source" && field != "subject" && field != "schema" && field != "value" {
				t.Errorf("%s %q: the proto takes what the checks refuse: %v", field, s, faults)
			}
		}
	}
	for _, d := range []time.Duration{0, time.Second - 1, time.Second, 30 * 24 * time.Hour, 30*24*time.Hour + 1} {
		e := &grapnelv1.Event{Type: "a", Ttl: durationpb.New(d)}
		_, faults := eventOf("acme", e, time.Now())
		if err := rules.Validate(e); (len(faults) == 0) != (err == nil) {
			t.Errorf("ttl %v: %v, proto says %v", d, faults, err)
		}
	}
}

// FuzzEvent: nothing that comes over the wire panics, and what is accepted is fit for headers.
func FuzzEvent(f *testing.F) {
	seed, err := proto.Marshal(&grapnelv1.Event{Id: "a", Type: "b", Attributes: map[string]string{"c": "d"}, Time: timestamppb.Now(), Payload: &grapnelv1.Event_Text{Text: "x"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Fuzz(func(t *testing.T, raw []byte) {
		e := &grapnelv1.Event{}
		if proto.Unmarshal(raw, e) != nil {
			return
		}
		ev, faults := eventOf("acme", e, time.Now())
		if (ev == nil) == (len(faults) == 0) {
			t.Fatal("neither event nor fault")
		}
		if ev == nil {
			return
		}
		for _, s := range []string{ev.ID, ev.Source, ev.Type, ev.Subject, ev.ContentType, ev.Schema} {
			if strings.ContainsAny(s, "\r\n\x00") {
				t.Fatalf("%q would go into a header", s)
			}
		}
		again, _ := eventOf("acme", proto.CloneOf(e), time.Now().Add(time.Minute))
		if again == nil || again.ContentHash != ev.ContentHash {
			t.Fatal("the hash is not a function of the content")
		}
	})
}

// TestContentHashIsStable: hashes are kept on disk, so they may not change with the program.
func TestContentHashIsStable(t *testing.T) {
	e := &grapnelv1.Event{
		Id: "any", Source: "s", Type: "t", Subject: "u", DataContentType: "c/d", DataSchema: "v",
		Time: &timestamppb.Timestamp{Seconds: 5, Nanos: 6}, Ttl: &durationpb.Duration{Seconds: 7},
		Attributes: map[string]string{"b": "2", "a": "1"},
	}
	got := fmt.Sprintf("%x", contentHash(e, []byte("payload")))
	if want := "e9f535ae640d8de8a0a83dbb4bb2b81f"; got != want {
		t.Errorf("hash = %s, want %s", got, want)
	}
	seen := map[string]bool{got: true}
	for _, headers := range []map[string]string{{"x-a": "1"}, {"x-a": "2"}, {"x-b": "1"}, {"x-a": "1", "x-b": "1"}} {
		e.Headers = headers
		hash := fmt.Sprintf("%x", contentHash(e, []byte("payload")))
		if seen[hash] {
			t.Errorf("headers %v make no difference", headers)
		}
		seen[hash] = true
	}
	e.Headers = map[string]string{"X-A": "1", "X-b": "1"}
	if !seen[fmt.Sprintf("%x", contentHash(e, []byte("payload")))] {
		t.Error("the case of a header's name makes a difference")
	}
}

func TestErrorsToStatus(t *testing.T) {
	const name = "namespaces/acme/subscriptions/orders"
	for _, c := range []struct {
		err          error
		code, reason string
	}{
		{fmt.Errorf("x: %w", context.DeadlineExceeded), "DEADLINE_EXCEEDED", "ABANDONED"},
		{context.Canceled, "CANCELLED", "ABANDONED"},
		{fmt.Errorf("x: %w", subscription.ErrNotFound), "NOT_FOUND", "RESOURCE_NOT_FOUND"},
		{subscription.ErrExists, "ALREADY_EXISTS", "RESOURCE_EXISTS"},
		{&subscription.InUseError{Name: name, Users: []string{"a"}}, "FAILED_PRECONDITION", "RESOURCE_IN_USE"},
		{&subscription.EtagError{Current: "x"}, "ABORTED", "ETAG_MISMATCH"},
		{&subscription.QuotaError{Namespace: "acme"}, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"},
		{&subscription.InvalidError{Violations: []subscription.Violation{{Field: "a"}}}, "INVALID_ARGUMENT", "INVALID_FIELD"},
		{subscription.ErrNamespaceDeleted, "FAILED_PRECONDITION", "INVALID_STATE"},
		{subscription.ErrUnavailable, "UNAVAILABLE", "STORE_UNAVAILABLE"},
		{delivery.ErrNotFound, "NOT_FOUND", "RESOURCE_NOT_FOUND"},
		{delivery.ErrEventConflict, "ALREADY_EXISTS", "EVENT_ID_CONFLICT"},
		{delivery.ErrFinal, "FAILED_PRECONDITION", "INVALID_STATE"},
		{delivery.ErrInvalidState, "FAILED_PRECONDITION", "INVALID_STATE"},
		{delivery.ErrDiskFull, "RESOURCE_EXHAUSTED", "STORE_FULL"},
		{delivery.ErrClosed, "UNAVAILABLE", "DRAINING"},
		{delivery.ErrInvalidCursor, "INVALID_ARGUMENT", "INVALID_PAGE_TOKEN"},
		{delivery.ErrInvalidEvent, "INVALID_ARGUMENT", "INVALID_FIELD"},
		{ingest.ErrDraining, "UNAVAILABLE", "DRAINING"},
		{ingest.ErrNamespaceNotFound, "NOT_FOUND", "RESOURCE_NOT_FOUND"},
		{&ingest.RateError{Namespace: "acme", RetryAfter: time.Second}, "RESOURCE_EXHAUSTED", "RATE_LIMITED"},
		{&ingest.QuotaError{Namespace: "acme"}, "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED"},
		{&ingest.FieldError{Field: "payload"}, "INVALID_ARGUMENT", "INVALID_FIELD"},
		{ErrPluginUnavailable, "FAILED_PRECONDITION", "PLUGIN_UNAVAILABLE"},
		{errors.New("disk /dev/x broke"), "INTERNAL", "INTERNAL"},
		{fmt.Errorf("wrapped: %w", notFound(name, "subscription")), "NOT_FOUND", "RESOURCE_NOT_FOUND"},
	} {
		e := toStatus(c.err, name)
		if e.codeName() != c.code || e.Reason() != c.reason {
			t.Errorf("%v: %s %s, want %s %s", c.err, e.codeName(), e.Reason(), c.code, c.reason)
		}
		if strings.Contains(e.Error(), "/dev/x") {
			t.Errorf("the cause is shown: %v", e)
		}
		st := status.Convert(e)
		kinds := map[string]int{}
		for _, d := range st.Details() {
			kinds[fmt.Sprintf("%T", d)]++
		}
		if kinds["*errdetails.ErrorInfo"] != 1 {
			t.Errorf("%v: details %v", c.err, kinds)
		}
		for kind, n := range kinds {
			if n > 1 {
				t.Errorf("%v: %d times %s", c.err, n, kind)
			}
		}
		if _, known := grapnelv1.ErrorReason_value["ERROR_REASON_"+e.Reason()]; !known {
			t.Errorf("%s is not in ErrorReason", e.Reason())
		}
		if item := e.item(); item.GetCode() != c.code || item.GetReason() != c.reason || item.GetMessage() == "" {
			t.Errorf("item = %v", item)
		}
	}
	if toStatus(nil, "") != nil {
		t.Error("an error out of nothing")
	}
	many := make([]string, 25)
	for i := range many {
		many[i] = fmt.Sprint("user", i)
	}
	if e := inUse(name, many); !strings.Contains(e.Error(), "15 more") {
		t.Error(e)
	}
}

func BenchmarkEventOf(b *testing.B) {
	e := benchEvent()
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if _, faults := eventOf("acme", e, now); faults != nil {
			b.Fatal(faults)
		}
	}
}

func BenchmarkProtovalidateEvent(b *testing.B) {
	e, rules := benchEvent(), newRules()
	b.ReportAllocs()
	for b.Loop() {
		if err := rules.Validate(e); err != nil {
			b.Fatal(err)
		}
	}
}

func benchEvent() *grapnelv1.Event {
	return &grapnelv1.Event{
		Id: "0192f0c1-7d7c-7c4e-9a53-1c1f7a1b2c3d", Type: "order.created", Source: "//shop/eu", Subject: "order/1001",
		Time: timestamppb.Now(), DataContentType: "application/json", Attributes: map[string]string{"tenant": "t1"},
		Payload: &grapnelv1.Event_Data{Data: make([]byte, 1024)},
	}
}
