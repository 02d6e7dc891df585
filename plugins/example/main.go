// Command grapnel-plugin-example is a Grapnel plugin as a third party would write one: a signer, two transports, of which
// one is on its own and the other builds on the first-party http, and a transformer in one program.
package main

import "github.com/grapnel/grapnel/sdk/plugin"

func main() { plugin.Main("example/plugin", "1.0.0", Signer(), Spool(), Zoom(), Pseudonym()) }
