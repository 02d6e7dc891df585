package wire_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

func shapeOf(ps *grapnelv1.PayloadShape) wire.Shape {
	return wire.ShapeOf(&grapnelv1.Subscription{PayloadShape: ps})
}

func TestShapesAsBytes(t *testing.T) {
	at := time.Date(2026, 2, 3, 4, 5, 6, 789e6, time.FixedZone("", 3600))
	event := func(contentType, payload string) *delivery.Event {
		return &delivery.Event{
			ID: "e-1", Source: "/shop", Type: "order.created", Subject: "a \"b\" <ü>\x01", Time: at, ContentType: contentType,
			Schema: "https://example.com/s", Payload: []byte(payload), Attributes: map[string]string{"tenant": "x", "another": "1"},
		}
	}
	const standard, structured = grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS, grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS
	const context = `{"specversion":"1.0","id":"e-1","source":"/shop","type":"order.created","time":"2026-02-03T03:05:06.789Z",` +
		`"subject":"a \"b\" <ü>\u0001","dataschema":"https://example.com/s","datacontenttype":`
	for name, tt := range map[string]struct {
		format grapnelv1.PayloadShape_Format
		event  *delivery.Event
		want   string
	}{
		"json":                   {standard, event("application/json", ` {"n": 1}`), `{"type":"order.created","timestamp":"2026-02-03T03:05:06.789Z","data": {"n": 1}}`},
		"no media type":          {standard, event("", `[1]`), `{"type":"order.created","timestamp":"2026-02-03T03:05:06.789Z","data":[1]}`},
		"text":                   {standard, event("text/plain", `12`), `{"type":"order.created","timestamp":"2026-02-03T03:05:06.789Z","datacontenttype":"text/plain","data_base64":"MTI="}`},
		"not the json it says":   {standard, event("application/json", `{"n":`), `{"type":"order.created","timestamp":"2026-02-03T03:05:06.789Z","datacontenttype":"application/json","data_base64":"eyJuIjo="}`},
		"json that is not utf-8": {standard, event("application/json", "\"\xff\""), `{"type":"order.created","timestamp":"2026-02-03T03:05:06.789Z","datacontenttype":"application/json","data_base64":"Iv8i"}`},
		"cloudevent":             {structured, event("application/vnd.x+json; charset=utf-8", `{"n":1}`), context + `"application/vnd.x+json; charset=utf-8","another":"1","tenant":"x","data":{"n":1}}`},
		"cloudevent, binary":     {structured, event("application/xml", `<a/>`), context + `"application/xml","another":"1","tenant":"x","data_base64":"PGEvPg=="}`},
		"cloudevent, no data":    {structured, event("application/json", ``), context + `"application/json","another":"1","tenant":"x"}`},
	} {
		got := new(wire.Shapes).Get(tt.event, shapeOf(&grapnelv1.PayloadShape{Format: tt.format}))
		if diff := cmp.Diff(tt.want, string(wire.ContentOf(tt.event, got).Body())); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestBodiesTravelOncePerBatch(t *testing.T) {
	var s wire.Shapes
	one, two := &delivery.Event{UID: "1", Seq: 1}, &delivery.Event{UID: "2", Seq: 2}
	structured := shapeOf(&grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS})
	zipped := shapeOf(&grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP})
	var batch wire.Batch
	for range 2 { // a batch is used again
		batch.Reset()
		for _, c := range []wire.Content{
			wire.ContentOf(one, nil), wire.ContentOf(one, s.Get(one, structured)), wire.ContentOf(two, nil),
			wire.ContentOf(one, new(wire.Shapes).Get(one, structured)), wire.ContentOf(one, s.Get(one, zipped)),
			wire.ContentOf(one, nil), wire.ContentOf(two, s.Get(two, structured)),
		} {
			batch.Add(&wire.Attempt{Content: c, Nonce: [16]byte{1}, Ownership: len(c.Body()) == 0})
		}
	}
	var got pluginv1.AttemptRequest
	if err := proto.Unmarshal(batch.Append(nil), &got); err != nil {
		t.Fatal(err)
	}
	var places []uint32
	for _, a := range got.GetBatch().GetAttempts() {
		places = append(places, a.GetContent())
		if len(a.GetNonce()) != 16 || a.GetNonce()[0] != 1 {
			t.Errorf("nonce %x", a.GetNonce())
		}
	}
	if diff := cmp.Diff([]uint32{0, 1, 2, 1, 3, 0, 4}, places); diff != "" || len(got.GetBatch().GetContents()) != 5 {
		t.Errorf("places (-want +got):\n%s", diff)
	}
	if a, b := s.Get(one, structured), s.Get(one, structured); a != b {
		t.Error("a body that is in use was made twice")
	}
}
