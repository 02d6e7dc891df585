package api_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/prototext"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api"
)

// twoSigners adds plugins/pair, which makes key pairs, plugins/plain, which needs to be given values, and
// plugins/many, which has several slots. What plugins say begins with their name.
func twoSigners(w *world) {
	signer := []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_SIGNER}
	w.host.all = append(w.host.all,
		&grapnelv1.Plugin{Name: "plugins/many", Roles: signer, SecretSlots: []*grapnelv1.SecretSlot{
			{Slot: "key", Required: true}, {Slot: "token", Required: true}, {Slot: "extra"}}},
		&grapnelv1.Plugin{Name: "plugins/pair", Roles: signer, SecretSlots: []*grapnelv1.SecretSlot{
			{Slot: "key", Required: true, Algorithms: []string{"ed25519", "rsa", "rsa-pss"}, Format: "pair-…"}, {Slot: "ca"}}},
		&grapnelv1.Plugin{Name: "plugins/plain", Roles: signer, SecretSlots: []*grapnelv1.SecretSlot{{Slot: "key", Format: "plain-…"}}},
	)
	w.host.prepare = func(id, slot, value, algorithm string) (api.Prepared, []api.Diagnostic, error) {
		if value == "" && id == "plain" {
			return api.Prepared{}, []api.Diagnostic{{Field: "value", Code: "secret.required", Summary: "a value must be given"}}, nil
		}
		if value == "" {
			if algorithm == "" {
				algorithm = "ed25519"
			}
			value = id + "-made-" + algorithm
		}
		if !strings.HasPrefix(value, id+"-") {
			return api.Prepared{}, []api.Diagnostic{{Field: "value", Code: "secret.malformed", Summary: "does not begin with " + id + "-"}}, nil
		}
		word := strings.TrimPrefix(value, id+"-made-")
		if word == "rsa-pss" {
			word = "RSA" // of which no scheme shows
		}
		made := api.Prepared{Value: []byte(value), Algorithm: word, PublicKey: "public of " + id}
		if id == "pair" {
			made.JWK, made.KeyID = `{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`, "kid-1"
		}
		return made, nil, nil
	}
}

func createPluginSecret(t *testing.T, w *world, r *grapnelv1.CreateSecretRequest) (*grapnelv1.CreateSecretResponse, error) {
	r.Parent = "namespaces/acme"
	return w.secrets.CreateSecret(t.Context(), r)
}

func TestSecretsOfPlugins(t *testing.T) {
	w := startWorld(t)
	twoSigners(w)
	w.namespace(t, "acme")
	made, err := createPluginSecret(t, w, &grapnelv1.CreateSecretRequest{SecretId: "pair", Plugin: "plugins/pair", Algorithm: "rsa"})
	if err != nil {
		t.Fatal(err)
	}
	got := made.GetSecret()
	v := got.GetVersions()[0]
	if made.GetGeneratedValue() != "pair-made-rsa" || got.GetPlugin() != "plugins/pair" || got.GetSlot() != "key" || got.GetKind() != grapnelv1.Secret_KIND_OPAQUE ||
		v.GetAlgorithm() != "rsa" || v.GetPublicKey() != "public of pair" || v.GetKeyId() != "kid-1" || !strings.Contains(v.GetJwk(), "11qYAY") {
		t.Errorf("made = %v", made)
	}
	// The algorithm stays unless another is asked for; a given value is not shown.
	for _, c := range []struct{ value, algorithm, want, shown string }{
		{"", "", "rsa", "pair-made-rsa"}, {"", "rsa-pss", "rsa-pss", "pair-made-rsa-pss"}, {"", "", "rsa-pss", "pair-made-rsa-pss"},
		{"", "ed25519", "ed25519", "pair-made-ed25519"}, {"pair-given", "", "pair-given", ""},
	} {
		rotated, err := w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: got.GetName(), Value: c.value, Algorithm: c.algorithm})
		if err != nil {
			t.Fatal(err)
		}
		if v := rotated.GetSecret().GetVersions()[0]; v.GetAlgorithm() != c.want || rotated.GetGeneratedValue() != c.shown {
			t.Errorf("rotated with %q %q to %v, shown %q", c.value, c.algorithm, v, rotated.GetGeneratedValue())
		}
	}
	// "pair-given" is an algorithm that the plugin does not make.
	_, err = w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: got.GetName()})
	refused(t, err, codes.InvalidArgument, "INVALID_FIELD").names(t, "algorithm")

	read, err := w.secrets.GetSecret(t.Context(), &grapnelv1.GetSecretRequest{Name: got.GetName()})
	if err != nil || len(read.GetSecret().GetVersions()) != 6 {
		t.Fatal(read, err)
	}
	if shown := prototext.Format(read) + w.log.String(); strings.Contains(shown, "pair-made-rsa") {
		t.Error("a read or the log shows the value")
	}
}

