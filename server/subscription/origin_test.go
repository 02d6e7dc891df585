package subscription_test

import (
	"testing"

	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/subscription"
)

func TestOrigin(t *testing.T) {
	of := func(uri string, change ...func(*subscription.Subscription)) subscription.Origin {
		s := subscription.Of(&grapnelv1.Subscription{Uri: uri, Transport: &grapnelv1.PluginBinding{Plugin: "http"}})
		for _, c := range change {
			c(s)
		}
		return s.Origin()
	}
	for uri, want := range map[string]string{
		"https://hooks.example.com/a":      "https://hooks.example.com:443",
		"HTTPS://Hooks.Example.com.:443/b": "https://hooks.example.com:443",
		"http://hooks.example.com":         "http://hooks.example.com:80",
		"http://[2001:db8::1]/x":           "http://[2001:db8::1]:80",
		"http://10.0.0.1:8080?q=1":         "http://10.0.0.1:8080",
		"nats://broker/subject":            "nats://broker",
		"file-spool:///orders":             "",
		"":                                 "",
	} {
		if got := of(uri).Host; got != want {
			t.Errorf("%s: %q, want %q", uri, got, want)
		}
	}
	plain := of("https://hooks.example.com/a")
	if plain != of("https://hooks.example.com/other") {
		t.Error("two paths of a host are two origins")
	}
	config := func(s *subscription.Subscription) {
		s.Proto().Transport.Config, _ = structpb.NewStruct(map[string]any{"proxy": map[string]any{"url": "http://proxy.example"}})
	}
	secret := func(ns string) func(*subscription.Subscription) {
		return func(s *subscription.Subscription) {
			s.Proto().Transport.Secrets = map[string]string{"client_certificate": "namespaces/" + ns + "/secrets/cert"}
		}
	}
	plugin := func(s *subscription.Subscription) { s.Proto().Transport.Plugin = "other" }
	seen := map[subscription.Origin]bool{plain: true}
	for _, change := range []func(*subscription.Subscription){config, secret("a"), secret("b"), plugin} {
		o := of("https://hooks.example.com/a", change)
		if seen[o] {
			t.Errorf("%+v is that of another transport", o)
		}
		seen[o] = true
	}
	if of("https://hooks.example.com/a", secret("a")) != of("https://hooks.example.com/b", secret("a")) {
		t.Error("with the same secrets they are two")
	}
}
