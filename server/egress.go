package server

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// ownListeners are the rules that keep deliveries away from the server itself: every address that one of the listeners
// may be reached at, on its port.
func ownListeners(listeners ...net.Listener) []string {
	var rules []string
	for _, lis := range listeners {
		tcp, ok := lis.Addr().(*net.TCPAddr)
		if !ok {
			continue
		}
		port := ":" + strconv.Itoa(tcp.Port)
		// The unspecified addresses lead to this machine as well.
		ranges := []string{"0.0.0.0/32", "::/128"}
		at := tcp.AddrPort().Addr().Unmap().WithZone("")
		if at.IsUnspecified() || at.IsLoopback() {
			ranges = append(ranges, "127.0.0.0/8", "::1/128")
		}
		if !at.IsUnspecified() {
			ranges = append(ranges, netip.PrefixFrom(at, at.BitLen()).String())
		} else if found, err := net.InterfaceAddrs(); err == nil {
			for _, a := range found {
				if n, ok := a.(*net.IPNet); ok {
					if ip, ok := netip.AddrFromSlice(n.IP); ok {
						ip = ip.Unmap()
						ranges = append(ranges, netip.PrefixFrom(ip, ip.BitLen()).String())
					}
				}
			}
		}
		for _, r := range ranges {
			rules = append(rules, r+port)
		}
	}
	return rules
}

// ownEtcd are the rules that keep deliveries away from an external etcd, which trusts whoever reaches it: every address
// that an endpoint has now, on its port. A name that cannot be resolved has none; its etcd has just answered by another.
func ownEtcd(ctx context.Context, endpoints []string) []string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var rules []string
	for _, endpoint := range endpoints {
		if _, rest, ok := strings.Cut(endpoint, "://"); ok {
			endpoint = rest
		}
		host, port, err := net.SplitHostPort(endpoint)
		if err != nil {
			continue
		}
		found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		if err != nil {
			continue
		}
		for _, ip := range found {
			ip = ip.Unmap().WithZone("")
			rules = append(rules, netip.PrefixFrom(ip, ip.BitLen()).String()+":"+port)
		}
	}
	return rules
}
