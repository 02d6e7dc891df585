package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	// victims get an event a second each while others attack.
	victims = 50
	// hostileTimeout is the attempt_timeout of attackers.
	hostileTimeout = 2 * time.Second
	// mostPlugins, in MiB, is what their processes take together of their own, whoever attacks and for however long.
	mostPlugins = 400
)

// hostileRow is one fault over one way: receivers of one tenant that attack, beside those of another.
type hostileRow struct {
	Fault     string `json:"fault"`
	Over      string `json:"over"`
	Receivers int    `json:"receivers"`
	// Deliveries of the attackers, with one attempt each, and how many whole requests the attackers have seen.
	Deliveries int   `json:"deliveries"`
	Seen       int64 `json:"seen"`
	// Outcomes counts the attempts by outcome and code; Wrong are those that should have had another.
	Outcomes map[string]int `json:"outcomes"`
	Wrong    int            `json:"wrong"`
	// Said is what one of the wrong ones says of itself.
	Said string `json:"said,omitempty"`
	// Longest is what one of them took, in seconds from its publish until it was recorded: its wait for a slot, and the
	// attempt.
	Longest float64 `json:"longest_seconds"`
	// Server and Plugins are the most MiB while it went on, PluginsBefore what the plugins took when it began. The plugins'
	// are their own: all of them, and the server, share the pages of one program.
	Server        float64  `json:"server_rss_mib"`
	Plugins       float64  `json:"plugins_anon_mib"`
	PluginsBefore float64  `json:"plugins_before_mib"`
	Victims       punctual `json:"victims"`
	P99Ratio      float64  `json:"p99_ratio"`
}

type hostileReport struct {
	Alone punctual     `json:"alone"`
	Rows  []hostileRow `json:"rows"`
	// After is Alone again, at the end.
	After punctual `json:"after"`
}

// hostile plays every fault over every way in turn, to one server.
func (b *bench) hostile(ctx context.Context) error {
	r := &hostileReport{}
	b.report.Hostile = r
	v, err := startVillain(ctx)
	if err != nil {
		return err
	}
	defer v.stop()
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return err
	}
	defer p.kill()
	beside := *b
	beside.healthy, beside.hangingFor = victims, b.hostileFor
	h := &hostility{bench: &beside, server: p, villain: v}
	if err := h.prepare(ctx); err != nil {
		return err
	}
	if r.Alone, err = h.alone(ctx); err != nil {
		return err
	}
	for _, f := range attacks() {
		if !h.asked(f) {
			continue
		}
		for _, over := range f.over() {
			row, err := h.play(ctx, f, over)
			if err != nil {
				return fmt.Errorf("%s over %s: %w", f.name, over, err)
			}
			row.P99Ratio = ratio(row.Victims.P99, r.Alone.P99)
			r.Rows = append(r.Rows, row)
			b.progress("%s over %s: %v, victims' p99 %.1f ms", f.name, over, row.Outcomes, row.Victims.P99)
		}
	}
	if r.After, err = h.alone(ctx); err != nil {
		return err
	}
	return errors.Join(r.verdict(), p.stop())
}

// verdict is what must not be, whatever the machine.
func (r *hostileReport) verdict() error {
	var errs []error
	for _, row := range r.Rows {
		if row.Victims.Missing > 0 {
			errs = append(errs, fmt.Errorf("%s over %s: %d of the victims' events did not arrive", row.Fault, row.Over, row.Victims.Missing))
		}
		if row.Plugins > mostPlugins {
			errs = append(errs, fmt.Errorf("%s over %s: the plugins took %.0f MiB, which is not to be more than %d", row.Fault, row.Over, row.Plugins, mostPlugins))
		}
		if row.Wrong > 0 {
			errs = append(errs, fmt.Errorf("%s over %s: %d attempts have a wrong outcome, one of them %q", row.Fault, row.Over, row.Wrong, row.Said))
		}
	}
	return errors.Join(errs...)
}

// hostility is one server with victims, and the process that attacks it.
type hostility struct {
	*bench
	server  *serverProcess
	villain *villainProcess
	steady  *probe
	// key and certificate are a large key and one of a client's with it; played counts the runs.
	key, certificate string
	played           int
}

func (h *hostility) asked(f *attack) bool {
	return h.faults == "" || slices.ContainsFunc(strings.Split(h.faults, ","), func(word string) bool { return strings.Contains(f.name, word) })
}

