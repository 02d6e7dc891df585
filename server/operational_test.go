//go:build unix

package server_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// operations is a server of which acme and grapnel-system have a subscription that listens, and acme one that gets
// everything else.
type operations struct {
	*replayer
	ops, system, all *servertest.Receiver
}

func listening(sub *grapnelv1.Subscription) { sub.EventTypes = []string{"grapnel.**"} }

func startOperations(t *testing.T, o servertest.Options) *operations {
	s := servertest.Start(t, o)
	x := &operations{
		replayer: newReplayer(t, s),
		ops:      servertest.NewReceiver(t, nil), system: servertest.NewReceiver(t, nil), all: servertest.NewReceiver(t, nil),
	}
	s.Namespace("acme")
	s.Subscribe("acme", "ops", x.ops.URL, listening)
	s.Subscribe("acme", "all", x.all.URL, func(sub *grapnelv1.Subscription) { sub.EventTypes = []string{"**"} })
	return x
}

// of are the events of a type that a receiver has had.
func of(r *servertest.Receiver, eventType string) (found []servertest.Request) {
	for _, q := range r.Requests() {
		if q.Header.Get("Ce-Type") == eventType {
			found = append(found, q)
		}
	}
	return found
}

// await waits for an event of a type about a resource, and returns its data.
func await(t *testing.T, r *servertest.Receiver, eventType, subject string) map[string]any {
	t.Helper()
	var q servertest.Request
	servertest.Await(t, eventType+" about "+subject, func() bool {
		got := of(r, eventType)
		i := slices.IndexFunc(got, func(q servertest.Request) bool { return q.Header.Get("Ce-Subject") == subject })
		if i >= 0 {
			q = got[i]
		}
		return i >= 0
	})
	var data map[string]any
	if err := json.Unmarshal(q.Body, &data); err != nil {
		t.Fatalf("%s: %s: %v", eventType, q.Body, err)
	}
	documented(t, eventType, data)
	if !strings.HasPrefix(q.Header.Get("Ce-Source"), "//grapnel/namespaces/") || q.Header.Get("Content-Type") != "application/json" || q.Header.Get("Webhook-Signature") == "" || q.Header.Get("Ce-Time") == "" {
		t.Errorf("%s: headers %v", eventType, q.Header)
	}
	for _, name := range []string{"subscription", "replay_job", "resource", "secret", "plugin", "node"} {
		if data[name] != nil && data[name] != subject {
			t.Errorf("%s about %s: data %s", eventType, subject, q.Body)
		}
	}
	return data
}

// optional are the fields that some events of a type lack.
var optional = []string{"disable_time", "last_response_code", "failing_since", "reason", "version"}

// documented compares data with the example of docs/operational-events.md: the same fields, with values of the same kinds.
func documented(t *testing.T, eventType string, data map[string]any) {
	t.Helper()
	page, err := os.Open("../docs/operational-events.md")
	if err != nil {
		t.Fatal(err)
	}
	defer page.Close()
	var example strings.Builder
	here, inside := false, false
	for lines := bufio.NewScanner(page); lines.Scan(); {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "`"+eventType+"`"):
			here = true
		case line == "```json":
			inside = here
		case line == "```" && inside:
			here, inside = false, false
		case inside:
			example.WriteString(line)
		}
	}
	var want map[string]any
	if err := json.Unmarshal([]byte(example.String()), &want); err != nil {
		t.Fatalf("the example of %s, %s: %v", eventType, &example, err)
	}
	maps.DeleteFunc(want, func(name string, _ any) bool { return data[name] == nil && slices.Contains(optional, name) })
	if diff := cmp.Diff(shape(want), shape(data)); diff != "" {
		t.Errorf("%s is not as documented (-want +got):\n%s", eventType, diff)
	}
}

// shape is a value with the kinds of what is in it.
func shape(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for _, k := range slices.Sorted(maps.Keys(v)) {
			out[k] = shape(v[k])
		}
		return out
	case []any:
		if len(v) == 0 {
			return "empty"
		}
		return []any{shape(v[0])}
	case string:
		if _, err := time.Parse(time.RFC3339Nano, v); err == nil {
			return "time"
		}
	}
	return fmt.Sprintf("%T", v)
}

