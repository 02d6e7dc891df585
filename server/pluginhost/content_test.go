//go:build linux

package pluginhost

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

func shapedSub(t testing.TB, n byte, ps *grapnelv1.PayloadShape) *subscription.Subscription {
	sub := newSub(t, n, nil)
	sub.Proto().Signers = []*grapnelv1.PluginBinding{{Plugin: "plugins/beta"}}
	sub.Proto().PayloadShape = ps
	return sub
}

// TestReceiverDecodesTheEvent sends random events in every shape and compares what a receiver makes of them.
func TestReceiverDecodesTheEvent(t *testing.T) {
	f := platform(t)
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[rng.IntN(len(from))] }
	for n := range 400 {
		job := newJob(n, pick("order.created", "a"))
		ev := job.Event
		ev.ContentType = pick("application/json", "application/xml", "application/x-protobuf", "application/ld+json", "text/plain; charset=utf-8", "")
		ev.Payload = []byte(pick(`{"a":[1,2,{"b":null}]}`, `"<&>\u2028 "`, "", " [ ] ", "<x/>", "\x00\xff\xfe", `{"a":`, "12", strings.Repeat(`[0]`, 3)))
		if rng.IntN(3) == 0 {
			ev.Payload = make([]byte, rng.IntN(200))
			for i := range ev.Payload {
				ev.Payload[i] = byte(rng.Uint32())
			}
		}
		ev.Subject, ev.Schema = pick("", "a b", "ü\"\\\n"), pick("", "https://example.com/schema")
		ev.Time = time.Unix(1700000000, int64(rng.IntN(1e9)))
		ev.Attributes = map[string]string{"tenant": pick("x", "ü \"")}
		ps := &grapnelv1.PayloadShape{
			Format: grapnelv1.PayloadShape_Format(rng.IntN(4)), Compression: grapnelv1.PayloadShape_Compression(rng.IntN(3)),
		}
		sub := shapedSub(t, byte(1+int(ps.Format)*3+int(ps.Compression)), ps)
		got := f.receive(t, sub, job)
		again := f.receive(t, sub, job)
		if !bytes.Equal(got.Body, again.Body) {
			t.Fatalf("two attempts differ: %q, %q", got.Body, again.Body)
		}
		checkDecoded(t, ps, ev, got)
		if t.Failed() {
			t.Fatalf("event %+v, payload %q, shape %v", ev, ev.Payload, ps)
		}
	}
}

func checkDecoded(t *testing.T, ps *grapnelv1.PayloadShape, ev *delivery.Event, got seen) {
	t.Helper()
	body := got.Body
	if zipped := ps.GetCompression() == grapnelv1.PayloadShape_COMPRESSION_GZIP; (got.get("content-encoding") == "gzip") != zipped {
		t.Errorf("content-encoding %q", got.get("content-encoding"))
	} else if zipped {
		r, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body, err = io.ReadAll(r); err != nil || !r.ModTime.IsZero() {
			t.Errorf("gzip: %v, time %v", err, r.ModTime)
		}
	}
	structured := ps.GetFormat() == grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS
	if got.get("webhook-id") != ev.UID || (got.get("ce-id") == "") != structured || (got.get("ce-tenant") == "") != structured {
		t.Errorf("headers %v", got.Headers)
	}
	switch ps.GetFormat() {
	case grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS:
		var in struct {
			Type, Timestamp string
			Data            json.RawMessage
			Base64          *[]byte `json:"data_base64"`
		}
		if err := json.Unmarshal(body, &in); err != nil || got.get("content-type") != "application/json" {
			t.Errorf("%v: %s as %s", err, body, got.get("content-type"))
		}
		at, err := time.Parse(time.RFC3339, in.Timestamp)
		if in.Type != ev.Type || err != nil || !at.Equal(ev.Time) {
			t.Errorf("%+v", in)
		}
		samePayload(t, ev, in.Data, in.Base64)
	case grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS:
		decodeCloudEvent(t, ev, body)
		if got.get("content-type") != "application/cloudevents+json" {
			t.Errorf("content-type %q", got.get("content-type"))
		}
	default:
		if !bytes.Equal(body, ev.Payload) || got.get("content-type") != ev.ContentType {
			t.Errorf("body %q as %q", body, got.get("content-type"))
		}
	}
}

