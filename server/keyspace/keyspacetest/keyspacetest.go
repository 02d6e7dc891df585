// Package keyspacetest runs an embedded etcd for tests: a real server on a unix socket, quick and quiet,
// which can be stopped and started again. For tests only: nothing it stores is synced.
package keyspacetest

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// Etcd is a server with a client of it. The client survives Stop and Restart of the server.
type Etcd struct {
	Client *clientv3.Client
	dir    string
	server *embed.Etcd
}

// Start makes an etcd with no data. It must be closed.
func Start() (*Etcd, error) {
	// A socket's path must be short, so that a test's own directory will not do.
	dir, err := os.MkdirTemp("", "etcd")
	if err != nil {
		return nil, err
	}
	e := &Etcd{dir: dir}
	if err := e.Restart(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	e.Client, err = clientv3.New(clientv3.Config{
		Endpoints: []string{"unix://" + filepath.Join(dir, "client")},
		Logger:    zap.NewNop(),
		// Tests should not wait for a reconnect longer than they must.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 100 * time.Millisecond},
		})},
	})
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

// Local returns a client in the server's own process, as an embedding server would use. It ends with Stop.
func (e *Etcd) Local() *clientv3.Client { return v3client.New(e.server.Server) }

// Restart starts a stopped server on its data.
func (e *Etcd) Restart() error {
	socket := func(name string) []url.URL {
		return []url.URL{{Scheme: "unix", Path: filepath.Join(e.dir, name)}}
	}
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(e.dir, "data")
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = socket("client"), socket("client")
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = socket("peer"), socket("peer")
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.EnableGRPCGateway = false
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.SnapshotCount = 1000
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		return fmt.Errorf("start etcd: %w", err)
	case <-time.After(30 * time.Second):
		server.Close()
		return errors.New("start etcd: it does not get ready")
	}
	e.server = server
	return nil
}

// Stop ends the server and keeps its data.
func (e *Etcd) Stop() {
	if e.server != nil {
		e.server.Close()
		e.server = nil
	}
}

// Wipe removes the data of a stopped server: after Restart its history begins anew.
func (e *Etcd) Wipe() error { return os.RemoveAll(filepath.Join(e.dir, "data")) }

// Close ends everything and removes the data.
func (e *Etcd) Close() error {
	var err error
	if e.Client != nil {
		err = e.Client.Close()
	}
	e.Stop()
	return errors.Join(err, os.RemoveAll(e.dir))
}
