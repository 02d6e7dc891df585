// Command grapnel-plugin-example is a Grapnel plugin as a third party would write one: a signer and a
// transport in one program that imports nothing but the SDK and the standard library.
package main

import "github.com/grapnel/grapnel/sdk/plugin"

func main() { plugin.Main("example/plugin", "1.0.0", Signer(), Spool()) }
