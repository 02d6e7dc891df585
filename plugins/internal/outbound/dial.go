package outbound

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// stagger is how long an address is alone in being tried (RFC 8305, section 5).
	stagger = 250 * time.Millisecond
	// maxAddresses is how many addresses of a name are tried.
	maxAddresses = 8
)

// ErrNowhere is a name without an address that may be delivered to. It does not say whether the name exists, lest
// errors tell what is inside a network. It may be another answer next time, so that it is no verdict: only an address
// that the URI itself names is refused for good.
var ErrNowhere = errors.New("the host name does not exist, or egress policy forbids every address it has")

// Steps are how long the parts of making a connection took, for whom the context was made that it is made under.
type Steps struct{ DNS, Connect, TLS time.Duration }

type stepsKey struct{}

// Timed has what is dialled under the context noted in s, which is not to be read before that has ended.
func Timed(ctx context.Context, s *Steps) context.Context {
	return context.WithValue(ctx, stepsKey{}, s)
}

// StepsOf is where to note; never nil.
func StepsOf(ctx context.Context) *Steps {
	if s, ok := ctx.Value(stepsKey{}).(*Steps); ok {
		return s
	}
	return &Steps{}
}

// Dialer connects under an egress policy. The zero value denies everything.
type Dialer struct {
	Egress *plugin.Egress
	// Timeout bounds a name's lookup and its connection together; zero leaves that to the context.
	Timeout time.Duration
	// Resolver looks names up; nil is net.DefaultResolver.
	Resolver *net.Resolver
}

// Dial looks the name up and connects to the first of its allowed addresses that answers; further ones are tried
// beside it a moment later. The policy is asked about each address once more just before it is connected to.
// addr is host:port. Errors are of type *Error: forbidden addresses count only when there are no others, and a
// shortage of this machine counts before what the addresses say, for it may have kept the others from being tried.
func (d Dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	if d.Timeout > 0 {
		bounded, cancel := context.WithTimeout(ctx, d.Timeout)
		defer cancel()
		ctx = bounded
	}
	addresses, err := d.Allowed(ctx, addr)
	if err != nil {
		return nil, err
	}
	return d.race(ctx, addresses)
}

// Allowed looks the name of host:port up, and returns what the policy allows of it, at least one and the families in
// turn. Errors are of type *Error.
func (d Dialer) Allowed(ctx context.Context, addr string) ([]netip.AddrPort, error) {
	host, text, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &Error{Code: plugin.CodeConnect, Err: err}
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return nil, &Error{Code: plugin.CodeConnect, Err: err}
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		ap := netip.AddrPortFrom(ip.Unmap(), uint16(port))
		if err := d.Egress.Check(ap); err != nil {
			return nil, &Error{Code: plugin.CodeEgress, Err: err}
		}
		return []netip.AddrPort{ap}, nil
	}
	resolver := d.Resolver
	if resolver == nil {
		resolver = net.DefaultResolver
	}
	asked := time.Now()
	found, err := resolver.LookupNetIP(ctx, "ip", host)
	StepsOf(ctx).DNS += time.Since(asked)
	var dns *net.DNSError
	switch {
	case err != nil && exhausted(err):
		return nil, &Error{Code: plugin.CodeShortage, Err: err}
	case errors.As(err, &dns) && dns.IsNotFound:
		return nil, &Error{Code: plugin.CodeDNS, Err: ErrNowhere}
	case err != nil:
		return nil, &Error{Code: plugin.CodeDNS, Err: err}
	}
	allowed := d.allowed(found, uint16(port))
	if len(allowed) == 0 {
		return nil, &Error{Code: plugin.CodeDNS, Err: ErrNowhere}
	}
	return allowed, nil
}

