// Package plugins lists the signers and transports that ship in the grapnel binary. They are written with
// sdk/plugin, as anybody's are, and run in a process of their own: the binary executed again.
package plugins

import (
	"slices"

	grpcplugin "github.com/grapnel/grapnel/plugins/grpc"
	hmacplugin "github.com/grapnel/grapnel/plugins/hmac"
	httpplugin "github.com/grapnel/grapnel/plugins/http"
	"github.com/grapnel/grapnel/plugins/httpsignature"
	"github.com/grapnel/grapnel/plugins/jose"
	natsplugin "github.com/grapnel/grapnel/plugins/nats"
	"github.com/grapnel/grapnel/plugins/none"
	"github.com/grapnel/grapnel/plugins/sigv4"
	"github.com/grapnel/grapnel/plugins/standardwebhooks"
	"github.com/grapnel/grapnel/plugins/twilio"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Kinds are all first-party kinds, signers first.
func Kinds() []plugin.Kind {
	return slices.Concat(
		standardwebhooks.Kinds(),
		hmacplugin.Kinds(),
		jose.Kinds(),
		[]plugin.Kind{
			twilio.Kind(),
			httpsignature.Kind(),
			sigv4.Kind(),
			none.Kind(),
			httpplugin.Kind(),
			grpcplugin.Kind(),
			natsplugin.Kind(),
		},
	)
}
