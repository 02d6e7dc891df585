// Package celplugin is the transformer "cel": a CEL expression that makes the body out of the event. (Its folder is named after
// the kind; a package of that name would hide the library's.)
package celplugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// costLimit bounds one evaluation, beside its time: it counts what is made of texts, too.
	costLimit = 5_000_000
	// maxPart is the largest text that an operator or a function makes: where types are not known, costLimit does not see it.
	maxPart = 8 << 20
)

// Config is what a subscription says about its body.
type Config struct {
	Expression  string `json:"expression" required:"true" minLength:"1" maxLength:"16384" doc:"A CEL expression over event, with id, source, type, subject, time, attributes, data_content_type, data and webhook_id, as conditions have it. What it gives is the body; null, or drop(\"reason\"), sends nothing."`
	Returns     string `json:"returns" default:"body" enum:"body,request" doc:"body: the expression gives the body. request: it gives {\"body\", \"content_type\", \"headers\"} or {\"drop\": REASON}."`
	ContentType string `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. A text is sent as it is when this is not JSON."`
}

// Kind is the transformer "cel".
func Kind(guard *script.Guard) plugin.Kind {
	latest := new(script.Latest[cel.Program])
	return plugin.Transformer("cel", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		program, err := latest.Build(c.Expression, compile)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, e *plugin.Event) (made *plugin.Transformed, err error) {
			err = guard.Do(ctx, func(ctx context.Context) error {
				made, err = run(ctx, program, c, e)
				return err
			})
			return made, err
		}, nil
	},
		plugin.Doc("makes the body by a CEL expression over the event (https://cel.dev)"),
		plugin.Example(Config{Expression: `{"text": "Order " + string(event.data.order) + " is " + event.type}`, Returns: script.Body, ContentType: "application/json"}),
		plugin.Check(func(c Config, _ plugin.Target) []plugin.Problem {
			if err := latest.Check(c.Expression, compile); err != nil {
				return []plugin.Problem{{Pointer: "/config/expression", Code: "config.syntax", Summary: err.Error()}}
			}
			return script.CheckContentType(c.ContentType)
		}))
}

// environment is what all expressions are compiled in.
var environment = sync.OnceValues(func() (*cel.Env, error) {
	return cel.NewEnv(
		cel.Variable("event", cel.MapType(cel.StringType, cel.DynType)),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
		cel.Function("drop", cel.Overload("drop_string", []*cel.Type{cel.StringType}, cel.DynType,
			cel.UnaryBinding(func(reason ref.Val) ref.Val {
				text, _ := reason.Value().(string)
				return types.WrapErr(plugin.Drop(text))
			}))),
	)
})

func compile(expression string) (cel.Program, error) {
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("make the environment: %w", err)
	}
	ast, issues := env.Compile(expression)
	if issues.Err() != nil {
		return nil, fmt.Errorf("the expression is not CEL: %w", issues.Err())
	}
	program, err := env.Program(ast, cel.CostLimit(costLimit), cel.InterruptCheckFrequency(1), cel.CustomDecorator(watch))
	if err != nil {
		return nil, fmt.Errorf("the expression does not compile: %w", err)
	}
	return program, nil
}

// call is a call that looks at the time before, for each may be as long as the event is large, and at what it has made.
type call struct{ interpreter.InterpretableCall }

func (c call) Eval(vars interpreter.Activation) ref.Val {
	if over, found := vars.ResolveName("#interrupted"); found && over == true {
		return errStopped
	}
	made := c.InterpretableCall.Eval(vars)
	if text, ok := made.(types.String); ok && len(text) > maxPart {
		return errPart
	}
	return made
}

func watch(i interpreter.Interpretable) (interpreter.Interpretable, error) {
	if c, ok := i.(interpreter.InterpretableCall); ok {
		return call{c}, nil
	}
	return i, nil
}

func run(ctx context.Context, program cel.Program, c Config, e *plugin.Event) (*plugin.Transformed, error) {
	given, _, err := program.ContextEval(ctx, map[string]any{"event": script.Event(e, number)})
	if err != nil {
		return nil, err
	}
	if given.Type() == types.NullType {
		return nil, plugin.Drop("the expression has given null")
	}
	text, err := appendJSON(nil, given, 0)
	if err != nil {
		return nil, err
	}
	return script.Finish(text, c.Returns, c.ContentType)
}

// number is as conditions have it: int, or uint above 2^63-1, without fraction and exponent, else double.
func number(n json.Number) any {
	if i, err := strconv.ParseInt(n.String(), 10, 64); err == nil {
		return i
	}
	if u, err := strconv.ParseUint(n.String(), 10, 64); err == nil {
		return u
	}
	f, _ := n.Float64() // out of range it is infinite
	return f
}

var (
	errStopped = types.NewErr("the expression was stopped")
	errPart    = types.NewErr("a text has more than %d bytes", maxPart)
)

var errDeep = errors.New("the result is nested deeper than a thousand levels")
