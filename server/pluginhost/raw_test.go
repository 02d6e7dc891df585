//go:build linux

package pluginhost

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// raw is a plugin written without the SDK, as one in another language would be: it takes attempts one by
// one, or lies about the batches it takes.
type raw struct {
	pluginv1.UnimplementedPluginServiceServer
	pluginv1.UnimplementedSignerServiceServer
	pluginv1.UnimplementedTransportServiceServer
	goplugin.NetRPCUnsupportedPlugin
	mode string

	mu     sync.Mutex // guards secret
	secret string     // the latest it was given
}

func serveRaw(mode string) {
	r := &raw{mode: mode}
	version := uint(plugin.ProtocolVersion)
	if mode == "future" {
		version = 99
	}
	if mode == "flood" {
		_, _ = os.Stdout.Write(append(bytes.Repeat([]byte{0, 0xff, '|', 0x1b}, 1<<18), '\n'))
	}
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: version, MagicCookieKey: plugin.MagicCookieKey, MagicCookieValue: plugin.MagicCookieValue,
		},
		Plugins: goplugin.PluginSet{plugin.PluginSet: r}, GRPCServer: goplugin.DefaultGRPCServer, Logger: hclog.NewNullLogger(),
	})
	os.Exit(0)
}

func (r *raw) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	pluginv1.RegisterPluginServiceServer(s, r)
	pluginv1.RegisterSignerServiceServer(s, r)
	pluginv1.RegisterTransportServiceServer(s, r)
	return nil
}

func (r *raw) GRPCClient(context.Context, *goplugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("not a client")
}

func (r *raw) Describe(context.Context, *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	d := &pluginv1.DescribeResponse{Name: "raw", Version: "9", Capabilities: []string{"attempt.stream", "sign.stream"}, Kinds: []*pluginv1.Kind{
		{Id: "mem", SecretSlots: []*pluginv1.SecretSlot{{Name: "token"}}, Traits: &pluginv1.Kind_Transport{Transport: &pluginv1.TransportTraits{UriSchemes: []string{"mem"}}}},
		{Id: "standard-webhooks", Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{}}},
	}}
	if strings.HasSuffix(r.mode, "unary") {
		d.Capabilities[0] = "attempt.unary"
	}
	return d, nil
}

func (r *raw) Configure(_ context.Context, req *pluginv1.ConfigureRequest) (*pluginv1.ConfigureResponse, error) {
	if r.mode == "dies-in-configure" {
		_, _ = syscall.Write(2, []byte("no such database\n"))
		os.Exit(7)
	}
	resp := &pluginv1.ConfigureResponse{}
	for _, in := range req.GetInstances() {
		r.note(in)
	}
	for _, in := range req.GetInstances() {
		resp.Statuses = append(resp.Statuses, &pluginv1.InstanceStatus{Ref: in.GetRef()})
	}
	return resp, nil
}

// note keeps an instance's secret, to quote it where it does not belong.
func (r *raw) note(in *pluginv1.Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, versions := range in.GetSecrets() {
		r.secret = string(versions.GetVersions()[0].GetValue())
	}
}

func (r *raw) quote(what string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return status.Errorf(codes.Unknown, "cannot send %s with token %s\n%s", what, r.secret, strings.Repeat("x", 5000))
}

func (r *raw) Validate(_ context.Context, req *pluginv1.ValidateRequest) (*pluginv1.ValidateResponse, error) {
	r.note(req.GetInstance())
	if r.mode == "quotes" {
		return nil, r.quote("this")
	}
	return &pluginv1.ValidateResponse{}, nil
}

func (r *raw) Remove(context.Context, *pluginv1.RemoveRequest) (*pluginv1.RemoveResponse, error) {
	return &pluginv1.RemoveResponse{}, nil
}

func (r *raw) Control(s grpc.BidiStreamingServer[pluginv1.ControlRequest, pluginv1.ControlResponse]) error {
	for {
		req, err := s.Recv()
		if err != nil {
			if r.mode == "stubborn" {
				signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
				select {}
			}
			go os.Exit(0)
			return nil
		}
		if hb := req.GetHeartbeat(); hb != nil {
			_ = s.Send(&pluginv1.ControlResponse{Frame: &pluginv1.ControlResponse_Heartbeat{Heartbeat: hb}})
		}
	}
}

