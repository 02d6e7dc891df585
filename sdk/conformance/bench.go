package conformance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	benchDuration = 3 * time.Second
	benchWindow   = 1024
	benchBody     = 1024
	// benchRounds is how often the contestants are measured in turn; the cheapest round of each counts, since
	// whatever else the machine does only adds.
	benchRounds = 3
	// benchKept bounds the samples of latency that are kept of a row.
	benchKept = 1 << 20
)

// BenchOptions say what to measure.
type BenchOptions struct {
	// Command starts the plugin. Required.
	Command []string
	// Fixture is that of Run.
	Fixture *Fixture
	// Kind is the transport to measure; empty means the first for http, or the first there is.
	Kind string
	// Duration of each row; 0 means 3 s.
	Duration time.Duration
	// Window is how many attempts are under way at once where throughput is measured; 0 means 1024.
	Window int
	// BodyBytes is the size of each event's body; 0 means 1 KiB.
	BodyBytes int
	// ReceiverURI is a receiver on loopback that answers with 2xx, in a process whose cost does not count.
	// Empty plays one in this process, and its cost then counts as the host's.
	ReceiverURI string
	// Others do the same work in other ways, to compare: the server's own host, or the kinds' code without a
	// process around it.
	Others []Contestant
}

// ErrCannotCompare is returned by Contestant.Start for work that it cannot do: its row is left out.
var ErrCannotCompare = errors.New("it cannot do this work")

// Contestant is a way to do the work of a row.
type Contestant struct {
	// Name for the report.
	Name string
	// InProcess marks what does it without a plugin process: the others' cost is compared with it.
	InProcess bool
	// Start makes ready for it.
	Start func(context.Context, Work) (*Running, error)
}

// Work is what each attempt of a row does: sign an event, and send it to URI.
type Work struct {
	// Transport and Signer are kinds' ids; Signer is empty when the plugin has none that can be used.
	Transport, Signer string
	// TransportConfig and SignerConfig are JSON, SignerSecrets by slot.
	TransportConfig, SignerConfig []byte
	TransportSecrets              map[string][]byte
	SignerSecrets                 map[string][]byte
	URI                           string
	Body                          []byte
}

// Running does attempts.
type Running struct {
	// Attempt begins one and returns at once, or soon; done is called once, from any goroutine.
	Attempt func(done func(Sample))
	// PID of the plugin process; 0 when there is none.
	PID  int
	Stop func()
}

// Sample is one attempt as it went.
type Sample struct {
	// Overhead is the time from handing it over to having the answer, less what the plugin took for it.
	Overhead time.Duration
	// Failed says that it did not end in a 2xx response.
	Failed bool
}

// BenchRow is one measurement. Costs are microseconds of CPU per attempt.
type BenchRow struct {
	Name     string  `json:"name"`
	Window   int     `json:"window"`
	Attempts int     `json:"attempts"`
	Failed   int     `json:"failed"`
	Rate     float64 `json:"attempts_per_second"`
	// HostMicros is what this process used, PluginMicros the plugin's.
	HostMicros   float64 `json:"host_cpu_us"`
	PluginMicros float64 `json:"plugin_cpu_us"`
	// P50Micros and P99Micros are Sample.Overhead; 0 where it is not measured.
	P50Micros float64 `json:"overhead_p50_us"`
	P99Micros float64 `json:"overhead_p99_us"`
	// RSSBytes is the plugin's memory at the end.
	RSSBytes int64 `json:"plugin_rss_bytes,omitempty"`
	// AboveInProcess is host and plugin together less the same work in process; nil where that is not known.
	AboveInProcess *float64 `json:"above_in_process_us,omitempty"`

	bare bool // nothing is delivered
}

// TotalMicros is host and plugin together.
func (r *BenchRow) TotalMicros() float64 { return r.HostMicros + r.PluginMicros }

// BenchReport is what was measured.
type BenchReport struct {
	Plugin string     `json:"plugin"`
	Rows   []BenchRow `json:"rows"`
}

