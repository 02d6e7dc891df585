package httpplugin

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/internal/gate"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxProxyAnswer is how much of a proxy's answer to CONNECT is read.
	maxProxyAnswer = 16 << 10
	// maxProxyTries is to how many of a name's addresses a proxy is asked to connect.
	maxProxyTries = 4
)

// proxy is a forward proxy. Every connection goes through a tunnel, to http receivers too, so that what is
// sent reaches the receiver as it was signed.
//
// The egress policy holds in two places: the proxy's own address is checked when it is dialled, and the
// receiver's is looked up here, checked, and asked for by number. Only with resolve "proxy" is the
// receiver's name handed on; then the proxy decides where it may lead. Literal addresses are always
// checked here.
type proxy struct {
	scheme   string // http, https or socks5
	hostname string
	addr     string // host:port to dial
	remote   bool   // the proxy resolves names
	user     string
	password string
	login    bool        // credentials are given
	tls      *tls.Config // of scheme https
	// shaking is the process's gate of handshakes.
	shaking *gate.Gate
}

// proxyRefusal is what a proxy that was reached said, in words of our own.
type proxyRefusal struct {
	code, message string
	// another says that another address of the receiver may be reachable.
	another bool
}

func (e *proxyRefusal) Error() string { return e.message }

func newProxy(c Config) (*proxy, error) {
	if c.Proxy.URL == "" {
		return nil, nil
	}
	u, err := parseProxyURL(c.Proxy.URL)
	if err != nil {
		return nil, err
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080"}[u.Scheme]
	}
	x := &proxy{
		scheme: u.Scheme, hostname: u.Hostname(), addr: net.JoinHostPort(u.Hostname(), port), remote: c.Proxy.Resolve == resolveProxy,
	}
	if !c.ProxyCredentials.Empty() {
		x.user, x.password, x.login = strings.Cut(string(c.ProxyCredentials.Values()[0]), ":")
	}
	return x, nil
}

func parseProxyURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("it is not a URL; want http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT")
	}
	switch {
	case u.User != nil:
		return nil, errors.New("it holds a user name or password; put user:password into the secret slot proxy_credentials")
	case u.Scheme == "socks5h":
		return nil, errors.New(`the scheme socks5h is not known here; want socks5, and resolve "proxy" if the proxy is to look up names`)
	case u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "socks5":
		return nil, errors.New("want http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT")
	case u.Opaque != "" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.Path != "" && u.Path != "/":
		return nil, errors.New("want a host and a port only, such as http://proxy.example.com:3128")
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && (err != nil || port == 0) {
		return nil, errors.New("its port must be 1 to 65535")
	}
	return u, outbound.CheckHost(u.Hostname())
}

// dial connects to addr, host:port, through the proxy. Errors are of type *outbound.Error.
func (x *proxy) dial(ctx context.Context, dialer outbound.Dialer, addr string) (net.Conn, error) {
	wants, err := x.targets(ctx, dialer, addr)
	if err != nil {
		return nil, err
	}
	var last error
	for _, want := range wants {
		conn, err := x.tunnel(ctx, dialer, want)
		if err == nil {
			return conn, nil
		}
		last = err
		var refusal *proxyRefusal
		if !errors.As(err, &refusal) || !refusal.another {
			break
		}
	}
	return nil, last
}

// targets are the addresses to ask the proxy for, all of which the egress policy allows.
func (x *proxy) targets(ctx context.Context, dialer outbound.Dialer, addr string) ([]string, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &outbound.Error{Code: plugin.CodeConnect, Err: err}
	}
	if _, err := netip.ParseAddr(host); err != nil && x.remote {
		if meansLoopback(host) || looksNumeric(host) {
			return nil, &outbound.Error{Code: plugin.CodeEgress, Err: plugin.ErrEgressDenied}
		}
		return []string{addr}, nil
	}
	allowed, err := dialer.Allowed(ctx, addr)
	if err != nil {
		return nil, err
	}
	var wants []string
	for _, ap := range allowed[:min(len(allowed), maxProxyTries)] {
		wants = append(wants, ap.String())
	}
	return wants, nil
}

// meansLoopback knows the names that RFC 6761 gives to loopback.
func meansLoopback(host string) bool {
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	return host == "localhost" || strings.HasSuffix(host, ".localhost") || host == "localhost.localdomain"
}

