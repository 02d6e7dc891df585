package subscription_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestBatching(t *testing.T) {
	type batching = grapnelv1.Batching
	const in = "subscription.batching."
	for _, c := range []struct {
		name     string
		batching *batching
		shape    *grapnelv1.PayloadShape
		// field and text of the one violation; empty when there is none.
		field, text string
		want        *subscription.Batching
	}{
		{name: "unset"},
		{name: "defaults", batching: &batching{}, want: &subscription.Batching{MaxEvents: 100, MaxBytes: 256 << 10, MaxWait: time.Second}},
		{name: "no wait", batching: &batching{MaxEvents: 2, MaxBytes: 1024, MaxWait: durationpb.New(0)}, want: &subscription.Batching{MaxEvents: 2, MaxBytes: 1024}},
		{name: "the most", batching: &batching{MaxEvents: 1000, MaxBytes: 512 << 10, MaxWait: durationpb.New(10 * time.Second)},
			want: &subscription.Batching{MaxEvents: 1000, MaxBytes: 512 << 10, MaxWait: 10 * time.Second}},
		{name: "compressed", batching: &batching{}, shape: &grapnelv1.PayloadShape{Compression: grapnelv1.PayloadShape_COMPRESSION_GZIP},
			want: &subscription.Batching{MaxEvents: 100, MaxBytes: 256 << 10, MaxWait: time.Second}},
		{name: "one event", batching: &batching{MaxEvents: 1}, field: in + "max_events", text: "1 is out of range; want 2 to 1000"},
		{name: "too many", batching: &batching{MaxEvents: 1001}, field: in + "max_events", text: "1001 is out of range"},
		{name: "few bytes", batching: &batching{MaxBytes: 1023}, field: in + "max_bytes", text: "want 1024 to 524288"},
		{name: "long", batching: &batching{MaxWait: durationpb.New(11 * time.Second)}, field: in + "max_wait", text: "11s is out of range; want 0s to 10s"},
		{name: "backwards", batching: &batching{MaxWait: durationpb.New(-1)}, field: in + "max_wait", text: "want 0s"},
		{name: "unknown format", batching: &batching{Format: 9}, field: in + "format", text: "FORMAT_CLOUDEVENTS, FORMAT_JSON_ARRAY, FORMAT_NDJSON"},
		{name: "form of one event", batching: &batching{}, shape: &grapnelv1.PayloadShape{Format: grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS},
			field: "subscription.payload_shape.format", text: "leave out one of the two"},
		{name: "type of one event", batching: &batching{}, shape: &grapnelv1.PayloadShape{ContentType: "text/csv"},
			field: "subscription.payload_shape.content_type", text: `"text/csv"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := valid()
			p.Batching, p.PayloadShape = c.batching, c.shape
			s, err := subscription.New(p)
			if c.field == "" {
				switch {
				case err != nil:
					t.Error(err)
				case (s.Batching == nil) != (c.want == nil) || c.want != nil && *s.Batching != *c.want:
					t.Errorf("%+v, want %+v", s.Batching, c.want)
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

// A rate is of requests.
func TestBatchingWarnsOfARate(t *testing.T) {
	p := valid()
	p.Batching, p.MaxRate = &grapnelv1.Batching{MaxEvents: 50}, 10
	s, err := subscription.New(p)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(subscription.Warnings(s.Proto()), "\n"); !strings.Contains(got, "max_rate is of requests") || !strings.Contains(got, "up to 500 a second") {
		t.Errorf("warnings: %s", got)
	}
}
