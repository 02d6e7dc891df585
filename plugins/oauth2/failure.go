package oauth2

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"os"

	"github.com/grapnel/grapnel/sdk/plugin"
)

var errUnreadableURL = errors.New("token_url is not a URL")

// endpointFailure is a token endpoint that does not do its part: the way to the receiver is barred. It
// counts as the receiver's and may pass.
func endpointFailure(code, message string) *plugin.Failure {
	return &plugin.Failure{Source: plugin.SourceEndpoint, Code: code, Message: "token endpoint: " + message, WireState: plugin.NotSent}
}

// configFailure is for settings that the token endpoint refuses. It counts against the subscription, whose
// settings they are. Its source is not SourceConfig, which asks the host to configure the instance anew:
// the same settings would be refused again.
func configFailure(message string) *plugin.Failure {
	return &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConfig, Message: message, WireState: plugin.NotSent}
}

// transportFailure says in own words why there was no answer: the texts of errors name URLs and addresses.
func transportFailure(ctx context.Context, err error) *plugin.Failure {
	// A dialer that knows more than this package says so itself.
	var f *plugin.Failure
	if errors.As(err, &f) {
		own := *f
		own.Message, own.WireState = "token endpoint: "+own.Message, plugin.NotSent
		return &own
	}
	if errors.Is(err, plugin.ErrEgressDenied) {
		return &plugin.Failure{
			Source: plugin.SourcePolicy, Code: plugin.CodeEgress, WireState: plugin.NotSent,
			Message: "token endpoint: " + plugin.ErrEgressDenied.Error(),
		}
	}
	var (
		dns    *net.DNSError
		op     *net.OpError
		verify *tls.CertificateVerificationError
		record tls.RecordHeaderError
		alert  tls.AlertError
		author x509.UnknownAuthorityError
	)
	switch {
	case ctx.Err() != nil, errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return endpointFailure(plugin.CodeTimeout, "no answer in time")
	case errors.As(err, &dns):
		return endpointFailure(plugin.CodeDNS, "the host name could not be looked up")
	case errors.As(err, &author):
		return endpointFailure(plugin.CodeTLS, "the certificate is by an unknown authority")
	case errors.As(err, &verify):
		return endpointFailure(plugin.CodeTLS, "the certificate is not valid for this use")
	case errors.As(err, &record), errors.Is(err, http.ErrSchemeMismatch):
		return endpointFailure(plugin.CodeTLS, "it does not speak TLS on this port")
	case errors.As(err, &alert), errors.As(err, &op) && op.Op == "remote error":
		return endpointFailure(plugin.CodeTLS, "it refused the TLS handshake")
	case errors.As(err, &op) && op.Op == "dial":
		return endpointFailure(plugin.CodeConnect, "no connection")
	}
	return endpointFailure(plugin.CodeReset, "the connection ended without an answer in HTTP")
}
