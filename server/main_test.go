package server_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/grapnel/grapnel/server/servertest"
)

// TestMain lets the test binary be an etcd of its own process, besides a plugin and the tests.
func TestMain(m *testing.M) {
	if len(os.Args) >= 4 && os.Args[1] == "etcd" {
		if err := runEtcd(os.Args[2], os.Args[3], os.Args[4:]...); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	servertest.Main(m)
}

// runEtcd serves one member on addr until its standard input ends; with the files of a CA, a certificate
// and its key, by TLS to clients that have a certificate of the same CA.
func runEtcd(dir, addr string, certs ...string) error {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	client := url.URL{Scheme: "http", Host: addr}
	if len(certs) == 3 {
		client.Scheme = "https"
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = certs[0], certs[1], certs[2]
		cfg.ClientTLSInfo.ClientCertAuth = true
	}
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	cfg.TickMs, cfg.ElectionMs = 20, 100
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	<-e.Server.ReadyNotify()
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// externalEtcd is an etcd in a process of its own that can be killed and started again.
type externalEtcd struct {
	t    *testing.T
	dir  string
	addr string
	// certs, when set, are used for TLS.
	certs *certificates
	cmd   *exec.Cmd
}

func startEtcd(t *testing.T) *externalEtcd {
	e := &externalEtcd{t: t, dir: t.TempDir(), addr: freeAddr(t)}
	e.start()
	t.Cleanup(e.kill)
	return e
}

func (e *externalEtcd) start() {
	e.t.Helper()
	self, err := os.Executable()
	if err != nil {
		e.t.Fatal(err)
	}
	args := []string{"etcd", e.dir, e.addr}
	if c := e.certs; c != nil {
		args = append(args, c.ca, c.cert, c.key)
	}
	e.cmd = exec.Command(self, args...)
	e.cmd.Stderr = os.Stderr
	if _, err := e.cmd.StdinPipe(); err != nil {
		e.t.Fatal(err)
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		e.t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	ready := make(chan string, 1)
	go func() {
		line := make([]byte, 16)
		n, _ := out.Read(line)
		ready <- strings.TrimSpace(string(line[:n]))
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case line := <-ready:
		if line != "ready" {
			e.t.Fatalf("etcd said %q", line)
		}
	case <-time.After(30 * time.Second):
		e.t.Fatal("etcd is not ready after 30s")
	}
}

// kill is kill -9.
func (e *externalEtcd) kill() {
	if e.cmd == nil {
		return
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
	e.cmd = nil
}

// newServer serves h on a socket until the test ends and returns its URL.
func newServer(t *testing.T, h http.Handler) string {
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}
