package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	firstparty "github.com/grapnel/grapnel/plugins"
	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// schemeCase is a scheme with a key, its config, and what a receiver verifies with if that is another key.
type schemeCase struct {
	scheme, config, key, verifyWith, other string
	timeless                               bool // a captured request stays good
	url                                    string
}

func schemeCases(t *testing.T) []schemeCase {
	t.Helper()
	const whsec, otherWhsec = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSx"
	const text, otherText = "0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdee"
	cases := []schemeCase{
		{scheme: "standard-webhooks", key: whsec, other: otherWhsec},
		{scheme: "svix", key: whsec, other: otherWhsec},
		{scheme: "stripe", key: whsec, other: otherWhsec},
		{scheme: "github", key: text, other: otherText, timeless: true},
		{scheme: "slack", key: text, other: otherText},
		{scheme: "shopify", key: text, other: otherText, timeless: true, config: `{"shop_domain":"x.myshopify.com"}`},
		{scheme: "twilio", key: text, other: otherText, timeless: true},
		{scheme: "square", key: text, other: otherText, timeless: true},
		{scheme: "convoy", key: text, other: otherText},
		{scheme: "convoy", key: text, other: otherText, config: `{"mode":"simple","hash":"SHA512","encoding":"base64"}`, timeless: true},
		{scheme: "outpost", key: text, other: otherText, timeless: true},
		{scheme: "webhookx", key: text, other: otherText},
		{scheme: "hook0", key: text, other: otherText},
		{scheme: "hmac", key: text, other: otherText, config: `{"content":"{id}.{timestamp}.{nonce}.{body}","headers":{"X-Sig":"t={timestamp},n={nonce},{signatures}"},"signature_each":"v1={signature}","timestamp_format":"ms"}`},
		{scheme: "sigv4", key: text, other: otherText, config: `{"region":"us-east-1","service":"execute-api","access_key_id":"AKIDEXAMPLE"}`},
		{scheme: "http-signature", key: text, other: otherText},
		{scheme: "jws", key: text, other: otherText},
		{scheme: "jwt", key: text, other: otherText, config: `{"body_hash":"sha","lifetime":"5m"}`},
	}
	for _, algorithm := range []string{keys.Ed25519, keys.ECDSAP256, keys.ECDSAP384, keys.RSAV15SHA256} {
		var private, public [2]string
		for i := range private {
			pem, err := keys.Generate(algorithm)
			if err != nil {
				t.Fatal(err)
			}
			k, err := keys.Parse(pem)
			if err != nil {
				t.Fatal(err)
			}
			private[i], public[i] = string(pem), k.PublicPEM()
		}
		for _, scheme := range []string{"http-signature", "jws", "jwt"} {
			config := ""
			if scheme == "jwt" {
				config = `{"body_hash":"sha","body_hash_encoding":"base64url"}`
			}
			cases = append(cases, schemeCase{scheme: scheme, key: private[0], verifyWith: public[0], other: public[1], config: config})
		}
	}
	return cases
}

// sign makes a request as the signer that ships signs it.
func (c schemeCase) sign(t *testing.T, at time.Time, body string) incoming {
	t.Helper()
	target := "http://127.0.0.1:9000/hooks?x=1"
	config := c.config
	if config == "" {
		config = "{}"
	}
	for _, k := range firstparty.Kinds() {
		if k.ID() != c.scheme {
			continue
		}
		local, err := plugin.OpenLocal(k, []byte(config), map[string][][]byte{"key": {[]byte(c.key)}}, plugin.Target{Method: "POST", URL: target})
		if err != nil {
			t.Fatal(err)
		}
		defer local.Close()
		r := &plugin.Request{
			MessageID: "evt_1", EventType: "order.created", Created: at, Nonce: []byte("0123456789abcdef"), Method: "POST", URL: target,
			Body: []byte(body), AttemptNumber: 1,
		}
		r.Add("webhook-id", "evt_1")
		r.Add("content-type", "application/json")
		r.Add("ce-type", "order.created")
		if err := local.Sign(r); err != nil {
			t.Fatal(err)
		}
		a := incoming{method: r.Method, url: r.URL, header: http.Header{}, body: []byte(body), at: at.Add(time.Second)}
		for _, h := range r.Headers {
			a.header.Add(h.Name, h.Value)
		}
		return a
	}
	t.Fatalf("no signer %s", c.scheme)
	return incoming{}
}

