package plugin

import (
	"errors"
	"fmt"
	"os"
)

// The handshake, for hosts. A cookie is no secret: it only tells a host's start from a person's.
const (
	ProtocolVersion  = 1
	MagicCookieKey   = "GRAPNEL_PLUGIN"
	MagicCookieValue = "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31"
	// PluginSet is the name under which go-plugin dispenses the connection.
	PluginSet = "grapnel"
	// InstanceLabel is the label (runtime/pprof) of goroutines that work for an instance, and of those that they start:
	// its value is the instance's id. The report of a panic bears it, which tells the host whose doing that was. A transformer's
	// context has it too, for goroutines that something else has started.
	InstanceLabel = "grapnel.instance"
)

// ErrNotStartedByHost is returned by Serve in a process that was started by hand.
var ErrNotStartedByHost = errors.New("this program is a Grapnel plugin and is started by the Grapnel server")

// Main serves the kinds until the host is gone, then exits the process: with status 0, or with 1 and a
// line on stderr when it cannot serve. SIGINT and SIGTERM are ignored while the host is there; it says
// when to stop.
func Main(name, version string, kinds ...Kind) {
	if err := Serve(name, version, kinds...); err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", name, version, err)
		os.Exit(1)
	}
	os.Exit(0)
}
