package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// refusal is the error of a server that must not start in dir.
func refusal(t *testing.T, dir string, adjust func(*server.Options)) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	o := server.Options{
		DataDir: dir, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", BuiltinPlugin: []string{self, "plugin", "serve"}, BuiltinParts: servertest.Parts(),
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if adjust != nil {
		adjust(&o)
	}
	s, err := server.New(o)
	if err != nil {
		return err.Error()
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	select {
	case err := <-ended:
		if err == nil {
			t.Fatal("stopped in order, want a refusal")
		}
		return err.Error()
	case <-s.Ready():
		stop()
		<-ended
		t.Fatal("it started, want a refusal")
		return ""
	}
}

// wantWords fails when one of the words is not in text.
func wantWords(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in %q", w, text)
		}
	}
}

// lived is a data directory with a configuration, and one delivery that waits.
func lived(t *testing.T) string {
	t.Helper()
	s := servertest.Start(t, servertest.Options{})
	s.Namespace("acme")
	s.Subscribe("acme", "one", "http://127.0.0.1:1/", nil)
	s.Publish("acme", "e1", "order.created", []byte("{}"))
	servertest.Await(t, "the delivery waits for its second attempt", func() bool {
		all := s.Deliveries("acme", "")
		return len(all) == 1 && all[0].GetState() == grapnelv1.Delivery_STATE_SCHEDULED
	})
	s.Stop()
	return s.Dir
}

// keeps wants the configuration and the delivery of lived.
func keeps(t *testing.T, dir string) {
	t.Helper()
	s := servertest.Start(t, servertest.Options{Dir: dir})
	// It may be due again by now.
	if all := s.Deliveries("acme", "state = SCHEDULED OR state = IN_FLIGHT"); len(all) != 1 {
		t.Errorf("the delivery is now %v", s.Deliveries("acme", ""))
	}
	s.Stop()
}