// looksNumeric reports whether some resolvers read the name as an IPv4 address in one of its older
// notations (127.1, 0x7f000001, 2130706433), as WHATWG's URL standard tells them apart: by the last label.
func looksNumeric(host string) bool {
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	last := host[strings.LastIndexByte(host, '.')+1:]
	if hex, ok := strings.CutPrefix(last, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return last != "" && strings.Trim(last, "0123456789") == ""
}

// tunnel opens one connection through the proxy to want, host:port.
func (x *proxy) tunnel(ctx context.Context, dialer outbound.Dialer, want string) (net.Conn, error) {
	raw, err := dialer.Dial(ctx, x.addr)
	if err != nil {
		return nil, ofProxy(err)
	}
	conn := raw
	if x.tls != nil {
		secure, err := outbound.Secure(ctx, raw, x.tls, x.shaking)
		if err != nil {
			return nil, ofProxy(err)
		}
		conn = secure
	}
	if err := x.agree(ctx, conn, want); err != nil {
		_ = conn.Close()
		failed := &outbound.Error{Code: plugin.CodeConnect, Err: err, Proxy: true}
		var refusal *proxyRefusal
		if errors.As(err, &refusal) {
			failed.Code, failed.Message = refusal.code, refusal.message
		}
		return nil, failed
	}
	return &tunnel{Conn: conn, socket: raw, peer: want}, nil
}

// ofProxy marks an error as the proxy's.
func ofProxy(err error) error {
	var e *outbound.Error
	if !errors.As(err, &e) {
		return err
	}
	own := *e
	own.Proxy = true
	return &own
}

// agree has the proxy connect to want, within ctx.
func (x *proxy) agree(ctx context.Context, conn net.Conn, want string) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	var err error
	if x.scheme == "socks5" {
		err = x.socks5(conn, want)
	} else {
		err = x.connect(conn, want)
	}
	if !stop() && err == nil {
		return ctx.Err()
	}
	return err
}

// connect is HTTP's CONNECT (RFC 9110, section 9.3.6).
func (x *proxy) connect(conn net.Conn, want string) error {
	head := "CONNECT " + want + " HTTP/1.1\r\nHost: " + want + "\r\n"
	if x.login {
		head += "Proxy-Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(x.user+":"+x.password)) + "\r\n"
	}
	if _, err := io.WriteString(conn, head+"\r\n"); err != nil {
		return err
	}
	reader := bufio.NewReader(io.LimitReader(conn, maxProxyAnswer))
	for {
		resp, err := http.ReadResponse(reader, &http.Request{Method: http.MethodConnect})
		switch {
		case err != nil && (outbound.IsTimeout(err) || outbound.IsReset(err)):
			return err
		case err != nil:
			return &proxyRefusal{code: plugin.CodeProtocol, message: "it did not answer in HTTP"}
		case resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols:
			continue // interim, within the bound
		case resp.StatusCode/100 != 2:
			return connectRefusal(resp.StatusCode, x.login)
		case reader.Buffered() > 0:
			// Whoever speaks before being spoken to is not the receiver.
			return &proxyRefusal{code: plugin.CodeProtocol, message: "it sent more than its answer to CONNECT"}
		}
		return nil
	}
}

func connectRefusal(status int, login bool) *proxyRefusal {
	text := strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status)))
	switch status {
	case http.StatusProxyAuthRequired:
		if !login {
			return &proxyRefusal{code: plugin.CodeConfig, message: "it wants credentials, and the slot proxy_credentials is empty"}
		}
		return &proxyRefusal{code: plugin.CodeConfig, message: "it refused the credentials"}
	case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return &proxyRefusal{code: plugin.CodeConnect, message: "it could not reach the receiver: " + text, another: true}
	}
	return &proxyRefusal{code: plugin.CodeConnect, message: "it refused to connect to the receiver: " + text}
}

// tunnel is a connection through a proxy. Its peer is the receiver.
type tunnel struct {
	net.Conn
	socket net.Conn // below TLS to the proxy
	peer   string
}

type peerAddr string

func (peerAddr) Network() string  { return "tcp" }
func (a peerAddr) String() string { return string(a) }

// RemoteAddr is the address that the proxy was asked for.
func (t *tunnel) RemoteAddr() net.Addr { return peerAddr(t.peer) }

// SyscallConn is the socket's, for the probe of idle connections.
func (t *tunnel) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := t.socket.(syscall.Conn); ok {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}

// readProxyCredentials is the format of slot proxy_credentials.
func readProxyCredentials(value []byte) (plugin.SecretInfo, error) {
	user, password, found := strings.Cut(string(value), ":")
	if !found || user == "" || strings.ContainsFunc(string(value), func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return plugin.SecretInfo{}, errors.New("want user:password on one line")
	}
	if len(user) > 255 || len(password) > 255 {
		return plugin.SecretInfo{}, errors.New("user and password may have 255 bytes each")
	}
	return plugin.SecretInfo{}, nil
}

// checkProxy looks at the proxy's URL and at what it gives away of its address.
func checkProxy(c Config, egress *plugin.Egress) []plugin.Problem {
	const pointer = "/config/proxy/url"
	if c.Proxy.URL == "" {
		if !c.ProxyCredentials.Empty() {
			return []plugin.Problem{outbound.Unused("proxy_credentials", "proxy.url is empty")}
		}
		return nil
	}
	x, err := newProxy(c)
	if err != nil {
		return []plugin.Problem{{Pointer: pointer, Code: "proxy.url", Summary: err.Error()}}
	}
	_, text, _ := net.SplitHostPort(x.addr)
	port, _ := strconv.ParseUint(text, 10, 16) // was read a moment ago
	var problems []plugin.Problem
	for _, p := range (&outbound.Address{Host: x.hostname, Port: uint16(port)}).Check(egress) {
		p.Pointer, p.Code = pointer, strings.Replace(p.Code, "uri.", "proxy.", 1)
		problems = append(problems, p)
	}
	if x.login && x.scheme != "https" {
		problems = append(problems, plugin.Problem{
			Pointer: pointer, Code: "proxy.plaintext", Warning: true,
			Summary: "everyone on the way to the proxy can read its credentials; use https:// if the proxy offers it",
		})
	}
	return problems
}