func TestSecretsOfPluginsRefused(t *testing.T) {
	w := startWorld(t)
	twoSigners(w)
	w.namespace(t, "acme")
	type req = grapnelv1.CreateSecretRequest
	for _, c := range []struct {
		name  string
		req   *req
		field string
		text  string
	}{
		{"unknown plugin", &req{SecretId: "x", Plugin: "plugins/nobody"}, "plugin", "plugins/many, plugins/pair, plugins/plain"},
		{"plugin without secrets", &req{SecretId: "x", Plugin: "plugins/http"}, "plugin", "takes no secrets"},
		{"form of plugin", &req{SecretId: "x", Plugin: "pair"}, "plugin", "plugins/NAME"},
		{"unknown slot", &req{SecretId: "x", Plugin: "plugins/pair", Slot: "keys"}, "slot", `no secret slot "keys"; it has key, ca`},
		{"which slot", &req{SecretId: "x", Plugin: "plugins/many", Value: "v"}, "slot", "key, token, extra"},
		{"kind", &req{SecretId: "x", Plugin: "plugins/pair", Kind: grapnelv1.Secret_KIND_HMAC}, "kind", "plugins/pair"},
		{"value", &req{SecretId: "x", Plugin: "plugins/pair", Value: "hunter2"}, "value", "pair-"},
		{"no value", &req{SecretId: "x", Plugin: "plugins/plain"}, "value", "must be given"},
		{"slot alone", &req{SecretId: "x", Kind: grapnelv1.Secret_KIND_HMAC, Slot: "key"}, "slot", "goes with plugin"},
		{"algorithm alone", &req{SecretId: "x", Kind: grapnelv1.Secret_KIND_HMAC, Algorithm: "rsa"}, "algorithm", "goes with plugin"},
	} {
		_, err := createPluginSecret(t, w, c.req)
		r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD")
		if r.names(t, c.field); !strings.Contains(r.fields[c.field], c.text) || strings.Contains(r.message, "hunter2") {
			t.Errorf("%s: %q lacks %q", c.name, r.fields[c.field], c.text)
		}
	}
	_, err := w.secrets.CreateSecret(t.Context(), &req{Parent: "namespaces/nowhere", SecretId: "x", Plugin: "plugins/pair"})
	refused(t, err, codes.NotFound, "RESOURCE_NOT_FOUND")
	calls := len(w.host.prepared)
	_, err = createPluginSecret(t, w, &req{SecretId: "key", Plugin: "plugins/pair"})
	refused(t, err, codes.AlreadyExists, "RESOURCE_EXISTS")
	if len(w.host.prepared) != calls {
		t.Error("a key was made for a name that is taken")
	}

	made, err := createPluginSecret(t, w, &req{SecretId: "pair", Plugin: "plugins/pair"})
	if err != nil {
		t.Fatal(err)
	}
	answer := w.host.prepare
	w.host.prepare = func(string, string, string, string) (api.Prepared, []api.Diagnostic, error) {
		return api.Prepared{}, nil, api.ErrPluginUnavailable
	}
	_, err = createPluginSecret(t, w, &req{SecretId: "y", Plugin: "plugins/pair"})
	if r := refused(t, err, codes.Unavailable, "PLUGIN_UNAVAILABLE"); r.retry != 2*time.Second || !strings.Contains(r.message, "plugins/pair") {
		t.Errorf("plugin down: %+v", r)
	}
	_, err = w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: made.GetSecret().GetName()})
	refused(t, err, codes.Unavailable, "PLUGIN_UNAVAILABLE")

	// A plugin that gives its private key away is not trusted with the key set.
	w.host.prepare = func(string, string, string, string) (api.Prepared, []api.Diagnostic, error) {
		return api.Prepared{Value: []byte("v"), JWK: `{"kty":"OKP","crv":"Ed25519","x":"AA","d":"hunter2"}`}, nil, nil
	}
	_, err = createPluginSecret(t, w, &req{SecretId: "z", Plugin: "plugins/pair"})
	if r := refused(t, err, codes.InvalidArgument, "INVALID_FIELD"); !strings.Contains(r.message, `private member "d"`) || strings.Contains(r.message, "hunter2") {
		t.Errorf("private JWK: %q", r.message)
	}

	// The plugin has been taken out.
	w.host.prepare = answer
	w.host.mu.Lock()
	w.host.all = w.host.all[:2]
	w.host.mu.Unlock()
	_, err = w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: made.GetSecret().GetName()})
	if r := refused(t, err, codes.FailedPrecondition, "PLUGIN_UNAVAILABLE"); !strings.Contains(r.message, "plugins/pair") {
		t.Error(r.message)
	}
}

