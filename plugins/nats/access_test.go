//go:build unix

package natsplugin

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/grapnel/grapnel/plugins/internal/outbound/certtest"
	"github.com/grapnel/grapnel/sdk/plugin"
)

func TestPasswordsAndTokens(t *testing.T) {
	users := start(t, "authorization { users: [ { user: app, password: s3cret-1 } ] }")
	users.stream(orders("ORDERS"), nats.UserInfo("app", "s3cret-1"))
	token := start(t, "authorization { token: t0ken-1 }")
	token.stream(orders("ORDERS"), nats.Token("t0ken-1"))
	tests := map[string]struct {
		to      *node
		config  any
		secrets map[string][]string
		status  int
	}{
		"password":            {users, map[string]any{"user": "app"}, map[string][]string{"password": {"s3cret-1"}}, 200},
		"newest password":     {users, map[string]any{"user": "app"}, map[string][]string{"password": {"s3cret-1", "older"}}, 200},
		"wrong password":      {users, map[string]any{"user": "app"}, map[string][]string{"password": {"wrong"}}, 401},
		"no password":         {users, nil, nil, 401},
		"token":               {token, nil, map[string][]string{"token": {"t0ken-1"}}, 200},
		"wrong token":         {token, nil, map[string][]string{"token": {"wrong"}}, 401},
		"another's .creds":    {token, nil, map[string][]string{"credentials": {newOperator(t).user(t, nil)}}, 401},
		"token not asked for": {users, nil, map[string][]string{"token": {"t0ken-1"}}, 401},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			resp, err := deliver(t, newBench(t).instance("nats://"+test.to.addr+"/orders.x", test.config, test.secrets))
			wantAnswer(t, resp, err, test.status, "")
		})
	}
}

func TestCredentialsFile(t *testing.T) {
	o := newOperator(t)
	n := start(t, o.config())
	creds := o.user(t, nil)
	n.stream(orders("ORDERS"), nats.UserCredentialBytes([]byte(creds)))
	b := newBench(t)
	resp, err := deliver(t, b.instance("nats://"+n.addr+"/orders.x", nil, map[string][]string{"credentials": {creds}}))
	wantAnswer(t, resp, err, http.StatusOK, "")
	stranger := newOperator(t).user(t, nil)
	resp, err = deliver(t, b.instance("nats://"+n.addr+"/orders.x", nil, map[string][]string{"credentials": {stranger}}))
	wantAnswer(t, resp, err, http.StatusUnauthorized, "the server does not know the credential")
	expired := o.user(t, map[string]any{"exp": time.Now().Add(-time.Hour).Unix()})
	resp, err = deliver(t, b.instance("nats://"+n.addr+"/orders.x", nil, map[string][]string{"credentials": {expired}}))
	wantAnswer(t, resp, err, http.StatusUnauthorized, "")
}

func TestPermissions(t *testing.T) {
	n := start(t, `authorization { users: [
		{ user: admin, password: s3cret },
		{ user: app, password: s3cret, permissions: { publish: "orders.>", subscribe: "_INBOX.>" } },
		{ user: own, password: s3cret, permissions: { publish: "orders.>", subscribe: "_MINE.>" } } ] }`)
	n.stream(orders("ORDERS"), nats.UserInfo("admin", "s3cret"))
	secrets := map[string][]string{"password": {"s3cret"}}
	b := newBench(t)
	tests := map[string]struct {
		subject string
		config  map[string]any
		status  int
		text    string
	}{
		"allowed":         {"orders.x", map[string]any{"user": "app"}, 200, ""},
		"denied":          {"payments.x", map[string]any{"user": "app"}, 403, `the user may not publish to "payments.x"`},
		"inbox denied":    {"orders.x", map[string]any{"user": "own"}, 403, "which acknowledgements come to"},
		"inbox of my own": {"orders.x", map[string]any{"user": "own", "inbox_prefix": "_MINE"}, 200, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			inst := b.instance("nats://"+n.addr+"/"+test.subject, test.config, secrets)
			for range 2 {
				resp, err := deliver(t, inst)
				wantAnswer(t, resp, err, test.status, test.text)
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %s: waited for an answer that does not come", took)
			}
		})
	}
}