// prepare makes the victims and has each of them show that it is well.
func (h *hostility) prepare(ctx context.Context) (err error) {
	if err := h.server.prepare(ctx, namespace); err != nil {
		return err
	}
	_, err = h.server.subscribeTo(ctx, namespace, victims, func(i int) *grapnelv1.Subscription {
		return signed(namespace, h.sink.url(fmt.Sprintf("/s/%d", i)), fmt.Sprintf("bench.%d", i))
	})
	if err != nil {
		return err
	}
	h.steady = h.steadyProbe(h.server, 0)
	h.steady.run(ctx, victims, warmUp, soon)
	return sleep(ctx, soon)
}

// alone is the victims' punctuality while nobody attacks.
func (h *hostility) alone(ctx context.Context) (punctual, error) {
	longer := *h.bench
	longer.hangingFor = max(2*h.hostileFor, 10*time.Second)
	return longer.punctuality(ctx, h.steady)
}

func (h *hostility) play(ctx context.Context, f *attack, over string) (row hostileRow, err error) {
	receivers, events := f.receivers, f.events
	if receivers == 0 {
		receivers = 200
	}
	if events == 0 {
		events = 2
	}
	row = hostileRow{Fault: f.name, Over: over, Receivers: receivers}
	h.played++
	ns := fmt.Sprintf("hostile-%d", h.played)
	if err := h.server.prepare(ctx, ns); err != nil {
		return row, err
	}
	defer func() {
		_, e := grapnelv1.NewNamespaceServiceClient(h.server.conn).DeleteNamespace(ctx, &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/" + ns, Force: true})
		err = errors.Join(err, e)
	}()
	addresses, err := h.villain.play(f, over, receivers)
	if err != nil {
		return row, err
	}
	transport, err := h.transport(ctx, ns, f, over)
	if err != nil {
		return row, err
	}
	signer, err := h.signer(ctx, ns, f)
	if err != nil {
		return row, err
	}
	scheme := map[string]string{overHTTP1: "http://", overNATS: "nats://"}[over]
	if scheme == "" {
		scheme = "https://"
	}
	_, err = h.server.subscribeTo(ctx, ns, receivers, func(i int) *grapnelv1.Subscription {
		s := signed(ns, scheme+addresses[i]+"/x", "hang")
		s.Transport, s.MaxInFlight = transport, int32(f.inFlight)
		if signer != nil {
			s.Signers = []*grapnelv1.PluginBinding{signer}
		}
		s.AttemptTimeout, s.RetryPolicy = durationpb.New(hostileTimeout), &grapnelv1.RetryPolicy{MaxAttempts: 1}
		return s
	})
	if err != nil {
		return row, err
	}
	watched := h.watchMemory(&row)
	attacking, stop := context.WithCancel(ctx)
	defer stop()
	attacked := make(chan error, 1)
	go func() { attacked <- h.publish(attacking, ns, events) }()
	row.Victims, err = h.punctuality(ctx, h.steady)
	stop()
	err = errors.Join(err, <-attacked)
	if err == nil {
		err = h.ended(ctx, ns, f, &row)
	}
	watched()
	if err != nil {
		return row, err
	}
	row.Seen, err = h.villain.seen()
	return row, err
}

// transport is how the attackers' subscriptions are sent to.
func (h *hostility) transport(ctx context.Context, ns string, f *attack, over string) (*grapnelv1.PluginBinding, error) {
	if over != overHTTPS && over != overHTTP2 {
		return nil, nil
	}
	config, err := structpb.NewStruct(map[string]any{"http2": over == overHTTP2})
	if err != nil {
		return nil, err
	}
	binding := &grapnelv1.PluginBinding{Plugin: "plugins/http", Config: config, Secrets: map[string]string{}}
	values := map[string]string{"ca": h.villain.authorities}
	if f.key {
		if err := h.makeKey(); err != nil {
			return nil, err
		}
		values["client_certificate"] = h.certificate
	}
	for slot, value := range values {
		id := strings.ReplaceAll(slot, "_", "-")
		_, err := grapnelv1.NewSecretServiceClient(h.server.conn).CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
			Parent: "namespaces/" + ns, SecretId: id, Plugin: "plugins/http", Slot: slot, Value: value,
		})
		if err != nil {
			return nil, err
		}
		binding.Secrets[slot] = "namespaces/" + ns + "/secrets/" + id
	}
	return binding, nil
}

// makeKey makes the largest key that is taken, and a client certificate with it, in PEM.
func (h *hostility) makeKey() error {
	if h.key != "" {
		return nil
	}
	key, err := rsa.GenerateKey(rand.Reader, 4096)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "client"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	h.key = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
	h.certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})) + h.key
	return nil
}

