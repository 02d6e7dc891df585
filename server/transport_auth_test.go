package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// tokenServer is an authorization server and the receiver that trusts its tokens.
type tokenServer struct {
	stand *stand
	// url is the token endpoint, receiver where the tokens are good for.
	url, receiver string
	// knows says what is wrong with how the client shows who it is.
	knows func(*http.Request) error

	mu       sync.Mutex
	issued   []string
	revoked  map[string]bool
	faults   []error
	refusals int
	accepted int
}

// newTokenServer asks clients for certificates of the authority, where they have one.
func newTokenServer(t *testing.T, s *stand, ca *authority, knows func(*http.Request) error) *tokenServer {
	t.Helper()
	ts := &tokenServer{stand: s, knows: knows, revoked: map[string]bool{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/oauth/token", ts.grant)
	mux.HandleFunc("/hook", ts.receive)
	srv := serveSecurely(t, ca.serverConfig(tls.VerifyClientCertIfGiven), false, mux)
	ts.url, ts.receiver = srv.url+"/oauth/token", srv.url+"/hook"
	return ts
}

func (ts *tokenServer) grant(w http.ResponseWriter, r *http.Request) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	err := r.ParseForm()
	switch {
	case err != nil:
	case r.PostForm.Get("grant_type") != "client_credentials" || r.PostForm.Get("scope") != "hooks.write hooks.read":
		err = fmt.Errorf("asked with %v", r.PostForm)
	default:
		err = ts.knows(r)
	}
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		ts.faults = append(ts.faults, err)
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, `{"error":"invalid_client"}`)
		return
	}
	token := ts.stand.canary("an access token", "token-"+rand.Text())
	ts.issued = append(ts.issued, token)
	_ = json.NewEncoder(w).Encode(map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": 3600})
}

// receive refuses all but live tokens, and says back what it was sent.
func (ts *tokenServer) receive(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	ts.stand.verified(r.Header, body)
	ts.mu.Lock()
	defer ts.mu.Unlock()
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok || !slices.Contains(ts.issued, token) || ts.revoked[token] || r.URL.RawQuery == "never" {
		ts.refusals++
		w.Header().Set("X-Echo", r.Header.Get("Authorization"))
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = fmt.Fprintf(w, "not for %s", r.Header.Get("Authorization"))
		return
	}
	ts.accepted++
}

func (ts *tokenServer) revoke() {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	ts.revoked[ts.issued[len(ts.issued)-1]] = true
}

// exercise delivers with one token, and with one more when the receiver stops taking that.
func (ts *tokenServer) exercise(t *testing.T, r route) {
	t.Helper()
	const many = 30
	auth := map[string]any{"type": "oauth2", "token_url": ts.url, "client_id": "grapnel", "scopes": []any{"hooks.write", "hooks.read"}}
	for name, value := range r.config {
		auth[name] = value
	}
	r.config = map[string]any{"auth": auth}
	s := ts.stand
	s.over("hooks", ts.receiver, r, nil)
	for round := 1; round <= 2; round++ {
		s.send("hooks", many)
		s.once("hooks")
		ts.mu.Lock()
		if len(ts.issued) != round || ts.accepted != round*many || len(ts.faults) > 0 {
			t.Errorf("round %d: %d tokens, %d accepted, faults %v; want %d and %d", round, len(ts.issued), ts.accepted, ts.faults, round, round*many)
		}
		if round == 1 && ts.refusals > 0 || round == 2 && ts.refusals == 0 {
			t.Errorf("round %d: %d requests were refused", round, ts.refusals)
		}
		ts.mu.Unlock()
		ts.revoke()
	}
	// A receiver that takes no token at all, and says it back: what it says of it is not kept.
	s.over("never", ts.receiver+"?never", r, oneTry)
	d := s.fail("never")
	if a := s.attempts(d.GetName()); a[0].GetResponseCode() != http.StatusUnauthorized || !strings.Contains(string(a[0].GetResponseBody()), "[redacted]") ||
		!strings.Contains(a[0].GetResponseHeaders()["x-echo"], "[redacted]") {
		t.Errorf("a receiver that takes no token: %v, %q", a, a[0].GetResponseBody())
	}
	// A token server that does not know the client.
	ts.mu.Lock()
	ts.knows = func(*http.Request) error { return errors.New("the client is not known any more") }
	ts.mu.Unlock()
	r.config["connect_timeout"] = "9s" // connections of its own, and tokens
	s.over("unknown", ts.receiver, r, oneTry)
	if a := s.fail("unknown").GetLastAttempt(); !strings.HasSuffix(a.GetError(), "the token endpoint refused the client: invalid_client") {
		t.Errorf("a client that is not known: %v: %q", a.GetOutcome(), a.GetError())
	}
}

