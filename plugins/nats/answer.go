package natsplugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// denial is a connection that the server does not want for who asks. It is an answer, not a failure of
// the network: a status, as over HTTP.
type denial struct {
	status int
	text   string
}

func (d *denial) Error() string { return d.text }

// greeting is why there was no greeting to hand to the client: TLS that ends when the server has asked for a client
// certificate is most likely about that.
func greeting(err error, offer *outbound.Offer) error {
	var e *outbound.Error
	if errors.As(err, &e) && e.Code == plugin.CodeTLS && offer.Refusal() != "" {
		return &outbound.Error{Code: plugin.CodeTLS, Err: err, Message: offer.Refusal()}
	}
	return err
}

// refusal is why the client has no connection.
func refusal(err error, conn *outbound.Watched, offer *outbound.Offer) error {
	wrap := func(code, message string) error {
		return &outbound.Error{Code: code, Err: err, Message: message}
	}
	var op interface{ Timeout() bool }
	timeout := errors.As(err, &op) && op.Timeout() || errors.Is(err, nats.ErrTimeout)
	switch {
	case errors.Is(err, nats.ErrAuthorization):
		return &denial{http.StatusUnauthorized, "the server does not know the credential, or wants one"}
	case errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAccountAuthExpired):
		return &denial{http.StatusUnauthorized, "the credential has expired"}
	case errors.Is(err, nats.ErrAuthRevoked):
		return &denial{http.StatusUnauthorized, "the credential has been revoked"}
	case errors.Is(err, nats.ErrNkeysNotSupported):
		return &denial{http.StatusUnauthorized, "the server does not take .creds files"}
	case strings.Contains(strings.ToLower(err.Error()), "connections exceeded"): // of the server or the account
		return wrap(plugin.CodeConnect, "the server takes no more connections")
	case offer.Refusal() != "":
		return wrap(plugin.CodeTLS, offer.Refusal())
	case timeout:
		return wrap(plugin.CodeConnect, "the server did not greet in time; it may want TLS first (config.tls.handshake_first)")
	case conn.Broke() != nil, errors.As(err, new(*net.OpError)):
		return wrap(plugin.CodeConnect, "the server closed the connection at once")
	}
	return wrap(plugin.CodeProtocol, "the server does not speak NATS")
}

// ack is a JetStream publish acknowledgement.
type ack struct {
	Stream   string `json:"stream"`
	Sequence uint64 `json:"seq"`
	Error    *struct {
		Code        int    `json:"code"`
		ErrCode     int    `json:"err_code"`
		Description string `json:"description"`
	} `json:"error"`
}

// Codes of JetStream errors that have an HTTP status of their own; the others come with one.
const (
	errMessageTooLarge = 10054
	errOtherStream     = 10060
)

// response is what the server sent back, in HTTP's terms.
func response(m *nats.Msg, subject string, keep int, peer string) (*plugin.Response, error) {
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" { // the server's word for "no responders"
		return answer(http.StatusNotFound, fmt.Sprintf(
			"no JetStream stream takes the subject %q; make one that does, or have JetStream enabled for the account", subject), keep, peer), nil
	}
	var a ack
	if err := json.Unmarshal(m.Data, &a); err != nil || a.Error == nil && (a.Stream == "" || a.Sequence == 0) {
		return nil, &plugin.Failure{
			Source: plugin.SourceEndpoint, Code: plugin.CodeProtocol, WireState: plugin.Sent, Peer: peer,
			Message: "something other than a JetStream stream answered on the subject",
		}
	}
	if a.Error == nil {
		return &plugin.Response{Status: http.StatusOK, Peer: peer}, nil
	}
	status := a.Error.Code
	switch {
	case a.Error.ErrCode == errMessageTooLarge:
		status = http.StatusRequestEntityTooLarge
	case a.Error.ErrCode == errOtherStream:
		status = http.StatusPreconditionFailed
	case status < 400 || status > 599 || status == http.StatusGone:
		status = http.StatusBadGateway
	}
	return answer(status, fmt.Sprintf("%s (JetStream error %d)", a.Error.Description, a.Error.ErrCode), keep, peer), nil
}

func answer(status int, text string, keep int, peer string) *plugin.Response {
	r := &plugin.Response{Status: status, Body: []byte(text), Peer: peer}
	if len(r.Body) > keep {
		r.Body, r.Truncated = r.Body[:keep], true
	}
	return r
}
