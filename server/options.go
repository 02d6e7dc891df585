package server

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// Options of a Server. The zero value of a field means the default named in its comment; New fills it.
type Options struct {
	// DataDir holds the journal, the embedded etcd and the key of the secrets. Required.
	DataDir string
	// Listen is the address of the public API, default 127.0.0.1:7070.
	Listen string
	// AdminListen serves metrics, health, pprof and reflection, default 127.0.0.1:7071.
	AdminListen string
	// EtcdEndpoints of an external cluster; empty starts the embedded server.
	EtcdEndpoints []string
	EtcdTLS       EtcdTLS
	// EtcdUser and EtcdPassword are for an external etcd with authentication.
	EtcdUser, EtcdPassword string
	// EtcdQuota is the size of the embedded etcd's file, in bytes, from which on new configuration is refused. Deletions
	// may let it grow by another quarter. Default 1 GiB; 100 000 subscriptions take about 100 MiB.
	EtcdQuota int64
	// AdoptStores takes the journal and the etcd that are there for each other's although at least one of them is
	// new or a stranger. What the other one had is then gone for good.
	AdoptStores bool
	// Partitions of a new journal, default 16; an existing one keeps its own and is not opened with another number.
	Partitions int
	// MemoryBytes is what the server and the first-party plugins may use together; default the least of the machine's
	// memory and the limits of the control groups that the process is in. Caches, windows and soft limits follow it.
	MemoryBytes int64
	// WindowBytes bounds the deliveries that wait in memory, Slots the attempts in flight; defaults by MemoryBytes.
	WindowBytes int64
	Slots       int
	// MaxCalls bounds the unary calls and, apart, the publish streams in progress, MaxCallsPerNamespace those of one
	// namespace, MaxCallsPerConnection all that is open on one connection, MaxStreamsPerConnection the publish streams
	// among it, MaxWatches the calls and streams of health and reflection. Defaults as in api.Options.
	MaxCalls, MaxCallsPerNamespace, MaxCallsPerConnection, MaxStreamsPerConnection, MaxWatches int
	// DebugSweep has the admin listener take POST /debug/sweep?keep=DURATION, which erases history: for trials.
	DebugSweep bool
	// AcceptLoss starts a journal that holds less than was acknowledged; the loss is told.
	AcceptLoss bool
	// PluginDir holds third-party plugins: those of its plugins.lock, or without one every executable file in
	// it. It is watched. Empty means none.
	PluginDir string
	// EgressAllow opens private or reserved ranges to deliveries.
	EgressAllow []netip.Prefix
	// EgressDeny closes ranges to deliveries whatever is allowed, with a port or without: 10.0.0.0/8, 127.0.0.1/32:7071. The
	// server's own listeners are always closed.
	EgressDeny []string
	// TLSCert and TLSKey are PEM files for the public API.
	TLSCert, TLSKey string
	// Insecure allows a public address without TLS and authentication.
	Insecure bool
	// MinFreeBytes is the free space on the disk below which nothing new is taken: for trials. Default 256 MiB, or a tenth of
	// the disk where that is less.
	MinFreeBytes int64
	// NodeName is the last segment of nodes/{node}; default the host name.
	NodeName string
	// Grace bounds the wait for attempts in flight at the end; default 30 s, below zero none.
	Grace time.Duration
	// BuiltinPlugin is the command of the process that serves the first-party plugins; default this
	// executable with the arguments plugin serve.
	BuiltinPlugin []string
	// BuiltinParts are the processes that the command is started as, with the part's name as its last argument. Without
	// any it is started once, as it is.
	BuiltinParts    []BuiltinPart
	Version, Commit string
	// Tracing sends traces as the environment's OTEL_* variables say; see package tracing. Without it they are not looked at.
	Tracing bool
	// Logger, default none.
	Logger *slog.Logger
	// Abandon, when closed, ends the wait for attempts in flight, and has a stop that has begun end within a second.
	Abandon <-chan struct{}
}

// BuiltinPart is one process of the bundled plugin.
type BuiltinPart struct {
	Name string
	// Kinds that it offers, and that nobody else may, with the URI schemes that each is the default for.
	Kinds map[string][]string
	// Confined has it run with little memory and few files. Of one that is not, readiness depends.
	Confined bool
}

// Bounds of EtcdQuota: less does not hold a tenant, more is slow to open and to make anew.
const (
	minEtcdQuota = 16 << 20
	maxEtcdQuota = 8 << 30
)

