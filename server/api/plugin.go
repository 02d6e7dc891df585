package api

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// ListPlugins reads one page of plugins in name order, without schemas and examples.
func (s pluginService) ListPlugins(_ context.Context, r *grapnelv1.ListPluginsRequest) (*grapnelv1.ListPluginsResponse, error) {
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	const query = "ListPlugins"
	after, err := s.pages.open(r.GetPageToken(), query)
	if err != nil {
		return nil, err
	}
	page := takePage(slices.Values(s.Plugins.Plugins()), size,
		func(p *grapnelv1.Plugin) bool { return p.GetName() > after },
		(*grapnelv1.Plugin).GetName,
		func(p *grapnelv1.Plugin) *grapnelv1.Plugin {
			p = s.placed(p)
			p.ConfigSchema, p.ConfigExample = nil, nil
			return p
		})
	return &grapnelv1.ListPluginsResponse{Plugins: page.items, NextPageToken: s.pages.seal(page.next, query)}, nil
}

// GetPlugin reads one plugin with its schema, secret slots, example and instances.
func (s pluginService) GetPlugin(_ context.Context, r *grapnelv1.GetPluginRequest) (*grapnelv1.GetPluginResponse, error) {
	id, err := parsePlugin("name", r.GetName())
	if err != nil {
		return nil, err
	}
	p, ok := s.Plugins.Plugin(id)
	if !ok {
		return nil, notFound(r.GetName(), "plugin")
	}
	return &grapnelv1.GetPluginResponse{Plugin: s.placed(p)}, nil
}

// placed returns a copy of a plugin whose instances say on which node they run; the host does not know.
func (s *Server) placed(p *grapnelv1.Plugin) *grapnelv1.Plugin {
	p = proto.CloneOf(p)
	for _, instance := range p.GetInstances() {
		if instance.GetNode() == "" {
			instance.Node = nodeName(s.NodeName)
		}
	}
	return p
}

// ValidatePluginConfig checks settings the way CreateSubscription would; each fault is a violation whose
// path begins with config.
func (s pluginService) ValidatePluginConfig(ctx context.Context, r *grapnelv1.ValidatePluginConfigRequest) (*grapnelv1.ValidatePluginConfigResponse, error) {
	id, err := parsePlugin("name", r.GetName())
	if err != nil {
		return nil, err
	}
	config := []byte("{}")
	if r.GetConfig() != nil {
		if config, err = protojson.Marshal(r.GetConfig()); err != nil {
			return nil, invalid(Violation{"config", "is not valid JSON: " + err.Error(), "config.json"})
		}
	}
	diagnostics, err := s.Plugins.CheckConfig(ctx, id, config)
	switch {
	case errors.Is(err, ErrUnknownPlugin):
		return nil, notFound(r.GetName(), "plugin")
	case errors.Is(err, ErrPluginUnavailable):
		return nil, unavailable(grapnelv1.ErrorReason_ERROR_REASON_PLUGIN_UNAVAILABLE,
			r.GetName()+" is not serving just now", 2*time.Second)
	case err != nil:
		return nil, toStatus(err, r.GetName())
	}
	for i := range diagnostics {
		diagnostics[i].Field = underConfig(diagnostics[i].Field)
	}
	if faults, _ := sortDiagnostics(diagnostics); len(faults) > 0 {
		return nil, invalid(faults...)
	}
	return &grapnelv1.ValidatePluginConfigResponse{}, nil
}

// underConfig makes the path of a diagnostic one of ValidatePluginConfigRequest.
func underConfig(field string) string {
	switch {
	case field == "":
		return "config"
	case field == "config", strings.HasPrefix(field, "config."), strings.HasPrefix(field, "config["):
		return field
	case strings.HasPrefix(field, "["):
		return "config" + field
	}
	return "config." + field
}

// sortDiagnostics parts what plugins say into what refuses a request and what only warns.
func sortDiagnostics(diagnostics []Diagnostic) (faults []Violation, warnings []string) {
	for _, d := range diagnostics {
		d.Field = mapKeys(d.Field)
		if !d.Warning {
			faults = append(faults, Violation{d.Field, d.Summary, d.Code})
			continue
		}
		text := d.Summary
		if d.Field != "" {
			text = d.Field + ": " + text
		}
		warnings = append(warnings, text)
	}
	return faults, warnings
}

// mapKeys writes the path of a secret's slot as paths into maps are written everywhere else:
// subscription.signers[0].secrets["key"].
func mapKeys(field string) string {
	binding, slot, ok := strings.Cut(field, ".secrets.")
	if !ok {
		return field
	}
	return binding + ".secrets[" + quote(slot) + "]"
}
