// Package plugins lists the signers, transports and transformers that ship in the grapnel binary. They are written with
// sdk/plugin, as anybody's are, and run in processes of their own: the binary executed again, once for each Part.
package plugins

import (
	"slices"

	celplugin "github.com/grapnel/grapnel/plugins/cel"
	grpcplugin "github.com/grapnel/grapnel/plugins/grpc"
	hmacplugin "github.com/grapnel/grapnel/plugins/hmac"
	httpplugin "github.com/grapnel/grapnel/plugins/http"
	"github.com/grapnel/grapnel/plugins/httpsignature"
	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/plugins/javascript"
	"github.com/grapnel/grapnel/plugins/jose"
	"github.com/grapnel/grapnel/plugins/jq"
	natsplugin "github.com/grapnel/grapnel/plugins/nats"
	"github.com/grapnel/grapnel/plugins/none"
	"github.com/grapnel/grapnel/plugins/sigv4"
	"github.com/grapnel/grapnel/plugins/standardwebhooks"
	templateplugin "github.com/grapnel/grapnel/plugins/template"
	"github.com/grapnel/grapnel/plugins/twilio"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Part is what one process offers. Parts are cut by trust: where a library that is not ours reads what a receiver sends,
// on goroutines that only a process contains, it reads it in a process with nothing else in it, and so does what runs
// scripts.
type Part struct {
	// Name is that of the part, and of its provider.
	Name  string
	Kinds []plugin.Kind
	// Confined parts get little memory and few files: what they read is not in our hands.
	Confined bool
}

// Parts are all first-party kinds, by the processes that they are in. The first holds all signers and HTTP, and nobody's
// deliveries go without it.
func Parts() []Part {
	return []Part{
		{Name: "grapnel", Kinds: slices.Concat(
			standardwebhooks.Kinds(),
			hmacplugin.Kinds(),
			jose.Kinds(),
			[]plugin.Kind{twilio.Kind(), httpsignature.Kind(), sigv4.Kind(), none.Kind(), httpplugin.Kind()},
		)},
		{Name: "grapnel/grpc", Kinds: []plugin.Kind{grpcplugin.Kind()}, Confined: true},
		{Name: "grapnel/nats", Kinds: []plugin.Kind{natsplugin.Kind()}, Confined: true},
		{Name: "grapnel/scripts", Kinds: scripts(), Confined: true},
	}
}

// scripts are the kinds that run what tenants have written: a process of their own, too.
func scripts() []plugin.Kind {
	guard := script.NewGuard()
	return []plugin.Kind{celplugin.Kind(guard), jq.Kind(guard), templateplugin.Kind(guard), javascript.Kind(guard)}
}

// Kinds are all first-party kinds, signers first.
func Kinds() []plugin.Kind {
	var all []plugin.Kind
	for _, p := range Parts() {
		all = append(all, p.Kinds...)
	}
	return all
}

// Names are the part's kinds by their ids, with the URI schemes that each is the default for.
func (p Part) Names() map[string][]string {
	names := map[string][]string{}
	for _, k := range p.Kinds {
		names[k.ID()] = k.Schemes()
	}
	return names
}

// Serve runs a part, or with an empty name all of them in one, in a process that a Grapnel server has started.
func Serve(part, version string) error {
	kinds, provider := Kinds(), "grapnel"
	for _, p := range Parts() {
		if p.Name == part {
			kinds, provider = p.Kinds, part
		}
	}
	return plugin.Serve(provider, version, kinds...)
}