// TestRotateAsksUsers: a key that its subscriptions' plugins cannot read is refused when it is rotated.
func TestRotateAsksUsers(t *testing.T) {
	w := startWorld(t)
	twoSigners(w)
	w.namespace(t, "acme")
	free, err := createPluginSecret(t, w, &grapnelv1.CreateSecretRequest{SecretId: "free", Value: "plain-1"})
	if err != nil {
		t.Fatal(err)
	}
	name := free.GetSecret().GetName()
	rotate := func(value string) error {
		_, err := w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: name, Value: value})
		return err
	}
	if err := rotate("anything"); err != nil {
		t.Error("nobody uses it:", err)
	}
	sub := w.subscribe(t, "acme", "orders", func(s *grapnelv1.Subscription) {
		s.Signers = append(s.Signers, &grapnelv1.PluginBinding{Plugin: "plugins/plain", Secrets: map[string]string{"key": name}})
	})
	r := refused(t, rotate("hunter2"), codes.InvalidArgument, "INVALID_FIELD")
	if r.names(t, "value"); !strings.Contains(r.message, "plugins/plain") || !strings.Contains(r.message, sub.GetName()) || strings.Contains(r.message, "hunter2") {
		t.Errorf("refused with %q", r.message)
	}
	if err := rotate("plain-2"); err != nil {
		t.Error(err)
	}
	// A plugin that does not serve does not keep a leaked key in use.
	w.host.mu.Lock()
	w.host.prepare = func(string, string, string, string) (api.Prepared, []api.Diagnostic, error) {
		return api.Prepared{}, nil, api.ErrPluginUnavailable
	}
	w.host.mu.Unlock()
	if err := rotate("anything"); err != nil {
		t.Error(err)
	}
	if log := w.log.String(); !strings.Contains(log, "not checked by a plugin") || strings.Contains(log, "hunter2") {
		t.Errorf("log: %s", log)
	}
	// Nor does what other namespaces do with a secret of the same id.
	w.namespace(t, "beta")
	if _, err := w.secrets.CreateSecret(t.Context(), &grapnelv1.CreateSecretRequest{Parent: "namespaces/beta", SecretId: "free", Value: "x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.secrets.RotateSecret(t.Context(), &grapnelv1.RotateSecretRequest{Name: "namespaces/beta/secrets/free", Value: "y"}); err != nil {
		t.Error(err)
	}
}

// TestForeignKeysWarn: a key made for one plugin may be used by another that can read it, and that is said.
func TestForeignKeysWarn(t *testing.T) {
	w := startWorld(t)
	twoSigners(w)
	w.namespace(t, "acme")
	made, err := createPluginSecret(t, w, &grapnelv1.CreateSecretRequest{SecretId: "pair", Plugin: "plugins/pair"})
	if err != nil {
		t.Fatal(err)
	}
	for plugin, want := range map[string]int{"plugins/pair": 0, "plugins/plain": 1} {
		sub := plainSubscription("acme")
		sub.Signers = []*grapnelv1.PluginBinding{{Plugin: plugin, Secrets: map[string]string{"key": made.GetSecret().GetName()}}}
		r, err := w.subscriptions.CreateSubscription(t.Context(), &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/acme", Subscription: sub, ValidateOnly: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.GetWarnings()) != want || want > 0 && (!strings.Contains(r.GetWarnings()[0], "keys of plugins/pair") || !strings.Contains(r.GetWarnings()[0], `signers[0].secrets["key"]`)) {
			t.Errorf("%s: warnings %q", plugin, r.GetWarnings())
		}
	}
}