// EtcdTLS names the files for TLS to an external etcd. All empty means plain text.
type EtcdTLS struct {
	CAFile, CertFile, KeyFile string
}

// fill puts the defaults in and reports every fault at once.
func (o *Options) fill() error {
	var errs []error
	if o.DataDir == "" {
		errs = append(errs, errors.New("data-dir: required"))
	}
	if o.Listen == "" {
		o.Listen = "127.0.0.1:7070"
	}
	if o.AdminListen == "" {
		o.AdminListen = "127.0.0.1:7071"
	}
	if o.Partitions < 0 || o.Partitions > 1024 {
		errs = append(errs, fmt.Errorf("partitions: %d given, 1 to 1024 allowed", o.Partitions))
	}
	if o.EtcdQuota == 0 {
		o.EtcdQuota = 1 << 30
	}
	if o.EtcdQuota < minEtcdQuota || o.EtcdQuota > maxEtcdQuota {
		errs = append(errs, fmt.Errorf("etcd-quota: %d bytes given, %d to %d allowed", o.EtcdQuota, minEtcdQuota, maxEtcdQuota))
	}
	if o.MinFreeBytes < 0 {
		errs = append(errs, fmt.Errorf("min-free-bytes: %d given; must not be negative", o.MinFreeBytes))
	}
	if o.MemoryBytes < 0 || o.WindowBytes < 0 || o.Slots < 0 {
		errs = append(errs, errors.New("memory, window-bytes and slots: must not be negative"))
	}
	if min(o.MaxCalls, o.MaxCallsPerNamespace, o.MaxCallsPerConnection, o.MaxStreamsPerConnection, o.MaxWatches) < 0 {
		errs = append(errs, errors.New("max-calls, max-calls-per-namespace, max-calls-per-connection, max-streams-per-connection and max-watches: must not be negative"))
	}
	errs = append(errs, o.checkEtcd())
	if o.Grace == 0 {
		o.Grace = 30 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.NodeName == "" {
		o.NodeName, _ = os.Hostname()
	}
	if o.NodeName == "" {
		o.NodeName = "node"
	}
	if (o.TLSCert == "") != (o.TLSKey == "") {
		errs = append(errs, errors.New("tls-cert and tls-key: both or neither"))
	}
	if (o.EtcdTLS.CertFile == "") != (o.EtcdTLS.KeyFile == "") {
		errs = append(errs, errors.New("etcd-cert and etcd-key: both or neither"))
	}
	errs = append(errs, o.checkExposure())
	if len(o.BuiltinPlugin) == 0 {
		self, err := os.Executable()
		if err != nil {
			errs = append(errs, fmt.Errorf("find the builtin plugin: %w", err))
		}
		o.BuiltinPlugin = []string{self, "plugin", "serve"}
	}
	return errors.Join(errs...)
}

// checkEtcd refuses what etcd's client would ignore.
func (o *Options) checkEtcd() error {
	for _, endpoint := range o.EtcdEndpoints {
		// Not with the endpoint: it holds the password.
		if strings.Contains(endpoint, "@") {
			return errors.New("etcd-endpoints: user and password do not go into an endpoint; give --etcd-user and --etcd-password-file")
		}
	}
	if (o.EtcdUser == "") != (o.EtcdPassword == "") {
		return errors.New("etcd-user and etcd-password-file: both or neither")
	}
	if o.EtcdUser != "" && len(o.EtcdEndpoints) == 0 {
		return errors.New("etcd-user: the embedded etcd has no users; it is for --etcd-endpoints")
	}
	return nil
}

// checkExposure refuses a public address that anybody could use: authentication is not built yet, so such
// an address needs --insecure even with TLS.
func (o *Options) checkExposure() error {
	for flag, addr := range map[string]string{"listen": o.Listen, "admin-listen": o.AdminListen} {
		host, _, err := net.SplitHostPort(addr)
		if err != nil {
			return fmt.Errorf("%s: %w", flag, err)
		}
		ip, err := netip.ParseAddr(host)
		loopback := host == "localhost" || err == nil && ip.IsLoopback()
		if !loopback && !o.Insecure {
			return fmt.Errorf("%s: %s is not a loopback address and callers are not authenticated; "+
				"listen on 127.0.0.1 behind a proxy that authenticates, or give --insecure", flag, addr)
		}
	}
	return nil
}
