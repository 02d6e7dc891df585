package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type signerConfig struct {
	Key plugin.Secret `slot:"key" doc:"Shared key, any bytes." required:"true"`
}

// Signer puts the body's HMAC-SHA256 by the newest key, in hex, into x-example-signature.
func Signer() plugin.Kind {
	return plugin.Signer("example-signer", func(c signerConfig, _ plugin.Target) (plugin.SignFunc, error) {
		return func(r *plugin.Request) error {
			mac := hmac.New(sha256.New, c.Key.Values()[0])
			mac.Write(r.Body)
			r.Set("x-example-signature", hex.EncodeToString(mac.Sum(nil)))
			return nil
		}, nil
	}, plugin.Doc("Hex HMAC-SHA256 of the body"), plugin.Emits("x-example-signature"))
}
