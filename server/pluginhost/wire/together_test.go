package wire_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

func batchShape(format grapnelv1.Batching_Format, gzipped bool) wire.Shape {
	sub := &grapnelv1.Subscription{Batching: &grapnelv1.Batching{Format: format}}
	if gzipped {
		sub.PayloadShape = &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}
	}
	return wire.ShapeOf(sub)
}

func TestBatchesAsBytes(t *testing.T) {
	at := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	events := []*delivery.Event{
		{UID: "evt_1", ID: "e-1", Source: "/shop", Type: "order.created", Subject: "a\nb", Time: at, ContentType: "application/json",
			Schema: "https://example.com/s", Payload: []byte("{\n \"n\":\r\n 1}"), Attributes: map[string]string{"tenant": "x", "webhookid": "theirs"}},
		{UID: "evt_2", ID: "e-2", Source: "/shop", Type: "order.paid", AcceptTime: at, ContentType: "text/plain", Payload: []byte("a\nb")},
		{UID: "evt_3", ID: "e-3", Source: "/shop", Type: "order.paid", AcceptTime: at},
	}
	const (
		first  = `{"id":"evt_1","type":"order.created","timestamp":"2026-02-03T04:05:06Z","attributes":{"id":"e-1","source":"/shop","time":"2026-02-03T04:05:06Z","subject":"a\u000ab","dataschema":"https://example.com/s","tenant":"x","webhookid":"theirs"},"data":`
		second = `{"id":"evt_2","type":"order.paid","timestamp":"2026-02-03T04:05:06Z","attributes":{"id":"e-2","source":"/shop"},"datacontenttype":"text/plain","data_base64":"YQpi"}`
		third  = `{"id":"evt_3","type":"order.paid","timestamp":"2026-02-03T04:05:06Z","attributes":{"id":"e-3","source":"/shop"},"data_base64":""}`
	)
	for format, want := range map[grapnelv1.Batching_Format]string{
		0:                                "[" + first + "{\n \"n\":\r\n 1}}," + second + "," + third + "]",
		grapnelv1.Batching_FORMAT_NDJSON: first + "{  \"n\":   1}}\n" + second + "\n" + third + "\n",
		grapnelv1.Batching_FORMAT_CLOUDEVENTS: `[{"specversion":"1.0","id":"e-1","source":"/shop","type":"order.created","time":"2026-02-03T04:05:06Z","subject":"a\u000ab",` +
			`"dataschema":"https://example.com/s","datacontenttype":"application/json","tenant":"x","webhookid":"evt_1","data":` + "{\n \"n\":\r\n 1}}," +
			`{"specversion":"1.0","id":"e-2","source":"/shop","type":"order.paid","datacontenttype":"text/plain","webhookid":"evt_2","data_base64":"YQpi"},` +
			`{"specversion":"1.0","id":"e-3","source":"/shop","type":"order.paid","webhookid":"evt_3"}]`,
	} {
		var shapes wire.Shapes
		got := shapes.Together(events, batchShape(format, false))
		if diff := cmp.Diff(want, string(got.Body())); diff != "" {
			t.Errorf("%v (-want +got):\n%s", format, diff)
		}
		if format == grapnelv1.Batching_FORMAT_NDJSON {
			for line := range strings.Lines(string(got.Body())) {
				if !json.Valid([]byte(line)) {
					t.Errorf("%q is no JSON", line)
				}
			}
		} else if !json.Valid(got.Body()) {
			t.Errorf("%v is no JSON", format)
		}
		zipped := shapes.Together(events, batchShape(format, true))
		z, err := gzip.NewReader(bytes.NewReader(zipped.Body()))
		if err != nil {
			t.Fatal(err)
		}
		if plain, err := io.ReadAll(z); err != nil || string(plain) != want {
			t.Errorf("%v, gzip: %q, %v", format, plain, err)
		}
		if again := shapes.Together(events, batchShape(format, true)); zipped.ID() != got.ID() || !bytes.Equal(again.Body(), zipped.Body()) || !strings.HasPrefix(got.ID(), "bat_") {
			t.Errorf("%v: not the same again", format)
		}
	}
	if events[0].Payload[1] != '\n' {
		t.Error("a payload was changed")
	}
}

// What travels of a batch says nothing of one event.
func TestBatchOnTheWire(t *testing.T) {
	var shapes wire.Shapes
	one := []*delivery.Event{{UID: "evt_1", ID: "e", Type: "a", Payload: []byte(`1`)}}
	for _, tt := range []struct {
		events []*delivery.Event
		kind   string
	}{
		{one, "a"},
		{append(slices.Clone(one), &delivery.Event{UID: "evt_2", ID: "f", Type: "a"}), "a"},
		{append(slices.Clone(one), &delivery.Event{UID: "evt_2", ID: "f", Type: "b"}), ""},
	} {
		a := &wire.Attempt{Content: shapes.Together(tt.events, batchShape(grapnelv1.Batching_FORMAT_NDJSON, true)), Answer: true}
		got := a.One()
		if got.GetAttempt().GetMaxResponseBody() != wire.MaxAnswer || got.GetMaxResponseBody() != wire.MaxAnswer {
			t.Errorf("answers of %d bytes are asked for", got.GetMaxResponseBody())
		}
		var names []string
		for _, h := range got.GetContent().GetHeaders() {
			names = append(names, h.GetName()+": "+h.GetValue())
		}
		want := []string{"content-type: application/x-ndjson", "content-encoding: gzip", "webhook-id: " + a.Content.ID()}
		if diff := cmp.Diff(want, names); diff != "" || got.GetContent().GetEventType() != tt.kind || got.GetContent().GetMessageId() != a.Content.ID() {
			t.Errorf("headers (-want +got):\n%s\ntype %q, want %q", diff, got.GetContent().GetEventType(), tt.kind)
		}
	}
}
