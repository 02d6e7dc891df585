package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// etcdQuota bounds the embedded etcd's file. Configuration is small: 100 000 subscriptions take about
// 100 MiB, history included.
const etcdQuota = 1 << 30

// configStore is the etcd that holds configuration: a server in this process, or a cluster elsewhere.
type configStore struct {
	client   *clientv3.Client
	embedded *embed.Etcd
}

// openConfigStore starts the embedded etcd, or dials the external one. The embedded one listens on no
// socket: it has one member, and its only client is in this process.
func openConfigStore(ctx context.Context, o Options) (*configStore, error) {
	if len(o.EtcdEndpoints) > 0 {
		return dialEtcd(o)
	}
	cfg := embed.NewConfig()
	cfg.Name = "grapnel"
	cfg.Dir = filepath.Join(o.DataDir, "etcd")
	cfg.ListenClientUrls, cfg.ListenPeerUrls = nil, nil
	cfg.AdvertiseClientUrls = nil
	// Never listened on or dialled: a member needs a peer address to be told apart.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:1"}
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	// A single member waits one election timeout at start, so a short one starts sooner.
	cfg.TickMs, cfg.ElectionMs = 50, 250
	cfg.QuotaBackendBytes = etcdQuota
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModeRevision, "1000"
	cfg.SnapshotCount = 10_000
	cfg.MaxRequestBytes = 2 << 20
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&slogCore{log: o.Logger.With("component", "etcd")}))
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start embedded etcd in %s: %w", cfg.Dir, err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		e.Close()
		return nil, fmt.Errorf("start embedded etcd in %s: %w", cfg.Dir, err)
	case <-ctx.Done():
		e.Close()
		return nil, ctx.Err()
	}
	return &configStore{client: v3client.New(e.Server), embedded: e}, nil
}

func dialEtcd(o Options) (*configStore, error) {
	tlsConfig, err := o.EtcdTLS.load()
	if err != nil {
		return nil, err
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: o.EtcdEndpoints, TLS: tlsConfig,
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
		Logger: zap.New(&slogCore{log: o.Logger.With("component", "etcd")}),
		// gRPC's own backoff grows to two minutes: too long to notice that etcd is back.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 200 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: 3 * time.Second,
		})},
	})
	if err != nil {
		return nil, fmt.Errorf("dial etcd at %v: %w", o.EtcdEndpoints, err)
	}
	return &configStore{client: c}, nil
}

// failed reports the end of the embedded server, when there is one.
func (c *configStore) failed() <-chan error {
	if c.embedded == nil {
		return nil
	}
	return c.embedded.Err()
}

// watchSpace registers what tells an operator that the embedded etcd fills up. At its quota it refuses
// every change until history has been compacted away; deliveries do not notice.
func (c *configStore) watchSpace(r prometheus.Registerer) {
	if c.embedded == nil {
		return
	}
	r.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_config_store_bytes", Help: "Size of the embedded etcd's file.",
		}, func() float64 { return float64(c.embedded.Server.Backend().Size()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_config_store_quota_bytes", Help: "Size at which the embedded etcd refuses changes.",
		}, func() float64 { return etcdQuota }),
	)
}

// full reports whether the embedded etcd has raised its alarm for want of space.
func (c *configStore) full() bool { return c.embedded != nil && len(c.embedded.Server.Alarms()) > 0 }

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

// slogCore hands etcd's log to slog one level lower: what etcd calls a warning (a slow disk, a missing
// peer address) is rarely one for our operator.
type slogCore struct {
	log    *slog.Logger
	fields []zapcore.Field
}

func (c *slogCore) Enabled(l zapcore.Level) bool {
	return c.log.Enabled(context.Background(), slogLevel(l))
}

func (c *slogCore) With(fields []zapcore.Field) zapcore.Core {
	return &slogCore{log: c.log, fields: append(append([]zapcore.Field(nil), c.fields...), fields...)}
}

func (c *slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(append([]zapcore.Field(nil), c.fields...), fields...) {
		f.AddTo(enc)
	}
	attrs := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	level := slogLevel(e.Level)
	switch e.Message {
	case "failed to update storage version", // at a first start, before the first entry; etcd tries again
		"Running http and grpc server on single port. This is not recommended for production.", // on none
		"simple token is not cryptographically signed":                                         // nobody logs in
		level = slog.LevelDebug
	}
	c.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}

func (c *slogCore) Sync() error { return nil }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelWarn
	case l >= zapcore.WarnLevel:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}
