//go:build linux

package pluginhost

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/delivery"
)

// BenchmarkHop measures the CPU that host and plugin spend on one attempt that itself costs nothing:
// 1 KiB body, one signer in the same hop, a window of attempts at hand all the time.
func BenchmarkHop(b *testing.B) {
	for _, window := range []int{1, 64, 1024} {
		b.Run("window="+strconv.Itoa(window), func(b *testing.B) { benchmarkHop(b, window) })
	}
}

type tokenSink struct{ free chan *delivery.Job }

func (s *tokenSink) Complete(job *delivery.Job, _ delivery.Result) { s.free <- job }

func benchmarkHop(b *testing.B, window int) {
	f := start(b, nil, self("plugin-all")).ready(b)
	sub := newSub(b, 1, nil)
	sink := &tokenSink{free: make(chan *delivery.Job, window)}
	body := []byte(strings.Repeat("x", 1024))
	for i := range window {
		job := newJob(i, "order.created")
		job.Event.Payload = body
		sink.free <- job
	}
	f.attempt(b, sub, newJob(0, "x"))
	pid := f.Pids()["test/all"]
	b.ReportAllocs()
	b.ResetTimer()
	host, plugin := ownCPU(), processCPU(b, pid)
	for range b.N {
		f.Attempt(sub, <-sink.free, sink)
	}
	for range window {
		<-sink.free
	}
	b.StopTimer()
	host, plugin = ownCPU()-host, processCPU(b, pid)-plugin
	b.ReportMetric(float64(host.Nanoseconds())/1000/float64(b.N), "host-µs/op")
	b.ReportMetric(float64(plugin.Nanoseconds())/1000/float64(b.N), "plugin-µs/op")
	b.ReportMetric(float64((host+plugin).Nanoseconds())/1000/float64(b.N), "cpu-µs/op")
}

func ownCPU() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// processCPU reads what a process has used so far; the kernel counts in hundredths of a second.
func processCPU(b *testing.B, pid int) time.Duration {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}