// clientSecret shows a secret with characters that RFC 6749, section 2.3.1, has encoded.
func clientSecret(t *testing.T, s *stand) {
	ca := newAuthority(t)
	secret := s.canary("a client secret", "c4n4ry secret:+%&="+rand.Text())
	ts := newTokenServer(t, s, ca, func(r *http.Request) error {
		id, password, ok := r.BasicAuth()
		plain, err := url.QueryUnescape(password)
		if !ok || err != nil || id != "grapnel" || plain != secret {
			return errors.New("wrong client secret")
		}
		return nil
	})
	ts.exercise(t, route{secrets: map[string]string{"ca": ca.pem, "client_secret": secret}})
}

// tlsClientAuth shows a certificate (RFC 8705) to the token endpoint.
func tlsClientAuth(t *testing.T, s *stand) {
	ca := newAuthority(t)
	ts := newTokenServer(t, s, ca, func(r *http.Request) error {
		if name := clientName(r); name != "oauth client" || r.PostForm.Get("client_id") != "grapnel" || r.Header.Get("Authorization") != "" {
			return fmt.Errorf("the client is %q by its certificate and %q by its words", name, r.PostForm.Get("client_id"))
		}
		return nil
	})
	ts.exercise(t, route{
		config:  map[string]any{"client_auth": "tls_client_auth"},
		secrets: map[string]string{"ca": ca.pem, "client_certificate": ca.client(s, "oauth client")},
	})
}

// privateKeyJWT signs assertions with a key that the plugin has made; the token server knows its public half
// from the admin listener, as it would in the field.
func privateKeyJWT(t *testing.T, s *stand) {
	ca := newAuthority(t)
	made := s.secret("http", "assertion_key", "")
	s.canary("an assertion key", strings.Split(made.GetGeneratedValue(), "\n")[2])
	version := made.GetSecret().GetVersions()[0]
	public := publishedKey(t, s, version.GetKeyId())
	block, _ := pem.Decode([]byte(version.GetPublicKey()))
	if block == nil {
		t.Fatalf("SecretService shows the public key as %q", version.GetPublicKey())
	}
	if shown, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil || !public.Equal(shown) {
		t.Errorf("SecretService and the key set show different keys (%v)", err)
	}
	used := map[string]bool{}
	var ts *tokenServer
	ts = newTokenServer(t, s, ca, func(r *http.Request) error {
		claims, err := readAssertion(r.PostForm, version.GetKeyId(), public)
		switch now := float64(time.Now().Unix()); {
		case err != nil:
			return err
		case claims.Issuer != "grapnel" || claims.Subject != "grapnel" || claims.Audience != ts.url:
			return fmt.Errorf("claims %+v", claims)
		case claims.Expires < now || claims.Expires > now+300 || claims.ID == "" || used[claims.ID]:
			return fmt.Errorf("claims %+v were used before, or at %v are no longer good", claims, now)
		}
		used[claims.ID] = true
		return nil
	})
	ts.exercise(t, route{
		config:  map[string]any{"client_auth": "private_key_jwt"},
		secrets: map[string]string{"ca": ca.pem, "assertion_key": made.GetSecret().GetName()},
	})
}

type assertionClaims struct {
	Issuer   string  `json:"iss"`
	Subject  string  `json:"sub"`
	Audience string  `json:"aud"`
	ID       string  `json:"jti"`
	Expires  float64 `json:"exp"`
}

// readAssertion reads the client's JWT (RFC 7523), signed with ES256.
func readAssertion(form url.Values, kid string, public *ecdsa.PublicKey) (claims assertionClaims, err error) {
	if form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
		return claims, fmt.Errorf("the form is %v", form)
	}
	parts := strings.Split(form.Get("client_assertion"), ".")
	if len(parts) != 3 {
		return claims, errors.New("the assertion is no JWT")
	}
	var raw [3][]byte
	for i, p := range parts {
		if raw[i], err = base64.RawURLEncoding.DecodeString(p); err != nil {
			return claims, err
		}
	}
	var header struct{ Alg, Kid string }
	if err := json.Unmarshal(raw[0], &header); err != nil || header.Alg != "ES256" || header.Kid != kid {
		return claims, fmt.Errorf("the header is %s", raw[0])
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	r, ss := new(big.Int).SetBytes(raw[2][:len(raw[2])/2]), new(big.Int).SetBytes(raw[2][len(raw[2])/2:])
	if len(raw[2]) != 64 || !ecdsa.Verify(public, sum[:], r, ss) {
		return claims, errors.New("the signature is wrong")
	}
	return claims, json.Unmarshal(raw[1], &claims)
}

