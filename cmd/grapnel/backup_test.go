//go:build unix

package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ledger is a receiver that refuses until it is told to take, and remembers what it took.
type ledger struct {
	url   string
	takes atomic.Bool

	mu  sync.Mutex // guards ids
	ids map[string]int
}

func newLedger(t *testing.T) *ledger {
	l := &ledger{ids: map[string]int{}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if !l.takes.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.ids[r.Header.Get("webhook-id")]++
	}))
	l.url = s.URL
	t.Cleanup(s.Close)
	return l
}

func (l *ledger) taken() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.ids)
}

func (a *api) events() (all []*grapnelv1.Event) {
	a.t.Helper()
	req := &grapnelv1.ListEventsRequest{Parent: "namespaces/acme", PageSize: 1000}
	for {
		page, err := grapnelv1.NewEventServiceClient(a.conn).ListEvents(a.t.Context(), req)
		if err != nil {
			a.t.Fatal(err)
		}
		all = append(all, page.GetEvents()...)
		if req.PageToken = page.GetNextPageToken(); req.PageToken == "" {
			return all
		}
	}
}

// TestBackupAndRestore takes backups of a server under load. Restored, each has all that was acknowledged before it, no
// loss is complained of, and what was open goes on.
func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	dir := filepath.Join(work, "data")
	l := newLedger(t)
	r := runServerIn(t, dir, "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	a.subscribe(l.url)
	for range 50 {
		if err := a.publish(); err != nil {
			t.Fatal(err)
		}
	}
	// The rest of the test has events and configuration come in all the time.
	var acknowledged, subscriptions atomic.Int64
	acknowledged.Store(50)
	var load sync.WaitGroup
	over := make(chan struct{})
	for range 4 {
		load.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				if a.publish() == nil {
					acknowledged.Add(1)
				}
			}
		})
	}
	load.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-over:
				return
			default:
			}
			if a.create(fmt.Sprint("ns-", i)) == nil {
				subscriptions.Add(1)
			}
		}
	})
	type backup struct {
		file          string
		before, after int64
		spacesBefore  int64
	}
	var backups []backup
	for i, flag := range []string{"--secret-key", "--secret-key=false", "--secret-key"} {
		b := backup{file: filepath.Join(work, fmt.Sprint("backup", i, ".tar")), before: acknowledged.Load(), spacesBefore: subscriptions.Load()}
		code, stdout, stderr := grapnel(t, "", "backup", b.file, "--admin-addr", r.admin, flag)
		if code != 0 {
			t.Fatalf("backup: %d %s\n%s", code, stderr, r.log.text())
		}
		b.after = acknowledged.Load() + 4 // what was on its way
		wantIn(t, stdout, b.file, "bytes", map[bool]string{true: "with the key", false: "without the key"}[flag == "--secret-key"])
		backups = append(backups, b)
	}
	close(over)
	load.Wait()
	if code, _, stderr := grapnel(t, "", "backup", backups[0].file, "--admin-addr", r.admin); code != 1 || !strings.Contains(stderr, "exists already") {
		t.Errorf("over a file: %d %s", code, stderr)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "journal", "backup*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	r.signal(syscall.SIGTERM)

	for i, b := range backups {
		to := filepath.Join(work, fmt.Sprint("restored", i))
		code, stdout, stderr := grapnel(t, "", "restore", b.file, "--data-dir", to)
		if code != 0 {
			t.Fatalf("restore: %d %s", code, stderr)
		}
		wantIn(t, stdout, "events", "of them open")
		if i == 1 {
			wantIn(t, stderr, "the key is not in the backup", filepath.Join(to, "secret.key"))
			refused := runServerIn(t, to)
			if code := refused.code(); code != 1 || !strings.Contains(refused.log.text(), "secret.key is missing") {
				t.Errorf("without the key: %d %s", code, refused.log.text())
			}
			if err := os.RemoveAll(to); err != nil {
				t.Fatal(err)
			}
			if code, _, stderr := grapnel(t, "", "restore", b.file, "--data-dir", to, "--secret-key", filepath.Join(dir, "secret.key")); code != 0 {
				t.Fatalf("restore with a key: %d %s", code, stderr)
			}
		}
		l.takes.Store(false)
		again := runServerIn(t, to, "--egress-allow", "127.0.0.0/8")
		restored := dialAPI(t, again.ready())
		events := int64(len(restored.events()))
		if events < b.before || events > b.after {
			t.Errorf("backup %d: %d events, %d were acknowledged before it and at most %d when it was there", i, events, b.before, b.after)
		}
		if _, err := restored.space.GetNamespace(t.Context(), &grapnelv1.GetNamespaceRequest{Name: fmt.Sprint("namespaces/ns-", max(b.spacesBefore-1, 0))}); b.spacesBefore > 0 && err != nil {
			t.Errorf("backup %d: configuration from before it: %v", i, err)
		}
		had := l.taken()
		l.takes.Store(true)
		if i == 0 {
			waitUntil(t, "all that was open is delivered", func() bool { return l.taken() == had+int(events) })
		}
		for _, word := range []string{"level=ERROR", "less than was acknowledged", "no note of what was acknowledged"} {
			if strings.Contains(again.log.text(), word) {
				t.Errorf("backup %d: %q in the restored server's log:\n%s", i, word, again.log.text())
			}
		}
		if code := again.signal(syscall.SIGTERM); code != 0 {
			t.Errorf("backup %d: exit code %d\n%s", i, code, again.log.text())
		}
	}
}

