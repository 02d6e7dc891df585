//go:build linux

package pluginhost

import (
	"strings"
	"testing"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
)

// namedKinds are signers by their ids, and transports where a scheme follows an equals sign.
func namedKinds(ids []string) (kinds []plugin.Kind) {
	for _, id := range ids {
		if id, scheme, ok := strings.Cut(id, "="); ok {
			kinds = append(kinds, plugin.Transport(id, func(struct{}, plugin.Target) (plugin.AttemptFunc, error) { return nil, nil }, plugin.Schemes(scheme)))
			continue
		}
		kinds = append(kinds, testSigner(id))
	}
	return kinds
}

func named(provider string, ids ...string) Spec {
	s := self(append([]string{"plugin-named", provider}, ids...)...)
	s.Name, s.Builtin = provider, false
	return s
}

// manifested is a plugin that says before its start what it offers, as an installed one does.
func manifested(t *testing.T, s Spec) Spec {
	t.Helper()
	f := start(t, nil, s)
	eventually(t, "it serves", func() bool { return len(f.Pids()) == 1 })
	desc, err := f.processes()[0].conn.Load().plugin.Describe(t.Context(), &pluginv1.DescribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	s.Manifest = desc
	f.stop()
	return s
}

// errorOf is what the plugin of a provider was refused with.
func (f *fixture) errorOf(provider string) string {
	for _, p := range f.Plugins() {
		if p.GetProvider() == provider {
			return p.GetInstances()[0].GetLastError()
		}
	}
	return ""
}

func (f *fixture) providerOf(id string) string {
	p, _ := f.Plugin(id)
	return p.GetProvider()
}

// TestNamesOfBuiltinPluginsAreTheirs: what ships is reserved from the start, also while it does not come up, and who takes
// its name harms only itself.
func TestNamesOfBuiltinPluginsAreTheirs(t *testing.T) {
	ours := self("plugin-all")
	ours.Reserves = map[string][]string{"mem": {"mem"}, "standard-webhooks": nil}
	late := ours
	late.Path, late.Args = "/bin/sh", []string{"-c", "sleep 600"}
	for name, builtin := range map[string]Spec{"it serves": ours, "it has not come up": late} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			thief, claimant, honest := named("acme/thief", "standard-webhooks", "mine"), named("acme/claimant", "a-first=mem"), named("acme/honest", "good")
			impostor := named("grapnel/extra", "extra")
			f := start(t, nil, thief, impostor, claimant, honest, builtin)
			eventually(t, "the thief is refused", func() bool {
				return strings.Contains(f.errorOf("acme/thief"), `kind "standard-webhooks" ships with grapnel`)
			})
			eventually(t, "the impostor is refused", func() bool { return strings.Contains(f.errorOf("grapnel/extra"), "calls itself grapnel/extra") })
			eventually(t, "the honest one serves", func() bool { return f.providerOf("good") == "acme/honest" })
			eventually(t, "the claimant serves", func() bool { return f.providerOf("a-first") == "acme/claimant" })
			if _, there := f.Plugin("mine"); there {
				t.Error("a refused plugin has a kind")
			}
			if p, _ := f.Plugin("a-first"); len(p.GetUriSchemes()) != 0 {
				t.Errorf("the claimant is the default for %v", p.GetUriSchemes())
			}
			if builtin.Path == "/bin/sh" {
				return
			}
			f.ready(t)
			if got := f.attempt(t, newSub(t, 1, nil), newJob(0, "x")); got.Outcome != delivery.OutcomeSucceeded {
				t.Errorf("%+v", got)
			}
			if got := f.providerOf("standard-webhooks"); got != "test/all" {
				t.Errorf("the kind is offered by %s", got)
			}
		})
	}
}

// TestNamesGoByTheList: which of two plugins has a name does not depend on who comes up first.
func TestNamesGoByTheList(t *testing.T) {
	if testing.Short() {
		t.Skip("takes long")
	}
	for round := range 2 {
		for name, specs := range map[string][]Spec{
			"by what they say": {named("acme/line", "line"), named("acme/ppl", "line", "other")},
			"by manifest":      {manifested(t, named("acme/line", "line")), manifested(t, named("acme/ppl", "line", "other"))},
		} {
			f := start(t, nil, specs...)
			eventually(t, "the second is refused", func() bool {
				return strings.Contains(f.errorOf("acme/ppl"), `kind "line" belongs to plugin acme/line`) ||
					strings.Contains(f.errorOf("acme/ppl"), "offers one of its kinds")
			})
			eventually(t, "the first serves", func() bool { return f.providerOf("line") == "acme/line" })
			// One that is added to those that run comes last, wherever it stands.
			f.Update([]Spec{named("acme/a", "line", "more"), specs[0], specs[1]})
			eventually(t, "the third is refused", func() bool { return strings.Contains(f.errorOf("acme/a"), "belongs to plugin acme/line") })
			if got := f.providerOf("line"); got != "acme/line" {
				t.Errorf("%s, round %d: the kind is offered by %s", name, round, got)
			}
			p, _ := f.Plugin("line")
			if p.GetHealth() != grapnelv1.Plugin_HEALTH_SERVING || p.GetInstances()[0].GetRestartCount() != 0 {
				t.Errorf("the owner is harmed: %v", p)
			}
			f.stop()
		}
	}
}
