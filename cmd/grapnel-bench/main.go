// Command grapnel-bench measures Grapnel as its users would meet it: the real binary as a process of its
// own with durable defaults, a receiver as another process, and a publisher. Every throughput is printed
// beside the raw bound of the same run, a bare net/http loop against the same receiver, because absolute
// figures on shared machines mean little.
//
// Arrivals are counted at the receiver, which checks every signature; a missing delivery or a bad
// signature fails the run.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	grapnel       string
	against       string
	serverFlags   string
	json          bool
	events        int
	events10      int
	payload       int
	concurrency   int
	repeat        int
	latencyFor    time.Duration
	latencyRate   int
	backlogs      products
	fanouts       products
	hung          numbers
	ailments      string
	picture       string
	healthy       int
	together      bool
	hangingFor    time.Duration
	memoryFor     time.Duration
	hostileFor    time.Duration
	faults        string
	subscriptions int
	namespaces    int
	sweepRows     int
	replayed      int
	replayKilled  int
	replayRate    float64
	orderKeys     int
	watchers      int
	only          string
	limit         time.Duration
	mostMemory    float64
	profile       string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "sink" {
		exit(runSink(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "loop" {
		exit(runLoop(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "villain" {
		exit(runVillain())
	}
	var o options
	flag.StringVar(&o.grapnel, "grapnel", "", "grapnel `binary`; default beside this one, else built with go")
	flag.StringVar(&o.against, "against", "", "another grapnel `binary`, whose throughput is measured in turn and compared")
	flag.StringVar(&o.serverFlags, "server-flags", "", "more `flags` for grapnel server, separated by blanks")
	flag.BoolVar(&o.json, "json", false, "print one JSON object instead of the table")
	flag.IntVar(&o.events, "events", 100_000, "events of each fan-out 1 run")
	flag.IntVar(&o.events10, "events10", 20_000, "events of each fan-out 10 run")
	flag.IntVar(&o.payload, "payload", 1024, "payload `bytes`")
	flag.IntVar(&o.concurrency, "concurrency", 64, "connections of the raw loop and callers of unary Publish")
	flag.IntVar(&o.repeat, "repeat", 1, "times to repeat raw bound and throughput; medians are printed")
	flag.DurationVar(&o.latencyFor, "latency", 20*time.Second, "length of the latency run")
	flag.IntVar(&o.latencyRate, "rate", 100, "events per second of the latency run")
	o.backlogs = products{{1, 1_000_000}}
	flag.Var(&o.backlogs, "backlog", "`sizes` of the backlog runs, lanes x waiting deliveries of each, such as\n1x10000000,10x1000000,100000x10; empty leaves them out")
	o.fanouts = products{{1, 100_000}, {10, 20_000}, {1000, 300}, {10_000, 100}}
	flag.Var(&o.fanouts, "fanout", "`sizes` of the fan-out runs, subscriptions x events; the last is run again with a kill")
	o.hung = numbers{0, 1, 30, 64, 200, 1000}
	flag.Var(&o.hung, "hung", "`numbers` of hanging receivers in the hanging runs")
	flag.StringVar(&o.ailments, "neighbours", ailmentNames(), "`letters` of the neighbours runs:\n"+ailmentList())
	flag.StringVar(&o.picture, "picture", "", "`file` for the SVG of the recovery run; default is none")
	flag.BoolVar(&o.together, "together", false, "have hanging receivers in the namespace of the healthy ones")
	flag.IntVar(&o.healthy, "healthy", 1000, "receivers of the hanging runs that answer, each with an event a second")
	flag.DurationVar(&o.hangingFor, "hanging-for", 20*time.Second, "length of a hanging run, alone and beside")
	flag.DurationVar(&o.memoryFor, "memory-for", time.Minute, "how long the memory run publishes large events")
	flag.DurationVar(&o.hostileFor, "hostile-for", 5*time.Second, "length of a hostile run")
	flag.StringVar(&o.faults, "faults", "", "`words`, separated by commas, of which a fault's name in the hostile runs has one; empty plays all")
	flag.IntVar(&o.subscriptions, "subscriptions", 100_000, "subscriptions of one namespace in the lanes run; 0 leaves it out")
	flag.IntVar(&o.namespaces, "namespaces", 100_000, "namespaces with one subscription each in the lanes run; 0 leaves it out")
	flag.IntVar(&o.sweepRows, "sweep-rows", 1_000_000, "deliveries for the lanes run's sweep to erase")
	flag.IntVar(&o.orderKeys, "order-keys", 10_000, "ordering keys of the order run")
	flag.IntVar(&o.watchers, "watchers", 1000, "who watch in the watch run")
	flag.IntVar(&o.replayed, "replayed", 1_000_000, "events of the replay run")
	flag.Float64Var(&o.replayRate, "replay-rate", 5000, "deliveries a second of the replay run")
	flag.IntVar(&o.replayKilled, "replay-killed", 100_000, "events of the replay over three kills; 0 leaves it out")
	flag.DurationVar(&o.limit, "limit", 10*time.Minute, "longest time of one run of fanout, lanes, hanging, backlog and memory")
	flag.Float64Var(&o.mostMemory, "most-memory", 6144, "`MiB` of the server at which such a run is ended")
	flag.StringVar(&o.only, "only", "", "run one `part`: start, throughput, latency, neighbour, backlog, or one that takes\nlonger and is only run when named: fanout, lanes, hanging, neighbours, recovery, memory, transports,\nhostile, replay, order, watch")
	flag.StringVar(&o.profile, "profile", "", "`directory` for CPU profiles of the server during the batch runs")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, o))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "grapnel-bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run does the parts in turn; each starts from an empty data directory.
func run(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "grapnel-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.grapnel, err = findGrapnel(ctx, o.grapnel, dir); err != nil {
		return err
	}
	snk, err := startSink(ctx)
	if err != nil {
		return err
	}
	defer snk.stop()

	rep := &report{CPUs: runtime.NumCPU(), GoVersion: runtime.Version(), Payload: o.payload}
	b := &bench{options: o, dir: dir, sink: snk, report: rep}
	parts := []struct {
		name string
		run  func(context.Context) error
		// named parts are run only when they are asked for.
		named bool
	}{
		{"start", b.start, false}, {"throughput", b.throughput, false}, {"latency", b.latency, false},
		{"neighbour", b.neighbour, false}, {"backlog", b.backlog, false}, {"fanout", b.fanout, true}, {"lanes", b.lanes, true},
		{"hanging", b.hanging, true}, {"neighbours", b.neighbours, true}, {"recovery", b.recovery, true}, {"memory", b.memory, true}, {"transports", b.transports, true},
		{"replay", b.replay, true},
		{"order", b.order, true},
		{"watch", b.watch, true},
		{"hostile", b.hostile, true},
	}
	var errs error
	known := o.only == ""
	for _, p := range parts {
		if o.only == "" && p.named || o.only != "" && o.only != p.name {
			continue
		}
		known = true
		if err := p.run(ctx); err != nil {
			errs = errors.Join(errs, fmt.Errorf("%s: %w", p.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	if !known {
		return fmt.Errorf("-only %s is not a part; -help lists them", o.only)
	}
	if o.json {
		out, err := json.MarshalIndent(rep, "", "  ")
		if err != nil {
			return err
		}
		fmt.Println(string(out))
	} else {
		rep.print(os.Stdout)
	}
	return errs
}

// bench holds what the parts share.
type bench struct {
	options
	dir    string
	sink   *sinkProcess
	report *report
	runs   int
	// probes counts the series of events of the lanes runs.
	probes int
}

// dataDir names a new data directory.
func (b *bench) dataDir() string {
	b.runs++
	return filepath.Join(b.dir, fmt.Sprintf("data-%d", b.runs))
}

// serve starts a binary as startServer does, with the flags that were asked for.
func (b *bench) serve(ctx context.Context, grapnel, dir string) (*serverProcess, error) {
	return startServer(ctx, grapnel, dir, strings.Fields(b.serverFlags)...)
}

// progress tells on standard error what a long part is doing.
func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s  %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

// findGrapnel settles which binary is measured.
func findGrapnel(ctx context.Context, given, dir string) (string, error) {
	if given != "" {
		return filepath.Abs(given)
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "grapnel")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	bin := filepath.Join(dir, "grapnel")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", bin, "github.com/grapnel/grapnel/cmd/grapnel")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build grapnel (or name one with -grapnel): %w\n%s", err, out)
	}
	return bin, nil
}
