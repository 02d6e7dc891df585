//go:build linux

package pluginhost

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/grapnel/grapnel/plugins"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// TestMain turns the test binary into a plugin, or into a host of one, when its first argument says so.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "plugin-all":
			plugin.Main("test/all", "1.0.0", testTransport("mem"), testSigner("standard-webhooks"))
		case "plugin-transport":
			plugin.Main("test/transport", "1.0.0", testTransport("mem"))
		case "plugin-signer":
			plugin.Main("test/signer", "1.0.0", testSigner("standard-webhooks"))
		case "plugin-signer2":
			plugin.Main("test/signer2", "1.0.0", testSigner("other-signer"))
		case "plugin-scripts":
			if err := plugins.Serve("grapnel/scripts", "1.0.0"); err != nil {
				log.Fatal(err)
			}
			os.Exit(0)
		case "plugin-raw":
			serveRaw(os.Args[2])
		case "plugin-noisy":
			noise := strings.Repeat("x", 1<<20)
			fmt.Println(noise)
			fmt.Println("hello, world")
			go func() {
				for range 3 {
					_, _ = syscall.Write(1, []byte(noise+"\n"))
					_, _ = fmt.Println(noise)
				}
			}()
			plugin.Main("test/noisy", "1.0.0", testTransport("mem"), testSigner("standard-webhooks"))
		case "plugin-crash":
			if _, err := os.Stat(os.Args[2]); err != nil {
				fmt.Fprintln(os.Stderr, "cannot find", os.Args[2])
				os.Exit(3)
			}
			plugin.Main("test/crash", "1.0.0", testTransport("mem"), testSigner("standard-webhooks"))
		case "plugin-platform":
			plugin.Main("test/platform", "1.0.0", platformKinds()...)
		case "plugin-signers":
			plugin.Main("test/signers", "1.0.0", chainSigner("alpha", "x-alpha"), chainSigner("liar", "x-beta"), chainSigner("changer", "content-type"))
		case "plugin-named":
			plugin.Main(os.Args[2], "1.0.0", namedKinds(os.Args[3:])...)
		case "plugin-link":
			link := filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "link")
			_ = os.Symlink(os.Args[2], link)
			fmt.Printf("1|1|unix|%s|grpc\n", link)
			select {}
		case "plugin-short":
			plugin.Main("test/short", "1.0.0", shortTransport(), testSigner("standard-webhooks"))
		case "plugin-bomb":
			plugin.Main("test/bomb", "1.0.0", bombTransport(), testSigner("standard-webhooks"))
		case "plugin-mortal":
			plugin.Main("test/mortal", "1.0.0", mortalTransport(), testSigner("standard-webhooks"))
		case "host":
			runHostProcess()
		default:
			runMisbehaving(os.Args[1], os.Args[2:])
		}
	}
	os.Exit(m.Run())
}

type transportConfig struct {
	Status int             `json:"status" default:"200" minimum:"100" maximum:"599" doc:"Status to answer with."`
	Mode   string          `json:"mode" default:"answer" enum:"answer,echo,panic,sleep,env,block,spawn,loud,leak" doc:"What to do."`
	Delay  plugin.Duration `json:"delay" default:"0s" maximum:"1m"`
	Header string          `json:"header"`
	Token  plugin.Secret   `slot:"token" doc:"Bearer token"`
}

