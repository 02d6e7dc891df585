package api

import (
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/subscription"
)

// subscriptionFilter reads the filter of ListSubscriptions.
func subscriptionFilter(text string) (func(*subscription.Subscription) bool, error) {
	f, err := parseFilter(text, subscriptionFields())
	if err != nil {
		return nil, err
	}
	return func(s *subscription.Subscription) bool { return f.Match(s.Proto()) }, nil
}

// subscriptionFields are what a filter over subscriptions may name.
func subscriptionFields() []filter.Field[*grapnelv1.Subscription] {
	type sub = *grapnelv1.Subscription
	return []filter.Field[sub]{
		{
			Name: "state", Values: []string{"ACTIVE", "PAUSED", "DISABLED"}, Prefix: statePrefix,
			Text: func(s sub) string { return strings.TrimPrefix(s.GetState().String(), statePrefix) },
		},
		{Name: "event_type", Texts: sub.GetEventTypes},
		{Name: "uri", Text: sub.GetUri},
		{Name: "labels", Map: sub.GetLabels},
		{Name: "transformer", Texts: func(s sub) []string { return pluginsOf([]*grapnelv1.PluginBinding{s.GetTransformer()}) }, Canonical: fullPluginName},
		{Name: "signer", Texts: func(s sub) []string { return pluginsOf(s.GetSigners()) }, Canonical: fullPluginName},
		{Name: "transport", Text: func(s sub) string { return s.GetTransport().GetPlugin() }, Canonical: fullPluginName},
		{Name: "secret", Texts: secretsOf},
		{Name: "uid", Text: sub.GetUid},
		{Name: "display_name", Text: sub.GetDisplayName},
		{Name: "create_time", Time: func(s sub) time.Time { return s.GetCreateTime().AsTime() }},
	}
}

// secretsOf lists the secrets that a subscription uses, each by its name and by its id.
func secretsOf(s *grapnelv1.Subscription) []string {
	var names []string
	for _, b := range bindings(s) {
		for _, name := range b.GetSecrets() {
			names = append(names, name, name[strings.LastIndex(name, "/")+1:])
		}
	}
	return names
}

func pluginsOf(bindings []*grapnelv1.PluginBinding) []string {
	names := make([]string, len(bindings))
	for i, b := range bindings {
		names[i] = b.GetPlugin()
	}
	return names
}

// statePrefix begins the value names of State enums.
const statePrefix = "STATE_"

// fullPluginName lets a filter say http for plugins/http.
func fullPluginName(text string) (string, error) {
	if !strings.HasPrefix(text, "plugins/") {
		text = pluginName(text)
	}
	return text, nil
}
