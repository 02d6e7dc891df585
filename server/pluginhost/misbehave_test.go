//go:build linux

package pluginhost

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/subscription"
)

// runMisbehaving is the test binary as a plugin of a given version, or as one that misbehaves.
func runMisbehaving(mode string, args []string) {
	kinds := []plugin.Kind{recorder("mem"), testSigner("standard-webhooks")}
	switch mode {
	case "plugin-version":
		for _, id := range args[1:] {
			kinds = append(kinds, testSigner(id))
		}
		plugin.Main("test/all", args[0], kinds...)
	case "plugin-only-signer":
		plugin.Main("test/all", args[0], testSigner("standard-webhooks"))
	case "plugin-recorder":
		plugin.Main("test/recorder", args[0], recorder("mem"))
	case "plugin-slots":
		plugin.Main("test/slots", "1", plugin.Signer("formatted", func(signerConfig, plugin.Target) (plugin.SignFunc, error) {
			return func(*plugin.Request) error { return nil }, nil
		}, plugin.Emits("X-Formatted"), plugin.Format("key", plugin.SecretFormat{Doc: "thirteen letters", Algorithms: []string{"rot13", "rot26"}})))
	case "stalled-host":
		runStalledHost()
	case "plugin-silent":
		waitInVain()
	case "plugin-ends":
		fmt.Fprintln(os.Stderr, "nothing to do")
		os.Exit(4)
	case "plugin-runs-over":
		fmt.Print("a banner|1|unix|\n", strings.Repeat("1|1|", 10_000), "\n", "and then ")
		plugin.Main("test/over", "1.0.0", kinds...)
	default:
		return // a flag of the test binary
	}
}

func waitInVain() { <-make(chan struct{}) }

// flood writes binary junk for ever, in lines of up to a mebibyte.
func flood(fd int) {
	junk := bytes.Repeat([]byte{0, 0xff, 'x', '|', '\r'}, 1<<18)
	for {
		_, _ = syscall.Write(fd, junk)
		_, _ = syscall.Write(fd, []byte("\n1|1|unix|/etc/passwd|grpc|\n"))
	}
}

type recorderConfig struct {
	Record string          `json:"record" doc:"File that takes a line for each attempt."`
	Delay  plugin.Duration `json:"delay" default:"0s" maximum:"1m"`
	Mode   string          `json:"mode" default:"answer" enum:"answer,hang,hog,setsid,escape,status,files"`
}

// recorder is a transport whose receiver is a file, the oracle of what was really sent.
func recorder(id string) plugin.Kind {
	return plugin.Transport(id, func(c recorderConfig, _ plugin.Target) (plugin.AttemptFunc, error) {
		var record *os.File
		if c.Record != "" {
			var err error
			if record, err = os.OpenFile(c.Record, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err != nil {
				return nil, err
			}
		}
		return func(_ context.Context, r *plugin.Request) (*plugin.Response, error) {
			if record != nil {
				_, _ = record.WriteString(r.MessageID + "\n")
			}
			time.Sleep(c.Delay.Std())
			switch c.Mode {
			case "hang":
				waitInVain()
			case "hog":
				return &plugin.Response{Status: 500, Body: []byte{hog()}}, nil
			case "setsid":
				return &plugin.Response{Status: 500, Body: daemon(os.Environ())}, nil
			case "escape":
				return &plugin.Response{Status: 500, Body: daemon(nil)}, nil
			case "status":
				b, _ := os.ReadFile("/proc/self/status")
				return &plugin.Response{Status: 500, Body: b}, nil
			case "files":
				b, _ := os.ReadFile("/proc/self/limits")
				return &plugin.Response{Status: 500, Body: b}, nil
			}
			return &plugin.Response{Status: 200}, nil
		}, nil
	}, plugin.Schemes("mem"))
}

// hog takes memory without end.
func hog() (sum byte) {
	var all [][]byte
	for {
		b := make([]byte, 16<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = byte(i)
		}
		all = append(all, b)
		sum += all[len(all)/2][0]
	}
}

// daemon starts a process in a session of its own that holds on to the plugin's output.
func daemon(env []string) []byte {
	cmd := exec.Command("/bin/sleep", "600")
	cmd.Env = append(env, "X=") // an empty one would mean the plugin's own
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return []byte(err.Error())
	}
	return []byte(strconv.Itoa(cmd.Process.Pid))
}