func (d Dialer) allowed(found []netip.Addr, port uint16) []netip.AddrPort {
	var families [2][]netip.AddrPort // that of the first, as the resolver has sorted them, and the other
	for _, ip := range found {
		ap := netip.AddrPortFrom(ip.Unmap(), port)
		if d.Egress.Check(ap) != nil {
			continue
		}
		family := 0
		if len(families[0]) > 0 && families[0][0].Addr().Is4() != ap.Addr().Is4() {
			family = 1
		}
		families[family] = append(families[family], ap)
	}
	var turns []netip.AddrPort
	for i := range max(len(families[0]), len(families[1])) {
		for _, of := range families {
			if i < len(of) && len(turns) < maxAddresses {
				turns = append(turns, of[i])
			}
		}
	}
	return turns
}

// outcome of one address.
type outcome struct {
	conn net.Conn
	err  error
}

// race tries the addresses one after the other, the next when one has failed or has been alone for a while.
func (d Dialer) race(ctx context.Context, addresses []netip.AddrPort) (net.Conn, error) {
	dialer := net.Dialer{ControlContext: d.Egress.Control}
	if len(addresses) == 1 { // as mostly
		conn, err := dialer.DialContext(ctx, "tcp", addresses[0].String())
		if err != nil {
			return nil, dialError(err, addresses[0])
		}
		return conn, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	results := make(chan outcome)
	try := func(ap netip.AddrPort) {
		conn, err := dialer.DialContext(ctx, "tcp", ap.String())
		if err != nil {
			err = dialError(err, ap)
		}
		select {
		case results <- outcome{conn, err}:
		case <-ctx.Done(): // another was first
			if conn != nil {
				_ = conn.Close()
			}
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	var worst error
	for next, open := 0, 0; ; {
		select {
		case <-timer.C:
			if next < len(addresses) {
				go try(addresses[next])
				next, open = next+1, open+1
				timer.Reset(stagger)
			}
		case r := <-results:
			if r.err == nil {
				return r.conn, nil
			}
			worst = telling(worst, r.err)
			if open--; next < len(addresses) {
				timer.Reset(0)
			} else if open == 0 {
				return nil, worst
			}
		case <-ctx.Done():
			return nil, &Error{Code: plugin.CodeConnect, Err: ctx.Err()}
		}
	}
}

// telling is which of two addresses' errors to tell: a shortage, else that of an address which there is a way to.
func telling(a, b error) error {
	switch {
	case a == nil:
		return b
	case !exhausted(a) && (exhausted(b) || noWay(a) && !noWay(b)):
		return b
	}
	return a
}

// dialError gives an errno the meaning that it has here.
func dialError(err error, to netip.AddrPort) error {
	e := &Error{Code: plugin.CodeConnect, Err: err}
	switch {
	case errors.Is(err, plugin.ErrEgressDenied):
		e.Code = plugin.CodeEgress
	case errors.Is(err, syscall.EADDRNOTAVAIL) && !routed(to):
		e.Err = errNoRoute
	case exhausted(err):
		e.Code = plugin.CodeShortage
	}
	return e
}

var errNoRoute = errors.New("this machine has no address of the family")

// noWay reports that this machine knows no way to the address.
func noWay(err error) bool {
	return errors.Is(err, errNoRoute) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EHOSTUNREACH) ||
		errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.ENETDOWN)
}

// routed tells the two meanings of EADDRNOTAVAIL apart: all ports taken, or no address to connect from. A UDP socket
// takes a port of another pool, and its connecting sends nothing.
func routed(to netip.AddrPort) bool {
	probe, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return !errors.Is(err, syscall.EADDRNOTAVAIL) && !noWay(err)
	}
	_ = probe.Close()
	return true
}

// exhausted reports what no receiver can be blamed for: this machine has no descriptor, socket or memory left.
func exhausted(err error) bool {
	if errors.Is(err, errNoRoute) {
		return false
	}
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	// The resolver keeps the text of what kept it from asking and not the error, and without a descriptor it does not
	// even read its own files: names of this machine do not exist then.
	return errors.As(err, new(*net.DNSError)) && !spare()
}

// spare reports whether this machine has a descriptor left.
func spare() bool {
	probe, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return !exhausted(err)
	}
	_ = probe.Close()
	return true
}
