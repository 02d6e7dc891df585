package main

import (
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestJudge: the judgement of the kill loop finds each kind of fault, and none where there is none.
func TestJudge(t *testing.T) {
	var (
		made      = time.Unix(1_000_000, 0)
		sent      = made.Add(time.Minute)
		delivered = grapnelv1.Delivery_STATE_SUCCEEDED
		cancelled = grapnelv1.Delivery_STATE_CANCELLED
	)
	delivery := func(state grapnelv1.Delivery_State) *grapnelv1.Delivery {
		return &grapnelv1.Delivery{
			Name: "namespaces/bench/deliveries/d", Event: "namespaces/bench/events/e", Subscription: subName(0), State: state,
			CreateTime: timestamppb.New(sent),
		}
	}
	// arrive enters an event's arrival at a generation of sub-0.
	arrive := func(m *meddling, generation, event string, after time.Duration) {
		key := "/sub-0/" + generation + " " + event
		m.accepted[key] = sent.Add(after)
		m.ledger.seen[key] = arrival{"webhook-id", sha256.Sum256([]byte(event))}
	}
	for name, c := range map[string]struct {
		happened func(*meddling)
		says     []*grapnelv1.Delivery
		want     verdict
		wrong    string // part of the one complaint; empty for none
	}{
		"delivered":         {happened: func(m *meddling) { arrive(m, "0", "e", 0) }, says: []*grapnelv1.Delivery{delivery(delivered)}},
		"said, not arrived": {says: []*grapnelv1.Delivery{delivery(delivered)}, want: verdict{lost: 1}, wrong: "lost"},
		"forgotten":         {want: verdict{lost: 1}, wrong: "lost"},
		"open": {
			says: []*grapnelv1.Delivery{delivery(grapnelv1.Delivery_STATE_SCHEDULED)}, want: verdict{stuck: 1}, wrong: "stuck",
		},
		"cancelled by us": {
			happened: func(m *meddling) { m.cancelled["namespaces/bench/deliveries/d"] = true },
			says:     []*grapnelv1.Delivery{delivery(cancelled)},
		},
		"cancelled by nobody, though it arrived": {
			happened: func(m *meddling) { arrive(m, "0", "e", 0) },
			says:     []*grapnelv1.Delivery{delivery(cancelled)}, wrong: "cancelled by nobody",
		},
		"exhausted": {
			happened: func(m *meddling) { arrive(m, "0", "e", 0) },
			says:     []*grapnelv1.Delivery{delivery(grapnelv1.Delivery_STATE_EXHAUSTED)}, wrong: "STATE_EXHAUSTED",
		},
		"of a subscription deleted since": {
			happened: func(m *meddling) {
				m.lives[0][0].dying, m.lives[0][0].gone = sent.Add(time.Second), sent.Add(2*time.Second)
				m.lives[0] = append(m.lives[0], generation{number: 1, asked: sent.Add(3 * time.Second), born: sent.Add(4 * time.Second)})
			},
			says: []*grapnelv1.Delivery{delivery(cancelled)},
		},
		"sent after the deletion": {
			happened: func(m *meddling) {
				m.lives[0][0].dying, m.lives[0][0].gone = sent, sent
				arrive(m, "0", "e", time.Minute)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)}, wrong: "after its subscription was deleted",
		},
		"sent to a successor": {
			happened: func(m *meddling) {
				m.lives[0][0].dying, m.lives[0][0].gone = sent.Add(time.Second), sent.Add(time.Second)
				m.lives[0] = append(m.lives[0], generation{number: 1, asked: sent.Add(2 * time.Second), born: sent.Add(2 * time.Second)})
				arrive(m, "1", "e", time.Minute)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)}, wrong: "made after it was published",
		},
		"never published": {
			happened: func(m *meddling) {
				arrive(m, "0", "e", 0)
				arrive(m, "0", "x", 0)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)}, wrong: "never published",
		},
		"ended twice": {
			happened: func(m *meddling) {
				arrive(m, "0", "e", 0)
				m.cancelled["namespaces/bench/deliveries/d"] = true
				m.observe([]*grapnelv1.Delivery{delivery(delivered)}, 1)
				m.observe([]*grapnelv1.Delivery{delivery(cancelled)}, 1)
			},
			says: []*grapnelv1.Delivery{delivery(cancelled)}, want: verdict{twice: 1}, wrong: "ended twice",
		},
		"delivered, and delivered once more": {
			happened: func(m *meddling) {
				arrive(m, "0", "e", 0)
				m.observe([]*grapnelv1.Delivery{delivery(delivered)}, 1)
				again := delivery(delivered)
				again.CompleteTime = timestamppb.New(sent.Add(time.Second))
				m.observe([]*grapnelv1.Delivery{again}, 1)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)}, want: verdict{twice: 1}, wrong: "ended twice",
		},
		"opened again by nobody": {
			happened: func(m *meddling) {
				arrive(m, "0", "e", 0)
				m.observe([]*grapnelv1.Delivery{delivery(delivered)}, 1)
				m.observe([]*grapnelv1.Delivery{delivery(grapnelv1.Delivery_STATE_PENDING)}, 1)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)}, want: verdict{twice: 1}, wrong: "ended twice",
		},
		"ended again after a retry, and after a crash": {
			happened: func(m *meddling) {
				arrive(m, "0", "e", 0)
				m.observe([]*grapnelv1.Delivery{delivery(delivered)}, 1)
				m.observe([]*grapnelv1.Delivery{delivery(cancelled)}, 2)
				m.retried["namespaces/bench/deliveries/d"] = true
				m.observe([]*grapnelv1.Delivery{delivery(delivered)}, 2)
			},
			says: []*grapnelv1.Delivery{delivery(delivered)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := &meddling{
				published: newPublisherLedger(0), ledger: newReceiverLedger(t), accepted: map[string]time.Time{},
				cancelled: map[string]bool{}, retried: map[string]bool{}, ended: map[string]ending{},
			}
			m.published.bodies["e"] = sha256.Sum256([]byte("e"))
			m.published.first["e"], m.published.acked["e"] = sent, sent.Add(time.Millisecond)
			m.lives[0] = []generation{{asked: made, born: made}}
			if c.happened != nil {
				c.happened(m)
			}
			got, wrong := m.judge(c.says)
			if got != c.want {
				t.Errorf("verdict = %+v, want %+v", got, c.want)
			}
			if c.wrong == "" && len(wrong) > 0 || c.wrong != "" && (len(wrong) != 1 || !strings.Contains(wrong[0], c.wrong)) {
				t.Errorf("complaints = %q, want one with %q", wrong, c.wrong)
			}
		})
	}
}