// Each of the types occurs in its namespace, with the data that the documentation has; who wants everything gets none.
func TestOperationalEventsOccur(t *testing.T) {
	plugins, dir := t.TempDir(), t.TempDir()
	free := freeBytes(t, dir)
	x := startOperations(t, servertest.Options{Dir: filepath.Join(dir, "data"), Adjust: func(o *server.Options) {
		o.PluginDir, o.MinFreeBytes = plugins, free/3*2
	}})
	x.Namespace("grapnel-system")
	x.Subscribe("grapnel-system", "ops", x.system.URL, listening)
	if err := os.WriteFile(filepath.Join(plugins, "broken"), []byte("#!/bin/sh\nexit 3\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	answer := atomic.Int32{}
	answer.Store(500)
	target := servertest.NewReceiver(t, func(servertest.Request) int { return int(answer.Load()) })
	x.Subscribe("acme", "orders", target.URL, func(sub *grapnelv1.Subscription) {
		sub.EventTypes = []string{"order.*"}
		once(sub)
	})
	left := servertest.NewReceiver(t, func(servertest.Request) int { return 410 })
	x.Subscribe("acme", "users", left.URL, func(sub *grapnelv1.Subscription) { sub.EventTypes = []string{"user.*"} })
	x.Publish("acme", "gone", "user.created", nil)

	const orders = "namespaces/acme/subscriptions/orders"
	for i := range 25 {
		x.Publish("acme", fmt.Sprint("o-", i), "order.created", []byte(`{"secret":"of a tenant"}`))
	}
	if got := await(t, x.ops, "grapnel.subscription.failing", orders); got["reason"] != "breaker open" || got["last_outcome"] != "RETRYABLE" || got["last_response_code"] != 500.0 {
		t.Errorf("failing: %v", got)
	}
	answer.Store(204)
	ended := await(t, x.ops, "grapnel.delivery.exhausted", orders)
	first := ended["deliveries"].([]any)[0].(map[string]any)
	servertest.Await(t, "all to end", func() bool {
		return len(x.Deliveries("acme", "subscription = orders AND (state = EXHAUSTED OR state = SUCCEEDED)")) == 25
	})
	lost := x.Deliveries("acme", "state = EXHAUSTED AND subscription = orders")
	if !slices.ContainsFunc(lost, func(d *grapnelv1.Delivery) bool { return d.GetName() == first["delivery"] }) || first["reason"] != "all 1 attempts failed" {
		t.Errorf("exhausted: %v", ended)
	}

	x.run("again", &grapnelv1.ReplayJob{Subscription: "namespaces/acme/subscriptions/orders", MaxRate: 1000})
	if got := await(t, x.ops, "grapnel.replay.done", "namespaces/acme/replayJobs/again"); got["state"] != "SUCCEEDED" || got["created_count"] != float64(len(lost)) {
		t.Errorf("replay of %d: %v", len(lost), got)
	}

	if got := await(t, x.ops, "grapnel.subscription.disabled", "namespaces/acme/subscriptions/users"); got["reason"] != "the target answered 410 Gone" {
		t.Errorf("disabled: %v", got)
	}

	if _, err := grapnelv1.NewSecretServiceClient(x.Conn).RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{
		Name: "namespaces/acme/secrets/key", Overlap: durationpb.New(time.Hour),
	}); err != nil {
		t.Fatal(err)
	}
	if got := await(t, x.ops, "grapnel.secret.expiring", "namespaces/acme/secrets/key"); got["version"] != 1.0 {
		t.Errorf("secret: %v", got)
	}

	if _, err := grapnelv1.NewNamespaceServiceClient(x.Conn).UpdateNamespace(t.Context(), &grapnelv1.UpdateNamespaceRequest{
		Namespace: &grapnelv1.Namespace{Name: "namespaces/acme", Quota: &grapnelv1.Quota{MaxSubscriptions: 6}},
	}); err != nil {
		t.Fatal(err)
	}
	x.Subscribe("acme", "fifth", x.all.URL, func(sub *grapnelv1.Subscription) { sub.EventTypes = []string{"none"} })
	if got := await(t, x.ops, "grapnel.quota.near", "namespaces/acme"); got["quota"] != "max_subscriptions" || got["used"] != 5.0 || got["limit"] != 6.0 {
		t.Errorf("quota: %v", got)
	}

	if got := await(t, x.system, "grapnel.plugin.failed", "plugins/broken"); got["crash_count"] != 5.0 || !strings.Contains(got["reason"].(string), "3") {
		t.Errorf("plugin: %v", got)
	}
	if got := await(t, x.system, "grapnel.disk.filling", "nodes/test"); got["free_bytes"].(float64) < got["min_free_bytes"].(float64) {
		t.Errorf("disk: %v", got)
	}

	await(t, x.ops, "grapnel.subscription.recovered", orders)

	for _, q := range x.all.Requests() {
		if strings.HasPrefix(q.Header.Get("Ce-Type"), "grapnel.") {
			t.Errorf("who wants everything got %s", q.Header.Get("Ce-Type"))
		}
	}
	for _, q := range x.ops.Requests() {
		if strings.Contains(string(q.Body), "tenant") {
			t.Errorf("a payload is in %s", q.Body)
		}
	}
}

// What comes of operational events themselves is not told, and however many deliveries end there are few events. What
// waits at a stop is stored by it, and a start tells nothing twice.
func TestOperationalEventsNeitherLoopNorFlood(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	x := startOperations(t, servertest.Options{Dir: dir})
	away := servertest.NewReceiver(t, func(servertest.Request) int { return 410 })
	for _, id := range []string{"gone", "gone-too"} {
		x.Subscribe("acme", id, away.URL, listening)
	}
	picky := servertest.NewReceiver(t, func(servertest.Request) int { return 422 })
	x.Subscribe("acme", "orders", picky.URL, func(sub *grapnelv1.Subscription) {
		sub.EventTypes = []string{"order.*"}
		once(sub)
	})
	const many = 1500
	publish := grapnelv1.NewPublishServiceClient(x.Conn)
	for n := range many / 500 {
		batch := &grapnelv1.BatchPublishRequest{Parent: "namespaces/acme"}
		for i := range 500 {
			batch.Events = append(batch.Events, &grapnelv1.Event{Id: fmt.Sprint("o-", n, "-", i), Type: "order.created"})
		}
		if got, err := publish.BatchPublish(t.Context(), batch); err != nil || got.GetFailedCount() != 0 {
			t.Fatal(got, err)
		}
	}
	servertest.Await(t, "all to be refused", func() bool {
		return len(x.Deliveries("acme", "subscription = orders AND state = EXHAUSTED")) == many
	})
	x.run("none", &grapnelv1.ReplayJob{Filter: "state = SKIPPED"})
	subs := grapnelv1.NewSubscriptionServiceClient(x.Conn)
	servertest.Await(t, "those who refuse to be told to be disabled", func() bool {
		disabled := 0
		for _, id := range []string{"gone", "gone-too"} {
			sub, err := subs.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: "namespaces/acme/subscriptions/" + id})
			if err == nil && sub.GetSubscription().GetState() == grapnelv1.Subscription_STATE_DISABLED {
				disabled++
			}
		}
		return disabled == 2
	})
	x.Stop()

	s := servertest.Start(t, servertest.Options{Dir: dir})
	told := func() (found map[string]int) {
		found = map[string]int{}
		for _, d := range s.Deliveries("acme", "subscription = ops AND state = SUCCEEDED") {
			found[d.GetEventType()]++
		}
		return found
	}
	servertest.Await(t, "what waited at the stop to be delivered", func() bool {
		return told()["grapnel.replay.done"] == 1 && len(s.Deliveries("acme", "state = PENDING OR state = SCHEDULED")) == 0
	})
	s.Stop() // which tells all that a start has found to tell
	s = servertest.Start(t, servertest.Options{Dir: dir})
	count := 0.0
	for _, q := range of(x.ops, "grapnel.delivery.exhausted") {
		var data struct {
			Subscription string
			Count        float64
			Deliveries   []any
		}
		if err := json.Unmarshal(q.Body, &data); err != nil || data.Subscription != "namespaces/acme/subscriptions/orders" || len(data.Deliveries) > 10 {
			t.Errorf("%s: %v", q.Body, err)
		}
		count += data.Count
	}
	got := told()
	if n := got["grapnel.delivery.exhausted"]; count != many || n > 3 {
		t.Errorf("%d events tell of %v deliveries, want %d in a few", n, count, many)
	}
	maps.DeleteFunc(got, func(eventType string, _ int) bool { return eventType == "grapnel.delivery.exhausted" })
	if diff := cmp.Diff(map[string]int{"grapnel.replay.done": 1}, got); diff != "" {
		t.Errorf("told beside that (-want +got):\n%s", diff)
	}
	if n := len(s.Deliveries("acme", "subscription = ops")); n != got["grapnel.replay.done"]+len(of(x.ops, "grapnel.delivery.exhausted")) {
		t.Errorf("%d deliveries to who listens", n)
	}
}

func freeBytes(t *testing.T, dir string) int64 {
	t.Helper()
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	return int64(fs.Bavail) * int64(fs.Bsize) //nolint:unconvert // its type differs between systems
}
