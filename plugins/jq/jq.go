// Package jq is the transformer "jq": a jq program that makes the body out of the event, run by gojq.
package jq

import (
	"context"
	"errors"
	"fmt"
	"math/big"

	"github.com/itchyny/gojq"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	maxDeep = 10_000
	// maxText is the most that is written of a result; a body may be one text in it, with escapes.
	maxText = 2 * plugin.MaxTransformed
	// maxShown is the largest value that an error or a reason shows.
	maxShown = 1 << 10
)

// Config is what a subscription says about its body.
type Config struct {
	Program     string `json:"program" required:"true" minLength:"1" maxLength:"16384" doc:"A jq program. Its input is the event, with id, source, type, subject, time, attributes, data_content_type, data and webhook_id; its one output is the body. No output, or drop(\"reason\"), sends nothing."`
	Returns     string `json:"returns" default:"body" enum:"body,request" doc:"body: the output is the body. request: it is {\"body\", \"content_type\", \"headers\"} or {\"drop\": REASON}."`
	ContentType string `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. A text is sent as it is when this is not JSON."`
}

// Kind is the transformer "jq".
func Kind(guard *script.Guard) plugin.Kind {
	latest := new(script.Latest[*gojq.Code])
	return plugin.Transformer("jq", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		code, err := latest.Build(c.Program, compile)
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
			if err := latest.Check(c.Program, compile); err != nil {
				return []plugin.Problem{{Pointer: "/config/program", Code: "config.syntax", Summary: err.Error()}}
			}
			return script.CheckContentType(c.ContentType)
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
		return plugin.Drop(textOf(args[0]))
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
	if !fits(first, maxText) {
		return nil, fmt.Errorf("the output is nested more than %d deep, or has more than the %d bytes that can be sent", maxDeep, plugin.MaxTransformed)
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
	if with := gojq.ValueError(nil); errors.As(err, &with) && !fits(with.Value(), maxShown) {
		return errors.New("the program has failed with a value that is too large to show")
	}
	return err
}

// textOf is a text as it is, nothing as nothing, and all else as JSON.
func textOf(v any) string {
	if text, ok := v.(string); ok || v == nil {
		return text
	}
	if !fits(v, maxShown) {
		return "a value that is too large to show"
	}
	text, err := gojq.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// fits reports whether a value is written in no more than so many characters, escapes aside. A value that is there a thousand
// times in another is one in memory, and a thousand when it is written.
func fits(v any, most int) bool {
	return count(v, &most, 0)
}

func count(v any, left *int, deep int) bool {
	*left--
	switch v := v.(type) {
	case string:
		*left -= len(v)
	case *big.Int:
		*left -= v.BitLen() / 4
	case []any:
		for _, e := range v {
			if *left < 0 || !count(e, left, deep+1) {
				return false
			}
		}
	case map[string]any:
		for name, e := range v {
			if *left -= len(name); *left < 0 || !count(e, left, deep+1) {
				return false
			}
		}
	}
	return *left >= 0 && deep <= maxDeep
}
