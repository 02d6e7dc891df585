package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	stampSigner    = "plugins/stamp"
	stampTransport = "plugins/stamp-post"
	standard       = "plugins/standard-webhooks"
)

// verifyStamp checks what the plugin of testdata/stamp signed, and returns its version.
func verifyStamp(r *http.Request, body []byte) (string, error) {
	version, signature, _ := strings.Cut(r.Header.Get("Stamp-Signature"), ",")
	mac := hmac.New(sha256.New, []byte(benchKey))
	mac.Write([]byte(version + "." + r.Header.Get("Webhook-Id") + "."))
	mac.Write(body)
	if want := hex.EncodeToString(mac.Sum(nil)); signature != want {
		return "", fmt.Errorf("stamp-signature is %q, want %s", r.Header.Get("Stamp-Signature"), want)
	}
	return version, nil
}

// managePlugins runs grapnel plugin on a plugin directory, as an operator does.
func managePlugins(t *testing.T, bin, dir string, args ...string) {
	t.Helper()
	if out, err := plugins(bin, dir, args...); err != nil {
		t.Fatalf("grapnel plugin %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

func plugins(bin, dir string, args ...string) (string, error) {
	out, err := exec.Command(bin, append(append([]string{"plugin"}, args...), "--plugin-dir", dir)...).CombinedOutput()
	return string(out), err
}

// subscribe makes a subscription that is disabled by a second of failures and has its deliveries exhausted by the
// first one: what counts against a receiver shows.
func (p *serverProcess) subscribe(ctx context.Context, id, uri, transport string, signers ...string) error {
	parent := "namespaces/" + namespace
	sub := &grapnelv1.Subscription{
		Uri: uri, EventTypes: []string{"bench.*"}, MaxInFlight: 64,
		RetryPolicy: &grapnelv1.RetryPolicy{
			MaxAttempts: 1, Schedule: []*durationpb.Duration{durationpb.New(100 * time.Millisecond)},
		},
		FailurePolicy: &grapnelv1.FailurePolicy{DisableAfter: durationpb.New(time.Second)},
	}
	for _, s := range signers {
		sub.Signers = append(sub.Signers, &grapnelv1.PluginBinding{Plugin: s, Secrets: map[string]string{"key": parent + "/secrets/key"}})
	}
	if transport != "" {
		sub.Transport = &grapnelv1.PluginBinding{Plugin: transport}
	}
	_, err := grapnelv1.NewSubscriptionServiceClient(p.conn).CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: parent, SubscriptionId: id, Subscription: sub,
	})
	return err
}

// plugin reads the state of a plugin; nil when there is none of that name.
func (p *serverProcess) plugin(t *testing.T, name string) *grapnelv1.Plugin {
	t.Helper()
	got, err := grapnelv1.NewPluginServiceClient(p.conn).GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: name})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return got.GetPlugin()
}

// awaitPlugin waits until a plugin is as said.
func (p *serverProcess) awaitPlugin(t *testing.T, name, what string, is func(*grapnelv1.Plugin) bool) *grapnelv1.Plugin {
	t.Helper()
	var last *grapnelv1.Plugin
	await(t, time.Minute, what, func() bool {
		last = p.plugin(t, name)
		return is(last)
	})
	return last
}

// serves is a condition for awaitPlugin: one process serves, of this version, and no other is left.
func serves(version string) func(*grapnelv1.Plugin) bool {
	return func(p *grapnelv1.Plugin) bool {
		is := p.GetInstances()
		return p.GetVersion() == version && len(is) == 1 && is[0].GetVersion() == version && is[0].GetPid() != 0
	}
}

// blameless checks that nothing which happened to plugins counts against receivers: no delivery failed or was put
// aside, no subscription was disabled, and every attempt that did not succeed was one that a process's end cut off.
// It returns how many of those there were.
func (p *serverProcess) blameless(t *testing.T, deliveries int) int {
	t.Helper()
	ctx, parent := t.Context(), "namespaces/"+namespace
	subs, err := grapnelv1.NewSubscriptionServiceClient(p.conn).ListSubscriptions(ctx, &grapnelv1.ListSubscriptionsRequest{Parent: parent})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range subs.GetSubscriptions() {
		if s.GetState() != grapnelv1.Subscription_STATE_ACTIVE {
			t.Errorf("%s is %v: %s", s.GetName(), s.GetState(), s.GetStateReason())
		}
	}
	for _, d := range p.deliveries(t, `state != "SUCCEEDED"`) {
		t.Errorf("%s is %v after %d attempts: %s %v", d.GetName(), d.GetState(), d.GetAttemptCount(), d.GetStateReason(), d.GetLastAttempt())
	}
	repeated := p.deliveries(t, `attempt_count > 1`)
	interrupted := 0
	for _, d := range repeated {
		interrupted += p.interruptions(t, d)
	}
	stats, err := grapnelv1.NewAdminServiceClient(p.conn).GetStats(ctx, &grapnelv1.GetStatsRequest{
		Parent: parent, Window: durationpb.New(time.Hour),
	})
	if err != nil {
		t.Fatal(err)
	}
	total := stats.GetTotal()
	if total.GetSucceeded() != int64(deliveries) || total.GetFailed() != 0 || total.GetOpen() != 0 ||
		total.GetFailedAttempts() != int64(interrupted) || total.GetAttempts() != int64(deliveries+interrupted) {
		t.Errorf("of %d deliveries with %d attempts cut off, the statistics say: %v", deliveries, interrupted, total)
	}
	return interrupted
}

// interruptions counts the attempts of a delivery that were cut off.
func (p *serverProcess) interruptions(t *testing.T, d *grapnelv1.Delivery) int {
	t.Helper()
	client := grapnelv1.NewDeliveryServiceClient(p.conn)
	r := &grapnelv1.ListAttemptsRequest{Parent: d.GetName()}
	n := 0
	for {
		page, err := client.ListAttempts(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range page.GetAttempts() {
			switch a.GetOutcome() {
			case grapnelv1.Attempt_OUTCOME_INTERRUPTED:
				n++
			case grapnelv1.Attempt_OUTCOME_SUCCEEDED:
			default:
				t.Errorf("%s: attempt %d is %v: %s", d.GetName(), a.GetNumber(), a.GetOutcome(), a.GetError())
			}
		}
		if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
			return n
		}
	}
}

// deliveries lists all that a filter lets through.
func (p *serverProcess) deliveries(t *testing.T, filter string) []*grapnelv1.Delivery {
	t.Helper()
	client := grapnelv1.NewDeliveryServiceClient(p.conn)
	r := &grapnelv1.ListDeliveriesRequest{Parent: "namespaces/" + namespace, PageSize: 1000, Filter: filter}
	var all []*grapnelv1.Delivery
	for {
		page, err := client.ListDeliveries(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}
		all = slices.Concat(all, page.GetDeliveries())
		if r.PageToken = page.GetNextPageToken(); r.PageToken == "" {
			return all
		}
	}
}

// await waits for a condition.
func await(t *testing.T, longest time.Duration, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(longest); !is(); {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", longest, what)
		}
		pause := time.NewTimer(10 * time.Millisecond)
		<-pause.C
	}
}

// living fails the test when the server has ended.
func (p *serverProcess) living(t *testing.T) {
	t.Helper()
	select {
	case <-p.ended:
		t.Fatalf("the server ended:\n%s", p.log)
	default:
	}
}