func move(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestStoresBelongTogether: a store that is missing or another's is refused, nothing is made in its place, and
// nothing is lost once it is back.
func TestStoresBelongTogether(t *testing.T) {
	t.Parallel()
	dir, other := lived(t), lived(t)
	for _, store := range []string{"journal", "etcd"} {
		path, aside := filepath.Join(dir, store), filepath.Join(dir, store+".away")
		move(t, path, aside)
		wantWords(t, refusal(t, dir, nil), store+" in "+path+" is missing", "restore", "--adopt-stores")
		if exists(path) {
			t.Errorf("a new %s was made", store)
		}
		move(t, filepath.Join(other, store), path)
		text := refusal(t, dir, nil)
		wantWords(t, text, "do not belong together", "expected", path, "--adopt-stores")
		move(t, path, filepath.Join(other, store))
		move(t, aside, path)
		keeps(t, dir)
	}
	// Meant: the journal goes on with an empty configuration, and it is not asked again.
	move(t, filepath.Join(dir, "etcd"), filepath.Join(dir, "etcd.away"))
	adopted := servertest.Start(t, servertest.Options{Dir: dir, Adjust: func(o *server.Options) { o.AdoptStores = true }})
	adopted.Stop()
	servertest.Start(t, servertest.Options{Dir: dir}).Stop()
	if err := os.WriteFile(filepath.Join(dir, "stores"), []byte("journal 0 etcd 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantWords(t, refusal(t, dir, nil), filepath.Join(dir, "stores"), "damaged", "--adopt-stores")
}

// TestExternalEtcdBelongs: the same for an etcd that others may reach, too, and may empty.
func TestExternalEtcdBelongs(t *testing.T) {
	t.Parallel()
	etcd, other := startEtcd(t), startEtcd(t)
	at := func(e *externalEtcd) func(*server.Options) {
		return func(o *server.Options) { o.EtcdEndpoints = []string{"http://" + e.addr} }
	}
	s := servertest.Start(t, servertest.Options{Adjust: at(etcd)})
	s.Namespace("acme")
	_, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
		Parent: "namespaces/acme", SubscriptionId: "etcd", Subscription: &grapnelv1.Subscription{Uri: "http://" + etcd.addr + "/v3/kv/put"},
	})
	if err == nil || !strings.Contains(err.Error(), "egress policy") {
		t.Errorf("deliveries to the etcd: %v", err)
	}
	s.Stop()
	wantWords(t, refusal(t, s.Dir, at(other)), "do not belong together", other.addr+" is empty", "--adopt-stores")
	wantWords(t, refusal(t, s.Dir, nil), "the embedded etcd in", "is missing", "--etcd-endpoints")
	if exists(filepath.Join(s.Dir, "etcd")) {
		t.Error("an embedded etcd was made")
	}
	wantWords(t, refusal(t, t.TempDir(), at(etcd)), "do not belong together", "belongs to the journal", "--adopt-stores")
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.addr}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Delete(t.Context(), "", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	wantWords(t, refusal(t, s.Dir, at(etcd)), "do not belong together", etcd.addr+" is empty", "--adopt-stores")
	servertest.Start(t, servertest.Options{Dir: s.Dir, Adjust: func(o *server.Options) { at(other)(o); o.AdoptStores = true }}).Stop()
	servertest.Start(t, servertest.Options{Dir: s.Dir, Adjust: at(other)}).Stop()
}

// TestKeyIsNotReplaced: a new key would make the secrets that are there unreadable for good.
func TestKeyIsNotReplaced(t *testing.T) {
	t.Parallel()
	dir := lived(t)
	path := filepath.Join(dir, "secret.key")
	move(t, path, path+".away")
	wantWords(t, refusal(t, dir, nil), path+" is missing", "restore it")
	if exists(path) {
		t.Error("a new key was made")
	}
	move(t, path+".away", path)
	keeps(t, dir)
	// Without secrets there is nothing to lose.
	empty := servertest.Start(t, servertest.Options{})
	empty.Stop()
	if err := os.Remove(filepath.Join(empty.Dir, "secret.key")); err != nil {
		t.Fatal(err)
	}
	servertest.Start(t, servertest.Options{Dir: empty.Dir}).Stop()
}

// TestHalfMadeIsThrownAway: what a kill left of a first start is in nobody's way.
func TestHalfMadeIsThrownAway(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "deep", "down", "data")
	for _, junk := range []string{"journal.new/MANIFEST-000001", "etcd/new/member/wal/0000000000000000-0000000000000000.wal", "etcd/new/member/snap/db"} {
		path := filepath.Join(dir, filepath.FromSlash(junk))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("half of it"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := servertest.Start(t, servertest.Options{Dir: dir})
	s.Namespace("acme")
	s.Stop()
	for _, gone := range []string{"journal.new", "etcd/new"} {
		if exists(filepath.Join(dir, filepath.FromSlash(gone))) {
			t.Errorf("%s is still there", gone)
		}
	}
}

// TestPreparedDirectories: empty directories, as an operator or a volume brings them, are made stores of.
func TestPreparedDirectories(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, sub := range []string{"journal", "etcd/lost+found"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.FromSlash(sub)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "journal", "lost+found"), 0o700); err != nil { // does not give way
		t.Fatal(err)
	}
	s := servertest.Start(t, servertest.Options{Dir: dir})
	s.Namespace("acme")
	s.Stop()
	servertest.Start(t, servertest.Options{Dir: dir}).Stop()
}

// TestDamagedEtcdIsRefused: within the bounded wait, with the file and the way out, and not by a fault of the
// processor's or a wait without end.
func TestDamagedEtcdIsRefused(t *testing.T) {
	t.Parallel()
	lived := lived(t)
	for name, c := range map[string]struct {
		damage func(t *testing.T, etcd string)
		words  []string
	}{
		"database cut off":      {func(t *testing.T, etcd string) { cut(t, filepath.Join(etcd, "member", "snap", "db"), 8192) }, []string{"snap/db", "is cut off"}},
		"database all but gone": {func(t *testing.T, etcd string) { cut(t, filepath.Join(etcd, "member", "snap", "db"), 100) }, []string{"snap/db", "is damaged"}},
		"log gone": {func(t *testing.T, etcd string) {
			if err := os.RemoveAll(filepath.Join(etcd, "member", "wal")); err != nil {
				t.Fatal(err)
			}
		}, []string{"its log is missing", "member/wal"}},
		"log with a flipped bit": {func(t *testing.T, etcd string) {
			path := filepath.Join(etcd, "member", "wal", "0000000000000000-0000000000000000.wal")
			log, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			log[600] ^= 4
			if err := os.WriteFile(path, log, 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"its log", "0000000000000000-0000000000000000.wal is damaged"}},
		"log all but gone": {func(t *testing.T, etcd string) {
			cut(t, filepath.Join(etcd, "member", "wal", "0000000000000000-0000000000000000.wal"), 64)
		}, []string{"0000000000000000-0000000000000000.wal is cut off"}},
		"log cut off": {func(t *testing.T, etcd string) {
			logs, err := filepath.Glob(filepath.Join(etcd, "member", "wal", "*.wal"))
			if err != nil || len(logs) != 1 {
				t.Fatal(logs, err)
			}
			cut(t, logs[0], 200)
		}, []string{"does not come up", "gave up after 10s", "member/wal may be damaged, cut off"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(lived)); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Join(dir, "secret.key"), 0o600); err != nil {
				t.Fatal(err)
			}
			c.damage(t, filepath.Join(dir, "etcd"))
			text := refusal(t, dir, nil)
			wantWords(t, text, append(c.words, filepath.Join(dir, "etcd"), "restore", "docs/operations.md")...)
		})
	}
}

