package plugin_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
)

func TestEgressCorpus(t *testing.T) {
	corpus, err := os.ReadFile("testdata/egress.txt")
	if err != nil {
		t.Fatal(err)
	}
	policy := plugin.NewEgress(nil)
	seen := 0
	for line := range strings.Lines(string(corpus)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] == "#" {
			continue
		}
		if len(fields) != 3 {
			t.Fatalf("corpus line %q does not have three fields", line)
		}
		seen++
		address := net.JoinHostPort(fields[1], fields[2])
		got := policy.Control(t.Context(), "tcp", address, nil)
		switch {
		case fields[0] == "allow" && got != nil:
			t.Errorf("%s: %v, want it allowed", address, got)
		case fields[0] == "deny" && !errors.Is(got, plugin.ErrEgressDenied):
			t.Errorf("%s: allowed, want it denied", address)
		}
	}
	if seen < 300 {
		t.Errorf("corpus has %d entries, want at least 300", seen)
	}
}

func TestEgressAllowList(t *testing.T) {
	tests := []struct {
		allow, address string
		want           bool
	}{
		{"127.0.0.0/8", "127.0.0.1:443", true},
		{"127.0.0.0/8", "127.0.0.1:2379", true}, // any port
		{"127.0.0.0/8", "127.0.0.1:0", false},
		{"127.0.0.0/8", "10.0.0.1:443", false},
		{"127.0.0.0/8", "[::1]:443", false},
		{"127.0.0.0/8", "[::ffff:127.0.0.1]:9000", true},
		{"::ffff:127.0.0.0/104", "127.0.0.1:9000", true},
		{"127.0.0.0/8", "[64:ff9b::127.0.0.1]:443", true},
		{"127.0.0.0/8", "[64:ff9b::10.0.0.1]:443", false},
		{"::1/128", "[::1]:8081", true},
		{"fe80::/10", "[fe80::1%eth0]:443", true},
		{"0.0.0.0/0", "10.0.0.1:443", true},
		{"0.0.0.0/0", "169.254.169.254:80", false}, // metadata never opens by range
		{"169.254.0.0/16", "169.254.169.254:80", false},
		{"169.254.0.0/16", "169.254.1.1:80", true},
		{"169.254.169.254/32", "169.254.169.254:80", true},
		{"fc00::/7", "[fd00:ec2::254]:80", false},
		{"fd00:ec2::254/128", "[fd00:ec2::254]:80", true},
		{"::/0", "10.0.0.1:443", false},
		{"::/0", "[::ffff:10.0.0.1]:443", false},
		// A tunnel's range opens the tunnel, not what lies behind it.
		{"2002::/16", "[2002:808:808::1]:443", true},
		{"2002::/16", "[2002:a00:1::1]:443", false},
		{"2001::/32", "[2001:0:808:808:0:0:f7f7:f7f7]:443", true},
		{"2001::/32", "[2001:0:808:808:0:0:f5ff:fffe]:443", false},
		{"2001::/32", "[2001:0:a00:1:0:0:f7f7:f7f7]:443", false},
		{"64:ff9b:1::/48", "[64:ff9b:1::808:808]:443", true},
		{"64:ff9b:1::/48", "[64:ff9b:1:ffff::808:808]:443", true},
		{"64:ff9b:1::/48", "[64:ff9b:1::a00:1]:443", false},
		{"64:ff9b:1::/48", "[64:ff9b:1:0:8:808:800:0]:443", true}, // /64: 8.8.8.8
		{"64:ff9b:1::/48", "[64:ff9b:1:0:a:0:100:0]:443", false},  // /64: 10.0.0.1
		{"64:ff9b:1::/48", "[64:ff9b:1:a00:0:100::]:443", false},  // /48: 10.0.0.1
		{"64:ff9b:1::/48", "[64:ff9b:1:1234:a:0:1::]:443", false}, // /64: 10.0.0.1 with zeros about
		{"::/0", "[::10.0.0.1]:443", false},                       // IPv4-compatible
		{"fe80::/10", "[fe80::5efe:10.0.0.1]:443", false},         // ISATAP
		{"fe80::/10,10.0.0.0/8", "[fe80::5efe:10.0.0.1]:443", true},
		{"8.8.8.0/24", "8.8.8.8:53", true}, // a public range may be opened for other ports
		{"8.8.8.0/24", "9.9.9.9:53", false},
		{"8.8.8.0/24", "9.9.9.9:443", true},
	}
	for _, tt := range tests {
		t.Run(tt.allow+" "+tt.address, func(t *testing.T) {
			var allow []netip.Prefix
			for text := range strings.SplitSeq(tt.allow, ",") {
				allow = append(allow, netip.MustParsePrefix(text))
			}
			policy := plugin.NewEgress(allow)
			if err := policy.Check(netip.MustParseAddrPort(tt.address)); (err == nil) != tt.want {
				t.Errorf("Check(%s) with %s allowed = %v, want allowed = %v", tt.address, tt.allow, err, tt.want)
			}
		})
	}
}