func TestTooManyConnections(t *testing.T) {
	n := start(t, "max_connections: 1")
	n.stream(orders("ORDERS")) // its client stays connected
	_, err := deliver(t, newBench(t).instance("nats://"+n.addr+"/orders.x", nil, nil))
	var f *plugin.Failure // whose words depend on whether the server's last ones could still be read
	if !errors.As(err, &f) || f.Source != plugin.SourceEndpoint || f.Code != plugin.CodeConnect || f.WireState != plugin.NotSent {
		t.Errorf("%#v, want a failure to connect", err)
	}
}

func TestTLS(t *testing.T) {
	ca, foreign := certtest.New(t), certtest.New(t)
	server, mine, stranger := ca.Issue("nats.example.com"), ca.Issue(), foreign.Issue()
	files := fmt.Sprintf("cert_file: %q, key_file: %q, ca_file: %q",
		certtest.Write(t, "cert.pem", server.Cert), certtest.Write(t, "key.pem", server.Key), certtest.Write(t, "ca.pem", ca.PEM))
	nodes := map[string]*node{
		"tls":    start(t, "tls { "+files+" }"),
		"first":  start(t, "tls { "+files+", handshake_first: true }"),
		"mutual": start(t, "tls { "+files+", verify: true }"),
		"plain":  start(t, ""),
	}
	options := []nats.Option{nats.ClientTLSConfig(
		func() (tls.Certificate, error) { return mine.Pair(), nil },
		func() (*x509.CertPool, error) { return ca.Pool(), nil })}
	for name, n := range nodes {
		more := options
		switch name {
		case "plain":
			more = nil
		case "first":
			more = append(more, nats.TLSHandshakeFirst())
		}
		n.stream(orders("ORDERS"), more...)
	}
	trusted := map[string][]string{"ca": {ca.PEM}}
	first := map[string]any{"tls": map[string]any{"handshake_first": true}}
	tests := map[string]struct {
		to, scheme string
		config     any
		secrets    map[string][]string
		failure    plugin.Failure // zero wants a delivery
	}{
		"tls":                        {to: "tls", scheme: "tls", secrets: trusted},
		"nats+tls":                   {to: "tls", scheme: "nats+tls", secrets: trusted},
		"the server asks for it":     {to: "tls", scheme: "nats", secrets: trusted},
		"server name":                {to: "tls", scheme: "tls", secrets: trusted, config: map[string]any{"tls": map[string]any{"server_name": "nats.example.com"}}},
		"authority in rotation":      {to: "tls", scheme: "tls", secrets: map[string][]string{"ca": {foreign.PEM, ca.PEM}}},
		"handshake first":            {to: "first", scheme: "tls", secrets: trusted, config: first},
		"client certificate":         {to: "mutual", scheme: "tls", secrets: map[string][]string{"ca": {ca.PEM}, "client_certificate": {mine.Cert + mine.Key}}},
		"wrong name":                 {to: "tls", scheme: "tls", secrets: trusted, config: map[string]any{"tls": map[string]any{"server_name": "x.example.com"}}, failure: tlsFailure("the certificate is not valid for the host")},
		"unknown authority":          {to: "tls", scheme: "tls", failure: tlsFailure("the certificate is by an unknown authority")},
		"unknown, though not wanted": {to: "tls", scheme: "nats", failure: tlsFailure("the certificate is by an unknown authority")},
		"no client certificate":      {to: "mutual", scheme: "tls", secrets: trusted, failure: tlsFailure("the receiver wants a client certificate; fill the slot client_certificate with one that it trusts")},
		"another's certificate":      {to: "mutual", scheme: "tls", secrets: map[string][]string{"ca": {ca.PEM}, "client_certificate": {stranger.Cert + stranger.Key}}, failure: tlsFailure("the receiver refused the client certificate")},
		"no TLS there":               {to: "plain", scheme: "tls", secrets: trusted, failure: tlsFailure("the server does not offer TLS")},
		"no TLS there, but an authority is given": {to: "plain", scheme: "nats", secrets: trusted, failure: tlsFailure("the server does not offer TLS")},
		"no TLS there, first":                     {to: "plain", scheme: "nats", config: first, failure: tlsFailure("the receiver does not speak TLS on this port")},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			resp, err := deliver(t, newBench(t).instance(test.scheme+"://"+nodes[test.to].addr+"/orders.x", test.config, test.secrets))
			if test.failure == (plugin.Failure{}) {
				wantAnswer(t, resp, err, http.StatusOK, "")
				return
			}
			wantFailure(t, err, test.failure)
		})
	}
}

