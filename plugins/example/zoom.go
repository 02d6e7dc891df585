package main

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strconv"

	httpplugin "github.com/grapnel/grapnel/plugins/http"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// zoomConfig is what there is beside the settings and secrets of the transport http.
type zoomConfig struct {
	Token plugin.Secret `slot:"zoom_token" doc:"Secret token that the receiver has, too." required:"true"`
}

// Zoom offers the transport example-zoom: the first-party http, and before there are deliveries the receiver is
// challenged as Zoom does: it is sent a token, signed, and must answer with the token's HMAC.
func Zoom() plugin.Kind {
	return plugin.Wrap("example-zoom", httpplugin.Kind(), buildZoom,
		plugin.Doc("HTTP requests to receivers that were validated as Zoom does"), plugin.Schemes("zoom+http", "zoom+https"),
		plugin.Emits("x-zm-request-timestamp", "x-zm-signature"), plugin.OwnershipCheck())
}

func buildZoom(c zoomConfig, _ plugin.Target, send plugin.AttemptFunc) (plugin.AttemptFunc, error) {
	token := c.Token.Values()[0]
	return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) {
		if r.OwnershipCheck {
			return validate(ctx, r, token, send)
		}
		return send(ctx, r)
	}, nil
}

type validation struct {
	Event   string            `json:"event"`
	Payload map[string]string `json:"payload"`
}

func validate(ctx context.Context, r *plugin.Request, token []byte, send plugin.AttemptFunc) (*plugin.Response, error) {
	plain := rand.Text()
	body, err := json.Marshal(validation{Event: "endpoint.url_validation", Payload: map[string]string{"plainToken": plain}})
	if err != nil {
		return nil, err
	}
	at := strconv.FormatInt(r.Created.Unix(), 10)
	r.OwnershipCheck, r.Body, r.MaxResponseBody = false, body, 16<<10
	r.Set("content-type", "application/json")
	r.Set("x-zm-request-timestamp", at)
	r.Set("x-zm-signature", "v0="+mac(token, "v0:"+at+":"+string(body)))
	resp, err := send(ctx, r)
	if err != nil || resp.Status < 200 || resp.Status > 299 {
		return resp, err
	}
	var answer struct {
		PlainToken     string `json:"plainToken"`
		EncryptedToken string `json:"encryptedToken"`
	}
	if json.Unmarshal(resp.Body, &answer) != nil || answer.PlainToken != plain || !hmac.Equal([]byte(answer.EncryptedToken), []byte(mac(token, plain))) {
		return nil, &plugin.Failure{
			Source: plugin.SourceEndpoint, Code: "ownership", WireState: plugin.Sent, Peer: resp.Peer,
			Message: "the receiver did not answer endpoint.url_validation with the token and its HMAC",
		}
	}
	return resp, nil
}

func mac(key []byte, text string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return hex.EncodeToString(m.Sum(nil))
}
