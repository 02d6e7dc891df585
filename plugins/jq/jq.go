// Package jq is the transformer "jq": a jq program that makes the body out of the event, run by gojq.
package jq

import (
	"context"
	"errors"
	"fmt"

	"github.com/itchyny/gojq"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription says about its body.
type Config struct {
	Program     string `json:"program" required:"true" minLength:"1" maxLength:"65536" doc:"A jq program. Its input is the event, with id, source, type, subject, time, attributes, data_content_type, data and webhook_id; its one output is the body. No output, or drop(\"reason\"), sends nothing."`
	Returns     string `json:"returns" default:"body" enum:"body,request" doc:"body: the output is the body. request: it is {\"body\", \"content_type\", \"headers\"} or {\"drop\": REASON}."`
	ContentType string `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. A text is sent as it is when this is not JSON."`
}

// Kind is the transformer "jq".
func Kind(guard *script.Guard) plugin.Kind {
	return plugin.Transformer("jq", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		code, err := compile(c.Program)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, e *plugin.Event) (made *plugin.Transformed, err error) {
			err = guard.Do(ctx, func(ctx context.Context) error {
				made, err = run(ctx, code, c, e)
				return err
			})
			return made, err
		}, nil
	},
		plugin.Doc("makes the body by a jq program over the event (https://jqlang.org/manual)"),
		plugin.Example(Config{Program: `{text: "Order \(.data.order) is \(.type)"}`, Returns: script.Body, ContentType: "application/json"}),
		plugin.Check(func(c Config, _ plugin.Target) []plugin.Problem {
			if _, err := compile(c.Program); err != nil {
				return []plugin.Problem{{Pointer: "/config/program", Code: "config.syntax", Summary: err.Error()}}
			}
			return nil
		}))
}

func compile(program string) (*gojq.Code, error) {
	query, err := gojq.Parse(program)
	if err != nil {
		return nil, fmt.Errorf("the program is not jq: %w", err)
	}
	code, err := gojq.Compile(query, gojq.WithFunction("drop", 0, 1, func(_ any, args []any) any {
		if len(args) == 0 {
			return plugin.Drop("")
		}
		return plugin.Drop(fmt.Sprint(args[0]))
	}))
	if err != nil {
		return nil, fmt.Errorf("the program does not compile: %w", err)
	}
	return code, nil
}

func run(ctx context.Context, code *gojq.Code, c Config, e *plugin.Event) (*plugin.Transformed, error) {
	outputs := code.RunWithContext(ctx, script.Event(e, script.Number))
	first, ok := outputs.Next()
	if !ok {
		return nil, plugin.Drop("the program has no output")
	}
	if err, failed := first.(error); failed {
		return nil, failure(err)
	}
	if second, more := outputs.Next(); more {
		if err, failed := second.(error); failed {
			return nil, failure(err)
		}
		return nil, errors.New("the program has more than one output; want one, such as an array of them: [ … ]")
	}
	text, err := gojq.Marshal(first)
	if err != nil {
		return nil, fmt.Errorf("write the output: %w", err)
	}
	return script.Finish(text, c.Returns, c.ContentType)
}

// failure is the error of a program; halt without a value has it end without an output.
func failure(err error) error {
	if halt := new(gojq.HaltError); errors.As(err, &halt) && halt.Value() == nil {
		return plugin.Drop("the program has halted")
	}
	return err
}
