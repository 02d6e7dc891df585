package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// report is the whole result; its JSON form is what -json prints. Times are seconds unless named
// otherwise, memory is MiB, CPU is microseconds per delivery.
type report struct {
	CPUs       int               `json:"cpus"`
	GoVersion  string            `json:"go_version"`
	Payload    int               `json:"payload_bytes"`
	Start      *startReport      `json:"start,omitempty"`
	Throughput []throughput      `json:"throughput,omitempty"`
	Paired     []paired          `json:"paired,omitempty"`
	Latency    *latencyReport    `json:"latency,omitempty"`
	Neighbour  *neighbourReport  `json:"slow_neighbour,omitempty"`
	Backlog    *backlogReport    `json:"backlog,omitempty"`
	Fanout     *fanoutReport     `json:"fanout,omitempty"`
	Lanes      *lanesReport      `json:"lanes,omitempty"`
	Hanging    *hangingReport    `json:"hanging,omitempty"`
	Neighbours *neighboursReport `json:"neighbours,omitempty"`
	Recovery   *recoveryReport   `json:"recovery,omitempty"`
	Memory     *boundedReport    `json:"memory,omitempty"`
	Transports *transportReport  `json:"transports,omitempty"`
	Hostile    *hostileReport    `json:"hostile,omitempty"`
	Replay     *replayReport     `json:"replay,omitempty"`
	Order      *orderReport      `json:"order,omitempty"`
	Watch      *watchReport      `json:"watch,omitempty"`

	runs map[string][]throughput
}

// startReport is a cold start on an empty data directory.
type startReport struct {
	Ready         float64 `json:"ready_seconds"`
	FirstDelivery float64 `json:"first_delivery_seconds"`
	Processes     int     `json:"processes"`
	ServerRSS     float64 `json:"server_rss_mib"`
	PluginRSS     float64 `json:"plugin_rss_mib"`
}

// throughput is one run from the first publish to the last recorded delivery.
type throughput struct {
	Name           string  `json:"name"`
	Deliveries     int     `json:"deliveries"`
	Seconds        float64 `json:"seconds"`
	PublishSeconds float64 `json:"publish_seconds,omitempty"`
	PerSecond      float64 `json:"per_second"`
	// Ratio is PerSecond over the raw bound's.
	Ratio      float64 `json:"ratio"`
	Duplicates int64   `json:"duplicates"`
	ServerCPU  float64 `json:"server_cpu_us"`
	PluginCPU  float64 `json:"plugin_cpu_us"`
	SinkCPU    float64 `json:"sink_cpu_us"`
	ClientCPU  float64 `json:"client_cpu_us"`
	ServerRSS  float64 `json:"server_rss_mib,omitempty"`
}

// paired compares one kind of run with the same of another binary: medians over the pairs of ours divided by the
// other's.
type paired struct {
	Name      string  `json:"name"`
	Pairs     int     `json:"pairs"`
	PerSecond float64 `json:"per_second"`
	// CPU is that of server and plugin together.
	CPU float64 `json:"cpu"`

	perSecond, cpu []float64
}

// latencyReport is publish to arrival, in milliseconds.
type latencyReport struct {
	Rate    int     `json:"events_per_second"`
	Samples int     `json:"samples"`
	P50     float64 `json:"p50_ms"`
	P99     float64 `json:"p99_ms"`
	Max     float64 `json:"max_ms"`
}

// neighbourReport compares a healthy subscription alone and beside a hanging one.
type neighbourReport struct {
	Alone    latencyReport `json:"alone"`
	Beside   latencyReport `json:"beside"`
	P99Ratio float64       `json:"p99_ratio"`
}

// add keeps the run; of several runs of one name the one with the median ratio is reported.
func (r *report) add(t throughput) {
	if r.runs == nil {
		r.runs = map[string][]throughput{}
	}
	r.runs[t.Name] = append(r.runs[t.Name], t)
	all := slices.Clone(r.runs[t.Name])
	slices.SortFunc(all, func(a, b throughput) int {
		switch {
		case a.Ratio < b.Ratio || a.Ratio == b.Ratio && a.PerSecond < b.PerSecond:
			return -1
		default:
			return 1
		}
	})
	median := all[len(all)/2]
	if i := slices.IndexFunc(r.Throughput, func(x throughput) bool { return x.Name == t.Name }); i >= 0 {
		r.Throughput[i] = median
		return
	}
	r.Throughput = append(r.Throughput, median)
}

