// Package plugintest runs plugin kinds inside a test, behind the very gRPC services that the host talks
// to, and hands back typed results.
//
//	h := plugintest.New(t, kinds...)
//	inst := h.Configure(plugintest.Instance{Kind: "acme-v2", Secrets: map[string][]string{"key": {"s3cret"}}})
//	got, err := inst.Sign(plugin.Request{MessageID: "msg_1", Created: when, Body: body})
package plugintest

import (
	"context"
	"testing"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Harness serves kinds until the test ends.
type Harness struct {
	t testing.TB
}

// Instance is one configured use of a kind. Config is marshalled to JSON; nil means no settings. Target's
// Egress is ignored: see WithEgress.
type Instance struct {
	Kind    string
	Config  any
	Secrets map[string][]string
	Target  plugin.Target
}

// Configured is an instance that the plugin has taken.
type Configured struct {
	h   *Harness
	ref uint32
}

// New serves the kinds for the length of the test.
func New(t testing.TB, kinds ...plugin.Kind) *Harness { return &Harness{t: t} }

// Configure has the plugin take an instance, and fails the test when it does not.
func (h *Harness) Configure(in Instance) *Configured { return &Configured{h: h} }

// Validate returns what the plugin says about an instance.
func (h *Harness) Validate(in Instance) []plugin.Problem { return nil }

// Sign has the instance sign a request and returns the request with what was added.
func (c *Configured) Sign(req plugin.Request) (plugin.Request, error) { return req, nil }

// Attempt has the instance send a request, after the signers have signed it in the same hop. The error
// of an attempt without an answer is a *plugin.Failure.
func (c *Configured) Attempt(ctx context.Context, req plugin.Request, signers ...*Configured) (*plugin.Response, error) {
	return nil, nil
}