// decodeCloudEvent reads the JSON format of CloudEvents 1.0 as its specification has it.
func decodeCloudEvent(t *testing.T, ev *delivery.Event, body []byte) {
	t.Helper()
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	text := map[string]string{}
	var data json.RawMessage
	var encoded *[]byte
	for name, raw := range members {
		var s string
		switch err := json.Unmarshal(raw, &s); {
		case name == "data":
			data = raw
		case err != nil:
			t.Errorf("%s: %v", name, err)
		case name == "data_base64":
			b, err := base64.StdEncoding.DecodeString(s)
			if err != nil {
				t.Error(err)
			}
			encoded = &b
		default:
			text[name] = s
		}
	}
	want := map[string]string{
		"specversion": "1.0", "id": ev.ID, "source": ev.Source, "type": ev.Type, "tenant": ev.Attributes["tenant"],
		"time": ev.Time.UTC().Format(time.RFC3339Nano),
	}
	for name, value := range map[string]string{"subject": ev.Subject, "dataschema": ev.Schema, "datacontenttype": ev.ContentType} {
		if value != "" {
			want[name] = value
		}
	}
	if diff := cmp.Diff(want, text); diff != "" {
		t.Errorf("attributes (-want +got):\n%s", diff)
	}
	if len(ev.Payload) == 0 {
		if data != nil || encoded != nil {
			t.Errorf("an event without data has %s %v", data, encoded)
		}
		return
	}
	samePayload(t, ev, data, encoded)
}

func samePayload(t *testing.T, ev *delivery.Event, data json.RawMessage, encoded *[]byte) {
	t.Helper()
	switch {
	case data == nil == (encoded == nil):
		t.Errorf("want one of data and data_base64, have %s and %v", data, encoded)
	case encoded != nil && !bytes.Equal(*encoded, ev.Payload):
		t.Errorf("data_base64 is %q", *encoded)
	case data != nil && !bytes.Equal(data, bytes.TrimSpace(ev.Payload)):
		t.Errorf("data is %q", data)
	}
}

func TestRawContentTypeAndStaticHeaders(t *testing.T) {
	f := platform(t)
	sub := shapedSub(t, 1, &grapnelv1.PayloadShape{ContentType: "application/vnd.acme", Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP})
	sub.Proto().Headers = map[string]string{"Content-Type": "text/wrong", "Content-Encoding": "br", "X-Kept": "yes"}
	got := f.receive(t, sub, newJob(0, "x"))
	if got.get("content-type") != "application/vnd.acme" || got.get("content-encoding") != "gzip" || got.get("x-kept") != "yes" {
		t.Errorf("%v", got.Headers)
	}
}

func TestBodyLimitHoldsForTheShapedBody(t *testing.T) {
	f := platform(t)
	job := newJob(0, "x")
	job.Event.Payload = []byte(`"` + strings.Repeat("x", platformMaxBody) + `"`)
	if got := f.attempt(t, shapedSub(t, 1, nil), job); got.Cause != delivery.CausePolicy || !strings.Contains(got.Error, "larger") {
		t.Errorf("raw: %+v", got)
	}
	if got := f.attempt(t, shapedSub(t, 2, &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}), job); got.ResponseCode != 400 {
		t.Errorf("compressed: %+v", got)
	}
	job.Event.Payload = job.Event.Payload[:platformMaxBody-2] // no JSON any more: base64 makes it longer
	if got := f.attempt(t, shapedSub(t, 3, &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS}), job); got.Cause != delivery.CausePolicy {
		t.Errorf("structured: %+v", got)
	}
}
