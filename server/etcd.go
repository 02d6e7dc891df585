package server

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// configStore is the etcd that holds configuration: a server in this process, or a cluster elsewhere.
type configStore struct {
	client   *clientv3.Client
	embedded *embed.Etcd
	log      *slog.Logger
	quota    int64 // of the embedded one's file, in bytes
	room     etcdRoom
	// cluster is what etcd calls itself, and keeps for life.
	cluster uint64
}

// openConfigStore starts the embedded etcd, or dials the external one, and returns once it answers.
func openConfigStore(ctx context.Context, o Options) (c *configStore, err error) {
	if len(o.EtcdEndpoints) > 0 {
		c, err = dialEtcd(ctx, o)
	} else {
		c, err = openEmbedded(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	c.log = o.Logger.With("component", "etcd")
	if err := wait(ctx, c.log, "etcd to answer", func(ctx context.Context) error { return c.meet(ctx, o) }); err != nil {
		return nil, errors.Join(err, c.close())
	}
	return c, nil
}

// meet asks etcd something for the first time. The error is the cause where the client hides it.
func (c *configStore) meet(ctx context.Context, o Options) error {
	resp, err := c.client.Get(ctx, configPrefix, clientv3.WithCountOnly())
	if errors.Is(err, rpctypes.ErrUserEmpty) {
		return fmt.Errorf("etcd at %s wants a user: %w; give --etcd-user and --etcd-password-file", strings.Join(o.EtcdEndpoints, ", "), err)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("etcd at %s: %w", strings.Join(o.EtcdEndpoints, ", "), err), diagnose(ctx, o))
	}
	c.cluster = resp.Header.GetClusterId()
	return nil
}

// configPrefix is where all keys of ours are.
const configPrefix = "/grapnel/v1/"

// etcdDir is where the embedded etcd lives. What it has made it keeps in member/, which appears there whole or not
// at all.
func etcdDir(o Options) string { return filepath.Join(o.DataDir, "etcd") }

// etcdMade reports whether there is an embedded etcd, of whatever state.
func etcdMade(o Options) bool {
	_, err := os.Stat(filepath.Join(etcdDir(o), "member"))
	return !errors.Is(err, fs.ErrNotExist)
}

// openEmbedded starts the embedded etcd, and makes one first where there is none. It listens on no socket: it has one
// member, and its only client is in this process.
func openEmbedded(ctx context.Context, o Options) (*configStore, error) {
	dir := etcdDir(o)
	if err := makeEtcd(ctx, o); err != nil {
		return nil, fmt.Errorf("make the embedded etcd in %s: %w", dir, err)
	}
	if err := checkEtcd(dir); err != nil {
		return nil, fmt.Errorf("embedded etcd: %w", err)
	}
	var e *embed.Etcd
	err := wait(ctx, o.Logger.With("component", "etcd"), "the embedded etcd to come up", func(ctx context.Context) (err error) {
		e, err = startEtcd(ctx, etcdConfig(o, dir))
		return err
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded) || err != nil && ctx.Err() == nil:
		return nil, fmt.Errorf("the embedded etcd in %s does not come up: %w; its log in member/wal may be damaged, cut off or another's; %s", dir, err, wayOut(dir))
	case err != nil:
		return nil, err
	}
	return &configStore{client: v3client.New(e.Server), embedded: e, quota: o.EtcdQuota}, nil
}

// makeEtcd makes an etcd aside, and gives it its place when it has written and said that it is ready. One that was
// left half-made is thrown away: nobody was told of anything in it.
func makeEtcd(ctx context.Context, o Options) error {
	dir := etcdDir(o)
	aside := filepath.Join(dir, "new")
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if etcdMade(o) {
		return nil
	}
	if err := makeDir(aside); err != nil {
		return err
	}
	err := wait(ctx, o.Logger.With("component", "etcd"), "a new etcd to come up", func(ctx context.Context) error {
		cfg := etcdConfig(o, aside)
		cfg.TickMs, cfg.ElectionMs = 5, 25 // it lives for a moment
		e, err := startEtcd(ctx, cfg)
		if err == nil {
			e.Close()
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := moveDurably(filepath.Join(aside, "member"), filepath.Join(dir, "member")); err != nil {
		return err
	}
	return os.RemoveAll(aside)
}

func etcdConfig(o Options, dir string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = "grapnel"
	cfg.Dir = dir
	cfg.ListenClientUrls, cfg.ListenPeerUrls = nil, nil
	cfg.AdvertiseClientUrls = nil
	// Never listened on or dialled: a member needs a peer address to be told apart.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	// The cluster's ID is made of this: no two are the same. An etcd that exists has its own.
	cfg.InitialClusterToken = rand.Text()
	// A single member waits one election timeout at start, so a short one starts sooner.
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.QuotaBackendBytes = hardQuota(o.EtcdQuota)
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, "1000"
	// It has no followers to catch up: what its log holds in memory is for nobody, and is replayed at start.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 2_000, 100
	cfg.MaxRequestBytes = 2 << 20
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(etcdLogger(o.Logger, dir))
	return cfg
}

// startEtcd returns when etcd is ready, or when ctx ends.
func startEtcd(ctx context.Context, cfg *embed.Config) (*embed.Etcd, error) {
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() { // it takes no context
		e, err := embed.StartEtcd(cfg)
		started <- result{e, err}
	}()
	var e *embed.Etcd
	select {
	case r := <-started:
		if r.err != nil {
			return nil, r.err
		}
		e = r.etcd
	case <-ctx.Done():
		go func() {
			if r := <-started; r.err == nil {
				r.etcd.Close()
			}
		}()
		return nil, ctx.Err()
	}
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err := <-e.Err():
		e.Close()
		return nil, err
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	}
}

// checkEtcd finds what etcd itself would wait for without end, or end the process for in a way that tells nobody
// anything: it maps its file into memory, and reading behind a cut is a fault of the processor's.
func checkEtcd(dir string) error {
	logs, err := filepath.Glob(filepath.Join(dir, "member", "wal", "*.wal"))
	if err != nil {
		return err
	}
	if len(logs) == 0 {
		return fmt.Errorf("its log is missing: no *.wal in %s; %s", filepath.Join(dir, "member", "wal"), wayOut(dir))
	}
	if err := checkEtcdLog(logs); err != nil {
		return fmt.Errorf("%w; %s", err, wayOut(dir))
	}
	file := filepath.Join(dir, "member", "snap", "db")
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // made again from the log, where that is whole
	}
	if err != nil {
		return err
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if errors.Is(err, berrors.ErrTimeout) {
		return fmt.Errorf("%s is in use by another process", file)
	}
	if err != nil {
		return fmt.Errorf("its database %s is damaged: %w; %s", file, err, wayOut(dir))
	}
	var size int64
	err = db.View(func(tx *bbolt.Tx) error {
		size = tx.Size()
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("its database %s is damaged: %w; %s", file, err, wayOut(dir))
	}
	if info.Size() < size {
		return fmt.Errorf("its database %s is cut off: %d bytes of %d are there; %s", file, info.Size(), size, wayOut(dir))
	}
	return nil
}

// checkEtcdLog reads the log through, as etcd does at its start, but for its end: what was being written when the process
// was killed is taken away by etcd itself. A log begins with a mark of where it does, which etcd takes for granted.
func checkEtcdLog(files []string) error {
	names := strings.Join(files, ", ")
	marks, err := readEtcdLog(filepath.Dir(files[0]))
	if err != nil {
		return fmt.Errorf("its log %s is damaged: %w", names, err)
	}
	if marks == 0 {
		return fmt.Errorf("its log %s is cut off: there is not even its beginning", names)
	}
	return nil
}

// readEtcdLog counts the marks of a log and reads the entries behind the last one. Checksums do not cover what a record is,
// so that a record may be whole and make no sense: etcd's code panics for some of those.
func readEtcdLog(dir string) (marks int, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("a record makes no sense: %v", fault)
		}
	}()
	log := zap.NewNop().WithOptions(zap.WithFatalHook(zapcore.WriteThenPanic))
	found, err := wal.ValidSnapshotEntries(log, dir)
	if err != nil || len(found) == 0 {
		return 0, err
	}
	w, err := wal.OpenForRead(log, dir, found[len(found)-1])
	if err != nil {
		return 0, err
	}
	defer w.Close()
	_, _, entries, err := w.ReadAll()
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if t := e.GetType(); t != raftpb.EntryNormal && t != raftpb.EntryConfChange && t != raftpb.EntryConfChangeV2 {
			return 0, fmt.Errorf("entry %d is of type %d, which there is not", e.GetIndex(), t)
		}
	}
	return len(found), nil
}

// wayOut is what an operator can do about an embedded etcd that does not come up.
func wayOut(dir string) string {
	return fmt.Sprintf("restore %s from a backup; without one, see \"When it does not start\" in docs/operations.md", dir)
}

func dialEtcd(ctx context.Context, o Options) (*configStore, error) {
	tlsConfig, err := o.EtcdTLS.load()
	if err != nil {
		return nil, err
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: o.EtcdEndpoints, TLS: tlsConfig, Username: o.EtcdUser, Password: o.EtcdPassword,
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
		Logger: etcdLogger(o.Logger, ""),
		// gRPC's own backoff grows to two minutes: too long to notice that etcd is back.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		})},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("dial etcd at %v: %w", o.EtcdEndpoints, err), diagnose(ctx, o))
	}
	return &configStore{client: c}, nil
}

// diagnose finds out why none of the external endpoints answers: the client hides what TLS and the network say. It takes
// two seconds at the most, also when ctx is over, unless that was cancelled.
func diagnose(ctx context.Context, o Options) error {
	if len(o.EtcdEndpoints) == 0 || errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	tlsConfig, err := o.EtcdTLS.load()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	causes := make([]error, len(o.EtcdEndpoints))
	var asked sync.WaitGroup
	for i, endpoint := range o.EtcdEndpoints {
		asked.Go(func() {
			if err := knock(ctx, endpoint, tlsConfig); err != nil {
				causes[i] = fmt.Errorf("%s: %w", endpoint, err)
			}
		})
	}
	asked.Wait()
	return errors.Join(causes...)
}

// knock connects to an endpoint of etcd, and has TLS spoken where that is to be.
func knock(ctx context.Context, endpoint string, config *tls.Config) error {
	secure, addr := config != nil, endpoint
	if scheme, rest, ok := strings.Cut(endpoint, "://"); ok {
		secure, addr = strings.HasPrefix(scheme, "https"), rest
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if !secure {
		return nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if config != nil {
		cfg = config.Clone()
	}
	cfg.ServerName, _, _ = net.SplitHostPort(addr)
	if err := tls.Client(conn, cfg).HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w; does this port speak TLS?", err)
	}
	return nil
}

// failed reports the end of the embedded server, when there is one.
func (c *configStore) failed() <-chan error {
	if c.embedded == nil {
		return nil
	}
	return c.embedded.Err()
}

func (c *configStore) close() error {
	err := c.client.Close()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	if c.embedded != nil {
		c.embedded.Close()
	}
	return err
}

// load reads the files; nil when none is named.
func (t EtcdTLS) load() (*tls.Config, error) {
	if t == (EtcdTLS{}) {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read etcd CA: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read etcd CA: %s holds no PEM certificate", t.CAFile)
		}
	}
	if t.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read etcd client certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}
