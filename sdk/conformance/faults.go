package conformance

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func refused(t *trial) error {
	return t.eachDirect(answer200, func(c *carrier) error {
		port, err := closedPort()
		if err != nil {
			return err
		}
		if c.ref, err = c.instance("http://127.0.0.1:" + strconv.Itoa(port) + "/"); err != nil {
			return err
		}
		f, err := c.failure(attemptTimeout)
		if err != nil {
			return err
		}
		return outcome(f, endpoint, []string{"connect"}, notSent)
	})
}

func resetAtOnce(t *trial) error {
	return t.eachDirect(nil, func(c *carrier) error {
		for range 3 {
			f, err := c.failure(attemptTimeout)
			if err != nil {
				return err
			}
			if err := outcome(f, endpoint, []string{"reset", "connect", "protocol"}); err != nil {
				return err
			}
		}
		return nil
	})
}

func resetAfterRequest(t *trial) error {
	return t.eachHTTP(func(x *exchange) { reset(x.Conn) }, func(c *carrier) error {
		for range 3 {
			f, err := c.failure(attemptTimeout)
			if err != nil {
				return err
			}
			if f.GetWireState() == notSent {
				return fmt.Errorf("the receiver had the whole request, and the failure is %s", failureText(f))
			}
		}
		return nil
	})
}

// noBlindRetry breaks connections where clients are tempted: one that was used before, behind the first bytes of an
// answer, and a new one. Where one that was used before ends without a byte, a request may go out once more.
func noBlindRetry(t *trial) error {
	handle := func(x *exchange) {
		switch x.n % 3 {
		case 1:
			answer200(x)
			return
		case 2:
			_, _ = io.WriteString(x, "HTTP/1.1")
		}
		reset(x.Conn)
	}
	return t.eachHTTP(handle, func(c *carrier) error {
		for range 6 {
			if _, err := c.send([]byte(`{}`), attemptTimeout); err != nil {
				return err
			}
		}
		if got, _ := c.sink.seen(); len(got) > 6 {
			return fmt.Errorf("%d requests arrived for 6 attempts", len(got))
		}
		return nil
	})
}

// onTime tries f until it takes about as long as the timeout says.
func onTime(timeout time.Duration, f func() error) error {
	var took time.Duration
	for range timingTries {
		began := time.Now()
		if err := f(); err != nil {
			return err
		}
		took = time.Since(began)
		if took >= timeout-tolerance && took <= timeout+tolerance {
			return nil
		}
	}
	return latef("an attempt with a timeout of %v was answered after %v", timeout, took.Round(time.Millisecond))
}

func timesOut(t *trial) error {
	return t.eachHTTP(hang, func(c *carrier) error {
		return onTime(shortTimeout, func() error {
			f, err := c.failure(shortTimeout)
			if err != nil {
				return err
			}
			return outcome(f, endpoint, []string{"timeout"}, maybeSent, allSent)
		})
	})
}

func endlessBody(t *trial) error {
	return t.eachHTTP(drip, func(c *carrier) error {
		return onTime(shortTimeout, func() error {
			res, err := c.send([]byte(`{}`), shortTimeout)
			if err != nil {
				return err
			}
			if f := res.GetFailure(); f != nil {
				return outcome(f, endpoint, []string{"timeout"}, maybeSent, allSent)
			}
			if !res.GetResponse().GetBodyTruncated() {
				return errors.New("the outcome is a response whose body is said to be whole")
			}
			return nil
		})
	})
}

func garbageAnswer(t *trial) error {
	answers := []string{"SSH-2.0-OpenSSH_9.2\r\n\r\n", "HTTP/1.1 two hundred\r\n\r\n", "\x00\x01\x02\x03\r\n\r\n"}
	handle := func(x *exchange) {
		_, _ = io.WriteString(x, answers[(x.n-1)%len(answers)])
		_ = x.Close()
	}
	return t.eachHTTP(handle, func(c *carrier) error {
		for _, answer := range answers {
			f, err := c.failure(attemptTimeout)
			if err != nil {
				return fmt.Errorf("answer %q: %w", answer, err)
			}
			if err := outcome(f, endpoint, nil, maybeSent, allSent); err != nil {
				return fmt.Errorf("answer %q: %w", answer, err)
			}
		}
		return c.ses.alive()
	})
}

