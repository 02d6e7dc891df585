package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

const (
	// crashed is how many deliveries are in flight when the plugin is killed.
	crashed = 20
	// known is how many their receiver takes before that: a new one gets few at once.
	known = 40
)

// tell plays the story.
func (d *demo) tell(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, demoLimit)
	defer cancel()
	for _, act := range []func(context.Context) error{d.prepare, d.signed, d.retried, d.crash} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	d.say("")
	d.say("%d events published, %d delivered, every signature verified, none lost, in %s.",
		d.result.Delivered+d.result.Lost, d.result.Delivered, since(d.begin))
	return nil
}

// prepare makes the tenant, its key and its subscriptions.
func (d *demo) prepare(ctx context.Context) error {
	_, err := d.client.NamespaceService().CreateNamespace(ctx, &grapnelv1.CreateNamespaceRequest{NamespaceId: "demo"})
	if err != nil {
		return fmt.Errorf("create namespace: %w", err)
	}
	secret, err := d.client.SecretService().CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/demo", SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC,
	})
	if err != nil {
		return fmt.Errorf("create secret: %w", err)
	}
	if err := d.receiver.trust(secret.GetGeneratedValue()); err != nil {
		return err
	}
	for _, s := range []struct{ id, types, path string }{
		{"orders", "order.*", "/orders"}, {"invoices", "invoice.*", "/flaky"}, {"parcels", "parcel.*", "/slow"},
	} {
		_, err := d.client.SubscriptionService().CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/demo", SubscriptionId: s.id,
			Subscription: &grapnelv1.Subscription{
				Uri: "http://" + d.receiver.addr() + s.path, EventTypes: []string{s.types}, MaxInFlight: 2 * crashed,
				Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/demo/secrets/key"}}},
				RetryPolicy: &grapnelv1.RetryPolicy{Jitter: new(float64), Schedule: slices.Repeat(
					[]*durationpb.Duration{durationpb.New(time.Second)}, 5)},
			},
		})
		if err != nil {
			return fmt.Errorf("create subscription %s: %w", s.id, err)
		}
	}
	d.say("Namespace demo has a secret and three subscriptions: order.* invoice.* parcel.*, retried after 1s.")
	return nil
}

func (d *demo) signed(ctx context.Context) error {
	d.say("")
	d.say("1. A signed delivery")
	begin := time.Now()
	r, err := d.client.Publish(ctx, "demo", client.Event{ID: "order-1001", Type: "order.created", Data: []byte(`{"order":1001,"total":"12.50"}`)})
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	d.step("Published %s. It is on disk after %s.", r.GetName(), since(begin))
	got, err := d.receiver.wait(ctx, 1, func(a arrival) bool { return a.path == "/orders" })
	if err != nil {
		return fmt.Errorf("wait for the delivery: %w", err)
	}
	took := got[0].at.Sub(begin)
	d.result.FirstDeliveryMillis = float64(took.Microseconds()) / 1000
	if !got[0].verified {
		return errors.New("the signature does not verify")
	}
	d.step("The receiver has it after %s:", roundDuration(took))
	d.step("    webhook-id: %s", got[0].id)
	d.step("    webhook-signature: %s", got[0].signature)
	d.step("    %s", got[0].body)
	d.step("The signature verifies with the subscription's secret, by the Standard Webhooks rules.")
	return d.settle(ctx, "orders", 1)
}

func (d *demo) retried(ctx context.Context) error {
	d.say("")
	d.say("2. A failure that is retried")
	d.receiver.refuseNext(1)
	begin := time.Now()
	r, err := d.client.Publish(ctx, "demo", client.Event{ID: "invoice-7", Type: "invoice.paid", Data: []byte(`{"invoice":7}`)})
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	failed, err := d.receiver.wait(ctx, 1, func(a arrival) bool { return a.path == "/flaky" && a.status == http.StatusServiceUnavailable })
	if err != nil {
		return fmt.Errorf("wait for the first attempt: %w", err)
	}
	d.step("Published %s. The receiver is busy: it answers 503 after %s.", r.GetName(), roundDuration(failed[0].at.Sub(begin)))
	accepted, err := d.receiver.wait(ctx, 1, func(a arrival) bool { return a.path == "/flaky" && a.status == http.StatusNoContent })
	if err != nil {
		return fmt.Errorf("wait for the second attempt: %w", err)
	}
	if accepted[0].id != failed[0].id || accepted[0].body != failed[0].body {
		return errors.New("the second attempt is not the same message")
	}
	d.step("Second attempt after %s: 204. Same webhook-id, same body, a fresh signature.", roundDuration(accepted[0].at.Sub(begin)))
	if err := d.settle(ctx, "invoices", 1); err != nil {
		return err
	}
	d.result.Retried++
	return d.showAttempts(ctx, "invoices")
}

