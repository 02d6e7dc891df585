package httpplugin

import (
	"context"
	"errors"
	"net"
	"strings"
	"time"

	"github.com/grapnel/grapnel/plugins/http/internal/answer"
	"github.com/grapnel/grapnel/plugins/http/internal/h1"
	"github.com/grapnel/grapnel/plugins/http/internal/h2"
	"github.com/grapnel/grapnel/plugins/internal/outbound"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// errAsked goes with the end of a new connection to a receiver that had asked for a client certificate.
var errAsked = errors.New("the receiver has asked for a client certificate")

// failure says what went wrong in words of our own: texts of errors below name addresses and repeat what
// receivers send. Where a client certificate is out of date, or none is there, an end of the connection has most
// likely to do with that.
func (o *origin) failure(ctx context.Context, err error) *plugin.Failure {
	f := failure(ctx, err)
	if f.Code != plugin.CodeTLS && f.Code != plugin.CodeReset {
		return f
	}
	var sent *answer.Error
	if errors.As(err, &sent) && sent.Fresh && o.asked.Load() && outbound.IsReset(err) {
		err = errors.Join(err, errAsked)
	}
	client := o.pool.client
	alert := certificateAlert(err)
	asked := errors.Is(err, errAsked) && outbound.IsReset(err)
	switch {
	case alert != "" && client != nil:
		f.Message = "the receiver refused the client certificate: " + alert
	case alert != "":
		f.Message = "the receiver wants a client certificate, and the slot client_certificate is empty"
	case asked && client != nil: // with TLS 1.3 an alert may be lost on the way
		f.Message += "; it may have refused the client certificate"
	case asked:
		f.Message += "; it had asked for a client certificate, and the slot client_certificate is empty"
	}
	if client == nil {
		return f
	}
	if text := outbound.Validity(client, time.Now()); text != "" {
		f.Code, f.Message = plugin.CodeTLS, text+"; "+f.Message
	}
	return f
}

// certificateAlert is what the receiver says against the client certificate, or against there being none, empty
// when it says nothing of that. It is one of a fixed list.
func certificateAlert(err error) string {
	var dial *outbound.Error
	var op *net.OpError
	if errors.As(err, &dial) && dial.Proxy || !errors.As(err, &op) || op.Op != "remote error" {
		return ""
	}
	alert := strings.TrimPrefix(op.Err.Error(), "tls: ")
	if strings.Contains(alert, "certificate") || alert == "access denied" || alert == "handshake failure" && errors.Is(err, errAsked) {
		return alert
	}
	return ""
}

// failure is the function above without what the origin knows.
func failure(ctx context.Context, err error) *plugin.Failure {
	var sent *answer.Error
	if !errors.As(err, &sent) || errors.As(err, new(*outbound.Error)) {
		return outbound.NotConnected(ctx, err)
	}
	state, peer := stateOf(sent.Sent), sent.Peer
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return outbound.Interrupted(ctx, state, peer)
	case ctx.Err() != nil, outbound.IsTimeout(err), errors.Is(err, h2.ErrHeaderLate):
		late := outbound.Late(state, peer)
		if state == plugin.MaybeSent {
			late.Message = "the receiver did not take the request in time"
		}
		return late
	case state == plugin.NotSent && outbound.Short(err):
		return outbound.Shortage(state)
	}
	f := &plugin.Failure{Source: plugin.SourceEndpoint, WireState: state, Peer: peer, Code: plugin.CodeProtocol}
	switch {
	case outbound.TLSMessage(err) != "":
		f.Code, f.Message = plugin.CodeTLS, outbound.TLSMessage(err)
	case errors.Is(err, h1.ErrHeaderTooLarge):
		f.Message = h1.ErrHeaderTooLarge.Error()
	case errors.Is(err, answer.ErrStatus):
		f.Message = answer.ErrStatus.Error()
	case errors.Is(err, answer.ErrInterim):
		f.Message = answer.ErrInterim.Error()
	case errors.Is(err, h2.ErrRefused):
		f.Code, f.Message = plugin.CodeReset, h2.ErrRefused.Error()
	case outbound.IsReset(err):
		return outbound.Lost(state, peer)
	default:
		f.Message = "the receiver did not answer in HTTP"
	}
	return f
}

func stateOf(s answer.Sent) plugin.WireState {
	switch s {
	case answer.Nothing:
		return plugin.NotSent
	case answer.All:
		return plugin.Sent
	}
	return plugin.MaybeSent
}
