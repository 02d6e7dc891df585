//go:build linux

package pluginhost

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestCheck(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	f.secrets.set("namespaces/acme/secrets/bad", "bad-canary-12345")
	for name, tt := range map[string]struct {
		change func(*grapnelv1.Subscription)
		want   []Diagnostic
	}{
		"all well": {func(*grapnelv1.Subscription) {}, nil},
		"unknown setting": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "metod", "POST") }, []Diagnostic{
			{Field: "subscription.transport.config.metod", Code: "config.unknown_field", Summary: `plugins/mem has no setting "metod" here; it has delay, header, mode, status`}}},
		"wrong type": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "status", "x") }, []Diagnostic{
			{Field: "subscription.transport.config.status", Code: "config.type", Summary: `given "x", want integer`}}},
		"out of range": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "status", 6000) }, []Diagnostic{
			{Field: "subscription.transport.config.status", Code: "config.range", Summary: `given 6000, want at most 599`}}},
		"not in the list": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "mode", "fly") }, []Diagnostic{
			{Field: "subscription.transport.config.mode", Code: "config.enum", Summary: `given "fly", want one of "answer", "echo", "panic", "sleep", "env", "block", "spawn", "loud", "leak"`}}},
		"no duration": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "delay", "5") }, []Diagnostic{
			{Field: "subscription.transport.config.delay", Code: "config.pattern", Summary: `given "5", want a duration such as "1m30s"`}}},
		"what only the plugin knows": {func(s *grapnelv1.Subscription) { s.Transport.Config = config(t, "delay", "5m") }, []Diagnostic{
			{Field: "subscription.transport.config.delay", Code: "config.range", Summary: `given 5m, want at most 1m`}}},
		"unknown plugin": {func(s *grapnelv1.Subscription) { s.Signers[0].Plugin = "plugins/none" }, []Diagnostic{
			{Field: "subscription.signers[0].plugin", Code: "plugin.unknown", Summary: `there is no plugin plugins/none; there are plugins/standard-webhooks`}}},
		"wrong role": {func(s *grapnelv1.Subscription) { s.Transport.Plugin = "plugins/standard-webhooks" }, []Diagnostic{
			{Field: "subscription.transport.plugin", Code: "plugin.wrong_role", Summary: `plugins/standard-webhooks is a signer, want a transport, such as plugins/mem`}}},
		"no transport for the scheme": {func(s *grapnelv1.Subscription) { s.Uri = "gopher://x" }, []Diagnostic{
			{Field: "subscription.uri", Code: "plugin.no_transport", Summary: `no plugin carries the scheme "gopher"; there are transports for mem`}}},
		"missing secret": {func(s *grapnelv1.Subscription) { s.Signers[0].Secrets = nil }, []Diagnostic{
			{Field: "subscription.signers[0].secrets.key", Code: "secret.missing", Summary: `plugins/standard-webhooks needs the name of a secret in slot "key" (Signing key)`}}},
		"unknown slot": {func(s *grapnelv1.Subscription) { s.Signers[0].Secrets["kee"] = keyName }, []Diagnostic{
			{Field: "subscription.signers[0].secrets.kee", Code: "secret.unknown_slot", Summary: `plugins/standard-webhooks has no secret slot "kee"; it has key`}}},
		"another namespace's secret": {func(s *grapnelv1.Subscription) { s.Signers[0].Secrets["key"] = "namespaces/other/secrets/key" }, []Diagnostic{
			{Field: "subscription.signers[0].secrets.key", Code: "secret.namespace", Summary: `the secret is in namespace "other", want one of the subscription's own, "acme"`}}},
		"a value for a name": {func(s *grapnelv1.Subscription) { s.Signers[0].Secrets["key"] = "whsec_canary" }, []Diagnostic{
			{Field: "subscription.signers[0].secrets.key", Code: "secret.name", Summary: `want the name of a secret, namespaces/{namespace}/secrets/{secret}, not a value`}}},
		"a secret in the config": {func(s *grapnelv1.Subscription) { s.Signers[0].Config = config(t, "mark", "whsec_canary") }, []Diagnostic{
			{Field: "subscription.signers[0].config.mark", Code: "config.secret_value", Summary: `the value looks like a secret (it begins with "whsec_"); store it with SecretService.CreateSecret and name it in the binding's secrets`}}},
		"a secret the plugin refuses": {func(s *grapnelv1.Subscription) { s.Signers[0].Secrets["key"] = "namespaces/acme/secrets/bad" }, []Diagnostic{
			{Field: "subscription.signers[0]", Code: "config.rejected", Summary: `the key [redacted] is bad`}}},
		"a static header that the signer sets": {func(s *grapnelv1.Subscription) { s.Headers["Webhook-Signature"] = "x" }, []Diagnostic{
			{Field: "subscription.headers.Webhook-Signature", Code: "plugin.header_conflict", Summary: `the header webhook-signature is set by plugins/standard-webhooks; take it out of headers`}}},
		"one that receivers take for the signer's": {func(s *grapnelv1.Subscription) {
			s.HeaderTemplates, s.AllowedEventHeaders = map[string]string{"Webhook_Signature": "{event.id}"}, []string{"webhook_signature"}
		}, []Diagnostic{
			{Field: "subscription.header_templates.Webhook_Signature", Code: "plugin.header_conflict", Summary: `the header webhook_signature is set by plugins/standard-webhooks; take it out of header_templates`},
			{Field: "subscription.allowed_event_headers[0]", Code: "plugin.header_conflict", Summary: `the header webhook_signature is set by plugins/standard-webhooks; take it out of allowed_event_headers`}}},
	} {
		t.Run(name, func(t *testing.T) {
			sub := newSub(t, 1, nil).Proto()
			tt.change(sub)
			got, err := f.Check(t.Context(), sub)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func config(t *testing.T, key string, value any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(map[string]any{key: value})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestCheckConfig(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	got, err := f.CheckConfig(t.Context(), "mem", []byte(`{"status":1,"x":2}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Diagnostic{
		{Field: "config.status", Code: "config.range", Summary: "given 1, want at least 100"},
		{Field: "config.x", Code: "config.unknown_field", Summary: `plugins/mem has no setting "x" here; it has delay, header, mode, status`},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, err := f.CheckConfig(t.Context(), "mem", []byte(`{"delay":"5m"}`)); err != nil || len(got) != 1 || got[0].Field != "config.delay" {
		t.Errorf("by the plugin: %v %v", got, err)
	}
	if got, err := f.CheckConfig(t.Context(), "standard-webhooks", nil); err != nil || len(got) != 0 {
		t.Errorf("without the secrets it needs: %v %v", got, err)
	}
	if _, err := f.CheckConfig(t.Context(), "none", nil); !errors.Is(err, ErrUnknownPlugin) {
		t.Errorf("unknown: %v", err)
	}
	f.stop()
	if _, err := f.CheckConfig(t.Context(), "mem", nil); !errors.Is(err, ErrUnavailable) {
		t.Errorf("after the stop: %v", err)
	}
}

func TestPluginStatus(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	f.attempt(t, newSub(t, 1, nil), newJob(0, "x"))
	var names []string
	for _, p := range f.Plugins() {
		names = append(names, p.GetName())
	}
	if diff := cmp.Diff([]string{"plugins/mem", "plugins/standard-webhooks"}, names); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	p, ok := f.Plugin("mem")
	in := p.GetInstances()[0]
	if !ok || p.GetVersion() != "1.0.0" || p.GetProtocolVersion() != "1.5" || p.GetHealth() != grapnelv1.Plugin_HEALTH_SERVING ||
		!p.GetBuiltin() || len(in.GetChecksum()) != 64 || in.GetStartTime() == nil || in.GetP99Latency() == nil ||
		p.GetConfigSchema().GetFields()["properties"] == nil || p.GetConfigExample() == nil || len(p.GetSecretSlots()) != 1 ||
		p.GetDescription() == "" || len(p.GetUriSchemes()) != 1 || p.GetRoles()[0] != grapnelv1.Plugin_ROLE_TRANSPORT {
		t.Errorf("got %v", p)
	}
	if _, ok := f.Plugin("none"); ok {
		t.Error("there is a plugin that is not")
	}
}