// testTransport answers without a network.
func testTransport(id string) plugin.Kind {
	return plugin.Transport(id, func(c transportConfig, t plugin.Target) (plugin.AttemptFunc, error) {
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
			if c.Delay > 0 {
				select {
				case <-time.After(c.Delay.Std()):
				case <-ctx.Done():
					return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeTimeout, WireState: plugin.MaybeSent}
				}
			}
			resp := &plugin.Response{Status: c.Status, Peer: "mem:1"}
			if name, value, ok := strings.Cut(c.Header, "="); ok {
				resp.Headers = []plugin.Header{{Name: name, Value: value}}
			}
			switch c.Mode {
			case "panic":
				if r.Get("ce-type") == "poison" {
					panic("poisoned")
				}
			case "echo":
				var b strings.Builder
				fmt.Fprintf(&b, "%s %s %s\n", r.Method, r.URL, r.Body)
				for _, h := range r.Headers {
					fmt.Fprintf(&b, "%s: %s\n", h.Name, h.Value)
				}
				fmt.Fprintf(&b, "traceparent: %s\nattempt: %d\n", r.Traceparent, r.AttemptNumber)
				resp.Body = []byte(b.String())
			case "env":
				resp.Body = []byte(strings.Join(os.Environ(), "\n"))
			case "block":
				<-ctx.Done()
				return nil, ctx.Err()
			case "spawn":
				resp.Body = spawnSleep()
			case "loud":
				slog.Warn("the token is "+string(c.Token.Values()[0]), "token", string(c.Token.Values()[0]))
				fmt.Fprintln(os.Stderr, "raw", string(c.Token.Values()[0]))
			case "leak":
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, Message: "with " + string(c.Token.Values()[0])}
			}
			return resp, nil
		}, nil
	}, plugin.Schemes("mem"), plugin.Doc("Answers from memory."), plugin.Emits("user-agent"), plugin.Example(map[string]any{"status": 200}))
}

func spawnSleep() []byte {
	p, err := os.StartProcess("/bin/sleep", []string{"sleep", "600"}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return []byte(err.Error())
	}
	return []byte(strconv.Itoa(p.Pid))
}

type signerConfig struct {
	Mark string        `json:"mark" default:"v1"`
	Key  plugin.Secret `slot:"key" doc:"Signing key" required:"true" kinds:"HMAC"`
}

// fingerprint is a signature that does not give its key away, in whatever encoding: the host takes that out of what it shows.
func fingerprint(key []byte) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

func testSigner(id string) plugin.Kind {
	return plugin.Signer(id, func(c signerConfig, _ plugin.Target) (plugin.SignFunc, error) {
		if strings.HasPrefix(string(c.Key.Values()[0]), "bad") {
			return nil, fmt.Errorf("the key %s is bad", c.Key.Values()[0])
		}
		return func(r *plugin.Request) error {
			r.Set("webhook-timestamp", strconv.FormatInt(r.Created.Unix(), 10))
			r.Set("webhook-signature", c.Mark+","+fingerprint(c.Key.Values()[0])+","+strconv.Itoa(len(r.Body)))
			return nil
		}, nil
	}, plugin.Emits("webhook-timestamp", "webhook-signature"), plugin.Doc("Marks."))
}

// sink counts completions and keeps results by job.
type sink struct {
	mu      sync.Mutex
	results map[*delivery.Job][]delivery.Result
	total   int
	changed *sync.Cond
}

func newSink() *sink {
	s := &sink{results: map[*delivery.Job][]delivery.Result{}}
	s.changed = sync.NewCond(&s.mu)
	return s
}

func (s *sink) Complete(job *delivery.Job, r delivery.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.results[job] = append(s.results[job], r)
	s.total++
	s.changed.Broadcast()
}

// wait blocks until n completions, and fails the test when they do not come.
func (s *sink) wait(t testing.TB, n int) {
	t.Helper()
	timer := time.AfterFunc(30*time.Second, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer timer.Stop()
	deadline := time.Now().Add(30 * time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.total < n {
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d attempts completed", s.total, n)
		}
		s.changed.Wait()
	}
}

func (s *sink) of(job *delivery.Job) delivery.Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.results[job]) == 0 {
		return delivery.Result{}
	}
	return s.results[job][len(s.results[job])-1]
}

// secrets is the store behind Options.Secrets.
type secrets struct {
	mu     sync.Mutex
	values map[string][]SecretVersion
}

