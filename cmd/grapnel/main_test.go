package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// patience bounds every wait for something that should happen soon.
const patience = 30 * time.Second

// The test binary is also the grapnel binary of the scripts, and so of the plugin process that their
// servers start.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"grapnel":   main,
		"acme-sign": acmePlugin("acme/sign", "acme-v2"), "acme-again": acmePlugin("acme/again", "acme-v2"),
		"acme-stripe": acmePlugin("acme/pps", "own", "stripe"), "acme-grapnel": acmePlugin("grapnel/more", "more"),
	})
}

func TestScripts(t *testing.T) { testscript.Run(t, scripts("testdata")) }

// scripts are the parameters of a run over the scripts of dir.
func scripts(dir string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Deadline:            time.Now().Add(3 * time.Minute), // a command that hangs should not take ten
		Setup: func(env *testscript.Env) error {
			env.Values[stateKey{}] = &scriptState{}
			env.Setenv("GRAPNEL_ADDR", "127.0.0.1:1") // nothing there, unless the script serves
			env.Setenv("TMPDIR", filepath.Join(env.WorkDir, "tmp"))
			files, err := filepath.Abs("testdata")
			if err != nil {
				return err
			}
			env.Setenv("FILES", files)
			return os.Mkdir(filepath.Join(env.WorkDir, "tmp"), 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"serve":    serve,
			"stop":     stop,
			"receiver": receive,
			"take":     take,
			"silent":   silent,
			"drain":    drain,
			"freeport": freePort,
			"await":    await,
			"lines":    lines,
			"emptydir": emptyDir,
		},
	}
}

type stateKey struct{}

// scriptState is what one script has running.
type scriptState struct{ server *serverProcess }

func state(ts *testscript.TestScript) *scriptState { return ts.Value(stateKey{}).(*scriptState) }

// serverProcess is a `grapnel server` of a script.
type serverProcess struct {
	cmd    *exec.Cmd
	log    *lockedBuffer
	ended  chan error
	mu     sync.Mutex // guards stdout
	stdout []string
}

// serve FLAG... starts a server, waits for its ready line, and points GRAPNEL_ADDR at it.
func serve(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("use exec for a server that must not start")
	}
	bin, err := exec.LookPath("grapnel")
	ts.Check(err)
	p := &serverProcess{log: &lockedBuffer{}, ended: make(chan error, 1)}
	p.cmd = exec.Command(bin, append([]string{"server", "--data-dir", ts.MkAbs("data"), "--listen", "127.0.0.1:0",
		"--admin-listen", "127.0.0.1:0", "--egress-allow", "127.0.0.0/8"}, args...)...)
	p.cmd.Stderr = p.log
	stdout, err := p.cmd.StdoutPipe()
	ts.Check(err)
	ts.Check(p.cmd.Start())
	ready := make(chan string, 1)
	go func() {
		scanner := bufio.NewScanner(stdout)
		for scanner.Scan() {
			p.mu.Lock()
			p.stdout = append(p.stdout, scanner.Text())
			p.mu.Unlock()
			select {
			case ready <- scanner.Text():
			default:
			}
		}
		p.ended <- p.cmd.Wait()
	}()
	state(ts).server = p
	ts.Defer(func() { p.kill() })
	select {
	case line := <-ready:
		match := regexp.MustCompile(`^grapnel ready addr=(\S+) admin=(\S+) data-dir=\S+ pid=\d+$`).FindStringSubmatch(line)
		if match == nil {
			ts.Fatalf("ready line = %q", line)
		}
		addr := match[1]
		if os.Getenv(insideNamespace) != "" { // by its name, which is ::1 first, where nobody listens
			addr = strings.Replace(addr, "127.0.0.1", "localhost", 1)
		}
		ts.Setenv("GRAPNEL_ADDR", addr)
		ts.Setenv("ADMIN_ADDR", match[2])
	case err := <-p.ended:
		p.ended <- err
		ts.Fatalf("server ended: %v\n%s", err, p.log.text())
	case <-time.After(patience):
		ts.Fatalf("no ready line\n%s", p.log.text())
	}
}

