package plugin

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// ErrEgressDenied is the answer to every forbidden address. It names neither the address nor the rule,
// so that its text cannot be used to map the network that the plugin runs in.
var ErrEgressDenied = errors.New("blocked by egress policy")

// Egress decides which addresses a transport may connect to. It denies what the IANA special-purpose
// registries list (loopback, private, link-local, shared, documentation, benchmarking, multicast, …),
// cloud metadata services, and every IPv6 address that carries a denied IPv4 address inside. Public
// addresses are open on ports 80, 443, 8080 and 8443 only; ranges of the allow list on every port.
//
// Metadata services stay closed when a range that holds them is allowed; only their very address
// (a /32 or /128) opens them. What Deny closes stays closed whatever is allowed.
//
// It must be asked with the address that is about to be dialled, after name resolution: see Control.
// Immutable and safe for concurrent use. A nil or zero Egress denies everything.
type Egress struct {
	allow    []netip.Prefix
	deny     []netip.Prefix
	metadata []netip.Addr
	closed   []EgressRule
}

// EgressRule is a range of addresses, on one port or on all.
type EgressRule struct {
	Range netip.Prefix
	Port  uint16 // 0 means every port
}

// String is what ParseEgressRule reads.
func (r EgressRule) String() string {
	if r.Port == 0 {
		return r.Range.String()
	}
	return r.Range.String() + ":" + strconv.Itoa(int(r.Port))
}

// ParseEgressRule reads a range with or without a port, such as 10.0.0.0/8, 127.0.0.1/32:7071 or ::1/128:7071.
func ParseEgressRule(text string) (EgressRule, error) {
	address, rest, _ := strings.Cut(text, "/")
	bits, port, found := strings.Cut(rest, ":")
	prefix, err := netip.ParsePrefix(address + "/" + bits)
	if err != nil {
		return EgressRule{}, fmt.Errorf("%q is not a range such as 10.0.0.0/8 or 127.0.0.1/32:7071", text)
	}
	r := EgressRule{Range: unmapped(prefix)}
	if found {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return EgressRule{}, fmt.Errorf("%q has no port from 1 to 65535 behind its range", text)
		}
		r.Port = uint16(n)
	}
	return r, nil
}

// unmapped is an IPv4-mapped range as IPv4, in canonical form.
func unmapped(p netip.Prefix) netip.Prefix {
	if p.IsValid() && p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked()
}

// NewEgress returns a policy that opens the allow list's ranges on top of public addresses. IPv4-mapped
// ranges count as IPv4; invalid prefixes open nothing.
func NewEgress(allow []netip.Prefix) *Egress {
	e := &Egress{deny: specialRanges(), metadata: metadataAddrs()}
	for _, p := range allow {
		if p = unmapped(p); p.IsValid() {
			e.allow = append(e.allow, p)
		}
	}
	slices.SortFunc(e.allow, netip.Prefix.Compare)
	e.allow = slices.Compact(e.allow)
	return e
}

// Deny returns a policy that closes the rules' ranges, too.
func (e *Egress) Deny(rules ...EgressRule) *Egress {
	out := &Egress{}
	if e != nil {
		*out = *e
	}
	out.closed = slices.Clone(out.closed)
	for _, r := range rules {
		if r.Range = unmapped(r.Range); r.Range.IsValid() {
			out.closed = append(out.closed, r)
		}
	}
	slices.SortFunc(out.closed, func(a, b EgressRule) int { return cmp.Or(a.Range.Compare(b.Range), cmp.Compare(a.Port, b.Port)) })
	out.closed = slices.Compact(out.closed)
	return out
}

// String returns the allow list in canonical form, and what is closed behind exclamation marks, separated by commas;
// policies with equal strings are equal.
func (e *Egress) String() string {
	if e == nil {
		return ""
	}
	var b strings.Builder
	for i, p := range e.allow {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(p.String())
	}
	for _, r := range e.closed {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString("!" + r.String())
	}
	return b.String()
}