// showAttempts lists what the server recorded, as `grapnel delivery attempts` would.
func (d *demo) showAttempts(ctx context.Context, subscription string) error {
	filter := client.Filter(fmt.Sprintf("subscription = %q", "namespaces/demo/subscriptions/"+subscription))
	for delivery, err := range d.client.Deliveries(ctx, "demo", filter) {
		if err != nil {
			return fmt.Errorf("list deliveries: %w", err)
		}
		for a, err := range d.client.Attempts(ctx, delivery.GetName()) {
			if err != nil {
				return fmt.Errorf("list attempts: %w", err)
			}
			d.step("    attempt %d: %s, response %d, took %s", a.GetNumber(), strings.ToLower(enumText(a.GetOutcome())),
				a.GetResponseCode(), roundDuration(a.GetDuration().AsDuration()))
		}
		return nil
	}
	return errors.New("the delivery is not listed")
}

func (d *demo) crash(ctx context.Context) error {
	d.say("")
	d.say("3. A crash of the plugin process")
	if err := d.parcels(ctx, "parcel.packed", "packed", known); err != nil {
		return err
	}
	if took, err := d.receiver.wait(ctx, known, func(a arrival) bool { return a.path == "/slow" && a.status == http.StatusNoContent }); err != nil {
		return fmt.Errorf("%d of %d deliveries were taken: %w", len(took), known, err)
	}
	release := d.receiver.holdSlow()
	released := false
	defer func() {
		if !released {
			release()
		}
	}()
	if err := d.parcels(ctx, "parcel.shipped", "parcel", crashed); err != nil {
		return err
	}
	held, err := d.receiver.wait(ctx, crashed, shipped)
	if err != nil {
		return fmt.Errorf("%d of %d deliveries reached the receiver: %w", len(held), crashed, err)
	}
	before := d.server.PluginPids()
	d.step("Published %d events. All are on their way: the receiver has the requests and has not answered.", crashed)
	begin := time.Now()
	for name, pid := range before {
		process, err := os.FindProcess(pid)
		if err == nil {
			err = process.Kill()
		}
		if err != nil {
			return fmt.Errorf("kill plugin %s, process %d: %w", name, pid, err)
		}
		d.step("kill -9 %d: the plugin process is gone, in the middle of %d attempts.", pid, crashed)
	}
	release()
	released = true
	if err := d.awaitPlugin(ctx, before, begin); err != nil {
		return err
	}
	return d.recovered(ctx, held, begin)
}

// parcels publishes n events.
func (d *demo) parcels(ctx context.Context, eventType, what string, n int) error {
	p := d.client.Publisher("demo", client.PublisherOptions{})
	for n := range n {
		p.Publish(ctx, client.Event{ID: fmt.Sprintf("%s-%d", what, n+1), Type: eventType, Data: fmt.Appendf(nil, `{%q:%d}`, what, n+1)})
	}
	if err := p.Close(ctx); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// shipped reports whether it is one of those in flight when the plugin is killed.
func shipped(a arrival) bool { return strings.HasPrefix(a.body, `{"parcel":`) }

// awaitPlugin waits until the server has replaced every process that was killed.
func (d *demo) awaitPlugin(ctx context.Context, before map[string]int, begin time.Time) error {
	return poll(ctx, "the plugin did not come back", func() (bool, error) {
		now := d.server.PluginPids()
		for name, pid := range before {
			if now[name] == 0 || now[name] == pid {
				return false, nil
			}
		}
		d.result.PluginBackMillis = float64(time.Since(begin).Microseconds()) / 1000
		d.step("The server started another, process %d, after %s.", slices.Collect(maps.Values(now))[0], since(begin))
		return true, nil
	})
}

func (d *demo) recovered(ctx context.Context, held []arrival, begin time.Time) error {
	accepted, err := d.receiver.wait(ctx, crashed, func(a arrival) bool { return shipped(a) && a.status == http.StatusNoContent })
	lost := map[string]string{}
	for _, a := range held {
		lost[a.id] = a.body
	}
	for _, a := range accepted {
		if lost[a.id] == a.body {
			delete(lost, a.id)
		}
	}
	d.result.Lost = len(lost)
	d.result.RecoveredAfterPluginCrash = len(held) - len(lost)
	if err != nil || len(lost) > 0 {
		return errors.Join(fmt.Errorf("%d of %d deliveries were not repeated", len(lost), crashed), err)
	}
	d.step("All %d were sent again and accepted %s after the crash, with the webhook-ids they had before.", crashed, since(begin))
	d.step("Nothing is lost, and the crash did not count against the receiver.")
	return d.settle(ctx, "parcels", known+crashed)
}

// settle waits until the server has recorded n successes of a subscription, and counts them.
func (d *demo) settle(ctx context.Context, subscription string, n int) error {
	filter := client.Filter(fmt.Sprintf("subscription = %q AND state = SUCCEEDED", "namespaces/demo/subscriptions/"+subscription))
	return poll(ctx, fmt.Sprintf("the deliveries to %s are not recorded", subscription), func() (bool, error) {
		succeeded := 0
		for _, err := range d.client.Deliveries(ctx, "demo", filter) {
			if err != nil {
				return false, fmt.Errorf("list deliveries: %w", err)
			}
			succeeded++
		}
		if succeeded < n {
			return false, nil
		}
		d.result.Delivered += succeeded
		d.result.Verified += succeeded // the receiver accepts nothing that does not verify
		return true, nil
	})
}

// poll asks until done or ctx ends.
func poll(ctx context.Context, otherwise string, done func() (bool, error)) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", otherwise, ctx.Err())
		}
	}
}
