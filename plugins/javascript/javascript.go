// Package javascript is the transformer "javascript": a script whose function transform makes the body out of the event, run
// by goja. Each event has a runtime of its own, without files, network, timers or modules.
package javascript

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"

	"github.com/dlclark/regexp2/v2"
	"github.com/dop251/goja"
	"github.com/dop251/goja/ast"
	"github.com/dop251/goja/parser"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

const (
	// maxCalls is how deep functions may call each other.
	maxCalls = 1000
	// maxText is the most JSON that is written of a result; a body may be one text in it, with escapes.
	maxText = 2 * plugin.MaxTransformed
)

// Config is what a subscription says about its body.
type Config struct {
	Script      string `json:"script" required:"true" minLength:"1" maxLength:"16384" doc:"JavaScript with a function transform(event), whose event has id, source, type, subject, time, attributes, data_content_type, data and webhook_id. What it returns is the body; nothing, or drop(\"reason\"), sends nothing."`
	Returns     string `json:"returns" default:"body" enum:"body,request" doc:"body: the function returns the body. request: it returns {body, content_type, headers} or {drop: REASON}."`
	ContentType string `json:"content_type" default:"application/json" maxLength:"128" doc:"Media type of the body. A text is sent as it is when this is not JSON."`
}

// Kind is the transformer "javascript". It bounds the time of regular expressions that go back over what they have read, for
// the whole process: an interrupt does not reach them.
func Kind(guard *script.Guard) plugin.Kind {
	regexp2.DefaultMatchTimeout = script.Time
	latest := new(script.Latest[*program])
	return plugin.Transformer("javascript", func(c Config, _ plugin.Target) (plugin.TransformFunc, error) {
		p, err := latest.Build(c.Script, compile)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, e *plugin.Event) (made *plugin.Transformed, err error) {
			event, err := json.Marshal(script.Event(e, number))
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
			if err := latest.Check(c.Script, compile); err != nil {
				return []plugin.Problem{{Pointer: "/config/script", Code: "config.syntax", Summary: err.Error()}}
			}
			return script.CheckContentType(c.ContentType)
		}))
}

type program struct{ before, script, call *goja.Program }

// before has the constructors of functions of other kinds give way to that of Function.
const before = `for (const f of [function* () {}, async () => {}]) delete Object.getPrototypeOf(f).constructor;`

const call = `(event) => transform(event)`

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
		to         **goja.Program
		name, text string
		strict     bool
	}{{&p.before, "before", before, true}, {&p.script, "script", text, false}, {&p.call, "call", call, true}} {
		if *part.to, err = goja.Compile(part.name, part.text, part.strict); err != nil {
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

func (p *program) run(ctx context.Context, c Config, event string) (made *plugin.Transformed, err error) {
	vm := goja.New()
	vm.SetMaxCallStackSize(maxCalls)
	var dropped error
	defer func() {
		switch p := recover().(type) {
		case nil:
		case *goja.InterruptedError: // outside a call, such as in what makes a text of an error
			made, err = nil, failure(p, dropped)
		default:
			panic(p)
		}
	}()
	defer context.AfterFunc(ctx, func() { vm.Interrupt(context.Cause(ctx)) })()
	parse, _ := goja.AssertFunction(vm.Get("JSON").ToObject(vm).Get("parse"))
	input, err := parse(goja.Undefined(), vm.ToValue(event))
	if err != nil {
		return nil, failure(err, nil)
	}
	if _, err := vm.RunProgram(p.before); err != nil {
		return nil, err
	}
	b, err := bound(ctx, vm)
	if err != nil {
		return nil, err
	}
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
	given, err := transform(goja.Undefined(), input)
	if err != nil {
		return nil, failure(err, dropped)
	}
	if given, err = settled(given); err != nil {
		return nil, failure(err, dropped)
	}
	if goja.IsUndefined(given) || goja.IsNull(given) {
		return nil, plugin.Drop("the function has returned nothing")
	}
	text, err := b.write(maxText, given, goja.Undefined(), goja.Undefined())
	switch {
	case err != nil:
		return nil, failure(err, dropped)
	case goja.IsUndefined(text): // of a function or a symbol
		return nil, plugin.Drop("the function has returned nothing")
	}
	return script.Finish([]byte(text.String()), c.Returns, c.ContentType)
}

var promiseType = reflect.TypeFor[*goja.Promise]()

// settled is what has become of a promise, and all else as it is. Nothing else goes on that one could wait for.
func settled(given goja.Value) (goja.Value, error) {
	o, ok := given.(*goja.Object)
	if !ok || o.ExportType() != promiseType {
		return given, nil
	}
	switch promise := o.Export().(*goja.Promise); promise.State() {
	case goja.PromiseStateFulfilled:
		return promise.Result(), nil
	case goja.PromiseStateRejected:
		return nil, fmt.Errorf("the function's promise was rejected: %s", promise.Result())
	default:
		return nil, errors.New("the function has returned a promise that nothing will keep")
	}
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
		return errors.New(thrown.Value().String() + where(thrown.Stack()))
	}
	return err
}

// where is the place in the script at which something was thrown.
func where(stack []goja.StackFrame) string {
	for _, frame := range stack {
		if at := frame.Position(); at.Line > 0 && frame.SrcName() == "script" {
			return fmt.Sprintf(" at %s (line %d, column %d)", cmp.Or(frame.FuncName(), "the top"), at.Line, at.Column)
		}
	}
	return ""
}
