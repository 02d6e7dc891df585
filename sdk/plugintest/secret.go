package plugintest

import (
	"context"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// PrepareSecret has the plugin check a value for a kind's secret slot, or make one by the algorithm when
// value is empty (an empty algorithm means the slot's first). It returns what the plugin read, with the
// value as it is to be stored, or what is wrong.
func (h *Harness) PrepareSecret(kind, slot, value, algorithm string) (plugin.SecretInfo, []plugin.Problem) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	resp, err := h.plugin.PrepareSecret(ctx, &pluginv1.PrepareSecretRequest{
		Kind: kind, Slot: slot, Value: []byte(value), Algorithm: algorithm,
	})
	if err != nil {
		h.t.Fatalf("prepare secret %s of %s: %v", slot, kind, err)
	}
	return plugin.SecretInfo{
		Value: resp.GetValue(), Algorithm: resp.GetAlgorithm(), PublicKey: resp.GetPublicKey(), JWK: resp.GetJwk(), KeyID: resp.GetKeyId(),
	}, problemsOf(resp.GetDiagnostics())
}