func headerBomb(t *trial) error {
	handle := func(x *exchange) {
		_, err := io.WriteString(x, "HTTP/1.1 200 OK\r\n")
		for i := 0; i < 64<<10 && err == nil; i++ { // 64 MiB
			_, err = fmt.Fprintf(x, "X-Bomb-%d: %s\r\n", i, strings.Repeat("x", 1000))
		}
	}
	return t.eachHTTP(handle, func(c *carrier) error {
		before, _ := usageOf(c.ses.proc.pid())
		if _, err := c.send([]byte(`{}`), attemptTimeout); err != nil {
			return err
		}
		if after, known := usageOf(c.ses.proc.pid()); known && after.rss-before.rss > 32<<20 {
			return fmt.Errorf("a response header of 64 MiB made the process grow by %d MiB", (after.rss-before.rss)>>20)
		}
		return c.ses.alive()
	})
}

// egressDenied asks for loopback by its address and by name while the settings do not open it, and while they close what they
// open.
func egressDenied(t *trial) error {
	if !slices.ContainsFunc(t.s.subjects, direct) {
		return t.noTransport("http")
	}
	if err := t.egressDeniedBy("egress_allow is empty", &pluginv1.HostSettings{}); err != nil {
		return err
	}
	both := []string{loopback4, loopback6}
	return t.egressDeniedBy("egress_deny has its range", &pluginv1.HostSettings{EgressAllow: both, EgressDeny: both})
}

// direct: what it connects to is the receiver.
func direct(u *subject) bool { return overHTTP(u) && !u.bridged() }

func (t *trial) egressDeniedBy(why string, set *pluginv1.HostSettings) error {
	ses, err := t.sessionWith(launch{}, set)
	if err != nil {
		return err
	}
	a, err := ses.sharedAttempts()
	if err != nil {
		return err
	}
	return t.each("transport for http", direct, func(u *subject) error {
		k, err := t.receiver(u, answer200)
		if err != nil {
			return err
		}
		for _, host := range []string{"127.0.0.1", "localhost", "[::ffff:127.0.0.1]"} {
			in := ses.instance(u, u.uriOf(k, fmt.Sprintf("http://%s:%d/", host, k.port)))
			statuses, err := ses.configure(in)
			if err != nil {
				return err
			}
			if len(complaints(statuses[0].GetDiagnostics())) > 0 {
				continue // refused when it is configured, which is earlier still
			}
			res, err := a.one(newContent("evt_egress", []byte(`{}`)), newAttempt(in.GetRef(), attemptTimeout))
			if err != nil {
				return err
			}
			if _, accepted := k.seen(); accepted > 0 {
				return fmt.Errorf("%s: a connection was made, and %s", host, why)
			}
			f, err := mustFail(res)
			if err != nil {
				return fmt.Errorf("%s: %w", host, err)
			}
			if host == "localhost" && f.GetCode() == "dns" {
				continue // there are machines without that name
			}
			if err := outcome(f, pluginv1.Failure_SOURCE_POLICY, []string{"egress"}, notSent); err != nil {
				return fmt.Errorf("%s: %w", host, err)
			}
		}
		return nil
	})
}

