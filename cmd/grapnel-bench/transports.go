package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// Ways for a request to travel.
const (
	overHTTP1 = "HTTP/1.1"
	overHTTPS = "HTTPS, HTTP/1.1"
	overHTTP2 = "HTTPS, HTTP/2"
)

// transportRow is one way: a bare net/http loop in a process of its own, and Grapnel, each from the first request to the
// last. CPU is microseconds per request or delivery.
type transportRow struct {
	Name       string `json:"name"`
	Deliveries int    `json:"deliveries"`
	// LoopPerSecond and LoopCPU are the loop's; SinkCPU* is what the receiver took for it.
	LoopPerSecond float64 `json:"loop_per_second"`
	LoopCPU       float64 `json:"loop_cpu_us"`
	LoopSinkCPU   float64 `json:"loop_sink_cpu_us"`
	PerSecond     float64 `json:"per_second"`
	// PluginCPU is that of the processes that send, ServerCPU of the one that accepts, keeps and records.
	PluginCPU float64 `json:"plugin_cpu_us"`
	ServerCPU float64 `json:"server_cpu_us"`
	SinkCPU   float64 `json:"sink_cpu_us"`
	// Ratio is PerSecond over LoopPerSecond, the medians of all rounds.
	Ratio      float64 `json:"ratio"`
	Duplicates int64   `json:"duplicates"`

	ratios []float64
}

type transportReport struct {
	Rows []transportRow `json:"rows"`
}

func (r *transportReport) print(out io.Writer) {
	fmt.Fprintln(out, "transports       batches, fan-out 1, beside a net/http loop in a process of its own; CPU in µs")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "over\tdeliveries\tloop /s\tloop\tits sink\tgrapnel /s\tratio\tplugin\tserver\tsink\tduplicates\t")
	for _, t := range r.Rows {
		fmt.Fprintf(w, "%s\t%d\t%.0f\t%.1f\t%.1f\t%.0f\t%.2f\t%.1f\t%.1f\t%.1f\t%d\t\n", t.Name, t.Deliveries, t.LoopPerSecond, t.LoopCPU,
			t.LoopSinkCPU, t.PerSecond, t.Ratio, t.PluginCPU, t.ServerCPU, t.SinkCPU, t.Duplicates)
	}
	_ = w.Flush()
}

// transports measures each way in turn, as often as -repeat says.
func (b *bench) transports(ctx context.Context) error {
	r := &transportReport{}
	b.report.Transports = r
	for round := range b.repeat {
		for i, name := range []string{overHTTP1, overHTTPS, overHTTP2} {
			row, err := b.transport(ctx, name)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			row.ratios = []float64{row.PerSecond / row.LoopPerSecond}
			if round == 0 {
				r.Rows = append(r.Rows, row)
			} else {
				row.ratios = append(r.Rows[i].ratios, row.ratios...)
				r.Rows[i] = row
			}
			r.Rows[i].Ratio = median(r.Rows[i].ratios)
			b.progress("%s: %.0f/s, the loop %.0f/s", name, row.PerSecond, row.LoopPerSecond)
		}
	}
	return nil
}

func (b *bench) transport(ctx context.Context, name string) (transportRow, error) {
	row := transportRow{Name: name, Deliveries: b.events}
	url := b.sink.over(name, "/s/raw")
	if err := b.sink.reset(); err != nil {
		return row, err
	}
	m := beginMeasure(map[string][]int{"sink": {b.sink.cmd.Process.Pid}})
	loop, err := b.runLoop(ctx, name, url)
	if err != nil {
		return row, err
	}
	_, cpu := m.end()
	row.LoopPerSecond, row.LoopCPU = float64(b.events)/loop.Seconds, loop.CPU/float64(b.events)
	row.LoopSinkCPU = perDelivery(cpu["sink"], b.events)
	if err := b.sink.reset(); err != nil {
		return row, err
	}
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return row, err
	}
	defer p.kill()
	if err := p.prepare(ctx, namespace); err != nil {
		return row, err
	}
	if err := b.subscribeOver(ctx, p, name); err != nil {
		return row, err
	}
	m = b.measured(p)
	if err := batch(ctx, p, namespace, b.events, b.payload); err != nil {
		return row, err
	}
	if _, err := b.sink.await(ctx, int64(b.events)); err != nil {
		return row, err
	}
	if err := p.recorded(ctx, namespace); err != nil {
		return row, err
	}
	wall, cpu := m.end()
	row.PerSecond = float64(b.events) / wall.Seconds()
	row.ServerCPU, row.PluginCPU, row.SinkCPU = perDelivery(cpu["server"], b.events), perDelivery(cpu["plugin"], b.events), perDelivery(cpu["sink"], b.events)
	st, err := b.sink.stats(false)
	if err != nil {
		return row, err
	}
	row.Duplicates = st.Arrived - st.Unique
	return row, p.stop()
}

