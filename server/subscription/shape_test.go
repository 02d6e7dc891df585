package subscription_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestPayloadShape(t *testing.T) {
	type shape = grapnelv1.PayloadShape
	const (
		raw      = grapnelv1.PayloadShape_FORMAT_RAW
		envelope = grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS
		cloud    = grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS
		gzip     = grapnelv1.PayloadShape_COMPRESSION_GZIP
		in       = "subscription.payload_shape."
	)
	for _, c := range []struct {
		name    string
		shape   *shape
		headers map[string]string
		// field and text of the one violation; empty when there is none.
		field, text string
	}{
		{name: "unset"},
		{name: "envelope", shape: &shape{Format: envelope, Compression: gzip}},
		{name: "cloudevents", shape: &shape{Format: cloud}},
		{name: "content type", shape: &shape{ContentType: "application/xml"}},
		{name: "with parameter", shape: &shape{Format: raw, ContentType: `text/csv; charset=utf-8; header="a b"`}},
		{name: "unknown format", shape: &shape{Format: 9}, field: in + "format", text: "FORMAT_CLOUDEVENTS, FORMAT_RAW, FORMAT_STANDARD_WEBHOOKS"},
		{name: "unknown compression", shape: &shape{Compression: 9}, field: in + "compression", text: "COMPRESSION_GZIP, COMPRESSION_NONE"},
		{name: "content type of an envelope", shape: &shape{Format: envelope, ContentType: "text/plain"}, field: in + "content_type", text: "FORMAT_RAW only"},
		{name: "header injection", shape: &shape{ContentType: "text/plain\r\nx-admin: 1"}, field: in + "content_type", text: "line break"},
		{name: "outside ASCII", shape: &shape{ContentType: "text/plain; name=ü"}, field: in + "content_type", text: "outside ASCII"},
		{name: "no media type", shape: &shape{ContentType: "xml"}, field: in + "content_type", text: `"xml" is not a media type`},
		{name: "no subtype", shape: &shape{ContentType: "text/"}, field: in + "content_type", text: "not a media type"},
		{name: "half a parameter", shape: &shape{ContentType: "text/plain; charset"}, field: in + "content_type", text: "not a media type"},
		{name: "blank", shape: &shape{ContentType: " text/plain"}, field: in + "content_type", text: "blank"},
		{name: "long", shape: &shape{ContentType: "text/" + strings.Repeat("x", 124)}, field: in + "content_type", text: "129 characters; want at most 128"},
		{name: "encoding twice", shape: &shape{Compression: gzip}, headers: map[string]string{"Content-Encoding": "br"},
			field: `subscription.headers["Content-Encoding"]`, text: "compression sets it"},
		{name: "encoding twice for some", shape: &shape{Compression: gzip}, headers: map[string]string{"content_encoding": "br"},
			field: `subscription.headers["content_encoding"]`, text: "compression sets it"},
		{name: "encoding of the publisher", headers: map[string]string{"Content-Encoding": "br"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := valid()
			p.PayloadShape, p.Headers = c.shape, c.headers
			_, err := subscription.New(p)
			if c.field == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var bad *subscription.InvalidError
			if !errors.As(err, &bad) || len(bad.Violations) != 1 || bad.Violations[0].Field != c.field || !strings.Contains(bad.Violations[0].Description, c.text) {
				t.Errorf("got %v, want %s: …%s…", err, c.field, c.text)
			}
		})
	}
}

func TestPayloadShapeWarnings(t *testing.T) {
	for _, c := range []struct {
		signers []string
		want    []string
	}{
		{[]string{"plugins/stripe"}, []string{"compressed bytes"}},
		{[]string{"plugins/none"}, nil},
		{[]string{"plugins/none", "plugins/stripe"}, []string{"compressed bytes", "signers[0] is plugins/none"}},
	} {
		p := valid()
		p.PayloadShape = &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP}
		for _, s := range c.signers {
			p.Signers = append(p.Signers, &grapnelv1.PluginBinding{Plugin: s})
		}
		s, err := subscription.New(p)
		if err != nil {
			t.Fatal(err)
		}
		got := subscription.Warnings(s.Proto())
		ok := len(got) == len(c.want)
		for i := range c.want {
			ok = ok && strings.Contains(got[i], c.want[i])
		}
		if !ok {
			t.Errorf("%v: %v", c.signers, cmp.Diff(c.want, got))
		}
	}
}