func TestEgressFailsClosed(t *testing.T) {
	public := netip.MustParseAddrPort("8.8.8.8:443")
	var absent *plugin.Egress
	for name, policy := range map[string]*plugin.Egress{"nil": absent, "zero": {}} {
		if policy.Check(public) == nil {
			t.Errorf("%s policy allows %v", name, public)
		}
	}
	policy := plugin.NewEgress([]netip.Prefix{{}, netip.MustParsePrefix("10.1.2.3/8"), netip.MustParsePrefix("10.0.0.0/8")})
	if policy.Check(netip.AddrPort{}) == nil {
		t.Error("the zero address is allowed")
	}
	for _, network := range []string{"udp", "unix", "ip4:icmp", ""} {
		if policy.Control(t.Context(), network, "8.8.8.8:443", nil) == nil {
			t.Errorf("network %q is allowed", network)
		}
	}
	if err := policy.Control(t.Context(), "tcp4", "8.8.8.8:443", nil); err != nil {
		t.Errorf("tcp4 to a public address: %v", err)
	}
	if got, want := policy.String(), "10.0.0.0/8"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
}

func TestEgressDenyWins(t *testing.T) {
	var rules []plugin.EgressRule
	for _, text := range []string{"127.0.0.1/32:7071", "10.1.0.0/16", "::ffff:10.2.0.0/112", "2001:db8::/32:443", "8.8.8.8/32"} {
		r, err := plugin.ParseEgressRule(text)
		if err != nil {
			t.Fatal(err)
		}
		rules = append(rules, r)
	}
	policy := plugin.NewEgress([]netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}).Deny(rules...)
	for address, open := range map[string]bool{
		"127.0.0.1:7071": false, "127.0.0.1:7070": true, "[::ffff:127.0.0.1]:7071": false, "10.1.2.3:80": false, "10.2.0.9:1": false, "10.3.0.1:80": true,
		"[2001:db8::1]:443": false, "[2001:db8::1]:80": true, "8.8.8.8:443": false, "[64:ff9b::808:808]:443": false, "[2002:a01:203::]:80": false,
	} {
		if got := policy.Check(netip.MustParseAddrPort(address)) == nil; got != open {
			t.Errorf("%s is open: %v", address, got)
		}
	}
	if got := policy.String(); got != "0.0.0.0/0,::/0,!8.8.8.8/32,!10.1.0.0/16,!10.2.0.0/16,!127.0.0.1/32:7071,!2001:db8::/32:443" {
		t.Errorf("%q", got)
	}
	for _, text := range []string{"", "10.0.0.0", "10.0.0.0/33", "10.0.0.0/8:0", "10.0.0.0/8:65536", "a/8", "::1/128:x"} {
		if r, err := plugin.ParseEgressRule(text); err == nil {
			t.Errorf("%q is taken as %v", text, r)
		}
	}
	if plugin.NewEgress(nil).Deny(plugin.EgressRule{}).Check(netip.MustParseAddrPort("1.1.1.1:443")) != nil {
		t.Error("a rule without a range closes everything")
	}
}

func TestEgressErrorIsNoOracle(t *testing.T) {
	policy := plugin.NewEgress(nil)
	texts := map[string]bool{}
	for _, address := range []string{"127.0.0.1:1", "169.254.169.254:80", "[::1]:443", "8.8.8.8:22", "nonsense"} {
		texts[policy.Control(t.Context(), "tcp", address, nil).Error()] = true
	}
	if len(texts) != 1 || !texts["blocked by egress policy"] {
		t.Errorf("texts = %v, want one that says nothing", texts)
	}
}