func unknownAuthority(t *trial) error {
	if !slices.ContainsFunc(t.s.subjects, overTLS) {
		return t.noTransport("https")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	a, err := ses.sharedAttempts()
	if err != nil {
		return err
	}
	return t.each("transport for https", overTLS, func(u *subject) error {
		k, err := t.newTLSSink(answer200)
		if err != nil {
			return err
		}
		in := ses.instance(u, u.uriOf(k, k.url+"/"))
		if err := ses.take(in); err != nil {
			return err
		}
		res, err := a.one(newContent("evt_tls", []byte(`{}`)), newAttempt(in.GetRef(), attemptTimeout))
		if err != nil {
			return err
		}
		if got, _ := k.seen(); len(got) > 0 {
			return errors.New("the request was sent to a receiver whose certificate nobody vouches for")
		}
		f, err := mustFail(res)
		if err != nil {
			return err
		}
		return outcome(f, endpoint, []string{"tls"}, notSent)
	})
}

func keepAlive(t *trial) error {
	const n = 20
	return t.eachHTTP(answer200, func(c *carrier) error {
		for range n {
			if _, err := c.response([]byte(`{}`)); err != nil {
				return err
			}
		}
		if _, accepted := c.sink.seen(); accepted > n/2 {
			return fmt.Errorf("%d connections for %d attempts in a row", accepted, n)
		}
		return nil
	})
}

func signHere(t *trial) error {
	var signer *subject
	for _, u := range t.s.subjects {
		if deterministicSigner(u) && signer == nil {
			signer = u
		}
	}
	if signer == nil {
		return skipf("it offers no deterministic signer beside the transport")
	}
	return t.eachHTTP(answer200, func(c *carrier) error {
		uri := c.sink.url + "/signed"
		in, carrying := c.ses.instance(signer, uri), c.ses.instance(c.u, c.uri(uri))
		if err := c.ses.take(in, carrying); err != nil {
			return err
		}
		content := newContent("evt_here", []byte(`{"sign":"here"}`))
		results, _, err := c.ses.signBatch([]*pluginv1.Content{content}, signItem(in.GetRef(), 0))
		if err != nil {
			return err
		}
		at := newAttempt(carrying.GetRef(), attemptTimeout)
		at.SignHere, at.CreatedUnixNano = []uint32{in.GetRef()}, signTime().UnixNano()
		res, err := c.a.one(content, at)
		if err != nil {
			return err
		}
		if res.GetResponse() == nil {
			return fmt.Errorf("the attempt failed: %s", failureText(res.GetFailure()))
		}
		got, _ := c.sink.seen()
		for _, h := range results[0].GetHeaders() {
			if value := got[0].header.Get(h.GetName()); value != h.GetValue() {
				return fmt.Errorf("signer %s: %s is %q on the way and %q apart", signer.kind.GetId(), h.GetName(), value, h.GetValue())
			}
		}
		return nil
	})
}

func noSuchHost(t *trial) error {
	return t.eachDirect(answer200, func(c *carrier) error {
		var err error
		if c.ref, err = c.instance("http://no-such-host.invalid/"); err != nil { // RFC 6761: never resolves
			return err
		}
		f, err := c.failure(3 * time.Second)
		if err != nil {
			return err
		}
		return outcome(f, endpoint, []string{"dns", "timeout"}, notSent)
	})
}

func deliversToFixture(t *trial) error {
	withURI := func(u *subject) bool { return u.transport() && u.fixture.URI != "" }
	if !slices.ContainsFunc(t.s.subjects, withURI) {
		return skipf("the fixture names no URI")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	a, err := ses.sharedAttempts()
	if err != nil {
		return err
	}
	return t.each("transport with a URI", withURI, func(u *subject) error {
		if u.unusable != "" {
			return errors.New(u.unusable)
		}
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		for i := range 10 {
			res, err := a.one(newContent(fmt.Sprintf("evt_fixture_%d", i), []byte(`{"n":1}`)), newAttempt(in.GetRef(), attemptTimeout))
			if err != nil {
				return err
			}
			if status := res.GetResponse().GetStatus(); status < 200 || status > 299 {
				return fmt.Errorf("the outcome is status %d, failure %s, want 2xx", status, failureText(res.GetFailure()))
			}
		}
		return nil
	})
}