// signer is what the attackers' subscriptions sign with; nil is what others do.
func (h *hostility) signer(ctx context.Context, ns string, f *attack) (*grapnelv1.PluginBinding, error) {
	if !f.signs {
		return nil, nil
	}
	if err := h.makeKey(); err != nil {
		return nil, err
	}
	const plugin = "plugins/http-signature"
	_, err := grapnelv1.NewSecretServiceClient(h.server.conn).CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/" + ns, SecretId: "large", Plugin: plugin, Slot: "key", Value: h.key,
	})
	return &grapnelv1.PluginBinding{Plugin: plugin, Secrets: map[string]string{"key": "namespaces/" + ns + "/secrets/large"}}, err
}

// publish publishes to the attackers until ctx ends.
func (h *hostility) publish(ctx context.Context, ns string, atOnce int) error {
	client := grapnelv1.NewPublishServiceClient(h.server.conn)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for i := int64(0); ; i++ {
		e := event(i, payload(h.payload, i, time.Time{}))
		e.Type = "hang"
		// The last one is not left half way, or it would be stored behind whoever counts.
		_, err := client.Publish(context.WithoutCancel(ctx), &grapnelv1.PublishRequest{Parent: "namespaces/" + ns, Event: e})
		if err != nil {
			return fmt.Errorf("publish to attackers: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
		if i+1 < int64(atOnce) {
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// ended waits until the attackers' deliveries have ended, and counts how.
func (h *hostility) ended(ctx context.Context, ns string, f *attack, row *hostileRow) error {
	if err := h.server.recorded(ctx, ns); err != nil {
		return err
	}
	row.Outcomes = map[string]int{}
	client := grapnelv1.NewDeliveryServiceClient(h.server.conn)
	for req := (&grapnelv1.ListDeliveriesRequest{Parent: "namespaces/" + ns, PageSize: 1000}); ; {
		page, err := client.ListDeliveries(ctx, req)
		if err != nil {
			return err
		}
		for _, d := range page.GetDeliveries() {
			last := d.GetLastAttempt()
			outcome := strings.TrimPrefix(last.GetOutcome().String(), "OUTCOME_")
			if code := last.GetResponseCode(); code != 0 {
				outcome = fmt.Sprintf("%s %d", outcome, code)
			}
			row.Outcomes[outcome]++
			row.Deliveries++
			if !slices.Contains(f.right(row.Over), outcome) {
				row.Wrong++
				row.Said = outcome + ": " + last.GetError()
			}
			row.Longest = max(row.Longest, d.GetCompleteTime().AsTime().Sub(d.GetCreateTime().AsTime()).Seconds())
		}
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return nil
		}
	}
}

// watchMemory samples the memory of the server and of its plugins until it is told to end.
func (h *hostility) watchMemory(row *hostileRow) (end func()) {
	server := h.server.cmd.Process.Pid
	plugins := func() (sum float64) {
		for _, pid := range children(server) {
			sum += statusMiB(pid, "RssAnon:")
		}
		return sum
	}
	row.PluginsBefore = plugins()
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		tick := time.NewTicker(sampleEvery)
		defer tick.Stop()
		for {
			row.Server, row.Plugins = max(row.Server, rss(server)), max(row.Plugins, plugins())
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	})
	return func() { close(stop); done.Wait() }
}

func (r *hostileReport) print(out io.Writer) {
	fmt.Fprintf(out, "hostile          receivers of one tenant that attack, two events each at once and then 1/s each, attempt_timeout %v, beside %d of another at 1/s each; alone p50 %.1f p99 %.1f ms, at the end %.1f and %.1f\n",
		hostileTimeout, victims, r.Alone.P50, r.Alone.P99, r.After.P50, r.After.P99)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "fault\tover\tattempts\tseen\toutcomes\twrong\tlongest s\tserver MiB\tplugins before, peak\tvictims' p99 ms\tto alone\tmissing")
	for _, row := range r.Rows {
		var outcomes []string
		for _, o := range slices.Sorted(maps.Keys(row.Outcomes)) {
			outcomes = append(outcomes, fmt.Sprintf("%d %s", row.Outcomes[o], o))
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%d\t%.1f\t%.0f\t%.0f, %.0f\t%.1f\t%.2f\t%d\n", row.Fault, row.Over, row.Deliveries, row.Seen, strings.Join(outcomes, ", "),
			row.Wrong, row.Longest, row.Server, row.PluginsBefore, row.Plugins, row.Victims.P99, row.P99Ratio, row.Victims.Missing)
	}
	_ = w.Flush()
}