func (p *serverProcess) kill() {
	_ = p.cmd.Process.Kill()
	p.ended <- <-p.ended
}

func (b *lockedBuffer) text() string {
	text, _ := io.ReadAll(b.reader())
	return string(text)
}

// stop interrupts the server and wants it to end in order, having printed one line.
func stop(ts *testscript.TestScript, _ bool, _ []string) {
	p := state(ts).server
	ts.Check(p.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-p.ended:
		p.ended <- err
		if err != nil {
			ts.Fatalf("server ended with %v\n%s", err, p.log.text())
		}
	case <-time.After(patience):
		ts.Fatalf("server did not stop\n%s", p.log.text())
	}
	if len(p.stdout) != 1 {
		ts.Fatalf("server printed %q, want the ready line only", p.stdout)
	}
	if log := p.log.text(); strings.Contains(log, "whsec_") || strings.Contains(log, "level=ERROR") {
		ts.Fatalf("server's log has a secret or an error:\n%s", log)
	}
}

// drain asks the server to stop, and does not wait until it has.
func drain(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(state(ts).server.cmd.Process.Signal(syscall.SIGTERM))
}

// receiver starts an HTTP server whose paths are the status codes it answers with, and ?retry-after=N its Retry-After;
// /hang never answers. RECEIVER is its URL, RECEIVER_ADDR its address.
func receive(ts *testscript.TestScript, _ bool, _ []string) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path == "/hang" {
			<-r.Context().Done()
			return
		}
		var status int
		if _, err := fmt.Sscanf(r.URL.Path, "/%d", &status); err != nil {
			status = http.StatusNotFound
		}
		if after := r.URL.Query().Get("retry-after"); after != "" {
			w.Header().Set("Retry-After", after)
		}
		w.WriteHeader(status)
	}))
	ts.Defer(s.Close)
	ts.Setenv("RECEIVER", s.URL)
	ts.Setenv("RECEIVER_ADDR", s.Listener.Addr().String())
}

// silent listens where nobody ever answers; SILENT is its address.
func silent(ts *testscript.TestScript, _ bool, _ []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { _ = l.Close() })
	ts.Setenv("SILENT", l.Addr().String())
}

// freePort VAR sets VAR to an address where nobody listens.
func freePort(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Check(l.Close())
	ts.Setenv(args[0], l.Addr().String())
}

// take VAR FIELD sets VAR to a field of the first JSON object that the last command printed; after a slash
// only the last segment.
func take(ts *testscript.TestScript, _ bool, args []string) {
	var object any
	if err := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout"))).Decode(&object); err != nil {
		ts.Fatalf("stdout is no JSON: %v", err)
	}
	for name := range strings.SplitSeq(args[1], ".") {
		object = object.(map[string]any)[name]
	}
	text := fmt.Sprint(object)
	ts.Setenv(args[0], text[strings.LastIndexByte(text, '/')+1:])
}

// await REGEXP COMMAND... repeats a command until its output matches.
func await(ts *testscript.TestScript, _ bool, args []string) {
	pattern := regexp.MustCompile("(?m)" + args[0])
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		_ = ts.Exec(args[1], args[2:]...)
		if pattern.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("no match for %s in\n%s%s", args[0], ts.ReadFile("stdout"), ts.ReadFile("stderr"))
		}
		<-tick.C
	}
}

// lines FILE N wants N lines in stdout, stderr or a file.
func lines(ts *testscript.TestScript, _ bool, args []string) {
	if n := bytes.Count([]byte(ts.ReadFile(args[0])), []byte("\n")); fmt.Sprint(n) != args[1] {
		ts.Fatalf("%d lines in %s, want %s", n, args[0], args[1])
	}
}

// emptydir DIR wants nothing left in a directory.
func emptyDir(ts *testscript.TestScript, _ bool, args []string) {
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(entries) > 0 {
		ts.Fatalf("%s has %v", args[0], entries)
	}
}