// publishedKey is the key of that id in the namespace's key set.
func publishedKey(t *testing.T, s *stand, id string) *ecdsa.PublicKey {
	t.Helper()
	resp, err := http.Get("http://" + s.AdminAddr + "/namespaces/" + s.ns + "/jwks.json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var set struct {
		Keys []struct{ Kty, Crv, X, Y, Kid, D string } `json:"keys"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		x, errX := base64.RawURLEncoding.DecodeString(k.X)
		y, errY := base64.RawURLEncoding.DecodeString(k.Y)
		if k.Kid != id || k.Kty != "EC" || k.Crv != "P-256" || k.D != "" || errX != nil || errY != nil {
			continue
		}
		public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
		if err != nil {
			t.Fatal(err)
		}
		return public
	}
	t.Fatalf("no key %s of P-256 in the key set %+v", id, set)
	return nil
}

// credentialsInRequests sends each kind of fixed credential, to a receiver that wants it, and to one that
// fails and says it back in every way.
func credentialsInRequests(t *testing.T, s *stand) {
	password := s.canary("a password", "c4n4ry:pass+word/"+rand.Text())
	token := s.canary("a bearer token", "c4n4ry-bearer-"+rand.Text())
	header := s.canary("a key in a header", "c4n4ry-header-"+rand.Text())
	query := s.canary("a key in a query", "c4n4ry+query/"+rand.Text())
	s.canary("an encoded key in a query", url.QueryEscape(query))
	pair := s.canary("a user with a password", base64.StdEncoding.EncodeToString([]byte("me:"+password)))
	for id, c := range map[string]struct {
		auth    map[string]any
		secrets map[string]string
		wants   func(servertest.Request) bool
	}{
		"basic": {map[string]any{"type": "basic", "username": "me"}, map[string]string{"password": password}, func(r servertest.Request) bool {
			return r.Header.Get("Authorization") == "Basic "+pair
		}},
		"bearer": {map[string]any{"type": "bearer"}, map[string]string{"token": token}, func(r servertest.Request) bool {
			return r.Header.Get("Authorization") == "Bearer "+token
		}},
		"header": {map[string]any{"type": "api_key", "name": "X-House-Key"}, map[string]string{"api_key": header}, func(r servertest.Request) bool {
			return r.Header.Get("X-House-Key") == header
		}},
		"query": {map[string]any{"type": "api_key", "in": "query", "name": "key"}, map[string]string{"api_key": query}, func(r servertest.Request) bool {
			u, err := url.Parse(r.URL)
			return err == nil && u.Query().Get("key") == query && u.Query().Get("a") == "b"
		}},
	} {
		rcv := servertest.NewReceiver(t, nil)
		r := route{config: map[string]any{"auth": c.auth}, secrets: c.secrets}
		s.over(id, rcv.URL+"/hook?a=b", r, nil)
		s.send(id, 3)
		for _, r := range rcv.Requests() {
			s.verified(r.Header, r.Body)
			if !c.wants(r) {
				t.Errorf("%s: %s arrived with\n%s", id, r.URL, headersText(r.Header))
			}
		}
		echo := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Echo", r.RequestURI+" "+r.Header.Get("Authorization")+r.Header.Get("X-House-Key"))
			w.WriteHeader(http.StatusBadGateway)
			_, _ = fmt.Fprintf(w, "GET %s %s\n%v", r.RequestURI, r.URL.Query().Get("key"), r.Header)
		}))
		t.Cleanup(echo.Close)
		s.over("echo-"+id, echo.URL+"/hook?a=b", r, oneTry)
		tested, err := grapnelv1.NewSubscriptionServiceClient(s.Conn).TestSubscription(t.Context(), &grapnelv1.TestSubscriptionRequest{
			Name: "namespaces/" + s.ns + "/subscriptions/echo-" + id,
		})
		if text := fmt.Sprint(tested.GetAttempt().GetResponseHeaders(), string(tested.GetAttempt().GetResponseBody())); err != nil ||
			!strings.Contains(text, "[redacted]") || strings.Contains(text, "c4n4ry") {
			t.Errorf("%s: a test shows %s (%v)", id, text, err)
		}
		attempts := s.attempts(s.fail("echo-" + id).GetName())
		if len(attempts) != 1 || !strings.Contains(string(attempts[0].GetResponseBody()), "[redacted]") || !strings.Contains(attempts[0].GetResponseHeaders()["x-echo"], "[redacted]") {
			t.Errorf("%s: the receiver said it back, and what is kept is %v: %s", id, attempts, attempts[0].GetResponseBody())
		}
	}
}
