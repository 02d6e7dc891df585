package outbound

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// NotConnected says why there was no connection to send on, in words of our own: texts of errors below name addresses
// and repeat what others send.
func NotConnected(ctx context.Context, err error) *plugin.Failure {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, WireState: plugin.NotSent}
	var e *Error
	switch {
	case errors.Is(err, plugin.ErrEgressDenied):
		f.Source, f.Code, f.Message = plugin.SourcePolicy, plugin.CodeEgress, plugin.ErrEgressDenied.Error()
	case ctx.Err() != nil:
		return Interrupted(ctx, plugin.NotSent, "")
	case Short(err):
		return Shortage(plugin.NotSent)
	case errors.As(err, &e):
		f.Code, f.Message = e.Code, e.message()
	default:
		f.Message = "no connection"
	}
	return f
}

// Short reports whether err is a shortage of this machine: of descriptors, sockets or memory.
func Short(err error) bool { return exhausted(err) }

// Shortage is an attempt that this machine had nothing left for.
func Shortage(state plugin.WireState) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.SourcePlugin, Code: plugin.CodeShortage, WireState: state, Message: "this machine is out of sockets, file descriptors or memory",
	}
}

// Interrupted is an attempt that ended with its context.
func Interrupted(ctx context.Context, state plugin.WireState, peer string) *plugin.Failure {
	if errors.Is(ctx.Err(), context.Canceled) {
		return &plugin.Failure{
			Source: plugin.SourcePlugin, Code: plugin.CodeCancelled, WireState: state, Peer: peer, Message: "cancelled by the host",
		}
	}
	return Late(state, peer)
}

// Late is an attempt whose time was up.
func Late(state plugin.WireState, peer string) *plugin.Failure {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeTimeout, WireState: state, Peer: peer, Message: "no answer in time"}
	if state == plugin.NotSent {
		f.Message = "no connection before the attempt's time was up"
	}
	return f
}

// Lost is a connection that ended while an answer was due.
func Lost(state plugin.WireState, peer string) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.SourceEndpoint, Code: plugin.CodeReset, WireState: state, Peer: peer,
		Message: "the receiver closed the connection without an answer",
	}
}

// CodeTooLarge, with plugin.SourcePolicy, is a request that is larger than receivers take.
const CodeTooLarge = "too_large"

// Unfit is a request that must not be sent as it is. That is neither the receiver's fault nor a reason to
// configure the instance again.
func Unfit(message string) *plugin.Failure {
	return &plugin.Failure{Source: plugin.SourcePlugin, Code: plugin.CodeProtocol, Message: message, WireState: plugin.NotSent}
}

// IsTimeout reports whether err is about time.
func IsTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

// IsReset reports whether a connection has ended, by whichever side or by the network between.
func IsReset(err error) bool {
	var op *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.As(err, new(syscall.Errno)) && !IsTimeout(err) ||
		errors.As(err, &op) && (op.Op == "read" || op.Op == "write") && !IsTimeout(err)
}

func (e *Error) message() string {
	text := e.own()
	if !e.Proxy {
		return text
	}
	if rest, ok := strings.CutPrefix(text, "the receiver "); ok && e.Message == "" {
		text = "it " + rest
	}
	return "proxy: " + text
}

func (e *Error) own() string {
	var dns *net.DNSError
	isDNS := errors.As(e.Err, &dns)
	switch {
	case e.Message != "":
		return e.Message
	case errors.Is(e.Err, ErrNowhere):
		return ErrNowhere.Error()
	case e.Code == plugin.CodeTLS && IsTimeout(e.Err):
		return "the TLS handshake was not done in time"
	case e.Code == plugin.CodeTLS && TLSMessage(e.Err) != "":
		return TLSMessage(e.Err)
	case e.Code == plugin.CodeTLS && IsReset(e.Err):
		return "the connection was closed in the TLS handshake"
	case e.Code == plugin.CodeTLS:
		return "the TLS handshake failed"
	case isDNS && dns.IsTimeout:
		return "looking up the host name took too long"
	case isDNS:
		return "the host name could not be looked up"
	case IsTimeout(e.Err):
		return "no connection in time"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(e.Err, errNoRoute), errors.Is(e.Err, syscall.EAFNOSUPPORT):
		return "host unreachable: this machine has no address of its family, IPv4 or IPv6"
	case noWay(e.Err):
		return "host unreachable"
	case errors.Is(e.Err, syscall.EPERM), errors.Is(e.Err, syscall.EACCES):
		return "this machine's firewall forbids the connection"
	case errors.Is(e.Err, io.EOF), errors.Is(e.Err, io.ErrUnexpectedEOF), errors.Is(e.Err, syscall.ECONNRESET):
		return "the connection was closed"
	}
	return "no connection"
}

// TLSMessage says what TLS has against the receiver, or it against us; empty when err is not about TLS.
func TLSMessage(err error) string {
	var (
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
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
	case errors.As(err, &invalid), errors.As(err, new(*tls.CertificateVerificationError)):
		return "the certificate is not valid"
	case errors.As(err, &record):
		return "the receiver does not speak TLS on this port"
	case errors.As(err, &op) && op.Op == "remote error":
		return "the receiver refused the TLS handshake: " + op.Err.Error() // an alert: one of a fixed list
	}
	return ""
}
