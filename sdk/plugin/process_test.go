//go:build unix

package plugin_test

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// closingPlugin has the test binary be a plugin whose instances create the file that their URL names at their end.
const closingPlugin = "GRAPNEL_TEST_CLOSING_PLUGIN"

func TestMain(m *testing.M) {
	if os.Getenv(closingPlugin) != "" {
		plugin.Main("closing", "0.0.0", plugin.Signer("closing", func(_ struct{}, t plugin.Target) (plugin.SignFunc, error) {
			t.OnClose(func(context.Context) { _ = os.WriteFile(strings.TrimPrefix(t.URL, "file:"), nil, 0o600) })
			return func(*plugin.Request) error { return nil }, nil
		}))
	}
	os.Exit(m.Run())
}

// TestProcessClosesItsInstancesWhenTheHostGoes ends Control, as the host does when it stops.
func TestProcessClosesItsInstancesWhenTheHostGoes(t *testing.T) {
	dir, err := os.MkdirTemp("", "p") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{closingPlugin + "=1", plugin.MagicCookieKey + "=" + plugin.MagicCookieValue, "PLUGIN_PROTOCOL_VERSIONS=1", "PLUGIN_UNIX_SOCKET_DIR=" + dir}
	cmd.Stderr = t.Output()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+strings.Split(line, "|")[3], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pluginv1.NewPluginServiceClient(conn)
	left := filepath.Join(dir, "left")
	resp, err := client.Configure(t.Context(), &pluginv1.ConfigureRequest{
		Settings:  &pluginv1.HostSettings{},
		Instances: []*pluginv1.Instance{{Id: "i", Generation: 1, Ref: 1, Kind: "closing", Target: &pluginv1.Target{Uri: "file:" + left}}},
	})
	if err != nil || len(resp.GetStatuses()[0].GetDiagnostics()) > 0 {
		t.Fatal(resp, err)
	}
	control, err := client.Control(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := control.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("the process: %v", err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Errorf("the instance was not closed: %v", err)
	}
}

// TestAuthoritiesAreReadBeforeTheHandshake: they are there before anything is asked of the process, so that no shortage
// that comes later can have it find none.
func TestAuthoritiesAreReadBeforeTheHandshake(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("SSL_CERT_FILE is for systems whose authorities are in a file")
	}
	dir, err := os.MkdirTemp("", "p") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	fifo := filepath.Join(dir, "ca") // who reads it is seen
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = []string{
		closingPlugin + "=1", plugin.MagicCookieKey + "=" + plugin.MagicCookieValue, "PLUGIN_PROTOCOL_VERSIONS=1", "PLUGIN_UNIX_SOCKET_DIR=" + dir,
		"SSL_CERT_FILE=" + fifo, "SSL_CERT_DIR=" + dir + "/none",
	}
	cmd.Stderr = t.Output()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	read := make(chan error, 1)
	go func() {
		file, err := os.OpenFile(fifo, os.O_WRONLY, 0) // once it is opened for reading
		if err == nil {
			err = file.Close()
		}
		read <- err
	}()
	line := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(stdout).ReadString('\n')
		line <- text
	}()
	select {
	case err := <-read:
		if err != nil {
			t.Fatal(err)
		}
	case text := <-line:
		_ = os.Remove(fifo)
		t.Fatalf("the handshake %q came before the authorities were read", text)
	}
	if text := <-line; !strings.HasPrefix(text, "1|") {
		t.Errorf("handshake %q", text)
	}
}
