// Package templateplugin is the transformer "template": a Go text/template that writes the body, or one of those that come with
// it, for receivers that take messages of their own form: Slack, Microsoft Teams, Discord and PagerDuty. (Its folder is named
// after the kind; a package of that name would hide the library's.)
package templateplugin

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"text/template"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription says about its body.
type Config struct {
	Template    string            `json:"template" maxLength:"65536" doc:"A Go template (https://pkg.go.dev/text/template) that writes the body. Its dot is the event, with id, source, type, subject, time, attributes, data_content_type, data and webhook_id, and parameters."`
	Ready       string            `json:"ready" enum:"slack,teams,discord,pagerduty" doc:"Instead of template: a message as the receiver of that name takes it, of title and text."`
	Title       string            `json:"title" maxLength:"4096" default:"{{.type}}{{with .subject}} · {{.}}{{end}}" doc:"With ready: the message's title, a template too."`
	Text        string            `json:"text" maxLength:"16384" default:"{{truncate 20000 (pretty .data)}}" doc:"With ready: the message's text, a template too."`
	Parameters  map[string]string `json:"parameters" maxLength:"4096" doc:"Texts for the template, as .parameters.NAME. ready pagerduty takes severity (critical, error, warning or info; error without) and action (trigger, acknowledge or resolve; trigger without)."`
	ContentType string            `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. If it is JSON, what the template writes must be."`
	Key         plugin.Secret     `json:"-" slot:"routing_key" kinds:"OPAQUE" doc:"Integration key of a PagerDuty service, for ready pagerduty; .routing_key in a template. It stands in the body, which is stored with the event."`
}

//go:embed ready
var ready embed.FS

// Kind is the transformer "template".
func Kind(guard *script.Guard) plugin.Kind {
	return plugin.Transformer("template", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		t, problem := compile(c)
		if problem != nil {
			return nil, errors.New(problem.Summary)
		}
		return func(ctx context.Context, e *plugin.Event) (made *plugin.Transformed, err error) {
			err = guard.Do(ctx, func(ctx context.Context) error {
				made, err = t.run(ctx, c, e)
				return err
			})
			return made, err
		}, nil
	},
		plugin.Doc("writes the body by a Go template over the event, or as Slack, Microsoft Teams, Discord or PagerDuty take messages"),
		plugin.Example(Config{Ready: "slack", Title: "Order {{.data.order}}", Text: "is {{.type}}", ContentType: "application/json"}),
		plugin.Check(func(c Config, _ plugin.Target) []plugin.Problem {
			if _, problem := compile(c); problem != nil {
				return []plugin.Problem{*problem}
			}
			return script.CheckContentType(c.ContentType)
		}))
}

// templates of one instance. title and text are those of a ready one.
type templates struct {
	body, title, text *template.Template
	json              bool
}

func compile(c Config) (*templates, *plugin.Problem) {
	body, at := c.Template, "/config/template"
	switch {
	case c.Template == "" && c.Ready == "":
		return nil, &plugin.Problem{Pointer: at, Code: "config.missing", Summary: "neither template nor ready is given; want a template, or the name of one that comes with grapnel: slack, teams, discord or pagerduty"}
	case c.Template != "" && c.Ready != "":
		return nil, &plugin.Problem{Pointer: "/config/ready", Code: "config.invalid", Summary: "template and ready exclude each other; leave out one of the two"}
	case c.Ready != "":
		text, err := ready.ReadFile("ready/" + c.Ready + ".tmpl")
		if err != nil {
			return nil, &plugin.Problem{Pointer: "/config/ready", Code: "config.enum", Summary: err.Error()}
		}
		body = string(text)
	}
	t := &templates{json: script.IsJSON(c.ContentType)}
	for _, part := range []struct {
		to       **template.Template
		text, at string
	}{{&t.body, body, at}, {&t.title, c.Title, "/config/title"}, {&t.text, c.Text, "/config/text"}} {
		var err error
		if *part.to, err = read(part.text); err != nil {
			return nil, &plugin.Problem{Pointer: part.at, Code: "config.syntax", Summary: "it is no template: " + err.Error()}
		}
	}
	return t, nil
}

func (t *templates) run(ctx context.Context, c Config, e *plugin.Event) (*plugin.Transformed, error) {
	dot := script.Event(e, func(n json.Number) any { return n })
	parameters := make(map[string]any, len(c.Parameters))
	for name, value := range c.Parameters {
		parameters[name] = value
	}
	dot["parameters"], dot["routing_key"] = parameters, ""
	if !c.Key.Empty() {
		dot["routing_key"] = string(c.Key.Values()[0])
	}
	if c.Ready != "" {
		if c.Ready == "pagerduty" && c.Key.Empty() {
			return nil, errors.New("pagerduty wants an integration key; name a secret that holds it in slot routing_key")
		}
		for name, part := range map[string]*template.Template{"title": t.title, "text": t.text} {
			written, err := execute(ctx, part, dot)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			dot[name] = string(written)
		}
	}
	body, err := execute(ctx, t.body, dot)
	if err != nil {
		return nil, err
	}
	if t.json {
		var compact bytes.Buffer
		if err := json.Compact(&compact, body); err != nil {
			return nil, fmt.Errorf("what the template writes is not JSON: %w; write values with {{json VALUE}}, or set content_type", err)
		}
		body = compact.Bytes()
	}
	return &plugin.Transformed{Body: body, ContentType: c.ContentType}, nil
}
