package main

import (
	"context"
	"os"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// thirdParty is a plugin of somebody else's for the scripts: thirdparty NAME KIND SCHEME.
func thirdParty() {
	name, kind, scheme := "acme/nobody", "nothing", "nothing"
	if len(os.Args) > 3 {
		name, kind, scheme = os.Args[1], os.Args[2], os.Args[3]
	}
	plugin.Main(name, "1.0.0", plugin.Transport(kind, func(struct{}, plugin.Target) (plugin.AttemptFunc, error) {
		return func(context.Context, *plugin.Request) (*plugin.Response, error) {
			return &plugin.Response{Status: 200}, nil
		}, nil
	}, plugin.Schemes(scheme)))
}