// pair enters a run and the other binary's that followed it.
func (r *report) pair(t, other throughput) {
	i := slices.IndexFunc(r.Paired, func(p paired) bool { return p.Name == t.Name })
	if i < 0 {
		i = len(r.Paired)
		r.Paired = append(r.Paired, paired{Name: t.Name})
	}
	p := &r.Paired[i]
	p.Pairs++
	p.perSecond = append(p.perSecond, ratio(t.PerSecond, other.PerSecond))
	p.cpu = append(p.cpu, ratio(t.ServerCPU+t.PluginCPU, other.ServerCPU+other.PluginCPU))
	p.PerSecond, p.CPU = median(p.perSecond), median(p.cpu)
}

func median(all []float64) float64 {
	sorted := slices.Sorted(slices.Values(all))
	n := len(sorted)
	return (sorted[n/2] + sorted[(n-1)/2]) / 2
}

func (r *report) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	if s := r.Start; s != nil {
		fmt.Fprintf(out, "cold start       ready %.2fs, first delivery %.2fs; idle RSS server %.0f MiB, plugin %.0f MiB; %d processes\n",
			s.Ready, s.FirstDelivery, s.ServerRSS, s.PluginRSS, s.Processes)
	}
	if len(r.Throughput) > 0 {
		fmt.Fprintf(out, "throughput       %d-byte payloads, first publish to last recorded; CPU in µs per delivery\n", r.Payload)
		fmt.Fprintln(w, "run\tdeliveries\t/s\tratio\tserver\tplugin\tsink\tpublisher\tRSS MiB\tduplicates\t")
		for _, t := range r.Throughput {
			fmt.Fprintf(w, "%s\t%d\t%.0f\t%.2f\t%.1f\t%.1f\t%.1f\t%.1f\t%.0f\t%d\t\n",
				t.Name, t.Deliveries, t.PerSecond, t.Ratio, t.ServerCPU, t.PluginCPU, t.SinkCPU, t.ClientCPU, t.ServerRSS, t.Duplicates)
		}
		_ = w.Flush()
	}
	for _, p := range r.Paired {
		fmt.Fprintf(out, "paired           %s: %.2f times the other's deliveries/s, %.2f times its CPU (median of %d pairs)\n", p.Name, p.PerSecond, p.CPU, p.Pairs)
	}
	if l := r.Latency; l != nil {
		fmt.Fprintf(out, "latency          at %d events/s: p50 %.2f ms, p99 %.2f ms, max %.2f ms (%d samples)\n", l.Rate, l.P50, l.P99, l.Max, l.Samples)
	}
	if n := r.Neighbour; n != nil {
		fmt.Fprintf(out, "slow neighbour   p99 alone %.2f ms, beside a hanging receiver %.2f ms: ratio %.2f\n", n.Alone.P99, n.Beside.P99, n.P99Ratio)
	}
	if r.Replay != nil {
		r.Replay.print(out)
	}
	if r.Backlog != nil {
		r.Backlog.print(out)
	}
	if r.Fanout != nil {
		r.Fanout.print(out)
	}
	if r.Lanes != nil {
		r.Lanes.print(out)
	}
	if r.Hanging != nil {
		r.Hanging.print(out)
	}
	if r.Neighbours != nil {
		r.Neighbours.print(out)
	}
	if r.Recovery != nil {
		r.Recovery.print(out)
	}
	if r.Memory != nil {
		r.Memory.print(out)
	}
	if r.Transports != nil {
		r.Transports.print(out)
	}
	if r.Watch != nil {
		r.Watch.print(out)
	}
	if r.Order != nil {
		r.Order.print(out)
	}
	if r.Hostile != nil {
		r.Hostile.print(out)
	}
}
