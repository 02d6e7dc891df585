package outbound

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// names is a DNS server on loopback that knows the addresses of names, and a resolver that asks it.
func names(t *testing.T, known map[string][]string) *net.Resolver {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if n > 12 {
				_, _ = conn.WriteTo(reply(buf[:n], known), from)
			}
		}
	}()
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// reply answers a query for A or AAAA (RFC 1035, section 4).
func reply(query []byte, known map[string][]string) []byte {
	end, labels := 12, []string(nil)
	for query[end] != 0 {
		size := int(query[end])
		labels = append(labels, string(query[end+1:end+1+size]))
		end += 1 + size
	}
	end++
	kind := binary.BigEndian.Uint16(query[end:])
	question := query[12 : end+4]
	addresses, exists := known[strings.ToLower(strings.Join(labels, "."))]
	var answers []byte
	count := uint16(0)
	for _, text := range addresses {
		ip := netip.MustParseAddr(text)
		if ip.Is4() != (kind == 1) {
			continue
		}
		raw := ip.AsSlice()
		answers = append(answers, 0xc0, 12)
		answers = binary.BigEndian.AppendUint16(answers, kind)
		answers = append(answers, 0, 1, 0, 0, 0, 0, 0, byte(len(raw)))
		answers = append(answers, raw...)
		count++
	}
	flags := uint16(0x8180)
	if !exists {
		flags |= 3
	}
	out := append([]byte(nil), query[:2]...)
	out = binary.BigEndian.AppendUint16(out, flags)
	out = append(out, 0, 1)
	out = binary.BigEndian.AppendUint16(out, count)
	out = append(out, 0, 0, 0, 0)
	return append(append(out, question...), answers...)
}

func listen(t *testing.T, at string) string {
	t.Helper()
	lis, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lis.Close() })
	_, port, _ := net.SplitHostPort(lis.Addr().String())
	return port
}

// closedPort is one that nobody listens on.
func closedPort(t *testing.T) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(lis.Addr().String())
	_ = lis.Close()
	return port
}

func only(ranges ...string) *plugin.Egress {
	var all []netip.Prefix
	for _, r := range ranges {
		all = append(all, netip.MustParsePrefix(r))
	}
	return plugin.NewEgress(all)
}

func TestForbiddenAddressesCountOnlyWhenThereAreNoOthers(t *testing.T) {
	known := map[string][]string{
		"dual.test": {"127.0.0.1", "::1"}, "inside.test": {"127.0.0.1", "::1"}, "two.test": {"127.0.0.1", "127.0.0.2"},
		"v6.test": {"2001:4860:4860::8888"}, "mixed.test": {"2001:4860:4860::8888", "127.0.0.2"},
	}
	resolver := names(t, known)
	closed, open := closedPort(t), listen(t, "127.0.0.2:0")
	for _, tt := range []struct {
		name, addr string
		egress     *plugin.Egress
		want       plugin.Failure // of which source, code and begin of the message count; none when it connects
	}{
		{"nobody listens on the allowed one", "dual.test:" + closed, only("127.0.0.0/8"), plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, Message: "connection refused"}},
		{"the second one listens", "two.test:" + open, only("127.0.0.0/8"), plugin.Failure{}},
		{"the second family listens", "mixed.test:" + open, only("127.0.0.0/8", "2001:4860:4860::8888/128"), plugin.Failure{}},
		{"all are forbidden", "inside.test:" + closed, only(), plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeDNS, Message: ErrNowhere.Error()}},
		{"no such name", "outside.test:" + closed, only(), plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeDNS, Message: ErrNowhere.Error()}},
		{"a literal", "127.0.0.1:" + closed, only(), plugin.Failure{Source: plugin.SourcePolicy, Code: plugin.CodeEgress, Message: "blocked by egress policy"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			conn, err := Dialer{Egress: tt.egress, Resolver: resolver}.Dial(ctx, tt.addr)
			if err == nil {
				_ = conn.Close()
				if tt.want.Code != "" {
					t.Errorf("it connected to %v", conn.RemoteAddr())
				}
				return
			}
			if f := NotConnected(ctx, err); f.Source != tt.want.Source || f.Code != tt.want.Code || f.Message != tt.want.Message || f.WireState != plugin.NotSent {
				t.Errorf("%+v, want %+v", *f, tt.want)
			}
		})
	}
}

