package outbound

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"syscall"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// NotConnected says why there was no connection to send on.
func NotConnected(ctx context.Context, err error) *plugin.Failure {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, WireState: plugin.NotSent}
	var e *Error
	switch {
	case errors.Is(err, plugin.ErrEgressDenied):
		f.Source, f.Code, f.Message = plugin.SourcePolicy, plugin.CodeEgress, plugin.ErrEgressDenied.Error()
	case ctx.Err() != nil:
		return Interrupted(ctx, plugin.NotSent, "")
	case exhausted(err):
		f.Source, f.Message = plugin.SourcePlugin, "out of sockets or file descriptors"
	case errors.As(err, &e):
		f.Code, f.Message = e.Code, e.message()
	default:
		f.Message = "no connection"
	}
	return f
}

// Interrupted is an attempt that ended with its context.
func Interrupted(ctx context.Context, state plugin.WireState, peer string) *plugin.Failure {
	f := &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeTimeout, WireState: state, Peer: peer}
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		f.Source, f.Code, f.Message = plugin.SourcePlugin, plugin.CodeCancelled, "cancelled by the host"
	case state == plugin.NotSent:
		f.Message = "no connection before the attempt's time was up"
	default:
		f.Message = "no answer in time"
	}
	return f
}

// Lost is a connection that ended while an answer was due.
func Lost(peer string) *plugin.Failure {
	return &plugin.Failure{
		Source: plugin.SourceEndpoint, Code: plugin.CodeReset, WireState: plugin.MaybeSent, Peer: peer,
		Message: "the receiver closed the connection without an answer",
	}
}

// Unfit is a request that must not be sent as it is. That is neither the receiver's fault nor a reason to
// configure the instance again.
func Unfit(message string) *plugin.Failure {
	return &plugin.Failure{Source: plugin.SourcePlugin, Code: plugin.CodeProtocol, Message: message, WireState: plugin.NotSent}
}

// exhausted reports what no receiver can be blamed for.
func exhausted(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOBUFS) ||
		errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.EADDRNOTAVAIL)
}

func timedOut(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout()
}

func (e *Error) message() string {
	var dns *net.DNSError
	switch {
	case e.Message != "":
		return e.Message
	case e.Code == plugin.CodeTLS:
		return tlsMessage(e.Err)
	case errors.As(e.Err, &dns) && dns.IsNotFound:
		return "the host name does not exist"
	case errors.As(e.Err, &dns):
		return "the host name could not be looked up"
	case timedOut(e.Err):
		return "no connection in time"
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(e.Err, syscall.EHOSTUNREACH), errors.Is(e.Err, syscall.ENETUNREACH):
		return "host unreachable"
	}
	return "no connection"
}

func tlsMessage(err error) string {
	var (
		authority x509.UnknownAuthorityError
		hostname  x509.HostnameError
		invalid   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		op        *net.OpError
	)
	switch {
	case timedOut(err):
		return "the TLS handshake was not done in time"
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
	return "the TLS handshake failed"
}
