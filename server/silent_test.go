//go:build unix

package server_test

import (
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/grapnel/grapnel/server/servertest"
)

// TestSilentPluginShows: while the process of the first-party plugins hangs nobody's deliveries move, and the server says
// so until another one serves.
func TestSilentPluginShows(t *testing.T) {
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	if code, text := ready(t, s); code != http.StatusOK || text != "ok\n" {
		t.Fatalf("%d %q", code, text)
	}
	process, err := os.FindProcess(s.PluginPids()["grapnel"])
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	silent := func() bool { return strings.Contains(metrics(t, s), "\ngrapnel_plugin_silent 1\n") }
	servertest.Await(t, "the metric says so", silent)
	servertest.Await(t, "readyz says so", func() bool {
		code, text := ready(t, s)
		return code == http.StatusServiceUnavailable && strings.HasPrefix(text, "not ready\nplugins: the process of the first-party plugins ")
	})
	servertest.Await(t, "another process serves", func() bool {
		code, text := ready(t, s)
		return code == http.StatusOK && text == "ok\n" && !silent()
	})
}