// TestReceiveVerifiesEveryScheme: what a signer that ships signs, receive verifies; another body, another key, an old time
// and a missing header it does not.
func TestReceiveVerifiesEveryScheme(t *testing.T) {
	verified := map[string]bool{}
	for _, c := range schemeCases(t) {
		t.Run(c.scheme, func(t *testing.T) {
			with := c.verifyWith
			if with == "" {
				with = c.key
			}
			verify, err := newVerifier(c.scheme, []byte(c.config), with, c.url)
			if err != nil {
				t.Fatal(err)
			}
			at := time.Now().Truncate(time.Millisecond)
			good := c.sign(t, at, `{"order":1}`)
			if err := verify(good); err != nil {
				t.Fatalf("a good signature: %v\n%v", err, good.header)
			}
			verified[c.scheme] = true

			changed := good
			changed.body = []byte(`{"order":2}`)
			if verify(changed) == nil {
				t.Error("another body verifies")
			}
			other, err := newVerifier(c.scheme, []byte(c.config), c.other, c.url)
			if err != nil {
				t.Fatal(err)
			}
			if other(good) == nil {
				t.Error("another key verifies")
			}
			old := good
			old.at = at.Add(time.Hour)
			if got := verify(old); (got == nil) != c.timeless {
				t.Errorf("an hour later: %v", got)
			}
			bare := good
			bare.header = http.Header{"Webhook-Id": {"evt_1"}, "Content-Type": {"application/json"}}
			if err := verify(bare); err == nil || !strings.Contains(err.Error(), "is missing") {
				t.Errorf("without a signature: %v, want that the header is missing", err)
			}
		})
	}
	for _, scheme := range schemes() {
		if !verified[scheme] {
			t.Errorf("%s is not tried", scheme)
		}
	}
	for _, k := range firstparty.Kinds() {
		if _, err := newVerifier(k.ID(), nil, "x", ""); err != nil && strings.Contains(err.Error(), "no --scheme") {
			switch k.ID() {
			case "none", "http", "grpc", "nats", "cel", "jq", "template", "javascript": // no signers
			default:
				t.Errorf("%s ships and receive does not know it", k.ID())
			}
		}
	}
}

// TestReceiveRotation: while two keys sign, a receiver that has one of them verifies.
func TestReceiveRotation(t *testing.T) {
	c := schemeCase{scheme: "stripe", key: "whsec_new0123456789"}
	good := c.sign(t, time.Now(), "x")
	c.key = "whsec_old0123456789"
	_, old, _ := strings.Cut(c.sign(t, good.at.Add(-time.Second), "x").header.Get("Stripe-Signature"), ",")
	good.header.Set("Stripe-Signature", good.header.Get("Stripe-Signature")+","+old)
	for _, key := range []string{"whsec_new0123456789", "whsec_old0123456789"} {
		verify, err := newVerifier("stripe", nil, key, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := verify(good); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
}

// TestReceiveShowsStrangersSafely: an unsigned request can neither steer the terminal nor forge a line, and an interrupt
// ends with 130.
func TestReceiveShowsStrangersSafely(t *testing.T) {
	bin, err := exec.LookPath("grapnel")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "receive", "--listen", "127.0.0.1:0", "--secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	cmd.WaitDelay = patience
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	lines := bufio.NewReader(out)
	first, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	addr := strings.TrimSpace(strings.TrimPrefix(first, "listening on http://"))
	for raw := range hostile() {
		body := raw + "\nPOST /hooks  order.created  verified  9 bytes: forged"
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /a%%1b%%e2%%80%%ae HTTP/1.1\r\nHost: x\r\nCe-Type: t\u202e\xff\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		answer, _ := io.ReadAll(conn)
		_ = conn.Close()
		if !bytes.HasPrefix(answer, []byte("HTTP/1.1 401")) {
			t.Fatalf("answered %q", answer)
		}
		line, err := lines.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if !shownSafely(line) || !strings.HasPrefix(line, "POST /a") || !strings.Contains(line, "not verified: the header Webhook-Id is missing") &&
			!strings.Contains(line, "not verified: the header Webhook-") || !strings.Contains(line, "forged") {
			t.Errorf("%q is shown as %q", raw, line)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	_, _ = io.Copy(io.Discard, lines)
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("an interrupt ends with %d, want 130", code)
	}
}
