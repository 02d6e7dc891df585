//go:build unix

package conformance_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	endpoint  = pluginv1.Failure_SOURCE_ENDPOINT
	ofPlugin  = pluginv1.Failure_SOURCE_PLUGIN
	notSent   = pluginv1.Failure_WIRE_STATE_NOT_SENT
	maybeSent = pluginv1.Failure_WIRE_STATE_MAYBE_SENT
	allSent   = pluginv1.Failure_WIRE_STATE_SENT
)

func failed(source pluginv1.Failure_Source, code string, state pluginv1.Failure_WireState) *pluginv1.AttemptResult {
	return &pluginv1.AttemptResult{Outcome: &pluginv1.AttemptResult_Failure{Failure: rawFailure(source, code, state)}}
}

// rawPool keeps idle connections.
type rawPool struct {
	r  *raw
	mu sync.Mutex // guards idle
	// idle connections by scheme and host; those from before have been read to the end of an answer.
	idle map[string][]*rawConn
}

type rawConn struct {
	net.Conn
	br *bufio.Reader
}

func newRawPool(r *raw) *rawPool { return &rawPool{r: r, idle: map[string][]*rawConn{}} }

var errEgress = errors.New("egress denied")

// get dials, or takes a connection that is idle and has not been closed meanwhile.
func (p *rawPool) get(ctx context.Context, u *url.URL, key string) (*rawConn, error) {
	for {
		p.mu.Lock()
		list := p.idle[key]
		if len(list) == 0 {
			p.mu.Unlock()
			break
		}
		c := list[len(list)-1]
		p.idle[key] = list[:len(list)-1]
		p.mu.Unlock()
		_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := c.br.Peek(1); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			return c, nil
		}
		_ = c.Close()
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		return nil, err
	}
	var last error = errEgress
	for _, addr := range addrs {
		if !p.r.allowed(addr.Unmap()) {
			continue
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(addr.String(), port))
		if err != nil {
			last = err
			continue
		}
		if u.Scheme == "https" {
			secure := tls.Client(conn, &tls.Config{ServerName: u.Hostname(), InsecureSkipVerify: p.r.is("no-verify")}) //nolint:gosec // a fault
			if err := secure.HandshakeContext(ctx); err != nil {
				_ = conn.Close()
				return nil, fmt.Errorf("tls: %w", err)
			}
			conn = secure
		}
		return &rawConn{Conn: conn, br: bufio.NewReader(conn)}, nil
	}
	return nil, last
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func (r *raw) allowed(addr netip.Addr) bool {
	if !addr.IsLoopback() && !addr.IsPrivate() || r.is("no-egress") {
		return true
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	within := func(ranges []string) bool {
		return slices.ContainsFunc(ranges, func(text string) bool {
			p, err := netip.ParsePrefix(text)
			return err == nil && p.Contains(addr)
		})
	}
	return within(r.egress) && (r.is("no-deny") || !within(r.deny))
}

// attempt is one attempt of either transport.
func (r *raw) attempt(ctx context.Context, at *pluginv1.Attempt, c *pluginv1.Content, maxBody int) *pluginv1.AttemptResult {
	if most := int(at.GetMaxResponseBody()); most > 0 && !r.is("short-answer") {
		maxBody = most
	}
	in := r.get(at.GetInstanceRef())
	if in == nil || in.pb.GetKind() == "raw-sign" {
		if r.is("unknown-ref-sent") {
			return failed(pluginv1.Failure_SOURCE_CONFIG, "config", maybeSent)
		}
		return failed(pluginv1.Failure_SOURCE_CONFIG, "config", notSent)
	}
	if in.pb.GetKind() == "raw-mem" {
		code := uint32(200)
		if r.is("mem-fails") {
			code = 500
		}
		return &pluginv1.AttemptResult{Outcome: &pluginv1.AttemptResult_Response{Response: &pluginv1.Response{Status: code}}}
	}
	headers := append(append([]*pluginv1.Header(nil), c.GetHeaders()...), in.pb.GetTarget().GetHeaders()...)
	headers = append(headers, at.GetHeaders()...)
	for _, ref := range at.GetSignHere() {
		signer := r.get(ref)
		if signer == nil {
			return failed(pluginv1.Failure_SOURCE_CONFIG, "config", notSent)
		}
		value := signer.sign(c, time.Unix(0, at.GetCreatedUnixNano()))
		if r.is("signs-otherwise-here") {
			value += "here"
		}
		headers = append(headers, &pluginv1.Header{Name: "x-raw-signature", Value: value})
	}
	uri := in.pb.GetTarget().GetUri()
	if at.GetUri() != "" && !r.is("ignores-uri") {
		uri = at.GetUri()
	}
	res, again := r.send(ctx, uri, headers, c.GetBody(), maxBody)
	if again && r.is("retries") {
		res, _ = r.send(ctx, uri, headers, c.GetBody(), maxBody)
	}
	if location := redirectOf(res); location != "" && r.is("follows-redirects") {
		u, _ := url.Parse(uri)
		to, _ := u.Parse(location)
		res, _ = r.send(ctx, to.String(), headers, c.GetBody(), maxBody)
	}
	return res
}

func redirectOf(res *pluginv1.AttemptResult) string {
	if status := res.GetResponse().GetStatus(); status >= 300 && status <= 399 {
		for _, h := range res.GetResponse().GetHeaders() {
			if h.GetName() == "location" {
				return h.GetValue()
			}
		}
	}
	return ""
}

// send makes one request. It reports whether the connection broke.
func (r *raw) send(ctx context.Context, uri string, headers []*pluginv1.Header, body []byte, maxBody int) (*pluginv1.AttemptResult, bool) {
	if ctx.Err() != nil {
		return r.ended(ctx, notSent), false
	}
	u, err := url.Parse(uri)
	if err != nil {
		return failed(ofPlugin, "protocol", notSent), false
	}
	key := u.Scheme + u.Host
	if r.is("keeps-connections") {
		key += u.Path // as if each instance had a pool of its own
	}
	conn, err := r.pool.get(ctx, u, key)
	if err != nil {
		return r.dialFailure(ctx, err), false
	}
	late := time.Duration(0)
	if r.is("late-timeout") {
		late = time.Second
	}
	deadline, _ := ctx.Deadline()
	_ = conn.SetDeadline(deadline.Add(late))
	stop := context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			_ = conn.SetDeadline(time.Now())
		}
	})
	defer stop()
	if _, err := conn.Write(r.request(u, headers, body)); err != nil {
		_ = conn.Close()
		return r.broken(ctx, err, maybeSent), true
	}
	resp, err := conn.readHeader(r.is("unbounded-header"))
	if err != nil {
		_ = conn.Close()
		return r.broken(ctx, err, allSent), isReset(err)
	}
	late = 0
	if r.is("late-body") {
		late = time.Second
	}
	_ = conn.SetDeadline(deadline.Add(late))
	kept, err := io.ReadAll(io.LimitReader(resp.Body, int64(maxBody)+1))
	if err != nil {
		_ = conn.Close()
		return r.broken(ctx, err, allSent), isReset(err)
	}
	rest, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 2<<20))
	if err == nil && rest < 2<<20 && !resp.Close && !r.is("no-keep-alive") {
		r.pool.put(key, conn)
	} else {
		_ = conn.Close()
	}
	return r.response(resp, kept, maxBody), false
}