func (s *secrets) set(name string, values ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.values == nil {
		s.values = map[string][]SecretVersion{}
	}
	var vs []SecretVersion
	for i, v := range values {
		vs = append(vs, SecretVersion{Number: len(values) - i, Value: []byte(v)})
	}
	s.values[name] = vs
}

func (s *secrets) get(name string) ([]SecretVersion, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, ok := s.values[name]
	return v, ok
}

const keyName = "namespaces/acme/secrets/key"

type fixture struct {
	failing  sync.Mutex
	failures []Failure

	*Host
	secrets *secrets
	stop    func()
	logs    *lockedBuffer
	metered *prometheus.Registry
}

// counted is a counter's sum over its labels.
func (f *fixture) counted(t testing.TB, name string) (sum float64) {
	t.Helper()
	families, err := f.metered.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == name {
			for _, m := range family.GetMetric() {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// self is a spec that runs this test binary as a plugin.
func self(args ...string) Spec {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Spec{Path: path, Args: args, Builtin: true}
}

// start runs a host for the length of the test.
// fail is told of failures, and hears the second one.
func (f *fixture) fail(of Failure) bool {
	f.failing.Lock()
	defer f.failing.Unlock()
	f.failures = append(f.failures, of)
	return len(f.failures) > 1
}

func (f *fixture) failed() []Failure {
	f.failing.Lock()
	defer f.failing.Unlock()
	return slices.Clone(f.failures)
}

func start(t testing.TB, tune func(*timing), specs ...Spec) *fixture {
	t.Helper()
	f := &fixture{secrets: &secrets{}, logs: &lockedBuffer{}, metered: prometheus.NewRegistry()}
	f.secrets.set(keyName, "key-one-value")
	h, err := New(Options{
		Plugins: specs, Dir: t.TempDir(), Secrets: f.secrets.get, UserAgent: "grapnel/test",
		Registerer: f.metered,
		Failed:     f.fail,
		Logger:     slog.New(slog.NewTextHandler(io.MultiWriter(f.logs, t.Output()), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	h.timing.sweep = 20 * time.Millisecond
	if tune != nil {
		tune(&h.timing)
	}
	f.Host = h
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Run(ctx)
	}()
	f.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(f.stop)
	return f
}

func (f *fixture) ready(t testing.TB) *fixture {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := f.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	return f
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not in time: %s", what)
		}
	}
}

func newSub(t testing.TB, id byte, config map[string]any) *subscription.Subscription {
	t.Helper()
	s, err := structpb.NewStruct(config)
	if err != nil {
		t.Fatal(err)
	}
	sub := subscription.Of(&grapnelv1.Subscription{
		Name: "namespaces/acme/subscriptions/s" + strconv.Itoa(int(id)), Uri: "mem://receiver/path",
		Headers:   map[string]string{"X-Static": "yes"},
		Signers:   []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": keyName}}},
		Transport: &grapnelv1.PluginBinding{Config: s},
	})
	sub.UID, sub.Revision = [16]byte{15: id}, 1
	sub.AttemptTimeout, sub.MaxInFlight = 10*time.Second, 16
	return sub
}

func newJob(n int, eventType string) *delivery.Job {
	return &delivery.Job{
		ID: delivery.ID{Seq: uint64(n + 1)}, MaxAttempts: 10,
		Event: &delivery.Event{
			ID: "ev-" + strconv.Itoa(n), Source: "/shop", Type: eventType, ContentType: "application/json",
			Payload: []byte(`{"n":` + strconv.Itoa(n) + `}`), UID: "evt" + strconv.Itoa(n), Time: time.Unix(1700000000, 0),
		},
	}
}

// attempt makes one and returns its result.
func (f *fixture) attempt(t testing.TB, sub *subscription.Subscription, job *delivery.Job) delivery.Result {
	t.Helper()
	s := newSink()
	f.Attempt(sub, job, s)
	s.wait(t, 1)
	return s.of(job)
}

func alive(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }
