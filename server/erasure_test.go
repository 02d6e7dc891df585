package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/server/servertest"
)

// person is nowhere else, and compresses badly.
const person = "q7Zk3vXw9PbT2mLd8RfH"

// filesWithPerson are the files below a directory that hold it.
func filesWithPerson(t *testing.T, dir string) (found []string) {
	t.Helper()
	if err := filepath.WalkDir(dir, func(path string, f fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // the engine's files come and go
			return nil
		case err != nil || !f.Type().IsRegular():
			return err
		}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if bytes.Contains(text, []byte(person)) {
			found = append(found, path[len(dir):])
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// A person's data is in what was delivered and in what is open, in what receivers have answered and transformers have made, in
// dead letters and replays, before and after a restart. After an erasure no file of the server holds it.
func TestErasureLeavesNothingOfAPerson(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	echo := func(code int) string {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("x-subject", r.Header.Get("ce-subject"))
			w.WriteHeader(code)
			_, _ = w.Write(append([]byte("you sent "), body...))
		}))
		t.Cleanup(srv.Close)
		return srv.URL
	}
	s.Namespace("acme")
	s.Namespace("other")
	s.Subscribe("acme", "fine", echo(200), nil)
	s.Subscribe("acme", "letters", echo(503), nil)
	s.Subscribe("acme", "failing", echo(500), nil)
	s.Subscribe("acme", "given-up", echo(400), func(sub *grapnelv1.Subscription) {
		once(sub)
		sub.DeadLetter = "namespaces/acme/subscriptions/letters"
	})
	s.Subscribe("acme", "made", echo(500), transformedBy(t, "jq", map[string]any{"program": `{hello: .data.who}`}))
	s.Subscribe("acme", "throws", echo(200), func(sub *grapnelv1.Subscription) {
		once(sub)
		transformedBy(t, "javascript", map[string]any{"script": "function transform(e) { throw new Error('no ' + e.data.who) }"})(sub)
	})
	s.Subscribe("other", "fine", echo(200), nil)
	watching, err := grapnelv1.NewDeliveryServiceClient(s.Conn).WatchDeliveries(t.Context(), &grapnelv1.WatchDeliveriesRequest{Parent: "namespaces/acme"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watching.Recv(); err != nil {
		t.Fatal(err)
	}
	publish := func(ns, id, who string) {
		t.Helper()
		if _, err := s.Client.Publish(t.Context(), ns, client.Event{ID: id, Type: "user.changed", Subject: who, Attributes: map[string]string{"who": who},
			Data: []byte(fmt.Sprintf(`{"who":%q,"id":%q}`, who, id))}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		publish("acme", fmt.Sprint("p", i), person)
		publish("acme", fmt.Sprint("n", i), "nobody")
	}
	servertest.Await(t, "the deliveries to be tried", func() bool {
		return len(s.Deliveries("acme", "state = SUCCEEDED")) == 10 && len(s.Deliveries("acme", "state = EXHAUSTED OR state = REJECTED")) >= 20 &&
			len(s.Deliveries("acme", "state = SCHEDULED AND attempt_count > 0")) >= 15
	})
	s.Stop()
	s = servertest.Start(t, servertest.Options{Dir: s.Dir})
	publish("acme", "late", person)
	publish("other", "not-asked-for", "somebody else")
	if r := newReplayer(t, s).run("again", &grapnelv1.ReplayJob{Subscription: "namespaces/acme/subscriptions/failing", Filter: "subscription = fine", MaxRate: 1000}); r.GetCreatedCount() < 10 {
		t.Fatalf("replay: %v", r)
	}
	if held := filesWithPerson(t, s.Dir); len(held) == 0 {
		t.Fatal("no file holds it before")
	}

	job := &grapnelv1.Erasure{Condition: fmt.Sprintf("event.data.who == '%s' || event.subject == '%s'", person[:10]+"' + '"+person[10:], "x")}
	counted, err := s.Client.CountErasure(t.Context(), "acme", job)
	if err != nil || counted.GetErasedCount() != 6 || counted.GetScannedCount() != 11 || counted.GetName() != "" {
		t.Errorf("counted %v, %v", counted, err)
	}
	made, err := s.Client.CreateErasure(t.Context(), "acme", "person-1", job)
	if err != nil {
		t.Fatal(err)
	}
	ended, err := s.Client.WaitErasure(t.Context(), "acme", made.GetName(), nil)
	if err != nil || ended.GetState() != grapnelv1.Erasure_STATE_SUCCEEDED || ended.GetErasedCount() != 6 || ended.GetErasedBytes() < 6*20 ||
		ended.GetCancelledCount() < 12 || ended.GetUnreadCount() != 0 || ended.GetVerifyTime() == nil || ended.GetVerifiedBytes() == 0 || ended.GetProgress() != 1 {
		t.Fatalf("ended %v, %v", ended, err)
	}
	if held := filesWithPerson(t, s.Dir); len(held) > 0 {
		t.Errorf("held by %q", held)
	}
	if e, err := s.Client.GetEvent(t.Context(), "acme", "p1"); err != nil || !e.GetPayloadPurged() || e.GetPurgeTime() == nil || e.GetSubject() != "" || e.GetPayload() != nil {
		t.Errorf("event %v, %v", e, err)
	}
	if e, err := s.Client.GetEvent(t.Context(), "acme", "n1"); err != nil || e.GetPayloadPurged() || e.GetSubject() != "nobody" {
		t.Errorf("event %v, %v", e, err)
	}
	for _, d := range s.Deliveries("acme", "event = p1") {
		if _, err := s.Client.DeliveryService().RetryDelivery(t.Context(), &grapnelv1.RetryDeliveryRequest{Name: d.GetName(), AllowSucceeded: true}); !errors.Is(err, client.ErrPayloadPurged) ||
			status.Code(err) != codes.FailedPrecondition {
			t.Errorf("retry of %s: %v", d.GetName(), err)
		}
		if state := d.GetState(); state == grapnelv1.Delivery_STATE_SCHEDULED || state == grapnelv1.Delivery_STATE_PENDING {
			t.Errorf("%s is %s", d.GetName(), state)
		}
	}
	s.Stop()
	if held := filesWithPerson(t, s.Dir); len(held) > 0 {
		t.Errorf("after the end of the server held by %q", held)
	}
}

// What is wrong with an erasure is said before it begins.
func TestErasureThatMakesNoSense(t *testing.T) {
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	at := anHourAgo()
	for field, job := range map[string]*grapnelv1.Erasure{
		"erasure.filter":    {},
		"erasure.condition": {Condition: "event.data."},
		"erasure.end_time":  {Filter: "subject = a", StartTime: at, EndTime: at},
	} {
		_, err := s.Client.CreateErasure(t.Context(), "acme", "", job)
		var bad *client.Error
		if !errors.As(err, &bad) || len(bad.Violations) != 1 || !strings.HasPrefix(bad.Violations[0].Field, field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	if _, err := s.Client.CreateErasure(t.Context(), "acme", "", &grapnelv1.Erasure{Filter: "payload = a"}); !errors.Is(err, client.ErrInvalidFilter) {
		t.Errorf("a filter: %v", err)
	}
	if _, err := s.Client.PurgeEvent(t.Context(), "acme", "nothing"); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("purge of nothing: %v", err)
	}
	first, err := s.Client.CreateErasure(t.Context(), "acme", "one", &grapnelv1.Erasure{Filter: "subject = a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client.WaitErasure(t.Context(), "acme", first.GetName(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client.CancelErasure(t.Context(), "acme", "one"); !errors.Is(err, client.ErrInvalidState) {
		t.Errorf("cancel of one that has ended: %v", err)
	}
	if _, err := s.Client.CreateErasure(t.Context(), "acme", "one", &grapnelv1.Erasure{Filter: "subject = b"}); !errors.Is(err, client.ErrExists) {
		t.Errorf("other content: %v", err)
	}
	n := 0
	for job, err := range s.Client.Erasures(t.Context(), "acme", client.Filter("state = SUCCEEDED")) {
		if n++; err != nil || job.GetName() != first.GetName() {
			t.Errorf("%v, %v", job, err)
		}
	}
	if n != 1 {
		t.Errorf("%d erasures", n)
	}
	for job, err := range s.Client.Replays(t.Context(), "acme") {
		t.Errorf("among the replays: %v, %v", job, err)
	}
}