func (r *raw) Sign(s grpc.BidiStreamingServer[pluginv1.SignRequest, pluginv1.SignResponse]) error {
	_, err := s.Recv()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (r *raw) AttemptOne(_ context.Context, req *pluginv1.AttemptOneRequest) (*pluginv1.AttemptOneResponse, error) {
	return &pluginv1.AttemptOneResponse{Result: r.answer(req.GetAttempt(), req.GetContent())}, nil
}

func (r *raw) answer(a *pluginv1.Attempt, c *pluginv1.Content) *pluginv1.AttemptResult {
	if strings.HasPrefix(r.mode, "headers") {
		resp := &pluginv1.Response{Status: 503}
		for range 1000 {
			resp.Headers = append(resp.Headers, &pluginv1.Header{Name: strings.Repeat("n", 500), Value: strings.Repeat("v\n", 5000)})
		}
		sent := resp.Headers
		resp.Headers = append(resp.Headers, &pluginv1.Header{Name: "retry-after", Value: "7"})
		return &pluginv1.AttemptResult{
			Seq: a.GetSeq(), TotalUs: 1, Peer: strings.Repeat("p", 10000), SentHeaders: sent[:400],
			Outcome: &pluginv1.AttemptResult_Response{Response: resp},
		}
	}
	return &pluginv1.AttemptResult{Seq: a.GetSeq(), TotalUs: 1, Outcome: &pluginv1.AttemptResult_Response{
		Response: &pluginv1.Response{Status: 400, Body: c.GetBody()},
	}}
}

// Attempt grants few credits, holds the host to them, and answers by its mode.
func (r *raw) Attempt(s grpc.BidiStreamingServer[pluginv1.AttemptRequest, pluginv1.AttemptResponse]) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	if r.mode == "flood" {
		go flood(1)
		go flood(2)
	}
	if r.mode == "no-credits" {
		<-s.Context().Done()
		return nil
	}
	const credits = 3
	err := s.Send(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Welcome{Welcome: &pluginv1.Welcome{Credits: credits}}})
	for err == nil {
		var req *pluginv1.AttemptRequest
		if req, err = s.Recv(); err != nil {
			return nil
		}
		batch := req.GetBatch()
		if len(batch.GetAttempts()) > credits {
			return errors.New("more than the credits")
		}
		if r.mode == "quotes" {
			if c := batch.GetContents()[0]; c.GetEventType() == "poison" {
				return r.quote(string(c.GetBody()))
			}
			continue
		}
		out := &pluginv1.AttemptResults{}
		for _, a := range batch.GetAttempts() {
			res := r.answer(a, batch.GetContents()[a.GetContent()])
			out.Results = append(out.Results, res)
			switch r.mode {
			case "twice":
				out.Results = append(out.Results, res)
			case "unknown":
				res.Seq += 1 << 20
			case "huge":
				res.GetResponse().Body = make([]byte, replyMax)
			case "mute":
				out.Results = nil
			}
		}
		err = s.Send(&pluginv1.AttemptResponse{Frame: &pluginv1.AttemptResponse_Results{Results: out}})
	}
	return err
}

func TestPluginWithoutTheSDK(t *testing.T) {
	for _, mode := range []string{"stream", "unary"} {
		t.Run(mode, func(t *testing.T) {
			f := start(t, nil, self("plugin-raw", mode), self("plugin-signer2")).ready(t)
			sub := newSub(t, 1, nil)
			sub.Proto().Signers[0].Plugin = "plugins/other-signer"
			s := newSink()
			jobs := load(f, sub, s, 100)
			s.wait(t, 100)
			for _, job := range jobs {
				if r := s.of(job); r.ResponseCode != 400 || string(r.ResponseBody) != string(job.Event.Payload) {
					t.Fatalf("%+v", r)
				}
			}
			pids := f.Pids()
			f.stop()
			if alive(pids["raw"]) {
				t.Error("the process is still there")
			}
		})
	}
}

// TestAnswersShowNoSecret: a receiver that says back what a transport has shown it does not put it into the records.
func TestAnswersShowNoSecret(t *testing.T) {
	for _, mode := range []string{"stream", "unary"} {
		t.Run(mode, func(t *testing.T) {
			f := start(t, nil, self("plugin-raw", mode), self("plugin-signer2")).ready(t)
			sub := newSub(t, 1, nil)
			sub.Proto().Signers[0].Plugin = "plugins/other-signer"
			job := newJob(0, "x")
			job.Event.Payload = []byte("\xff you sent key-one-value, did you? key-one-v")
			if got := f.attempt(t, sub, job); string(got.ResponseBody) != "\xff you sent [redacted], did you? [redacted]" {
				t.Errorf("%q", got.ResponseBody)
			}
		})
	}
}