func cut(t *testing.T, path string, size int64) {
	t.Helper()
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
}

// TestSecondServer in one directory is told so, and harms nobody.
func TestSecondServer(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	wantWords(t, refusal(t, s.Dir, nil), "data directory "+s.Dir+" is in use by pid")
	s.Namespace("acme")
}

// TestPartitionsAreTheJournals: only an explicit other number is refused.
func TestPartitionsAreTheJournals(t *testing.T) {
	t.Parallel()
	four := func(o *server.Options) { o.Partitions = 4 }
	s := servertest.Start(t, servertest.Options{Adjust: four})
	s.Stop()
	servertest.Start(t, servertest.Options{Dir: s.Dir}).Stop()
	servertest.Start(t, servertest.Options{Dir: s.Dir, Adjust: four}).Stop()
	text := refusal(t, s.Dir, func(o *server.Options) { o.Partitions = 16 })
	wantWords(t, text, "made with 4 partitions", "cannot be opened with 16", "leave the number out")
}

// TestStopDuringStart is orderly at every moment, and leaves what the next start goes on from.
func TestStopDuringStart(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "data")
	for after := time.Duration(0); after < 800*time.Millisecond; after += 40 * time.Millisecond {
		s, err := server.New(server.Options{
			DataDir: dir, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", BuiltinPlugin: []string{self, "plugin", "serve"}, BuiltinParts: servertest.Parts(),
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithTimeout(t.Context(), after)
		if err := s.Run(ctx); err != nil {
			t.Errorf("stopped after %v: %v", after, err)
		}
		stop()
	}
	servertest.Start(t, servertest.Options{Dir: dir}).Stop()
}

// TestSocketsWithoutTemporaryDirectory go below the data directory, when its path is short enough.
func TestSocketsWithoutTemporaryDirectory(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("sockets have no such bounds")
	}
	short, err := os.MkdirTemp("", "g")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(short)
	long := filepath.Join(t.TempDir(), strings.Repeat("long", 20))
	file := filepath.Join(short, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", filepath.Join(file, "below")) // cannot be made
	s := servertest.Start(t, servertest.Options{Dir: filepath.Join(short, "data")})
	s.Namespace("acme")
	s.Subscribe("acme", "one", newServer(t, nil), nil) // a plugin checks it
	s.Stop()
	if exists(filepath.Join(short, "data", "sockets")) {
		t.Error("the sockets' directory is still there")
	}
	wantWords(t, refusal(t, long, nil), "plugin sockets", "not a directory", "TMPDIR")
}

// TestEtcdThatWantsUsers: the user is in options of its own, and what is wrong is said at once.
func TestEtcdThatWantsUsers(t *testing.T) {
	t.Parallel()
	etcd := startEtcd(t)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.addr}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx := t.Context()
	_, errUser := c.UserAdd(ctx, "root", "a password")
	_, errRole := c.UserGrantRole(ctx, "root", "root")
	_, errAuth := c.AuthEnable(ctx)
	if err := errors.Join(errUser, errRole, errAuth); err != nil {
		t.Fatal(err)
	}
	as := func(user, password string) func(*server.Options) {
		return func(o *server.Options) {
			o.EtcdEndpoints, o.EtcdUser, o.EtcdPassword = []string{"http://" + etcd.addr}, user, password
		}
	}
	s := servertest.Start(t, servertest.Options{Adjust: as("root", "a password")})
	s.Namespace("acme")
	wantWords(t, refusal(t, t.TempDir(), as("", "")), etcd.addr, "user name is empty", "--etcd-user")
	text := refusal(t, t.TempDir(), as("root", "a mistake"))
	wantWords(t, text, etcd.addr, "invalid user ID or password")
	if strings.Contains(text, "a mistake") {
		t.Errorf("the password is in %q", text)
	}
	text = refusal(t, t.TempDir(), func(o *server.Options) { o.EtcdEndpoints = []string{"http://root:hush@" + etcd.addr} })
	wantWords(t, text, "--etcd-user", "--etcd-password-file")
	if strings.Contains(text, "hush") {
		t.Errorf("the password is in %q", text)
	}
}

