package server_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/grapnel/grapnel/internal/required"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server"
	"github.com/grapnel/grapnel/server/servertest"
)

// needs is required.Tool for the languages that plugins are written in.
func needs(t *testing.T, language string) {
	t.Helper()
	var err error
	how := "install python3-grpcio and python3-protobuf"
	switch language {
	case "ruby":
		how = "install ruby-grpc and ruby-google-protobuf"
		err = exec.Command("ruby", "-e", "require 'grpc'; require 'google/protobuf'").Run()
	case "python":
		err = exec.Command("/usr/bin/python3", "-c", "import grpc, google.protobuf").Run()
	case "node":
		how = "install node and run `npm ci` in plugins/example-node"
		if _, err = exec.LookPath("node"); err == nil {
			_, err = os.Stat("../plugins/example-node/node_modules")
		}
	}
	required.Tool(t, language, err, how)
}

// TestPluginsInOtherLanguages delivers with the example plugins in Python, JavaScript and Ruby: signed by theirs and
// sent by ours, and signed by ours and sent by theirs.
func TestPluginsInOtherLanguages(t *testing.T) {
	t.Parallel()
	for _, language := range []string{"python", "node", "ruby"} {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			needs(t, language)
			dir, err := filepath.Abs("../plugins/example-" + language)
			if err != nil {
				t.Fatal(err)
			}
			s := servertest.Start(t, servertest.Options{Adjust: func(o *server.Options) { o.PluginDir = dir }})
			rcv := servertest.NewReceiver(t, nil)
			s.Namespace("acme")
			plugins := grapnelv1.NewPluginServiceClient(s.Conn)
			servertest.Await(t, "the plugin to serve", func() bool {
				got, err := plugins.GetPlugin(t.Context(), &grapnelv1.GetPluginRequest{Name: "plugins/" + language + "-hmac"})
				return err == nil && got.GetPlugin().GetHealth() == grapnelv1.Plugin_HEALTH_SERVING
			})
			made, err := grapnelv1.NewSecretServiceClient(s.Conn).CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{
				Parent: "namespaces/acme", SecretId: "theirs", Plugin: "plugins/" + language + "-hmac",
			})
			if err != nil {
				t.Fatal(err)
			}
			s.Subscribe("acme", "signed", rcv.URL+"/signed", func(sub *grapnelv1.Subscription) {
				sub.Signers[0].Plugin = "plugins/" + language + "-hmac"
				sub.Signers[0].Secrets["key"] = made.GetSecret().GetName()
			})
			s.Subscribe("acme", "sent", language+"+"+rcv.URL+"/sent", nil)
			s.Publish("acme", "e1", "order.created", []byte(`{"order":1}`))
			got := map[string]servertest.Request{}
			servertest.Await(t, "both deliveries", func() bool {
				for _, r := range rcv.Requests() {
					got[r.Path] = r
				}
				return len(got) == 2
			})
			header := "X-" + language + "-Signature"
			signed := got["/signed"]
			var at string
			if _, err := fmt.Sscanf(signed.Header.Get(header), "t=%10s", &at); err != nil {
				t.Fatalf("%s = %q: %v", header, signed.Header.Get(header), err)
			}
			mac := hmac.New(sha256.New, []byte(made.GetGeneratedValue()))
			fmt.Fprintf(mac, "%s.%s.%s", signed.ID, at, signed.Body)
			if want := "t=" + at + ",v1=" + hex.EncodeToString(mac.Sum(nil)); signed.Header.Get(header) != want {
				t.Errorf("%s = %q, want %q", header, signed.Header.Get(header), want)
			}
			sent := got["/sent"]
			if string(sent.Body) != `{"order":1}` || sent.Header.Get("Webhook-Signature") == "" || sent.Header.Get("Ce-Type") != "order.created" {
				t.Errorf("sent by %s: %q with %v", language, sent.Body, sent.Header)
			}
		})
	}
}
