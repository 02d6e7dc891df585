package webhook_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/webhook"
)

const jsonBatch = `[{"id":"evt_1","type":"order.created","timestamp":"2026-02-03T04:05:06Z","attributes":{"id":"o-1","source":"/shop","subject":"a","tenant":"x"},"data": {"n": 1}},` +
	`{"id":"evt_2","type":"order.paid","timestamp":"2026-02-03T04:05:06Z","attributes":{"id":"o-2","source":"/shop"},"datacontenttype":"text/plain","data_base64":"aGk="}]`

const cloudBatch = `[{"specversion":"1.0","id":"o-1","source":"/shop","type":"order.created","subject":"a","tenant":"x","webhookid":"evt_1","data": {"n": 1}},` +
	`{"specversion":"1.0","id":"o-2","source":"/shop","type":"order.paid","datacontenttype":"text/plain","webhookid":"evt_2","data_base64":"aGk="}]`

func lines(batch string) string {
	var elements []json.RawMessage
	_ = json.Unmarshal([]byte(batch), &elements)
	out := ""
	for _, e := range elements {
		out += string(e) + "\n"
	}
	return out
}

func TestReadBatch(t *testing.T) {
	for media, body := range map[string]string{
		"application/json; charset=utf-8": jsonBatch, "application/x-ndjson": lines(jsonBatch), "application/cloudevents-batch+json": cloudBatch,
	} {
		t.Run(media, func(t *testing.T) {
			got, err := webhook.ReadBatch(media, []byte(body))
			if err != nil {
				t.Fatal(err)
			}
			want := []webhook.Event{
				{ID: "evt_1", Type: "order.created", Source: "/shop", Subject: "a", ContentType: "application/json", Body: []byte(`{"n": 1}`),
					Attributes: map[string]string{"id": "o-1", "tenant": "x"}},
				{ID: "evt_2", Type: "order.paid", Source: "/shop", ContentType: "text/plain", Body: []byte("hi"), Attributes: map[string]string{"id": "o-2"}},
			}
			for i := range got {
				delete(got[i].Attributes, "specversion")
				delete(got[i].Attributes, "datacontenttype")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	for name, tt := range map[string][2]string{
		"another media type": {"text/html", jsonBatch},
		"no array":           {"application/json", `{"id":"evt_1"}`},
		"no events":          {"application/json", `[]`},
		"no webhook-id":      {"application/json", `[{"type":"x"}]`},
		"no webhookid":       {"application/cloudevents-batch+json", `[{"specversion":"1.0","id":"o-1","source":"/","type":"x"}]`},
		"no objects":         {"application/json", `[1]`},
		"half a line":        {"application/x-ndjson", lines(jsonBatch) + `{"id":`},
		"too many":           {"application/x-ndjson", strings.Repeat(`{"id":"evt_1"}`+"\n", 1001)},
		"no base64":          {"application/json", `[{"id":"evt_1","data_base64":"%"}]`},
		"many attributes":    {"application/json", `[{"id":"evt_1","attributes":{"a":"` + strings.Repeat("x", 65<<10) + `"}}]`},
	} {
		if got, err := webhook.ReadBatch(tt[0], []byte(tt[1])); err == nil {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// What failed, and nothing else, is named, and comes again in another company.
func TestBatchHandlerNamesWhatFailed(t *testing.T) {
	calls := map[string]int{}
	fail := map[string]any{"evt_2": errors.New("no")}
	h := webhook.BatchHandler(newVerifier(t, vectorSecret), func(_ context.Context, e webhook.Event) error {
		calls[e.ID]++
		switch why := fail[e.ID].(type) {
		case error:
			return why
		case string:
			panic(why)
		}
		return nil
	})
	send := func(id, body string) (int, []webhook.Failed) {
		r := signedRequest(t, id, body)
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var got struct{ Failed []webhook.Failed }
		if w.Code == http.StatusOK {
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Errorf("%s: %v", w.Body, err)
			}
		}
		return w.Code, got.Failed
	}
	if status, failed := send("bat_1", jsonBatch); status != http.StatusOK || len(failed) != 1 || failed[0].ID != "evt_2" {
		t.Errorf("status %d, failed %v", status, failed)
	}
	fail["evt_2"] = "a panic"
	if status, failed := send("bat_2", jsonBatch); status != http.StatusOK || len(failed) != 1 || failed[0].ID != "evt_2" {
		t.Errorf("with a panic: status %d, failed %v", status, failed)
	}
	clear(fail)
	if status, _ := send("bat_3", jsonBatch); status != http.StatusNoContent {
		t.Errorf("in the end: status %d", status)
	}
	if diff := cmp.Diff(map[string]int{"evt_1": 1, "evt_2": 3}, calls); diff != "" {
		t.Error(diff)
	}
	if status, _ := send("bat_4", `{"no": "batch"}`); status != http.StatusBadRequest {
		t.Errorf("no batch: status %d, want 400", status)
	}
	forged := signedRequest(t, "bat_5", jsonBatch)
	forged.Header.Set(webhook.HeaderSignature, vectorHMAC)
	if status := serve(h, forged); status != http.StatusUnauthorized {
		t.Errorf("forged: status %d, want 401", status)
	}
}

// An answer is one that the sender reads to its end, however much there is to say: 64 KiB.
func TestAnswersToBatchesAreRead(t *testing.T) {
	const most = 64 << 10
	for name, tt := range map[string]struct {
		n      int
		reason string
		want   string // of each reason
	}{
		"no reasons":    {1000, "", ""},
		"few long ones": {3, strings.Repeat("x", most), strings.Repeat("x", 256)},
		"many":          {1000, strings.Repeat("x", 200), ""},
		"half a letter": {1, strings.Repeat("x", 255) + "é", strings.Repeat("x", 255)},
	} {
		failed := make([]webhook.Failed, tt.n)
		for i := range failed {
			failed[i] = webhook.Failed{ID: fmt.Sprintf("evt_%024d", i), Reason: tt.reason}
		}
		w := httptest.NewRecorder()
		webhook.AnswerBatch(w, failed)
		size := w.Body.Len()
		var got struct{ Failed []webhook.Failed }
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != http.StatusOK || size > most || len(got.Failed) != tt.n {
			t.Errorf("%s: status %d, %d bytes that name %d, %v", name, w.Code, size, len(got.Failed), err)
			continue
		}
		for i, f := range got.Failed {
			if f.ID != failed[i].ID || f.Reason != tt.want {
				t.Errorf("%s: %+v", name, f)
				break
			}
		}
	}
}