func (p *rawPool) put(key string, c *rawConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle[key] = append(p.idle[key], c)
}

func (r *raw) request(u *url.URL, headers []*pluginv1.Header, body []byte) []byte {
	if r.is("trims-body") {
		body = bytes.TrimSpace(body)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\nUser-Agent: raw\r\n", u.RequestURI(), u.Host, len(body))
	for _, h := range headers {
		value := h.GetValue()
		if r.is("changes-header") {
			value = strings.ReplaceAll(value, `"`, `'`)
		}
		fmt.Fprintf(&b, "%s: %s\r\n", h.GetName(), value)
	}
	if r.is("surprise-header") {
		b.WriteString("X-Powered-By: raw\r\n")
	}
	b.WriteString("\r\n")
	b.Write(body)
	return b.Bytes()
}

var errHeaderTooLarge = errors.New("header too large")

// readHeader reads 64 KiB at most.
func (c *rawConn) readHeader(unbounded bool) (*http.Response, error) {
	var head bytes.Buffer
	for !bytes.HasSuffix(head.Bytes(), []byte("\r\n\r\n")) {
		line, err := c.br.ReadSlice('\n')
		head.Write(line)
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if head.Len() > 0 && errors.Is(err, io.EOF) {
				break // what is there may be told to be no HTTP
			}
			return nil, err
		}
		if head.Len() > 64<<10 && !unbounded {
			return nil, errHeaderTooLarge
		}
	}
	if head.Len() == 0 {
		return nil, io.EOF
	}
	return http.ReadResponse(bufio.NewReader(io.MultiReader(&head, c.br)), nil)
}

