// Command stamp is a third party's plugin whose requests say by which version of it they were signed and sent.
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"strings"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// version is set by the linker.
var version = "0.0.0"

func main() { plugin.Main("example/stamp", version, signer(), transport()) }

type signerConfig struct {
	Key plugin.Secret `slot:"key" doc:"Shared key, any bytes." required:"true"`
}

// signer puts VERSION,HEX into stamp-signature: the HMAC-SHA256 of "VERSION.ID.BODY".
func signer() plugin.Kind {
	return plugin.Signer("stamp", func(c signerConfig, _ plugin.Target) (plugin.SignFunc, error) {
		return func(r *plugin.Request) error {
			mac := hmac.New(sha256.New, c.Key.Values()[0])
			mac.Write([]byte(version + "." + r.MessageID + "."))
			mac.Write(r.Body)
			r.Set("stamp-signature", version+","+hex.EncodeToString(mac.Sum(nil)))
			return nil
		}, nil
	}, plugin.Doc("Version and hex HMAC-SHA256"), plugin.Emits("stamp-signature"))
}

// transport posts to stamp://HOST as http does, and says its version in stamp-carrier.
func transport() plugin.Kind {
	return plugin.Transport("stamp-post", func(_ struct{}, target plugin.Target) (plugin.AttemptFunc, error) {
		dialer := &net.Dialer{ControlContext: target.Egress.Control}
		client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, MaxIdleConnsPerHost: target.MaxInFlight}}
		return func(ctx context.Context, r *plugin.Request) (*plugin.Response, error) { return post(ctx, client, r) }, nil
	}, plugin.Doc("Posts to stamp://HOST as http does"), plugin.Schemes("stamp"), plugin.Emits("stamp-carrier"))
}

func post(ctx context.Context, client *http.Client, r *plugin.Request) (*plugin.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http"+strings.TrimPrefix(r.URL, "stamp"), bytes.NewReader(r.Body))
	if err != nil {
		return nil, err
	}
	for _, h := range r.Headers {
		req.Header.Add(h.Name, h.Value)
	}
	req.Header.Set("stamp-carrier", version)
	resp, err := client.Do(req)
	if err != nil {
		return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, Message: err.Error(), WireState: plugin.MaybeSent}
	}
	_ = resp.Body.Close()
	return &plugin.Response{Status: resp.StatusCode}, nil
}
