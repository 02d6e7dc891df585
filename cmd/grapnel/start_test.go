//go:build unix

package main

import (
	"bufio"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

var killedStarts = flag.Int("killed-starts", 3, "first starts that TestKilledFirstStart kills")

// running is a `grapnel server` process.
type running struct {
	t     *testing.T
	cmd   *exec.Cmd
	log   *lockedBuffer
	addr  chan string // the ready line's
	admin string      // the same, once ready has returned
	ended chan error
}

// run starts a server in dir. It is killed with the test.
func runServerIn(t *testing.T, dir string, args ...string) *running {
	t.Helper()
	bin, err := exec.LookPath("grapnel")
	if err != nil {
		t.Fatal(err)
	}
	r := &running{t: t, log: &lockedBuffer{}, addr: make(chan string, 1), ended: make(chan error, 1)}
	r.cmd = exec.Command(bin, append([]string{"server", "--data-dir", dir, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"}, args...)...)
	r.cmd.Stderr = r.log
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if match := regexp.MustCompile(`addr=(\S+) admin=(\S+)`).FindStringSubmatch(lines.Text()); match != nil {
				r.admin = match[2]
				r.addr <- match[1]
			}
		}
		r.ended <- r.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Kill()
		r.ended <- <-r.ended
	})
	return r
}

// ready waits for the ready line and returns the API's address.
func (r *running) ready() string {
	r.t.Helper()
	select {
	case addr := <-r.addr:
		return addr
	case err := <-r.ended:
		r.ended <- err
		r.t.Fatalf("the server ended: %v\n%s", err, r.log.text())
	case <-time.After(patience):
		r.t.Fatalf("the server is not ready\n%s", r.log.text())
	}
	return ""
}

// signal sends s and returns the exit code; -1 for a death by signal.
func (r *running) signal(s os.Signal) int {
	r.t.Helper()
	_ = r.cmd.Process.Signal(s) // it may have ended by itself
	return r.code()
}

// code waits for the end and returns the exit code.
func (r *running) code() int {
	r.t.Helper()
	select {
	case err := <-r.ended:
		r.ended <- err
		return r.cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		r.t.Fatalf("the server does not end\n%s", r.log.text())
		return 0
	}
}

// api is a plain connection to a server: the SDK's client would wait for room.
type api struct {
	t     *testing.T
	conn  *grpc.ClientConn
	space grapnelv1.NamespaceServiceClient
	subs  grapnelv1.SubscriptionServiceClient
}

func dialAPI(t *testing.T, addr string) *api {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &api{t: t, conn: conn, space: grapnelv1.NewNamespaceServiceClient(conn), subs: grapnelv1.NewSubscriptionServiceClient(conn)}
}

func (a *api) create(ns string) error {
	_, err := a.space.CreateNamespace(a.t.Context(), &grapnelv1.CreateNamespaceRequest{NamespaceId: ns})
	return err
}

func (a *api) publish() error {
	_, err := grapnelv1.NewPublishServiceClient(a.conn).Publish(a.t.Context(), &grapnelv1.PublishRequest{
		Parent: "namespaces/acme", Event: &grapnelv1.Event{Id: rand.Text(), Type: "t", Payload: &grapnelv1.Event_Data{Data: []byte("{}")}},
	})
	return err
}

// wantFull fails unless err says that there is no room.
func wantFull(t *testing.T, err error) {
	t.Helper()
	if !isFull(err) {
		t.Errorf("got %v, want STORE_FULL", err)
	}
}

func isFull(err error) bool {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetReason() == "STORE_FULL" {
			return status.Code(err) == codes.ResourceExhausted
		}
	}
	return false
}

