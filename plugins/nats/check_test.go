package natsplugin

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/nats-io/nkeys"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

// credentialsFile is a .creds file whose JWT names a user; its signature is nobody's.
func credentialsFile(t testing.TB, subject string, seed []byte) string {
	t.Helper()
	part := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	return "-----BEGIN NATS USER JWT-----\n" + part(`{"alg":"ed25519-nkey"}`) + "." + part(`{"sub":"`+subject+`"}`) + "." + part("signature") +
		"\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n" + string(seed) + "\n------END USER NKEY SEED------\n"
}

func newUser(t testing.TB) (public string, seed []byte) {
	t.Helper()
	user, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	if public, err = user.PublicKey(); err != nil {
		t.Fatal(err)
	}
	if seed, err = user.Seed(); err != nil {
		t.Fatal(err)
	}
	return public, seed
}

func TestConfigIsCheckedInWords(t *testing.T) {
	public, seed := newUser(t)
	_, otherSeed := newUser(t)
	creds := credentialsFile(t, public, seed)
	account, err := nkeys.CreateAccount()
	if err != nil {
		t.Fatal(err)
	}
	accountSeed, err := account.Seed()
	if err != nil {
		t.Fatal(err)
	}
	const fine = "tls://nats.example.com:443/orders"
	secret := func(slot, value string) map[string][]string { return map[string][]string{slot: {value}} }
	tests := map[string]struct {
		uri     string
		config  any
		secrets map[string][]string
		headers []plugin.Header
		want    []string // code and pointer, warnings in brackets
	}{
		"fine":                      {uri: fine},
		"fine, nats+tls":            {uri: "nats+tls://nats.example.com:443/orders/{type}"},
		"fine with credentials":     {uri: fine, secrets: secret("credentials", creds)},
		"fine with password":        {uri: fine, config: map[string]any{"user": "app"}, secrets: secret("password", "p4ssword")},
		"subject in the config":     {uri: "tls://nats.example.com:443", config: map[string]any{"subject": "a.{type}.b", "stream": "S"}},
		"default port, plaintext":   {uri: "nats://nats.example.com/orders", want: []string{"[uri.port] /target/uri", "[uri.plaintext] /target/uri"}},
		"other scheme":              {uri: "https://nats.example.com/orders", want: []string{"uri.invalid /target/uri"}},
		"no subject":                {uri: "tls://nats.example.com:443/", want: []string{"subject.invalid /target/uri"}},
		"two subjects":              {uri: fine, config: map[string]any{"subject": "x"}, want: []string{"subject.invalid /config/subject"}},
		"wildcard":                  {uri: "tls://nats.example.com:443/orders.*", want: []string{"subject.invalid /target/uri"}},
		"empty part":                {uri: "tls://nats.example.com:443/orders..x", want: []string{"subject.invalid /target/uri"}},
		"blank":                     {uri: "tls://nats.example.com:443/orders%20x", want: []string{"subject.invalid /target/uri"}},
		"unknown placeholder":       {uri: "tls://nats.example.com:443/{tenant}", want: []string{"subject.invalid /target/uri"}},
		"steers the server":         {uri: "tls://nats.example.com:443/$JS.API.STREAM.DELETE.X", want: []string{"subject.invalid /target/uri"}},
		"inbox prefix":              {uri: fine, config: map[string]any{"inbox_prefix": "_INBOX.>"}, want: []string{"subject.invalid /config/inbox_prefix"}},
		"stream without JetStream":  {uri: fine, config: map[string]any{"stream": "S", "require_jetstream": false}, want: []string{"stream.unused /config/stream"}},
		"password without user":     {uri: fine, secrets: secret("password", "p4ssword"), want: []string{"user.missing /config/user"}},
		"user without password":     {uri: fine, config: map[string]any{"user": "app"}, want: []string{"config.rejected "}},
		"two credentials":           {uri: fine, secrets: map[string][]string{"token": {"p4ssword"}, "credentials": {creds}}, want: []string{"secret.conflict /secrets"}},
		"token of two lines":        {uri: fine, secrets: secret("token", "p4ssword\n"), want: []string{"secret.malformed /secrets/token"}},
		"credentials, seed alone":   {uri: fine, secrets: secret("credentials", string(seed)), want: []string{"secret.malformed /secrets/credentials"}},
		"credentials of two users":  {uri: fine, secrets: secret("credentials", credentialsFile(t, public, otherSeed)), want: []string{"secret.malformed /secrets/credentials"}},
		"credentials of an account": {uri: fine, secrets: secret("credentials", credentialsFile(t, public, accountSeed)), want: []string{"secret.malformed /secrets/credentials"}},
		"header of the stream":      {uri: fine, headers: []plugin.Header{{Name: "nats-rollup", Value: "all"}}, want: []string{"header.invalid /target/headers/nats-rollup"}},
	}
	h := plugintest.New(t, Kind())
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			problems := h.Validate(plugintest.Instance{Kind: "nats", Config: test.config, Secrets: test.secrets, Target: plugin.Target{
				URL: test.uri, Headers: test.headers, Egress: plugin.NewEgress(nil),
			}})
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
				if p.Summary == "" || strings.Contains(p.Summary, "p4ssword") || strings.Contains(p.Summary, string(seed)) {
					t.Errorf("summary %q", p.Summary)
				}
			}
		})
	}
}

func TestCredentialsShowWhoseTheyAre(t *testing.T) {
	public, seed := newUser(t)
	info, err := credentialsFormat().Read([]byte(credentialsFile(t, public, seed)))
	if err != nil || info.KeyID != public || info.PublicKey != public {
		t.Errorf("info %+v, error %v; want the user's public key %s", info, err, public)
	}
}

// FuzzSubject holds what no event type may do: lead to another place in the tree of subjects.
func FuzzSubject(f *testing.F) {
	for _, kind := range []string{"order.created", "", ".", "a..b", "$JS.API.X", "> *", "a\r\nPUB x 0\r\n", "\xff", "é.ü", "%2e%0d%0a"} {
		f.Add(kind)
	}
	f.Fuzz(func(t *testing.T, kind string) {
		subject, err := fill("events."+placeholder, &plugin.Request{EventType: kind})
		if err != nil {
			return
		}
		if err := checkTokens(subject); err != nil && !strings.ContainsAny(kind, "{}%") || !strings.HasPrefix(subject, "events.") {
			t.Errorf("type %q leads to %q: %v", kind, subject, err)
		}
		if strings.ContainsAny(subject, " \t\r\n*>\x00") {
			t.Errorf("type %q leads to %q", kind, subject)
		}
	})
}
