package plugins

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed example-python/grapnel_plugin.py example-python/plugin.binpb
//go:embed example-node/grapnel-plugin.mjs example-node/plugin.proto
//go:embed example-ruby/grapnel_plugin.rb example-ruby/plugin.binpb
var runtimes embed.FS

// Runtime is what a plugin in another language carries with it, "python", "node" or "ruby": the files of its example
// that hold the protocol. It returns an error for a language that has none.
func Runtime(language string) (fs.FS, error) {
	if _, err := fs.Stat(runtimes, "example-"+language); err != nil {
		return nil, fmt.Errorf("there is no runtime for the language %q; want python, node or ruby", language)
	}
	return fs.Sub(runtimes, "example-"+language)
}
