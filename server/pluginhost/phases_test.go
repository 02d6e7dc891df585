package pluginhost

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
)

// What a transport says of its time is taken for no longer than the attempt was, and each duration counts in the buckets whose
// bounds are not below it.
func TestPhases(t *testing.T) {
	s := newPhases()
	now := time.Now()
	p := &pending{first: now.Add(-time.Second), written: now.Add(-time.Second), job: &delivery.Job{
		ID: delivery.ID{Seq: 7}, Event: &delivery.Event{Seq: 7, AcceptTime: now.Add(-3 * time.Second)},
	}}
	s.answered(p, &wire.Result{Timings: wire.Timings{wire.Sign: 16, wire.TLS: 17, wire.FirstByte: 3e9}}, now)
	reg := prometheus.NewRegistry()
	reg.MustRegister(s)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]*dto.Histogram{}
	for _, m := range families[0].GetMetric() {
		got[m.GetLabel()[0].GetValue()] = m.GetHistogram()
	}
	for name, want := range map[string]float64{"queue": 2, "transform": -1, "sign": 16e-6, "dns": -1, "connect": -1, "tls": 17e-6, "first_byte": 1, "body": -1} {
		h := got[name]
		if want < 0 && h.GetSampleCount() != 0 || want >= 0 && (h.GetSampleCount() != 1 || h.GetSampleSum() != want) {
			t.Errorf("%s: %d, %v s in sum; want %v", name, h.GetSampleCount(), h.GetSampleSum(), want)
		}
		for _, b := range h.GetBucket() {
			if in := want >= 0 && want <= b.GetUpperBound(); (b.GetCumulativeCount() == 1) != in {
				t.Errorf("%s: %d up to %v", name, b.GetCumulativeCount(), b.GetUpperBound())
			}
		}
	}
}

// BenchmarkPhases is what the phases of an attempt cost the host.
func BenchmarkPhases(b *testing.B) {
	s := newPhases()
	now := time.Now()
	p := &pending{first: now, written: now.Add(-time.Second), job: &delivery.Job{
		ID: delivery.ID{Seq: 7}, Event: &delivery.Event{Seq: 7, AcceptTime: now.Add(-3 * time.Second)},
	}}
	r := &wire.Result{Timings: wire.Timings{wire.Sign: 16, wire.FirstByte: 300, wire.Body: 5}}
	for b.Loop() {
		s.answered(p, r, now)
	}
}