// Bench measures what a plugin costs: the bare hop, which is an attempt that the plugin answers without
// doing anything because it names no instance; and the whole work of signing an event and delivering it to a
// receiver on loopback. The host's side of these rows is the suite's own client, which is written with
// generated code: the server's is cheaper, and is measured as one of Others.
//
// CPU is read from the system, so that waiting does not count and other work on the machine disturbs little.
// It needs Linux.
func Bench(ctx context.Context, o BenchOptions) (*BenchReport, error) {
	if _, known := usageOf(os.Getpid()); !known {
		return nil, errors.New("this system does not tell what a process uses; bench needs Linux")
	}
	s, err := newSuite(Options{Command: o.Command, Fixture: o.Fixture})
	if err != nil {
		return nil, err
	}
	defer s.close()
	if blocked := s.prepare(ctx); blocked != "" {
		return nil, errors.New(blocked)
	}
	b := &bench{o: o, s: s, t: &trial{ctx: ctx, s: s}}
	if o.Duration <= 0 {
		b.o.Duration = benchDuration
	}
	if o.Window <= 0 {
		b.o.Window = benchWindow
	}
	if o.BodyBytes <= 0 {
		b.o.BodyBytes = benchBody
	}
	defer b.t.end()
	if err := b.run(ctx); err != nil {
		return nil, err
	}
	return &BenchReport{Plugin: s.described.GetName() + " " + s.described.GetVersion(), Rows: b.rows}, nil
}

type bench struct {
	o    BenchOptions
	s    *suite
	t    *trial
	rows []BenchRow
}

func (b *bench) run(ctx context.Context) error {
	work, err := b.work()
	if err != nil {
		return err
	}
	ses, err := b.t.session()
	if err != nil {
		return err
	}
	pump, err := ses.newPump(b.o.Window, work.Body)
	if err != nil {
		return err
	}
	hop := &Running{PID: ses.proc.pid(), Attempt: func(done func(Sample)) { pump.attempt(1<<20, nil, done) }}
	for _, row := range []struct {
		name   string
		window int
	}{{"bare hop, one at a time", 1}, {"bare hop", pump.window}} {
		if err := b.measure(ctx, row.name, row.window, hop); err != nil {
			return err
		}
		b.rows[len(b.rows)-1].bare = true
	}
	if work.URI != "" {
		delivery, err := pump.delivery(work, b.s)
		if err != nil {
			return err
		}
		if err := b.measure(ctx, "delivery, suite's client", pump.window, delivery); err != nil {
			return err
		}
	}
	return b.others(ctx, work)
}

// others measures the contestants, and what the others cost above those in process.
func (b *bench) others(ctx context.Context, work Work) error {
	var inProcess *BenchRow
	first := len(b.rows)
	for range benchRounds {
		for _, c := range b.o.Others {
			r, err := c.Start(ctx, work)
			if errors.Is(err, ErrCannotCompare) {
				continue
			}
			if err != nil {
				return fmt.Errorf("%s: %w", c.Name, err)
			}
			err = b.measure(ctx, c.Name, b.o.Window, r)
			r.Stop()
			if err != nil {
				return err
			}
			b.keepBest(first)
			if row := b.rows[first:]; c.InProcess {
				best := row[slices.IndexFunc(row, func(r BenchRow) bool { return r.Name == c.Name })]
				inProcess = &best
			}
		}
	}
	if inProcess == nil {
		return nil
	}
	base, name := inProcess.TotalMicros(), inProcess.Name
	for i := range b.rows {
		if row := &b.rows[i]; !row.bare && row.Name != name && row.Failed == 0 {
			above := row.TotalMicros() - base
			row.AboveInProcess = &above
		}
	}
	return nil
}

// keepBest merges the latest row into the one of the same name from first on, if there is one.
func (b *bench) keepBest(first int) {
	last := len(b.rows) - 1
	for i := first; i < last; i++ {
		if b.rows[i].Name != b.rows[last].Name {
			continue
		}
		if b.rows[last].Failed > 0 || b.rows[i].Failed == 0 && b.rows[last].TotalMicros() < b.rows[i].TotalMicros() {
			b.rows[i] = b.rows[last]
		}
		b.rows = b.rows[:last]
		return
	}
}