// Check returns ErrEgressDenied unless a connection to ap is allowed. Zones are ignored, IPv4-mapped
// addresses are IPv4 addresses, and what cannot be read as an address and a port is denied.
func (e *Egress) Check(ap netip.AddrPort) error {
	if e == nil || !ap.IsValid() || ap.Port() == 0 || !e.open(ap.Addr(), ap.Port()) {
		return ErrEgressDenied
	}
	return nil
}

// Control is for net.Dialer.ControlContext, which calls it once for each address that a name resolved
// to, between the socket's making and its connecting: no second resolution can slip in between.
func (e *Egress) Control(_ context.Context, network, address string, _ syscall.RawConn) error {
	switch network {
	case "tcp", "tcp4", "tcp6":
	default:
		return ErrEgressDenied
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return ErrEgressDenied
	}
	return e.Check(ap)
}

// open reports whether addr may be reached on port. An address that carries others is open only when
// it is open itself and all it carries are.
func (e *Egress) open(addr netip.Addr, port uint16) bool {
	addr = addr.Unmap().WithZone("")
	if !e.openItself(addr, port) {
		return false
	}
	if !addr.Is6() {
		return true
	}
	for _, inner := range carried(addr) {
		if !e.openItself(inner, port) {
			return false
		}
	}
	return true
}

func (e *Egress) openItself(addr netip.Addr, port uint16) bool {
	for _, r := range e.closed {
		if (r.Port == 0 || r.Port == port) && r.Range.Contains(addr) {
			return false
		}
	}
	allowed, exact := false, false
	for _, p := range e.allow {
		if p.Contains(addr) {
			allowed = true
			exact = exact || p.IsSingleIP()
		}
	}
	if slices.Contains(e.metadata, addr) {
		return exact
	}
	if allowed {
		return true
	}
	switch port {
	case 80, 443, 8080, 8443:
		return e.public(addr)
	}
	return false
}

func (e *Egress) public(addr netip.Addr) bool {
	if len(e.deny) == 0 {
		return false // the zero Egress
	}
	// Outside 2000::/3 nothing is assigned as global unicast; the well-known NAT64 prefix is the one
	// exception a host without IPv4 needs to reach IPv4 receivers.
	if addr.Is6() && addr.As16()[0]>>5 != 1 && !wellKnownNAT64(addr) {
		return false
	}
	for _, p := range e.deny {
		if p.Contains(addr) {
			return false
		}
	}
	return addr.IsGlobalUnicast()
}

func wellKnownNAT64(addr netip.Addr) bool {
	b := addr.As16()
	return binary.BigEndian.Uint64(b[:8]) == 0x0064ff9b_00000000 && binary.BigEndian.Uint32(b[8:12]) == 0
}

// carried returns the IPv4 addresses that an IPv6 address of a translation or tunnel mechanism leads
// to.
func carried(addr netip.Addr) []netip.Addr {
	b := addr.As16()
	v4 := func(b0, b1, b2, b3 byte) netip.Addr { return netip.AddrFrom4([4]byte{b0, b1, b2, b3}) }
	last := v4(b[12], b[13], b[14], b[15])
	high, low := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	var found []netip.Addr
	switch {
	case wellKnownNAT64(addr): // 64:ff9b::/96, RFC 6052
		found = append(found, last)
	case high>>16 == 0x0064ff9b_0001: // 64:ff9b:1::/48, RFC 8215: local, so of unknown prefix length
		if b[13]|b[14]|b[15] != 0 {
			found = append(found, last) // /96
			break
		}
		// Shorter prefixes leave zeros behind the address (RFC 6052, section 2.2); several may fit, and
		// then each must be open.
		found = append(found, v4(b[9], b[10], b[11], b[12])) // /64
		if b[12] == 0 {
			found = append(found, v4(b[7], b[9], b[10], b[11])) // /56
		}
		if b[11]|b[12] == 0 {
			found = append(found, v4(b[6], b[7], b[9], b[10])) // /48
		}
	case high>>48 == 0x2002: // 2002::/16, 6to4
		found = append(found, v4(b[2], b[3], b[4], b[5]))
	case high>>32 == 0x20010000: // 2001::/32, Teredo: server, and client inverted
		found = append(found, v4(b[4], b[5], b[6], b[7]), v4(^b[12], ^b[13], ^b[14], ^b[15]))
	case high == 0 && low > 1: // ::/96, IPv4-compatible, and ::ffff:0:0:0/96, IPv4-translated
		found = append(found, last)
	}
	if low>>32 == 0x00005efe || low>>32 == 0x02005efe { // ISATAP, under any prefix
		found = append(found, last)
	}
	return found
}

