package grpcplugin

import (
	"strings"
	"testing"

	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestConfigIsCheckedInWords(t *testing.T) {
	ca := certtest.New(t)
	pair := ca.Issue()
	open := plugin.NewEgress(nil)
	tests := map[string]struct {
		uri     string
		config  any
		secrets map[string][]string
		want    []string // code pointer, warnings in brackets
	}{
		"fine":                    {uri: "grpcs://hooks.example.com/orders"},
		"fine with all":           {uri: "grpcs://hooks.example.com:8443", config: map[string]any{"connect_timeout": "1s", "tls": map[string]any{"server_name": "x"}}, secrets: map[string][]string{"ca": {ca.PEM}, "client_certificate": {pair.Cert + pair.Key}, "token": {"t0ken"}}},
		"plaintext":               {uri: "grpc://hooks.example.com", want: []string{"[uri.plaintext] /target/uri"}},
		"plaintext with token":    {uri: "grpc://hooks.example.com", secrets: map[string][]string{"token": {"t0ken"}}, want: []string{"[uri.plaintext] /target/uri", "[token.plaintext] /secrets/token"}},
		"plaintext with tls":      {uri: "grpc://hooks.example.com", config: map[string]any{"tls": map[string]any{"server_name": "x"}}, secrets: map[string][]string{"ca": {ca.PEM}, "client_certificate": {pair.Cert + pair.Key}}, want: []string{"[uri.plaintext] /target/uri", "tls.unused /config/tls/server_name", "tls.unused /secrets/ca", "tls.unused /secrets/client_certificate"}},
		"other scheme":            {uri: "https://hooks.example.com", want: []string{"uri.invalid /target/uri"}},
		"no host":                 {uri: "grpcs:///orders", want: []string{"uri.invalid /target/uri"}},
		"user name":               {uri: "grpcs://me@hooks.example.com", want: []string{"uri.invalid /target/uri"}},
		"query":                   {uri: "grpcs://hooks.example.com/a?b=c", want: []string{"uri.invalid /target/uri"}},
		"fragment":                {uri: "grpcs://hooks.example.com/a#b", want: []string{"uri.invalid /target/uri"}},
		"port":                    {uri: "grpcs://hooks.example.com:0", want: []string{"uri.invalid /target/uri"}},
		"host with a space":       {uri: "grpcs://hooks%20x.example.com", want: []string{"uri.invalid /target/uri"}},
		"zone":                    {uri: "grpcs://[fe80::1%25eth0]", want: []string{"uri.invalid /target/uri"}},
		"private address":         {uri: "grpcs://10.0.0.1", want: []string{"uri.egress /target/uri"}},
		"port that is not open":   {uri: "grpcs://hooks.example.com:50051", want: []string{"[uri.port] /target/uri"}},
		"unknown field":           {uri: "grpcs://hooks.example.com", config: map[string]any{"retries": 3}, want: []string{"config.unknown_field /config/retries"}},
		"authority is no PEM":     {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"ca": {"nonsense"}}, want: []string{"secret.malformed /secrets/ca"}},
		"authority with a key":    {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"ca": {ca.PEM + pair.Key}}, want: []string{"secret.malformed /secrets/ca"}},
		"certificate without key": {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"client_certificate": {pair.Cert}}, want: []string{"certificate.key /secrets/client_certificate"}},
		"certificate and its key": {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"client_certificate": {pair.Cert}, "client_key": {pair.Key}}},
		"another's key":           {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"client_certificate": {pair.Cert + ca.Issue().Key}}, want: []string{"secret.malformed /secrets/client_certificate"}},
		"token with its scheme":   {uri: "grpcs://hooks.example.com", secrets: map[string][]string{"token": {"Bearer t0ken-of-mine"}}, want: []string{"secret.malformed /secrets/token"}},
	}
	h := plugintest.New(t, Kind())
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			problems := h.Validate(plugintest.Instance{
				Kind: "grpc", Config: test.config, Secrets: test.secrets, Target: plugin.Target{URL: test.uri, Egress: open},
			})
			if len(problems) != len(test.want) {
				t.Fatalf("problems %+v, want %q", problems, test.want)
			}
			for i, p := range problems {
				got := p.Code + " " + p.Pointer
				if p.Warning {
					got = "[" + p.Code + "] " + p.Pointer
				}
				if got != test.want[i] {
					t.Errorf("problem %+v, want %s", p, test.want[i])
				}
				if p.Summary == "" || strings.Contains(p.Summary, "t0ken") || strings.Contains(p.Summary, "PRIVATE KEY-") {
					t.Errorf("summary %q", p.Summary)
				}
			}
		})
	}
}

func TestSignerMustNotChangeTheURI(t *testing.T) {
	r := serve(t, nil)
	req := event()
	req.URL = "grpc://" + r.addr + "?bodySHA256=x"
	_, err := newBench(t).instance("grpc://"+r.addr, nil, nil).Attempt(t.Context(), req)
	f, ok := err.(*plugin.Failure)
	if !ok || f.Source != plugin.SourcePlugin || f.WireState != plugin.NotSent {
		t.Errorf("%#v, want a refusal", err)
	}
}
