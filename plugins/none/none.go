// Package none is the signer that signs nothing, for receivers that know their sender by other means: a
// private network, a client certificate, an API key. It needs no secret, sets no header, and cannot fail.
package none

import "github.com/grapnel/grapnel/sdk/plugin"

// Kind is the signer "none".
func Kind() plugin.Kind {
	build := func(struct{}, plugin.Target) (plugin.SignFunc, error) {
		return func(*plugin.Request) error { return nil }, nil
	}
	return plugin.Signer("none", build,
		plugin.Doc("No signature: the receiver cannot tell who sent the request, unless the transport shows it"),
		plugin.Example(struct{}{}))
}