// refusedAddr is an address where nobody listens, and nobody else can as long as the test runs.
func refusedAddr(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", at.(*unix.SockaddrInet4).Port)
}

// TestEtcdThatCannotBeReached is waited for within bounds, and the cause is told where the client hides it.
func TestEtcdThatCannotBeReached(t *testing.T) {
	t.Parallel()
	etcd := startEtcd(t)
	nobody := refusedAddr(t)
	for endpoint, word := range map[string]string{
		"https://" + etcd.addr: "does this port speak TLS?",
		"http://" + nobody:     "refused",
	} {
		t.Run(word, func(t *testing.T) {
			t.Parallel()
			text := refusal(t, t.TempDir(), func(o *server.Options) { o.EtcdEndpoints = []string{endpoint} })
			wantWords(t, text, endpoint, "gave up after 10s", word)
		})
	}
}

// TestFullConfigurationStore: at its quota the embedded etcd takes no new configuration, events go on, and deletions
// alone make it writable again.
func TestFullConfigurationStore(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.EtcdQuota = 16 << 20 }})
	s.Namespace("acme")
	secrets := grapnelv1.NewSecretServiceClient(s.Conn)
	create := func(id string) error {
		_, err := secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
			Parent: "namespaces/acme", SecretId: id, Kind: grapnelv1.Secret_KIND_OPAQUE, Value: strings.Repeat("x", 60_000),
		})
		return err
	}
	var made atomic.Int64
	var full atomic.Pointer[error]
	var creators sync.WaitGroup
	for range 8 {
		creators.Go(func() {
			for full.Load() == nil {
				id := made.Add(1)
				if err := create(fmt.Sprint("s", id)); err != nil {
					full.Store(&err)
				}
			}
		})
	}
	creators.Wait()
	err := *full.Load()
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "configuration store has reached its quota") {
		t.Fatalf("after %d secrets: %v", made.Load(), err)
	}
	s.Publish("acme", "e1", "order.created", []byte("{}"))
	servertest.Await(t, "readyz says that the configuration store is full", func() bool {
		code, text := ready(t, s)
		return code == http.StatusOK && strings.HasPrefix(text, "ok\nconfiguration: ")
	})
	for id := range made.Load() {
		_, err := secrets.DeleteSecret(t.Context(), &grapnelv1.DeleteSecretRequest{Name: fmt.Sprint("namespaces/acme/secrets/s", id+1)})
		if err != nil && status.Code(err) != codes.NotFound {
			t.Fatalf("delete while full: %v", err)
		}
	}
	servertest.Await(t, "a secret can be created again", func() bool { return create("again") == nil })
	servertest.Await(t, "readyz says that all is well", func() bool {
		code, text := ready(t, s)
		return code == http.StatusOK && text == "ok\n"
	})
}

// ready asks readyz.
func ready(t *testing.T, s *servertest.Server) (code int, text string) {
	t.Helper()
	resp, err := http.Get("http://" + s.AdminAddr + "/readyz")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}
