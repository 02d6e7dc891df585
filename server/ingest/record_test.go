package ingest_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/ingest"
)

const acmeSubscriptions = "namespaces/acme/subscriptions/"

func failing(about string) []*delivery.Event {
	return []*delivery.Event{{Type: "grapnel.subscription.failing", Subject: acmeSubscriptions + about, Time: time.Now(), Payload: []byte("{}")}}
}

// What the server tells is stored where it is wanted, for those who were there when it happened and whom it is not about,
// also while the server drains and beyond what publishers may.
func TestRecordStoresWhatIsWanted(t *testing.T) {
	registry := newTenants(t, &grapnelv1.Quota{MaxPublishRate: 1, MaxOpenDeliveries: 1000},
		&grapnelv1.Subscription{Name: acmeSubscriptions + "all"},
		&grapnelv1.Subscription{Name: acmeSubscriptions + "late", EventTypes: []string{"grapnel.**"}, CreateTime: timestamppb.New(time.Now().Add(time.Hour))},
		&grapnelv1.Subscription{Name: acmeSubscriptions + "ops", EventTypes: []string{"grapnel.**"}},
	)
	journal := &shelf{open: 1199}
	in := ingest.New(ingest.Options{Registry: registry, Journal: journal})
	in.Drain()
	acme := delivery.UID(registry.Snapshot().Namespace("acme").UID).NamespaceKey()
	for n := range 100 {
		got := in.Record(t.Context(), acme, failing("orders"))[0]
		if got.Err != nil || got.Event == nil || got.Event.Namespace != acme {
			t.Fatalf("event %d: %+v", n, got)
		}
		var to []string
		for _, target := range journal.events[got.Event.ID].Targets {
			to = append(to, target.Subscription)
		}
		if diff := cmp.Diff([]string{"ops"}, to); diff != "" {
			t.Fatalf("targets (-want +got):\n%s", diff)
		}
	}
	calls := journal.calls
	if got := in.Record(t.Context(), acme, failing("ops"))[0]; got.Event != nil || got.Err != nil || journal.calls != calls {
		t.Errorf("nobody wants it: %+v, the journal was asked: %v", got, journal.calls != calls)
	}
	journal.open = 1200
	var full *ingest.QuotaError
	if got := in.Record(t.Context(), acme, failing("orders"))[0]; !errors.As(got.Err, &full) || full.Name != "max_open_deliveries" {
		t.Errorf("a tenth and a hundred beyond the quota: %v", got.Err)
	}
	gone := delivery.UID(registry.Snapshot().Namespace("gone").UID).NamespaceKey()
	if got := in.Record(t.Context(), gone, failing("orders"))[0]; !errors.Is(got.Err, ingest.ErrNamespaceDeleted) {
		t.Errorf("a deleted namespace: %v", got.Err)
	}
	if got := in.Record(t.Context(), 42, failing("orders"))[0]; !errors.Is(got.Err, ingest.ErrNamespaceNotFound) {
		t.Errorf("an absent namespace: %v", got.Err)
	}
}

// That a quota is near is told at four fifths of it and at its end, about once an hour, if anybody listens.
func TestNearQuotasAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		quota := &grapnelv1.Quota{MaxPublishRate: 10, MaxOpenDeliveries: 1000}
		ops := &grapnelv1.Subscription{Name: acmeSubscriptions + "ops", EventTypes: []string{"grapnel.**"}}
		var told []string
		near := func(n ingest.Near) {
			told = append(told, fmt.Sprint(n.Namespace.ID, " ", n.Quota, " ", n.Used, "/", n.Limit))
		}
		journal := &shelf{}
		in := ingest.New(ingest.Options{Registry: newTenants(t, quota, ops), Journal: journal, Near: near})
		publish := func(seconds, each int) {
			for range seconds {
				in.Publish(t.Context(), "acme", events(each, func(_ int, e *delivery.Event) { e.ID = "" }))
				time.Sleep(time.Second)
			}
		}
		wantTold := func(what string, want ...string) {
			t.Helper()
			if diff := cmp.Diff(want, told); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
			told = nil
		}
		publish(60, 7)
		wantTold("seven tenths of the rate")
		publish(60, 9)
		wantTold("nine tenths", "acme max_publish_rate 8/10")
		publish(1, 200)
		wantTold("beyond it, within the hour")
		time.Sleep(time.Hour)
		publish(1, 200)
		wantTold("beyond it", "acme max_publish_rate 10/10")
		journal.open = 799
		publish(1, 1)
		wantTold("799 of 1000 open deliveries")
		journal.open = 800
		publish(3, 1)
		wantTold("800", "acme max_open_deliveries 800/1000")
		time.Sleep(time.Hour)
		journal.open = 1000
		publish(3, 1)
		wantTold("1000", "acme max_open_deliveries 1000/1000")

		in = ingest.New(ingest.Options{Registry: newTenants(t, quota), Journal: journal, Near: near})
		publish(3, 200)
		wantTold("nobody listens")
	})
}