// TestKilledFirstStart kills the first start of a new directory at many moments. Nothing was acknowledged yet, so the
// next start has nothing to complain of.
func TestKilledFirstStart(t *testing.T) {
	t.Parallel()
	for i := range *killedStarts {
		dir := filepath.Join(t.TempDir(), "data")
		first := runServerIn(t, dir)
		moment := time.Duration(mathrand.Int64N(int64(900 * time.Millisecond)))
		if i%2 == 0 {
			moment /= 6 // the making of the stores
		}
		time.Sleep(moment) // not a wait: the moment is what is varied
		first.signal(syscall.SIGKILL)
		second := runServerIn(t, dir)
		second.ready()
		if code := second.signal(syscall.SIGTERM); code != 0 {
			t.Fatalf("killed after %v; the next start's end is %d\n%s", moment, code, second.log.text())
		}
		for _, told := range regexp.MustCompile("level=(WARN|ERROR).*").FindAllString(second.log.text(), -1) {
			if !strings.Contains(told, "still starting") { // a busy machine
				t.Errorf("killed after %v; the next start says %s", moment, told)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTerminatedStart: a stop is orderly whenever it comes, asked for once or twice, in a new directory and in one
// that has deliveries to recover.
func TestTerminatedStart(t *testing.T) {
	t.Parallel()
	lived := filepath.Join(t.TempDir(), "lived")
	before, _ := hanging(t, lived)
	before.signal(syscall.SIGKILL)
	for name, dir := range map[string]string{"new": filepath.Join(t.TempDir(), "data"), "recovery": lived} {
		for moment, twice := 50*time.Millisecond, false; moment < 700*time.Millisecond; moment, twice = moment+90*time.Millisecond, !twice {
			r := runServerIn(t, dir)
			time.Sleep(moment) // as above; before main has begun a signal ends the process in any case
			if twice {
				_ = r.cmd.Process.Signal(syscall.SIGTERM)
			}
			if code := r.signal(syscall.SIGTERM); code != 0 && code != -1 {
				t.Errorf("%s, terminated after %v: exit code %d\n%s", name, moment, code, r.log.text())
			}
		}
	}
	r := runServerIn(t, lived)
	r.ready()
	if code := r.signal(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d\n%s", code, r.log.text())
	}
}

// TestFullDisk has somebody else fill the disk that both stores are on. What is under way goes on, new things are
// refused with the reason, and a killed server comes up although there is no room at all.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "400m")
	dir := filepath.Join(disk, "data")
	r := runServerIn(t, dir)
	a := dialAPI(t, r.ready())
	if err := errors.Join(a.create("acme"), a.create("other"), a.publish()); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(disk, "foreign")
	fill(t, foreign)
	waitUntil(t, "publishes are refused", func() bool { return isFull(a.publish()) })
	wantFull(t, a.create("third"))
	r.signal(syscall.SIGKILL)
	for range 4 {
		r = runServerIn(t, dir)
		a = dialAPI(t, r.ready())
		wantFull(t, a.publish())
		wantFull(t, a.create("third"))
		r.signal(syscall.SIGKILL)
	}
	if strings.Contains(r.log.text(), "goroutine ") || strings.Count(r.log.text(), "level=ERROR") > 1 {
		t.Errorf("a full disk is told as\n%s", r.log.text())
	}
	r = runServerIn(t, dir)
	a = dialAPI(t, r.ready())
	if _, err := a.space.DeleteNamespace(t.Context(), &grapnelv1.DeleteNamespaceRequest{Name: "namespaces/other"}); err != nil {
		t.Errorf("delete on a full disk: %v", err)
	}
	if err := os.Remove(foreign); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, "publishes are taken again", func() bool { return a.publish() == nil })
	if err := a.create("third"); err != nil {
		t.Errorf("create with room again: %v", err)
	}
	if code := r.signal(syscall.SIGTERM); code != 0 {
		t.Errorf("exit code %d\n%s", code, r.log.text())
	}
}

// TestEtcdWithoutRoom takes the disk's last byte, the ballast's included, and goes on changing what may be changed until
// etcd cannot write any more. The end is in our words and has its own exit code, and the next start, with room, has
// everything.
func TestEtcdWithoutRoom(t *testing.T) {
	t.Parallel()
	disk := smallDisk(t, "300m")
	dir := filepath.Join(disk, "data")
	r := runServerIn(t, dir, "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	if err := a.create("acme"); err != nil {
		t.Fatal(err)
	}
	_, err := grapnelv1.NewSecretServiceClient(a.conn).CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
		Parent: "namespaces/acme", SecretId: "key", Kind: grapnelv1.Secret_KIND_HMAC,
	})
	if err != nil {
		t.Fatal(err)
	}
	const name = "namespaces/acme/subscriptions/one"
	_, err = a.subs.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/acme", SubscriptionId: "one", Subscription: &grapnelv1.Subscription{
			Uri: "http://127.0.0.1:1/", Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/acme/secrets/key"}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // again, for what the ballast gives
		fill(t, filepath.Join(disk, fmt.Sprint("foreign", i)))
		waitUntil(t, "publishes are refused", func() bool { return isFull(a.publish()) })
		if i == 0 {
			waitUntil(t, "the ballast is given up", func() bool { return strings.Contains(r.log.text(), "the ballast was given up") })
		}
	}
	ended := false
	for end := time.Now().Add(patience); !ended && time.Now().Before(end); {
		_, _ = a.subs.PauseSubscription(t.Context(), &grapnelv1.PauseSubscriptionRequest{Name: name})
		_, _ = a.subs.ResumeSubscription(t.Context(), &grapnelv1.ResumeSubscriptionRequest{Name: name})
		ended = len(r.ended) > 0
	}
	code := r.code()
	if code != 70 {
		t.Errorf("exit code %d\n%s", code, r.log.text())
	}
	told := regexp.MustCompile("level=ERROR.*etcd cannot go on.*").FindString(r.log.text())
	for _, word := range []string{"no space left", filepath.Join(dir, "etcd"), `hint="free space`} {
		if !strings.Contains(told, word) {
			t.Errorf("no %q in %q\n%s", word, told, r.log.text())
		}
	}
	for i := range 3 {
		if err := os.Remove(filepath.Join(disk, fmt.Sprint("foreign", i))); err != nil {
			t.Fatal(err)
		}
	}
	r = runServerIn(t, dir)
	a = dialAPI(t, r.ready())
	if _, err := a.subs.GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name}); err != nil {
		t.Errorf("after a start with room: %v", err)
	}
}

// fill writes a file until the disk has no room.
func fill(t *testing.T, path string) {
	t.Helper()
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for block := make([]byte, 1<<20); len(block) > 0; block = block[:len(block)/2] {
		for err = nil; err == nil; {
			_, err = file.Write(block)
		}
	}
}

func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); !ok(); <-tick.C {
		if time.Now().After(end) {
			t.Fatalf("gave up waiting: %s", what)
		}
	}
}

// smallDisk mounts a file system of its own, where the test may.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%s", size), "grapnel-test", dir).CombinedOutput(); err != nil {
		t.Skipf("cannot mount a small disk, which takes root on Linux: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("unmount: %v %s", err, out)
		}
	})
	return dir
}