// TestNobodySeesWhatIsAnothers: a plugin in another language whose handler raises puts the exception's text into the call's
// status, and that text quotes a payload and a secret of one tenant.
func TestNobodySeesWhatIsAnothers(t *testing.T) {
	f := start(t, nil, self("plugin-raw", "quotes"), self("plugin-signer2")).ready(t)
	f.secrets.set("namespaces/acme/secrets/token", "tok-canary-12345")
	mine, theirs := newSub(t, 1, nil), newSub(t, 2, nil)
	theirs.Proto().Name, theirs.Namespace = "namespaces/other/subscriptions/s2", "other"
	for _, sub := range []*subscription.Subscription{mine, theirs} {
		sub.Proto().Signers[0].Plugin = "plugins/other-signer"
	}
	mine.Proto().Transport.Secrets = map[string]string{"token": "namespaces/acme/secrets/token"}
	_, err := f.Check(t.Context(), mine.Proto())
	if err == nil || !strings.Contains(err.Error(), "with token [redacted]") || len(err.Error()) > 1000 {
		t.Errorf("check: %v", err)
	}
	s := newSink()
	innocent, guilty := newJob(0, "slow"), newJob(1, "poison")
	f.Attempt(theirs, innocent, s)
	eventually(t, "it is under way", func() bool {
		p, _ := f.Plugin("mem")
		return p.GetInstances()[0].GetInFlight() == 1
	})
	f.Attempt(mine, guilty, s)
	s.wait(t, 2)
	for _, job := range []*delivery.Job{innocent, guilty} {
		if got := s.of(job).Error; got != "plugin lost: raw: its attempt stream broke off" {
			t.Errorf("told %q", got)
		}
	}
	eventually(t, "operators are told more", func() bool { return strings.Contains(f.logs.String(), "with token [redacted]") })
	eventually(t, "the last error is the host's", func() bool {
		p, _ := f.Plugin("mem")
		return p.GetInstances()[0].GetLastError() == "its attempt stream broke off"
	})
	if strings.Contains(f.logs.String(), "canary") {
		t.Error("the log shows the secret")
	}
}

// TestHeadersAreBounded: of what a receiver answers only so much is stored, whatever its size.
func TestHeadersAreBounded(t *testing.T) {
	for _, mode := range []string{"headers", "headers-unary"} {
		f := start(t, nil, self("plugin-raw", mode), self("plugin-signer2")).ready(t)
		sub := newSub(t, 1, nil)
		sub.Proto().Signers[0].Plugin = "plugins/other-signer"
		got := f.attempt(t, sub, newJob(0, "x"))
		size := 0
		for _, h := range append(got.ResponseHeaders, got.RequestHeaders...) {
			size += len(h.Name) + len(h.Value)
		}
		if got.RetryAfter != 7*time.Second || len(got.ResponseHeaders) == 0 || size > 2*maxHeaderBytes || len(got.Peer) > 512 {
			t.Errorf("%s: %d headers of %d bytes, retry after %v", mode, len(got.ResponseHeaders), size, got.RetryAfter)
		}
	}
}

func TestLyingPluginIsRestarted(t *testing.T) {
	for _, mode := range []string{"twice", "unknown"} {
		t.Run(mode, func(t *testing.T) {
			f := start(t, nil, self("plugin-raw", mode), self("plugin-signer2")).ready(t)
			sub := newSub(t, 1, nil)
			sub.Proto().Signers[0].Plugin = "plugins/other-signer"
			s := newSink()
			job := newJob(0, "x")
			f.Attempt(sub, job, s)
			s.wait(t, 1)
			if r := s.of(job); mode == "unknown" && !r.Indeterminate {
				t.Errorf("got %+v", r)
			}
			eventually(t, "it is restarted, with the reason", func() bool {
				p, ok := f.Plugin("mem")
				in := p.GetInstances()[0]
				return ok && in.GetRestartCount() > 0
			})
			if got := len(s.results[job]); got != 1 {
				t.Errorf("completed %d times", got)
			}
		})
	}
}

func TestOtherProtocolVersionIsAStatus(t *testing.T) {
	f := start(t, nil, self("plugin-raw", "future"))
	eventually(t, "the version is refused", func() bool {
		return strings.Contains(f.Plugins()[0].GetInstances()[0].GetLastError(), "99")
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"0": 0, "120": 2 * time.Minute, " 7 ": 7 * time.Second, "-5": 0, "1.5": 1500 * time.Millisecond, "soon": 0, "": 0,
		"999999999999": 24 * time.Hour, "9223372036854775807": 24 * time.Hour, "99999999999999999999999": 24 * time.Hour, ".": 0, "1.2.3": 0, "1e3": 0,
		now.Add(time.Hour).Format("Mon, 02 Jan 2006 15:04:05 GMT"):        time.Hour,
		now.Add(-time.Hour).Format("Mon, 02 Jan 2006 15:04:05 GMT"):       0,
		now.Add(1000 * time.Hour).Format("Mon, 02 Jan 2006 15:04:05 GMT"): 24 * time.Hour,
	} {
		if got := retryAfter([]delivery.Header{{Name: "x"}, {Name: "retry-after", Value: value}}, now); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}

func TestLatencyBuckets(t *testing.T) {
	for us := range uint64(100_000) {
		b := latencyBucket(us)
		if bound := latencyBound(b); us >= bound || (b > 0 && us < latencyBound(b-1)) {
			t.Fatalf("%d is in bucket %s, which ends at %d", us, strconv.Itoa(b), bound)
		}
	}
	var l latency
	at := time.Unix(1000, 0)
	for i := range 1000 {
		l.observe(time.Duration(i)*time.Microsecond, at)
	}
	if got := l.quantile(0.99, at); got < 990*time.Microsecond || got > 1100*time.Microsecond {
		t.Errorf("p99 %v", got)
	}
	if got := l.quantile(0.99, at.Add(time.Hour)); got != 0 {
		t.Errorf("an hour later: %v", got)
	}
}
