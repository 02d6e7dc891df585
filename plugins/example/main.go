// Command grapnel-plugin-example is a Grapnel plugin as a third party would write one: a signer and two
// transports in one program, of which one is on its own and the other builds on the first-party http.
package main

import "github.com/grapnel/grapnel/sdk/plugin"

func main() { plugin.Main("example/plugin", "1.0.0", Signer(), Spool(), Zoom()) }