// metadataAddrs are services that hand credentials to whoever can reach them.
func metadataAddrs() []netip.Addr {
	return parseAll(netip.MustParseAddr,
		"169.254.169.254", // AWS, Google, Azure, DigitalOcean, OpenStack, Oracle
		"169.254.170.2",   // AWS ECS task credentials
		"169.254.170.23",  // AWS EKS pod identity
		"169.254.0.23",    // Tencent
		"169.254.42.42",   // Scaleway
		"100.100.100.200", // Alibaba
		"168.63.129.16",   // Azure wire server; looks public
		"192.0.0.192",     // Oracle, older
		"fd00:ec2::254",   // AWS
		"fd00:ec2::23",    // AWS EKS pod identity
		"fd20:ce::254",    // Google
		"fd00:42::42",     // Scaleway
		"fe80::a9fe:a9fe", // OpenStack
	)
}

// specialRanges are the IANA IPv4 and IPv6 special-purpose address registries, with multicast and the
// deprecated ranges that no longer are in them. 64:ff9b::/96 is absent: what it carries decides.
func specialRanges() []netip.Prefix {
	return parseAll(netip.MustParsePrefix,
		"0.0.0.0/8",       // this network
		"10.0.0.0/8",      // private
		"100.64.0.0/10",   // shared (carrier-grade NAT)
		"127.0.0.0/8",     // loopback
		"169.254.0.0/16",  // link-local
		"172.16.0.0/12",   // private
		"192.0.0.0/24",    // IETF protocol assignments
		"192.0.2.0/24",    // documentation
		"192.31.196.0/24", // AS112
		"192.52.193.0/24", // AMT
		"192.88.99.0/24",  // 6to4 relay anycast
		"192.168.0.0/16",  // private
		"192.175.48.0/24", // AS112
		"198.18.0.0/15",   // benchmarking
		"198.51.100.0/24", // documentation
		"203.0.113.0/24",  // documentation
		"224.0.0.0/4",     // multicast
		"240.0.0.0/4",     // reserved, and broadcast

		"::/96",             // unspecified, loopback, IPv4-compatible
		"::ffff:0:0/96",     // IPv4-mapped
		"::ffff:0:0:0/96",   // IPv4-translated
		"64:ff9b:1::/48",    // local NAT64
		"100::/64",          // discard only
		"100:0:0:1::/64",    // dummy prefix
		"2001::/23",         // IETF protocol assignments: Teredo, ORCHID, benchmarking, AMT, DRIP
		"2001:db8::/32",     // documentation
		"2002::/16",         // 6to4
		"2620:4f:8000::/48", // AS112
		"3fff::/20",         // documentation
		"5f00::/16",         // segment routing
		"fc00::/7",          // unique local
		"fe80::/10",         // link-local
		"fec0::/10",         // site-local
		"ff00::/8",          // multicast
	)
}

func parseAll[T any](parse func(string) T, texts ...string) []T {
	all := make([]T, len(texts))
	for i, text := range texts {
		all[i] = parse(text)
	}
	return all
}
