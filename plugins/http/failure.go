package httpplugin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
)

var (
	errHeaderTooLarge = errors.New("the response's header is larger than 64 KiB")
	errUpgrade        = errors.New("the receiver wants to switch protocols")
	// errAsked goes with the end of a new connection to a receiver that had asked for a client certificate.
	errAsked = errors.New("the receiver has asked for a client certificate")
)

// dialError is a connection that did not come about; nothing was sent.
type dialError struct {
	code string // of plugin.Failure
	err  error
	// proxy says that it is the proxy's, and not the receiver's.
	proxy bool
}

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// failure is the function failure, which does not know of client certificates: where one is out of date,
// an end of the connection has most likely to do with that.
func (p *pool) failure(ctx context.Context, err error, state plugin.WireState, peer string) *plugin.Failure {
	f := failure(ctx, err, state, peer)
	if f.Code != plugin.CodeTLS && f.Code != plugin.CodeReset {
		return f
	}
	alert := certificateAlert(err)
	asked := errors.Is(err, errAsked) && isReset(err)
	switch {
	case alert != "" && p.client != nil:
		f.Message = "the receiver refused the client certificate: " + alert
	case alert != "":
		f.Message = "the receiver wants a client certificate, and the slot client_certificate is empty"
	case asked && p.client != nil: // with TLS 1.3 an alert may be lost on the way
		f.Message += "; it may have refused the client certificate"
	case asked:
		f.Message += "; it had asked for a client certificate, and the slot client_certificate is empty"
	}
	if p.client == nil {
		return f
	}
	if text := validity(p.client, time.Now()); text != "" {
		f.Code, f.Message = plugin.CodeTLS, text+"; "+f.Message
	}
	return f
}

// certificateAlert is what the receiver says against the client certificate, or against there being none, empty
// when it says nothing of that. It is one of a fixed list.
func certificateAlert(err error) string {
	var dial *dialError
	var op *net.OpError
	if errors.As(err, &dial) && dial.proxy || !errors.As(err, &op) || op.Op != "remote error" {
		return ""
	}
	alert := strings.TrimPrefix(op.Err.Error(), "tls: ")
	if strings.Contains(alert, "certificate") || alert == "access denied" || alert == "handshake failure" && errors.Is(err, errAsked) {
		return alert
	}
	return ""
}

// failure says what went wrong in words of our own: texts of errors below name addresses and repeat what
// receivers send.
func failure(ctx context.Context, err error, state plugin.WireState, peer string) *plugin.Failure {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, WireState: state, Peer: peer}
	var dial *dialError
	dialling := errors.As(err, &dial)
	if dialling {
		f.WireState = plugin.NotSent
	}
	switch {
	case errors.Is(err, plugin.ErrEgressDenied):
		f.Source, f.Code, f.Message, f.Peer = plugin.SourcePolicy, plugin.CodeEgress, plugin.ErrEgressDenied.Error(), ""
	case errors.Is(ctx.Err(), context.Canceled):
		f.Source, f.Code, f.Message = plugin.SourcePlugin, plugin.CodeCancelled, "cancelled by the host"
	case ctx.Err() != nil:
		f.Code, f.Message = plugin.CodeTimeout, timeoutMessage(state, dialling)
	case ownFault(err):
		f.Source, f.Code, f.Message = plugin.SourcePlugin, plugin.CodeConnect, "out of sockets or file descriptors"
	case dialling:
		f.Code, f.Message = dial.code, dialMessage(dial)
	case isTimeout(err):
		f.Code, f.Message = plugin.CodeTimeout, timeoutMessage(state, false)
	case tlsMessage(err) != "":
		f.Code, f.Message = plugin.CodeTLS, tlsMessage(err)
	case errors.Is(err, errHeaderTooLarge), errors.Is(err, errUpgrade):
		f.Code, f.Message = plugin.CodeProtocol, err.Error()
	case isReset(err):
		f.Code, f.Message = plugin.CodeReset, "the receiver closed the connection without an answer"
	default:
		f.Code, f.Message = plugin.CodeProtocol, "the receiver did not answer in HTTP"
	}
	return f
}

func isTimeout(err error) bool {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func timeoutMessage(state plugin.WireState, dialling bool) string {
	switch {
	case dialling || state == plugin.NotSent:
		return "no connection before the attempt's time was up"
	case state == plugin.Sent:
		return "no answer in time"
	}
	return "the receiver did not take the request in time"
}

// isReset includes the texts of net/http, which has no types for them.
func isReset(err error) bool {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) {
		return true
	}
	text := err.Error()
	return slices.ContainsFunc([]string{
		"http: server closed idle connection", "http2: client conn could not be established", "http2: client connection lost",
		"http2: Transport received", "http2: server sent GOAWAY", "http2: Transport: cannot retry",
	}, func(begin string) bool { return strings.HasPrefix(text, begin) })
}

// ownFault reports what no receiver can be blamed for.
func ownFault(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func dialMessage(e *dialError) string {
	if e.proxy {
		own := *e
		own.proxy = false
		text := dialMessage(&own)
		if rest, ok := strings.CutPrefix(text, "the receiver "); ok && !errors.As(e.err, new(*proxyRefusal)) {
			text = "it " + rest
		}
		return "proxy: " + text
	}
	var dns *net.DNSError
	var refusal *proxyRefusal
	switch {
	case errors.As(e.err, &refusal):
		return refusal.message
	case errors.Is(e.err, io.EOF), errors.Is(e.err, io.ErrUnexpectedEOF), errors.Is(e.err, syscall.ECONNRESET):
		if e.code == plugin.CodeConnect {
			return "the connection was closed"
		}
		return "the connection was closed in the TLS handshake"
	case e.code == plugin.CodeTLS && isTimeout(e.err):
		return "the TLS handshake was not done in time"
	case e.code == plugin.CodeTLS:
		if text := tlsMessage(e.err); text != "" {
			return text
		}
		return "the TLS handshake failed"
	case errors.As(e.err, &dns) && dns.IsNotFound:
		return "the host name does not exist"
	case errors.As(e.err, &dns) && dns.IsTimeout:
		return "looking up the host name took too long"
	case errors.As(e.err, &dns):
		return "the host name could not be looked up"
	case isTimeout(e.err):
		return "no connection in time"
	case errors.Is(e.err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(e.err, syscall.EHOSTUNREACH), errors.Is(e.err, syscall.ENETUNREACH):
		return "host unreachable"
	}
	return "no connection"
}

// tlsMessage is empty when err is not about TLS.
func tlsMessage(err error) string {
	var (
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
		verify    *tls.CertificateVerificationError
		record    tls.RecordHeaderError
		op        *net.OpError
	)
	switch {
	case errors.As(err, &authority):
		return "the certificate is by an unknown authority"
	case errors.As(err, &hostname):
		return "the certificate is not valid for the host"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate has expired or is not valid yet"
	case errors.As(err, &invalid), errors.As(err, &verify):
		return "the certificate is not valid"
	case errors.As(err, &record):
		return "the receiver does not speak TLS on this port"
	case errors.As(err, &op) && op.Op == "remote error":
		return "the receiver refused the TLS handshake: " + op.Err.Error() // an alert: one of a fixed list
	}
	return ""
}