func (r *raw) response(resp *http.Response, body []byte, maxBody int) *pluginv1.AttemptResult {
	out := &pluginv1.Response{Status: uint32(resp.StatusCode), Body: body}
	if len(body) > maxBody {
		out.Body, out.BodyTruncated = body[:maxBody], !r.is("truncation-hidden")
	}
	for name, values := range resp.Header {
		for _, v := range values {
			if r.is("drops-retry-after") && name == "Retry-After" && resp.StatusCode < 300 {
				continue
			}
			out.Headers = append(out.Headers, &pluginv1.Header{Name: strings.ToLower(name), Value: v})
		}
	}
	if r.is("odd-status-hidden") && out.GetStatus() == 599 {
		out.Status = 500
	}
	if r.is("no-204") && out.GetStatus() == 204 {
		return failed(endpoint, "protocol", allSent)
	}
	return &pluginv1.AttemptResult{Outcome: &pluginv1.AttemptResult_Response{Response: out}}
}

// ended is the outcome of an attempt whose context has.
func (r *raw) ended(ctx context.Context, state pluginv1.Failure_WireState) *pluginv1.AttemptResult {
	if errors.Is(ctx.Err(), context.Canceled) {
		return failed(ofPlugin, "cancelled", state)
	}
	return failed(endpoint, "timeout", state)
}

func (r *raw) dialFailure(ctx context.Context, err error) *pluginv1.AttemptResult {
	var dns *net.DNSError
	switch {
	case errors.Is(err, errEgress):
		return failed(pluginv1.Failure_SOURCE_POLICY, "egress", notSent)
	case ctx.Err() != nil:
		return r.ended(ctx, notSent)
	case errors.As(err, &dns) && r.is("dns-own-fault"):
		return failed(ofPlugin, "dns", notSent)
	case errors.As(err, &dns):
		return failed(endpoint, "dns", notSent)
	case strings.HasPrefix(err.Error(), "tls: "):
		return failed(endpoint, "tls", notSent)
	case r.is("refused-maybe-sent"):
		return failed(endpoint, "connect", maybeSent)
	}
	return failed(endpoint, "connect", notSent)
}

func isReset(err error) bool {
	var op *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &op) && !op.Timeout()
}

// broken is the outcome of a request that was begun.
func (r *raw) broken(ctx context.Context, err error, state pluginv1.Failure_WireState) *pluginv1.AttemptResult {
	switch {
	case ctx.Err() != nil || isTimeout(err):
		return r.ended(ctx, state)
	case isReset(err) && r.is("reset-own-fault"):
		return failed(ofPlugin, "reset", state)
	case isReset(err) && r.is("reset-not-sent"):
		return failed(endpoint, "reset", notSent)
	case isReset(err):
		return failed(endpoint, "reset", state)
	case r.is("garbage-own-fault"):
		return failed(ofPlugin, "protocol", state)
	}
	return failed(endpoint, "protocol", state)
}