// TestNoRouteIsNoShortage: without an address of the family connecting fails as it does when all ports are taken.
func TestNoRouteIsNoShortage(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	for _, addr := range []string{"[2001:4860:4860::8888]:443", "[::1]:1", "240.0.0.1:443"} {
		_, err := Dialer{Egress: only("::/0", "2001:4860:4860::8888/128", "::1/128", "240.0.0.0/4")}.Dial(ctx, addr)
		if err == nil {
			continue // it is there, after all
		}
		if f := NotConnected(ctx, err); f.Source != plugin.SourceEndpoint {
			t.Errorf("%s: %+v (%v): the machine's fault, but it is the way that is missing", addr, *f, err)
		}
	}
}

func TestShortageIsNobodysFault(t *testing.T) {
	resolver := names(t, map[string][]string{"two.test": {"127.0.0.1", "127.0.0.2"}})
	port := listen(t, "127.0.0.1:0")
	var before syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	low := before
	low.Cur = 64
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &low); err != nil {
		t.Skip(err)
	}
	defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &before) //nolint:errcheck // as it was
	var taken []*os.File
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		taken = append(taken, f)
	}
	defer func() {
		for _, f := range taken {
			_ = f.Close()
		}
	}()
	for _, addr := range []string{"127.0.0.1:" + port, "two.test:" + port, "localhost:" + port} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err := Dialer{Egress: only("127.0.0.0/8"), Resolver: resolver}.Dial(ctx, addr)
		if f := NotConnected(ctx, err); f.Source != plugin.SourcePlugin || f.Code != plugin.CodeShortage || f.WireState != plugin.NotSent {
			t.Errorf("%s: %+v (%v), want a shortage", addr, *f, err)
		}
		cancel()
	}
}

// TestErrnosMeanWhatTheySay: one error stands for all addresses of a name, and each is told as what it is.
func TestErrnosMeanWhatTheySay(t *testing.T) {
	to := netip.MustParseAddrPort("127.0.0.1:1")
	wrap := func(errno syscall.Errno) error {
		return dialError(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", errno)}, to)
	}
	for errno, want := range map[syscall.Errno]string{
		syscall.EMFILE: "this machine is out", syscall.ENFILE: "this machine is out", syscall.ENOBUFS: "this machine is out",
		syscall.ENOMEM: "this machine is out", syscall.EADDRNOTAVAIL: "this machine is out",
		syscall.ECONNREFUSED: "connection refused", syscall.ENETUNREACH: "host unreachable", syscall.EHOSTUNREACH: "host unreachable",
		syscall.EAFNOSUPPORT: "host unreachable", syscall.ENETDOWN: "host unreachable", syscall.ETIMEDOUT: "no connection in time",
		syscall.EPERM: "this machine's firewall", syscall.EACCES: "this machine's firewall", syscall.ECONNRESET: "the connection was closed",
	} {
		if f := NotConnected(t.Context(), wrap(errno)); !strings.HasPrefix(f.Message, want) || (f.Code == plugin.CodeShortage) != strings.HasPrefix(want, "this machine is out") {
			t.Errorf("%v: %+v, want %q", errno, *f, want)
		}
	}
	refused, unreachable, short := wrap(syscall.ECONNREFUSED), wrap(syscall.ENETUNREACH), wrap(syscall.EMFILE)
	for _, tt := range []struct{ a, b, want error }{
		{nil, refused, refused}, {refused, unreachable, refused}, {unreachable, refused, refused}, {refused, short, short}, {short, refused, short},
	} {
		if got := telling(tt.a, tt.b); !errors.Is(got, tt.want) {
			t.Errorf("of %v and %v it is %v that is told", tt.a, tt.b, got)
		}
	}
}