// subscribeOver makes the run's subscription, which believes in the sink's certificate.
func (b *bench) subscribeOver(ctx context.Context, p *serverProcess, name string) error {
	sub := signed(namespace, b.sink.over(name, "/s/0"), "bench.*")
	sub.MaxInFlight = int32(b.concurrency) // as many connections, and handshakes, as the loop has
	if name != overHTTP1 {
		config, err := structpb.NewStruct(map[string]any{"http2": name == overHTTP2})
		if err != nil {
			return err
		}
		_, err = grapnelv1.NewSecretServiceClient(p.conn).CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
			Parent: "namespaces/" + namespace, SecretId: "ca", Plugin: "plugins/http", Slot: "ca", Value: b.sink.certificate,
		})
		if err != nil {
			return err
		}
		sub.Transport = &grapnelv1.PluginBinding{
			Plugin: "plugins/http", Config: config, Secrets: map[string]string{"ca": "namespaces/" + namespace + "/secrets/ca"},
		}
	}
	_, err := p.subscribeTo(ctx, namespace, 1, func(int) *grapnelv1.Subscription { return sub })
	return err
}

// loopResult is what the loop's process says of itself. CPU is microseconds of all.
type loopResult struct {
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"cpu_us"`
}

// runLoop starts the loop in a process of its own.
func (b *bench) runLoop(ctx context.Context, name, url string) (loopResult, error) {
	var r loopResult
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, self, "loop", name, url, strconv.Itoa(b.events), strconv.Itoa(b.concurrency), strconv.Itoa(b.payload))
	cmd.Stdin, cmd.Stderr = bytes.NewReader([]byte(b.sink.certificate)), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("the loop: %w", err)
	}
	return r, json.Unmarshal(out, &r)
}

// runLoop is the process: a bare net/http client that posts one signed request again and again.
func runLoop(args []string) error {
	if len(args) != 5 {
		return fmt.Errorf("loop: given %d arguments, want name, URL, requests, concurrency and payload", len(args))
	}
	var sizes [3]int
	for i, text := range args[2:] {
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("loop: %w", err)
		}
		sizes[i] = n
	}
	requests, concurrency := int64(sizes[0]), sizes[1]
	certificate, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certificate)
	transport := &http.Transport{
		MaxIdleConns: concurrency, MaxIdleConnsPerHost: concurrency, DisableCompression: true,
		TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: args[0] == overHTTP2,
	}
	body := payload(sizes[2], 1, time.Time{})
	header, err := rawHeader(body)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: transport}
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	begin, before := time.Now(), cpuTime(selfPid())
	for range concurrency {
		wg.Go(func() {
			for next.Add(1) <= requests {
				if rawPost(client, args[1], header, body) != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if f := failed.Load(); f > 0 {
		return fmt.Errorf("loop: %d of %d requests failed", f, requests)
	}
	return json.NewEncoder(os.Stdout).Encode(loopResult{
		Seconds: time.Since(begin).Seconds(), CPU: float64((cpuTime(selfPid()) - before).Microseconds()),
	})
}

// over is a URL of the sink's.
func (p *sinkProcess) over(name, path string) string {
	switch name {
	case overHTTPS:
		return "https://" + p.secure + path
	case overHTTP2:
		return "https://" + p.second + path
	}
	return p.url(path)
}

// serveTLS has the sink's handler answer over TLS, in HTTP/1.1 on one listener and in HTTP/2 on another.
func serveTLS(handler http.Handler) (secure, second net.Listener, certificate []byte, err error) {
	pair, certificate, err := selfSigned(time.Now().Add(24*time.Hour), net.IPv4(127, 0, 0, 1))
	if err != nil {
		return nil, nil, nil, err
	}
	listen := func(http2 bool) (net.Listener, error) {
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		srv := &http.Server{Handler: handler, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}}, Protocols: &http.Protocols{}}
		srv.Protocols.SetHTTP1(!http2)
		srv.Protocols.SetHTTP2(http2)
		go srv.ServeTLS(lis, "", "") //nolint:errcheck // ends with the process
		return lis, nil
	}
	if secure, err = listen(false); err == nil {
		second, err = listen(true)
	}
	return secure, second, certificate, err
}

// selfSigned makes a certificate that is its own authority, and its PEM.
func selfSigned(until time.Time, ip net.IP) (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{ip},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}