// work picks what is to be measured.
func (b *bench) work() (Work, error) {
	w := Work{Body: slices.Repeat([]byte("x"), b.o.BodyBytes)}
	var carrying *subject
	for _, u := range b.s.subjects {
		if !usableTransport(u) || b.o.Kind != "" && u.kind.GetId() != b.o.Kind {
			continue
		}
		if carrying == nil || !plainHTTP(carrying) && plainHTTP(u) {
			carrying = u
		}
	}
	if carrying == nil && b.o.Kind != "" {
		return w, fmt.Errorf("it offers no transport %q that an instance can be made of", b.o.Kind)
	}
	if carrying == nil {
		return w, errors.New("it offers no transport that an instance can be made of; bench measures transports")
	}
	w.Transport, w.TransportConfig, w.TransportSecrets, w.URI = carrying.kind.GetId(), carrying.config, carrying.secrets, carrying.fixture.URI
	if plainHTTP(carrying) && w.URI == "" {
		w.URI = b.o.ReceiverURI
	}
	if plainHTTP(carrying) && w.URI == "" {
		k, err := b.t.newSink(func(x *exchange) {
			answer200(x)
			x.sink.forgetSeen()
		})
		if err != nil {
			return w, err
		}
		w.URI = k.url + "/bench"
	}
	for _, u := range b.s.subjects {
		// The default signer of subscriptions, when there is more than one.
		if usableSigner(u) && (w.Signer == "" || u.kind.GetId() == "standard-webhooks") {
			w.Signer, w.SignerConfig, w.SignerSecrets = u.kind.GetId(), u.config, maps.Clone(u.secrets)
		}
	}
	return w, nil
}

func plainHTTP(u *subject) bool { return overHTTP(u) && u.fixture.Receiver == nil }

// measure keeps window attempts under way for the duration, after a warm-up of a quarter of it.
func (b *bench) measure(ctx context.Context, name string, window int, r *Running) error {
	var keep meter
	tokens := make(chan struct{}, window)
	for range window {
		tokens <- struct{}{}
	}
	done := func(s Sample) {
		keep.add(s)
		tokens <- struct{}{}
	}
	loop := func(d time.Duration) error {
		for until := time.Now().Add(d); time.Now().Before(until); {
			select {
			case <-tokens:
				r.Attempt(done)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		for range window {
			select {
			case <-tokens:
			case <-time.After(30 * time.Second):
				return fmt.Errorf("%s: attempts are not answered", name)
			}
		}
		for range window {
			tokens <- struct{}{}
		}
		return nil
	}
	if err := loop(b.o.Duration / 4); err != nil {
		return err
	}
	keep.reset()
	before, _ := usageOf(r.PID)
	own, began := ownCPU(), time.Now()
	if err := loop(b.o.Duration); err != nil {
		return err
	}
	took := time.Since(began)
	own = ownCPU() - own
	after, _ := usageOf(r.PID)
	row := keep.row(took)
	row.Name, row.Window, row.RSSBytes = name, window, after.rss
	row.HostMicros = micros(own) / float64(row.Attempts)
	row.PluginMicros = micros(after.cpu-before.cpu) / float64(row.Attempts)
	b.rows = append(b.rows, row)
	return nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

// meter counts samples.
type meter struct {
	mu     sync.Mutex // guards what follows
	count  int
	failed int
	times  []time.Duration
}

func (m *meter) add(s Sample) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count++
	if s.Failed {
		m.failed++
	}
	if s.Overhead > 0 && len(m.times) < benchKept {
		m.times = append(m.times, s.Overhead)
	}
}

func (m *meter) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.count, m.failed, m.times = 0, 0, m.times[:0]
}

func (m *meter) row(took time.Duration) BenchRow {
	m.mu.Lock()
	defer m.mu.Unlock()
	row := BenchRow{Attempts: max(m.count, 1), Failed: m.failed, Rate: float64(m.count) / took.Seconds()}
	if slices.Sort(m.times); len(m.times) > 0 {
		row.P50Micros, row.P99Micros = micros(m.times[len(m.times)/2]), micros(m.times[len(m.times)*99/100])
	}
	return row
}
