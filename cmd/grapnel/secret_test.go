package main

import (
	"bytes"
	"strings"
	"testing"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// TestSecretShowsPublicKeys: a public key of several lines can be copied as it stands, and steers no terminal.
func TestSecretShowsPublicKeys(t *testing.T) {
	pem := "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\x1b[2J\n-----END PUBLIC KEY-----\n"
	var out bytes.Buffer
	c := &cli{stdout: &out, output: "table"}
	err := c.showSecretMetadata(&grapnelv1.Secret{
		Name: "namespaces/acme/secrets/pair", Plugin: "plugins/jws", Slot: "other",
		Versions: []*grapnelv1.SecretVersion{
			{Version: 3, PublicKey: pem, KeyId: "new", Algorithm: "ed25519"}, {Version: 2, PublicKey: "whpk_one", KeyId: "old"}, {Version: 1},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	got := out.String()
	for _, want := range []string{
		"Plugin:       jws/other\n", "Algorithm:    ed25519\n", "Key ids:      3:new, 2:old\n", "Public keys:  whpk_one\n",
		"Public key of version 3:\n-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\\u001b[2J\n-----END PUBLIC KEY-----\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
}