// lastError is what the status says of the first plugin.
func (f *fixture) lastError() string { return f.Plugins()[0].GetInstances()[0].GetLastError() }

func TestWhatKeepsAPluginFromServingIsAStatus(t *testing.T) {
	missing := Spec{Path: filepath.Join(t.TempDir(), "missing")}
	text := Spec{Path: filepath.Join(t.TempDir(), "text")}
	if err := os.WriteFile(text.Path, []byte("\x7fELF of another machine"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		spec Spec
		want []string
	}{
		"there is no such file":        {missing, []string{"no such file", missing.Path}},
		"it is no program":             {text, []string{"exec format error", text.Path}},
		"it ends at once":              {self("plugin-ends"), []string{"ended before its handshake: exit status 4", "nothing to do"}},
		"it never says anything":       {self("plugin-silent"), []string{"no handshake line", "pluginhost.waitInVain"}},
		"it speaks another protocol":   {self("plugin-raw", "future"), []string{"speaks version 99", "this server speaks version 1"}},
		"it dies when it is set up":    {self("plugin-raw", "dies-in-configure"), []string{"configure", "exit status 7", "no such database"}},
		"it grants no credits":         {self("plugin-raw", "no-credits"), []string{"grants no credits"}},
		"its limits cannot be kept":    {Spec{Path: self().Path, Limits: Limits{Processes: 5}}, []string{"needs a user"}},
		"its user does not exist":      {Spec{Path: self().Path, User: "nobody-of-that-name"}, []string{`no user "nobody-of-that-name"`}},
		"its group does not exist":     {Spec{Path: self().Path, User: "0:no-such-group"}, []string{`no group "no-such-group"`}},
		"its user's number is too big": {Spec{Path: self().Path, User: "4294967296"}, []string{"no number of a user"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := start(t, func(tm *timing) { tm.start, tm.call = 2*time.Second, 2*time.Second }, tt.spec)
			eventually(t, "it has failed to start", func() bool { return f.lastError() != "" })
			in := f.Plugins()[0].GetInstances()[0]
			got := in.GetLastError() + "\n" + strings.Join(in.GetLastOutput(), "\n")
			for _, want := range tt.want {
				if !strings.Contains(got, want) {
					t.Errorf("last error and output lack %q:\n%s", want, got)
				}
			}
			if got := f.attempt(t, newSub(t, 1, nil), newJob(0, "x")); got.Cause != delivery.CauseUnspent {
				t.Errorf("an attempt meanwhile: %+v", got)
			}
			if len(f.Pids()) != 0 {
				t.Error("it takes attempts")
			}
		})
	}
}

// TestHandshakeAfterOtherOutput has what libraries print when they are loaded, with and without an end of line.
func TestHandshakeAfterOtherOutput(t *testing.T) {
	f := start(t, nil, self("plugin-runs-over"))
	f.unary(t)
	eventually(t, "the rest of the line is not lost", func() bool {
		return strings.Contains(f.logs.String(), `line="and then "`) && strings.Contains(f.logs.String(), "a banner")
	})
}

// TestFloodOfOutput has a plugin write binary junk in lines of a mebibyte to both its streams, before its handshake and
// without end after it.
func TestFloodOfOutput(t *testing.T) {
	f := start(t, nil, self("plugin-raw", "flood"), self("plugin-signer2")).ready(t)
	s := newSink()
	sub := newSub(t, 1, nil)
	sub.Proto().Signers[0].Plugin = "plugins/other-signer"
	for i := range 20 {
		load(f, sub, s, 50)
		s.wait(t, (i+1)*50)
	}
	if p, _ := f.Plugin("mem"); p.GetInstances()[0].GetRestartCount() != 0 {
		t.Errorf("it was restarted: %s", f.lastError())
	}
	if strings.ContainsAny(f.logs.String(), "\x00\x1b") {
		t.Error("the log has control characters")
	}
	if n := strings.Count(f.logs.String(), "plugin wrote"); n == 0 || n > 200 {
		t.Errorf("%d of its lines are in the log", n)
	}
}

func TestRepliesThatCannotBeTaken(t *testing.T) {
	f := start(t, nil, self("plugin-raw", "huge"), self("plugin-signer2")).ready(t)
	sub := newSub(t, 1, nil)
	sub.Proto().Signers[0].Plugin = "plugins/other-signer"
	if got := f.attempt(t, sub, newJob(0, "x")); !got.Indeterminate || !strings.Contains(got.Error, "larger than 16 MiB") {
		t.Errorf("got %+v", got)
	}
	eventually(t, "the fault is counted", func() bool { return f.counted(t, "grapnel_plugin_protocol_faults_total") > 0 })
}

func TestResultsThatNeverCome(t *testing.T) {
	f := start(t, func(tm *timing) { tm.grace = 200 * time.Millisecond }, self("plugin-raw", "mute"), self("plugin-signer2")).ready(t)
	sub := newSub(t, 1, nil)
	sub.AttemptTimeout = 100 * time.Millisecond
	sub.Proto().Signers[0].Plugin = "plugins/other-signer"
	s := newSink()
	jobs := load(f, sub, s, 10)
	s.wait(t, 10)
	hung := 0 // those that were written: three at a time, as many as it grants
	for _, job := range jobs {
		if r := s.of(job); r.Indeterminate && strings.Contains(r.Error, "hangs") {
			hung++
		}
	}
	if hung == 0 {
		t.Errorf("the first is %+v, and none is told of a plugin that hangs", s.of(jobs[0]))
	}
	if f.counted(t, "grapnel_plugin_hangs_total") == 0 {
		t.Error("no hang was counted")
	}
}

// TestHungPluginSaysWhere relies on what an operator needs: the stack of the code that hangs.
func TestHungPluginSaysWhere(t *testing.T) {
	f := start(t, func(tm *timing) { tm.grace = 200 * time.Millisecond }, self("plugin-version", "1.0.0")).ready(t)
	sub := newSub(t, 1, map[string]any{"mode": "hang"})
	sub.AttemptTimeout = 100 * time.Millisecond
	if got := f.attempt(t, sub, newJob(0, "x")); !got.Indeterminate || !strings.Contains(got.Error, "without an answer") {
		t.Errorf("got %+v", got)
	}
	eventually(t, "it is noted", func() bool {
		p, _ := f.Plugin("mem")
		return len(p.GetInstances()[0].GetLastOutput()) > 0
	})
	p, _ := f.Plugin("mem")
	in := p.GetInstances()[0]
	if last := strings.Join(in.GetLastOutput(), "\n"); !strings.Contains(last, "pluginhost.waitInVain") || len(in.GetLastOutput()) > 20 {
		t.Errorf("last output:\n%s", last)
	}
	if in.GetLastCrashTime() == nil {
		t.Error("no time of the crash")
	}
}

func TestStubbornPluginIsKilled(t *testing.T) {
	f := start(t, func(tm *timing) { tm.term = 100 * time.Millisecond }, self("plugin-raw", "stubborn"), self("plugin-signer2")).ready(t)
	pid := f.Pids()["raw"]
	f.stop()
	if alive(pid) {
		t.Error("it lives")
	}
}

// TestCloseIsBounded: a stop takes what it is given, whatever is in flight and whatever plugins make of it.
func TestCloseIsBounded(t *testing.T) {
	for name, spec := range map[string]Spec{"attempts that go on": self("plugin-all"), "it does not end": self("plugin-raw", "stubborn")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := start(t, nil, spec, self("plugin-signer2")).ready(t)
			sub := newSub(t, 1, map[string]any{"delay": "50s"})
			sub.AttemptTimeout = time.Minute
			sub.Proto().Signers[0].Plugin = "plugins/other-signer"
			s := newSink()
			pids := f.Pids()
			if name == "attempts that go on" {
				f.Attempt(sub, newJob(0, "x"), s)
				eventually(t, "it is under way", func() bool {
					p, _ := f.Plugin("mem")
					return p.GetInstances()[0].GetInFlight() == 1
				})
			}
			ctx, cancel := context.WithCancel(t.Context()) // as the end of a grace, which is not foreseen
			ended := make(chan error, 1)
			go func() { ended <- f.Close(ctx) }()
			cancel()
			select {
			case err := <-ended:
				if !errors.Is(err, context.Canceled) {
					t.Errorf("ended with %v", err)
				}
			case <-time.After(20 * time.Second): // drain alone would take a minute
				t.Fatal("it goes on")
			}
			for plugin, pid := range pids {
				if alive(pid) {
					t.Errorf("%s is still there", plugin)
				}
			}
			if name == "attempts that go on" {
				s.wait(t, 1)
			}
		})
	}
	h, err := New(Options{Secrets: func(string) ([]SecretVersion, bool) { return nil, false }, Plugins: []Spec{self("plugin-all")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Errorf("before Run: %v", err)
	}
	if err := h.Run(t.Context()); err != nil {
		t.Errorf("Run after Close: %v", err)
	}
}

func TestDescendantsInSessionsOfTheirOwn(t *testing.T) {
	for mode, found := range map[string]bool{"setsid": true, "escape": false} {
		t.Run(mode, func(t *testing.T) {
			f := start(t, nil, self("plugin-version", "1.0.0")).ready(t)
			got := f.attempt(t, newSub(t, 1, map[string]any{"mode": mode}), newJob(0, "x"))
			child, err := strconv.Atoi(string(got.ResponseBody))
			if err != nil {
				t.Fatal(err)
			}
			if !found {
				defer func() { _ = syscall.Kill(child, syscall.SIGKILL) }()
			}
			before := f.Pids()["test/all"]
			_ = syscall.Kill(before, syscall.SIGKILL)
			eventually(t, "the plugin is back, although its output is held open", func() bool {
				now := f.Pids()["test/all"]
				return now != 0 && now != before
			})
			if running(child) == found {
				t.Errorf("the descendant runs: %v", !found)
			}
		})
	}
}

// runStalledHost is a host in a process of its own that makes attempts until its input ends, and then prints what
// became of them. It is impatient with its plugin.
func runStalledHost() {
	f := &fixture{}
	spec := self("plugin-version", "1")
	h, err := New(Options{Plugins: []Spec{spec}, Secrets: func(string) ([]SecretVersion, bool) {
		return []SecretVersion{{Number: 1, Value: []byte("key")}}, true
	}})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	h.timing.sweep, h.timing.grace, h.timing.heartbeat = 20*time.Millisecond, 300*time.Millisecond, 50*time.Millisecond
	f.Host = h
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = os.Stdin.Read(make([]byte, 1))
		cancel()
	}()
	go func() { _ = h.Run(context.Background()) }()
	_ = h.Ready(ctx)
	sub := subscription.Of(&grapnelv1.Subscription{Uri: "mem://x", Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": keyName}}}})
	sub.UID, sub.Revision, sub.AttemptTimeout, sub.Namespace = [16]byte{1}, 1, 100*time.Millisecond, "acme"
	sub.Proto().Transport = &grapnelv1.PluginBinding{Config: &structpb.Struct{Fields: map[string]*structpb.Value{
		"delay": structpb.NewStringValue("20ms"),
	}}}
	s := newSink()
	for n := 0; ctx.Err() == nil; n += 100 {
		load(f, sub, s, 100)
		s.room(n+100, nil)
		if n == 0 {
			fmt.Println("up")
		}
	}
	lost := 0
	for _, r := range s.results {
		if r[0].Indeterminate {
			lost++
		}
	}
	p, _ := h.Plugin("mem")
	fmt.Println(lost, "lost,", p.GetInstances()[0].GetRestartCount(), "restarts")
	os.Exit(0)
}

// TestStalledHostAccusesNobody stops the host itself for longer than a plugin may be silent. What the plugin has answered
// meanwhile lies there to be read.
func TestStalledHostAccusesNobody(t *testing.T) {
	cmd := exec.Command(self().Path, "stalled-host")
	cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	lines := bufio.NewReader(out)
	if line, err := lines.ReadString('\n'); line != "up\n" {
		t.Fatalf("%q %v", line, err)
	}
	for range 3 {
		_ = cmd.Process.Signal(syscall.SIGSTOP)
		<-time.After(700 * time.Millisecond) // there is nothing else to wait for: time is what the host misses
		_ = cmd.Process.Signal(syscall.SIGCONT)
		<-time.After(100 * time.Millisecond)
	}
	_ = in.Close()
	if line, err := lines.ReadString('\n'); line != "0 lost, 0 restarts\n" {
		t.Errorf("%q %v", line, err)
	}
}