// TestRestoreRefuses what is cut off, damaged, or not wanted, and leaves nothing that looks like a data directory.
func TestRestoreRefuses(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	dir := filepath.Join(work, "data")
	r := runServerIn(t, dir, "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	a.subscribe("http://127.0.0.1:1/")
	for range 20 {
		if err := a.publish(); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(work, "backup.tar")
	if code, _, stderr := grapnel(t, "", "backup", file, "--admin-addr", r.admin, "--secret-key"); code != 0 {
		t.Fatalf("backup: %d %s", code, stderr)
	}
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(work, "restored")
	wrongKey := filepath.Join(work, "wrong.key")
	if err := os.WriteFile(wrongKey, []byte(strings.Repeat("ab", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	for name, c := range map[string]struct {
		content []byte
		args    []string
		words   []string
	}{
		"half":            {whole[:len(whole)/2], nil, []string{"cut off"}},
		"without its end": {whole[:len(whole)-4096], nil, []string{"cut off"}},
		"one bit":         {flipped, nil, []string{"backup"}},
		"empty":           {nil, nil, []string{"cut off"}},
		"another file":    {[]byte(strings.Repeat("no backup ", 1000)), nil, []string{"no backup"}},
		"another tar":     {rewritten(t, whole, func(name string) (string, []byte) { return "etc/" + name, nil }), nil, []string{`no backup: it holds "etc/backup.json"`}},
		"leads out":       {rewritten(t, whole, func(name string) (string, []byte) { return strings.Replace(name, "journal/", "journal/../../", 1), nil }), nil, []string{`no backup: it holds "journal/../../`}},
		"another journal": {rewritten(t, whole, func(name string) (string, []byte) {
			if name == "backup.json" {
				return name, []byte(`{"format":1,"journal":"00000000000000000000","partitions":16,"keys":1,"secret_key":true}`)
			}
			return name, nil
		}), nil, []string{"damaged", "00000000000000000000"}},
		"another key": {rewritten(t, whole, func(name string) (string, []byte) {
			if name == "secret.key" {
				return name, []byte(strings.Repeat("ab", 32) + "\n")
			}
			return name, nil
		}), nil, []string{"right key"}},
		"a key too many": {whole, []string{"--secret-key", wrongKey}, []string{"leave --secret-key out"}},
	} {
		path := filepath.Join(work, "try.tar")
		if err := os.WriteFile(path, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		code, stdout, stderr := grapnel(t, "", append([]string{"restore", path, "--data-dir", to}, c.args...)...)
		if code != 1 || stdout != "" {
			t.Errorf("%s: exit code %d %s", name, code, stdout)
		}
		for _, word := range c.words {
			if !strings.Contains(stderr, word) {
				t.Errorf("%s: no %q in %s", name, word, stderr)
			}
		}
		if left, err := filepath.Glob(filepath.Join(to, "*")); err != nil || len(left) > 1 { // lock
			t.Errorf("%s: left behind: %v %v", name, left, err)
		}
	}
	keyless, noKey := filepath.Join(work, "keyless.tar"), filepath.Join(work, "no.key")
	if err := os.WriteFile(noKey, []byte("hushhush"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := grapnel(t, "", "backup", keyless, "--admin-addr", r.admin); code != 0 {
		t.Fatalf("backup: %d %s", code, stderr)
	}
	if code, _, stderr := grapnel(t, "", "restore", keyless, "--data-dir", to, "--secret-key", noKey); code != 1 || !strings.Contains(stderr, noKey+" is no key of secrets") || strings.Contains(stderr, "hushhush") {
		t.Errorf("with a file that is no key: %d %s", code, stderr)
	}
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", dir); code != 1 || !strings.Contains(stderr, fmt.Sprint("is in use by pid ", r.cmd.Process.Pid)) {
		t.Errorf("over a running server: %d %s", code, stderr)
	}
	r.signal(syscall.SIGTERM)
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", dir); code != 1 || !strings.Contains(stderr, "is not empty") {
		t.Errorf("over a data directory: %d %s", code, stderr)
	}
	// One that was killed in the middle of it.
	if err := os.MkdirAll(filepath.Join(to, "restoring", "journal"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to, "stores"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused := runServerIn(t, to)
	if code := refused.code(); code != 1 || !strings.Contains(refused.log.text(), "did not come to its end") {
		t.Errorf("in a half-restored directory: %d %s", code, refused.log.text())
	}
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", to); code != 0 {
		t.Errorf("again: %d %s", code, stderr)
	}
	restored := runServerIn(t, to)
	if n := len(dialAPI(t, restored.ready()).events()); n != 20 {
		t.Errorf("%d events", n)
	}
}

// TestKilledRestore kills restores at many moments. Whatever is left is refused by a start, or whole; and another restore
// makes it whole.
func TestKilledRestore(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	r := runServerIn(t, filepath.Join(work, "data"), "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	a.subscribe("http://127.0.0.1:1/")
	const events = 200
	for range events {
		if err := a.publish(); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(work, "backup.tar")
	if code, _, stderr := grapnel(t, "", "backup", file, "--admin-addr", r.admin, "--secret-key"); code != 0 {
		t.Fatalf("backup: %d %s", code, stderr)
	}
	r.signal(syscall.SIGTERM)
	whole := func(dir, when string) {
		t.Helper()
		started := runServerIn(t, dir)
		if n := len(dialAPI(t, started.ready()).events()); n != events {
			t.Errorf("%s: %d events, want %d", when, n, events)
		}
		started.signal(syscall.SIGTERM)
	}
	began := time.Now()
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", filepath.Join(work, "timed")); code != 0 {
		t.Fatalf("restore: %d %s", code, stderr)
	}
	took := time.Since(began)
	for i := range *killedStarts {
		to := filepath.Join(work, fmt.Sprint("to", i))
		first := exec.Command(lookPath(t, "grapnel"), "restore", file, "--data-dir", to)
		if err := first.Start(); err != nil {
			t.Fatal(err)
		}
		moment := time.Duration(mathrand.Int64N(int64(took)))
		time.Sleep(moment) // not a wait: the moment is what is varied
		_ = first.Process.Kill()
		ended := first.Wait()
		when := fmt.Sprintf("killed after %v of %v", moment, took)
		_, unfinished := os.Lstat(filepath.Join(to, "restoring"))
		_, made := os.Lstat(filepath.Join(to, "journal"))
		switch {
		case unfinished == nil:
			refused := runServerIn(t, to)
			if code := refused.code(); code != 1 || !strings.Contains(refused.log.text(), "did not come to its end") {
				t.Fatalf("%s: a start: %d %s", when, code, refused.log.text())
			}
		case made == nil:
			whole(to, when)
			continue
		case ended == nil:
			t.Errorf("%s: it ended well and made nothing", when)
		}
		if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", to); code != 0 {
			t.Fatalf("%s: another restore: %d %s", when, code, stderr)
		}
		whole(to, when)
	}
}

// TestRestoreCutAtItsEnd: with all in place but the last step, a start refuses, and another restore goes through.
func TestRestoreCutAtItsEnd(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	r := runServerIn(t, filepath.Join(work, "data"), "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	a.subscribe("http://127.0.0.1:1/")
	if err := a.publish(); err != nil {
		t.Fatal(err)
	}
	file, to := filepath.Join(work, "backup.tar"), filepath.Join(work, "restored")
	if code, _, stderr := grapnel(t, "", "backup", file, "--admin-addr", r.admin, "--secret-key"); code != 0 {
		t.Fatalf("backup: %d %s", code, stderr)
	}
	r.signal(syscall.SIGTERM)
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", to); code != 0 {
		t.Fatalf("restore: %d %s", code, stderr)
	}
	if err := os.Mkdir(filepath.Join(to, "restoring"), 0o700); err != nil {
		t.Fatal(err)
	}
	refused := runServerIn(t, to)
	if code := refused.code(); code != 1 || !strings.Contains(refused.log.text(), "run `grapnel restore` again") {
		t.Errorf("a start: %d %s", code, refused.log.text())
	}
	if code, _, stderr := grapnel(t, "", "restore", file, "--data-dir", to); code != 0 {
		t.Fatalf("another restore: %d %s", code, stderr)
	}
	started := runServerIn(t, to)
	if n := len(dialAPI(t, started.ready()).events()); n != 1 {
		t.Errorf("%d events", n)
	}
}

// rewritten is a backup with other names or contents, and the checksums to them.
func rewritten(t *testing.T, whole []byte, change func(name string) (string, []byte)) []byte {
	t.Helper()
	var out, sums bytes.Buffer
	w := tar.NewWriter(&out)
	for r := tar.NewReader(bytes.NewReader(whole)); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if header.Name == "SHA256SUMS" {
			content = sums.Bytes()
		} else {
			name, other := change(header.Name)
			if header.Name = name; other != nil {
				content = other
			}
		}
		header.Size = int64(len(content))
		sum := sha256.Sum256(content)
		fmt.Fprintf(&sums, "%s  %s\n", hex.EncodeToString(sum[:]), header.Name)
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// TestBackupThatIsNotTaken: a reader that goes away leaves nothing, on either side.
func TestBackupThatIsNotTaken(t *testing.T) {
	t.Parallel()
	work := t.TempDir()
	dir := filepath.Join(work, "data")
	r := runServerIn(t, dir)
	a := dialAPI(t, r.ready())
	if err := a.create("acme"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(work, "backup.tar")
	code, _, stderr := grapnel(t, "", "backup", file, "--admin-addr", "127.0.0.1:1")
	if code != 1 || !strings.Contains(stderr, "127.0.0.1:1") || !strings.Contains(stderr, "refused") {
		t.Errorf("nobody there: %d %s", code, stderr)
	}
	resp, err := http.Get("http://" + r.admin + "/backup?secret-key=perhaps")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a wrong wish: %s", resp.Status)
	}
	half := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 4096))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}))
	defer half.Close()
	code, _, stderr = grapnel(t, "", "backup", file, "--admin-addr", strings.TrimPrefix(half.URL, "http://"))
	if code != 1 || !strings.Contains(stderr, "was not made") {
		t.Errorf("cut off: %d %s", code, stderr)
	}
	if left, err := filepath.Glob(filepath.Join(work, "*backup*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	// Nor is the server's copy in the way of the next one.
	if code, _, stderr := grapnel(t, "", "backup", file, "--admin-addr", r.admin); code != 0 {
		t.Errorf("the next one: %d %s", code, stderr)
	}
}

// TestBackupGuide runs the commands of docs/operations.md as they are printed, beside a running server.
func TestBackupGuide(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	r := runServerIn(t, filepath.Join(work, "grapnel-data"), "--egress-allow", "127.0.0.0/8")
	a := dialAPI(t, r.ready())
	a.subscribe("http://127.0.0.1:1/")
	if err := a.publish(); err != nil {
		t.Fatal(err)
	}
	ran := 0
	for _, s := range guideSections(string(page)) {
		if s.title != "Backup" {
			continue
		}
		for _, line := range s.commands {
			cmd := exec.Command("sh", "-ec", line)
			cmd.Dir, cmd.Env = work, append(os.Environ(), "GRAPNEL_ADMIN_ADDR="+r.admin)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", line, err, out)
			}
			ran++
		}
	}
	if ran != 3 {
		t.Errorf("%d commands, want 3", ran)
	}
	restored := runServerIn(t, filepath.Join(work, "restored"))
	if n := len(dialAPI(t, restored.ready()).events()); n != 1 {
		t.Errorf("%d events", n)
	}
}
