// Package javascript is the transformer "javascript": a script whose function transform makes the body out of the event, run
// by goja. Each event has a runtime of its own, without files, network, timers or modules.
package javascript

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/dlclark/regexp2/v2"
	"github.com/dop251/goja"
	"github.com/dop251/goja/ast"
	"github.com/dop251/goja/parser"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// maxCalls is how deep functions may call each other.
const maxCalls = 1000

// Config is what a subscription says about its body.
type Config struct {
	Script      string `json:"script" required:"true" minLength:"1" maxLength:"65536" doc:"JavaScript with a function transform(event), whose event has id, source, type, subject, time, attributes, data_content_type, data and webhook_id. What it returns is the body; nothing, or drop(\"reason\"), sends nothing."`
	Returns     string `json:"returns" default:"body" enum:"body,request" doc:"body: the function returns the body. request: it returns {body, content_type, headers} or {drop: REASON}."`
	ContentType string `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. A text is sent as it is when this is not JSON."`
}

// Kind is the transformer "javascript". It bounds the time of regular expressions that go back over what they have read, for
// the whole process: an interrupt does not reach them.
func Kind(guard *script.Guard) plugin.Kind {
	regexp2.DefaultMatchTimeout = script.Time
	return plugin.Transformer("javascript", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		p, err := compile(c.Script)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, e *plugin.Event) (made *plugin.Transformed, err error) {
			event, err := json.Marshal(script.Event(e, func(n json.Number) any { return n }))
			if err != nil {
				return nil, err
			}
			err = guard.Do(ctx, func(ctx context.Context) error {
				made, err = p.run(ctx, c, string(event))
				return err
			})
			return made, err
		}, nil
	},
		plugin.Doc("makes the body by a JavaScript function over the event (ECMAScript 2020 and more, as goja has it)"),
		plugin.Example(Config{
			Script: "function transform(event) {\n  return {text: `Order ${event.data.order} is ${event.type}`};\n}", Returns: script.Body, ContentType: "application/json",
		}),
		plugin.Check(func(c Config, _ plugin.Target) []plugin.Problem {
			if _, err := compile(c.Script); err != nil {
				return []plugin.Problem{{Pointer: "/config/script", Code: "config.syntax", Summary: err.Error()}}
			}
			return nil
		}))
}

type program struct{ before, script, call *goja.Program }

// before takes away what could take any amount of memory in one step, which nothing can stop half-way.
const before = `"use strict";
(function () {
  const most = 1 << 20;
  for (const name of ["ArrayBuffer", "SharedArrayBuffer", "DataView", "Int8Array", "Uint8Array", "Uint8ClampedArray", "Int16Array", "Uint16Array",
    "Int32Array", "Uint32Array", "Float32Array", "Float64Array", "BigInt64Array", "BigUint64Array"]) delete globalThis[name];
  const bound = function (of, name, size) {
    const f = of[name];
    if (f) Object.defineProperty(of, name, {configurable: true, writable: true, value: function (...args) {
      if (!(size(this, args) <= most)) throw new RangeError(name + ": more than " + most);
      return f.apply(this, args);
    }});
  };
  bound(String.prototype, "repeat", (s, a) => String(s).length * a[0]);
  for (const name of ["padStart", "padEnd"]) bound(String.prototype, name, (_, a) => a[0]);
  for (const name of ["fill", "join", "map", "concat", "slice", "splice", "sort", "reverse", "toString"]) bound(Array.prototype, name, (s) => s.length);
  bound(Array, "from", (_, a) => (a[0] && a[0].length) || 0);
})();
`

// call is what makes JSON of what the function gives; an empty text is nothing.
const call = `(function (event) {
  const given = transform(JSON.parse(event));
  return given === undefined || given === null ? "" : JSON.stringify(given) || "";
})`

func compile(text string) (*program, error) {
	tree, err := parser.ParseFile(nil, "script", text, 0)
	if err != nil {
		return nil, fmt.Errorf("the script is not JavaScript: %w", err)
	}
	if !declares(tree, "transform") {
		return nil, errors.New("the script has no function transform; want function transform(event) { return … }")
	}
	p := &program{}
	for _, part := range []struct {
		to     **goja.Program
		text   string
		strict bool
	}{{&p.before, before, true}, {&p.script, text, false}, {&p.call, call, true}} {
		if *part.to, err = goja.Compile("script", part.text, part.strict); err != nil {
			return nil, fmt.Errorf("the script does not compile: %w", err)
		}
	}
	return p, nil
}

// declares reports whether a script declares a name on its top level.
func declares(tree *ast.Program, name string) bool {
	bound := func(list []*ast.Binding) bool {
		for _, b := range list {
			if id, ok := b.Target.(*ast.Identifier); ok && id.Name.String() == name {
				return true
			}
		}
		return false
	}
	for _, statement := range tree.Body {
		switch s := statement.(type) {
		case *ast.FunctionDeclaration:
			if s.Function.Name != nil && s.Function.Name.Name.String() == name {
				return true
			}
		case *ast.LexicalDeclaration:
			if bound(s.List) {
				return true
			}
		case *ast.VariableStatement:
			if bound(s.List) {
				return true
			}
		}
	}
	return false
}

func (p *program) run(ctx context.Context, c Config, event string) (*plugin.Transformed, error) {
	vm := goja.New()
	vm.SetMaxCallStackSize(maxCalls)
	defer context.AfterFunc(ctx, func() { vm.Interrupt(context.Cause(ctx)) })()
	if _, err := vm.RunProgram(p.before); err != nil {
		return nil, err
	}
	var dropped error
	if err := vm.Set("drop", func(reason goja.FunctionCall) goja.Value {
		text := ""
		if a := reason.Argument(0); !goja.IsUndefined(a) {
			text = a.String()
		}
		dropped = plugin.Drop(text)
		vm.Interrupt(dropped) // whatever the script catches
		return goja.Undefined()
	}); err != nil {
		return nil, err
	}
	if _, err := vm.RunProgram(p.script); err != nil {
		return nil, failure(err, dropped)
	}
	wrapper, err := vm.RunProgram(p.call)
	if err != nil {
		return nil, failure(err, dropped)
	}
	transform, _ := goja.AssertFunction(wrapper)
	given, err := transform(goja.Undefined(), vm.ToValue(event))
	if err != nil {
		return nil, failure(err, dropped)
	}
	text := given.String()
	if text == "" {
		return nil, plugin.Drop("the function has returned nothing")
	}
	return script.Finish([]byte(text), c.Returns, c.ContentType)
}

// failure is what a script has thrown, with where it stands, or why it was stopped.
func failure(err, dropped error) error {
	if dropped != nil {
		return dropped
	}
	thrown, stopped, deep := new(goja.Exception), new(goja.InterruptedError), new(goja.StackOverflowError)
	switch {
	case errors.As(err, &deep):
		return fmt.Errorf("the script's functions call each other more than %d deep: stack overflow", maxCalls)
	case errors.As(err, &stopped):
		return errors.New("the script was stopped")
	case errors.As(err, &thrown):
		return errors.New(thrown.Error())
	}
	return err
}