func tlsFailure(message string) plugin.Failure {
	return endpoint(plugin.CodeTLS, message, plugin.NotSent)
}

// operator issues what a server in operator mode believes: JWTs signed with nkeys
// (https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt).
type operator struct {
	key, account nkeys.KeyPair
	t            testing.TB
}

func newOperator(t testing.TB) *operator {
	t.Helper()
	key, err := nkeys.CreateOperator()
	if err != nil {
		t.Fatal(err)
	}
	account, err := nkeys.CreateAccount()
	if err != nil {
		t.Fatal(err)
	}
	return &operator{key: key, account: account, t: t}
}

// config is for a server with one account, which may use JetStream.
func (o *operator) config() string {
	unlimited := map[string]any{
		"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1,
		"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1,
	}
	account := o.sign(o.key, public(o.t, o.account), map[string]any{"type": "account", "version": 2, "limits": unlimited}, nil)
	system, err := nkeys.CreateAccount()
	if err != nil {
		o.t.Fatal(err)
	}
	systemJWT := o.sign(o.key, public(o.t, system), map[string]any{"type": "account", "version": 2, "limits": unlimitedSystem()}, nil)
	return fmt.Sprintf("operator: %s\nsystem_account: %s\nresolver: MEMORY\nresolver_preload: { %s: %s, %s: %s }\n",
		o.sign(o.key, public(o.t, o.key), map[string]any{"type": "operator", "version": 2}, nil), public(o.t, system),
		public(o.t, o.account), account, public(o.t, system), systemJWT)
}

func unlimitedSystem() map[string]any {
	return map[string]any{"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1}
}

// user is the text of a .creds file for a new user of the account.
func (o *operator) user(t testing.TB, more map[string]any) string {
	t.Helper()
	user, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := user.Seed()
	if err != nil {
		t.Fatal(err)
	}
	jwt := o.sign(o.account, public(t, user), map[string]any{"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}, more)
	return "-----BEGIN NATS USER JWT-----\n" + jwt + "\n------END NATS USER JWT------\n\n" +
		"-----BEGIN USER NKEY SEED-----\n" + string(seed) + "\n------END USER NKEY SEED------\n"
}

func (o *operator) sign(by nkeys.KeyPair, subject string, claims, more map[string]any) string {
	o.t.Helper()
	all := map[string]any{"iss": public(o.t, by), "sub": subject, "name": "test", "iat": time.Now().Unix(), "jti": "X", "nats": claims}
	for name, v := range more {
		all[name] = v
	}
	encode := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			o.t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	signed := encode(map[string]any{"typ": "JWT", "alg": "ed25519-nkey"}) + "." + encode(all)
	signature, err := by.Sign([]byte(signed))
	if err != nil {
		o.t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func public(t testing.TB, key nkeys.KeyPair) string {
	t.Helper()
	text, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(text)
}
