package main

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func selfPid() int { return os.Getpid() }

// measure is CPU time of some processes over a stretch of wall time.
type measure struct {
	pids  map[string][]int // of each name, together
	cpu   map[string]time.Duration
	begin time.Time
}

func beginMeasure(pids map[string][]int) *measure {
	m := &measure{pids: pids, cpu: map[string]time.Duration{}}
	for name, of := range pids {
		m.cpu[name] = cpuTimes(of)
	}
	m.begin = time.Now()
	return m
}

func (m *measure) end() (time.Duration, map[string]time.Duration) {
	wall := time.Since(m.begin)
	used := map[string]time.Duration{}
	for name, of := range m.pids {
		used[name] = cpuTimes(of) - m.cpu[name]
	}
	return wall, used
}

// perDelivery is CPU in microseconds.
func perDelivery(cpu time.Duration, n int) float64 {
	if n == 0 {
		return 0
	}
	return float64(cpu.Microseconds()) / float64(n)
}

func cpuTimes(pids []int) (sum time.Duration) {
	for _, pid := range pids {
		sum += cpuTime(pid)
	}
	return sum
}

// cpuTime reads user and system time of a process out of /proc; 0 where there is no /proc.
func cpuTime(pid int) time.Duration {
	fields := procStat(pid)
	if len(fields) < 13 {
		return 0
	}
	utime, _ := strconv.ParseInt(fields[11], 10, 64)
	stime, _ := strconv.ParseInt(fields[12], 10, 64)
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every Linux that Go runs on
	return time.Duration(utime+stime) * tick
}

// procStat returns the fields of /proc/PID/stat after the command: state, ppid, …
func procStat(pid int) []string {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return nil
	}
	_, after, ok := strings.Cut(string(raw), ") ")
	if !ok {
		return nil
	}
	return strings.Fields(after)
}

// children lists the direct children of a process.
func children(pid int) []int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var out []int
	for _, d := range dirs {
		child, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			continue
		}
		if f := procStat(child); len(f) > 1 && f[1] == strconv.Itoa(pid) {
			out = append(out, child)
		}
	}
	slices.Sort(out)
	return out
}

// rss is the resident set of a process in MiB.
func rss(pid int) float64 { return statusMiB(pid, "VmRSS:") }

// statusMiB reads a size out of /proc/PID/status in MiB; 0 where there is none.
func statusMiB(pid int, name string) float64 {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			kb, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kb / 1024
		}
	}
	return 0
}

// quantile of sorted values, in the unit of the values.
func quantile(sorted []int64, q float64) int64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}
