package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// runEtcd is what the test binary does as `etcd DIR ADDR`: it serves one member until its standard input ends.
func runEtcd(dir, addr string) error {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	client, peer := url.URL{Scheme: "http", Host: addr}, url.URL{Scheme: "http", Host: "127.0.0.1:0"}
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

// etcdProcess is an etcd in a process of its own, which can be killed and started again.
type etcdProcess struct {
	dir, addr string
	cmd       *exec.Cmd
}

func startEtcd(t *testing.T) *etcdProcess {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &etcdProcess{dir: t.TempDir(), addr: l.Addr().String()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.kill)
	if err := e.start(); err != nil {
		t.Fatal(err)
	}
	return e
}

// start returns when it serves.
func (e *etcdProcess) start() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	e.cmd = exec.Command(self, "etcd", e.dir, e.addr)
	e.cmd.Stderr = os.Stderr
	if _, err := e.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := e.cmd.Start(); err != nil {
		return err
	}
	late := time.AfterFunc(30*time.Second, e.kill)
	defer late.Stop()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "ready" {
		return fmt.Errorf("etcd is not ready: %q, %w", line, err)
	}
	return nil
}

// kill is kill -9.
func (e *etcdProcess) kill() {
	if e.cmd == nil || e.cmd.Process == nil {
		return
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
}
