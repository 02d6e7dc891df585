package javascript

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"github.com/dop251/goja"
)

const (
	// maxItems is the most elements of what a function of the language goes through in one step.
	maxItems = 1 << 20
	// maxChars is the most that one makes of texts in one step.
	maxChars = 16 << 20
	// maxDeep is how deep JSON may be nested that a script reads.
	maxDeep = 10_000
)

// bounds take from a runtime what could take any amount of time or memory in one step, which nothing can stop half-way, or
// bound it. Scripts cannot get behind them: what they see is all there is, and what is looked at is what is gone on with. Not
// all of the language can be had so; for the rest there is script.Guard.
type bounds struct {
	vm  *goja.Runtime
	ctx context.Context //nolint:containedctx // the evaluation's
	// stringify is JSON.stringify, propertyOf Object.getOwnPropertyDescriptor.
	stringify, propertyOf goja.Callable
}

var proxyType = reflect.TypeFor[goja.Proxy]()

// absent are globals that scripts do without.
var absent = []string{
	"ArrayBuffer", "SharedArrayBuffer", "DataView", "Int8Array", "Uint8Array", "Uint8ClampedArray", "Int16Array", "Uint16Array",
	"Int32Array", "Uint32Array", "Float32Array", "Float64Array", "BigInt64Array", "BigUint64Array", "eval",
}

// walking are methods of arrays that go through all of one, whether it has that many elements or only says so.
var walking = []string{
	"concat", "copyWithin", "every", "fill", "filter", "find", "findIndex", "findLast", "findLastIndex", "flat", "flatMap", "forEach", "includes", "indexOf",
	"join", "lastIndexOf", "map", "reduce", "reduceRight", "reverse", "shift", "slice", "some", "sort", "splice", "toLocaleString", "toReversed",
	"toSorted", "toSpliced", "toString", "unshift", "with",
}

func bound(ctx context.Context, vm *goja.Runtime) (*bounds, error) {
	b := &bounds{vm: vm, ctx: ctx}
	global := vm.GlobalObject()
	of := func(o goja.Value, name string) *goja.Object { return o.ToObject(vm).Get(name).ToObject(vm) }
	b.propertyOf, _ = goja.AssertFunction(of(global.Get("Object"), "getOwnPropertyDescriptor"))
	b.stringify, _ = goja.AssertFunction(of(global.Get("JSON"), "stringify"))
	function := of(global.Get("Function"), "prototype")
	strings, arrays := of(global.Get("String"), "prototype"), of(global.Get("Array"), "prototype")
	b.wrap(strings, "repeat", b.repeat)
	b.wrap(strings, "padStart", b.pad)
	b.wrap(strings, "padEnd", b.pad)
	b.wrap(strings, "concat", b.concat)
	b.wrap(strings, "replaceAll", b.replace)
	b.wrap(strings, "replace", b.replace)
	for _, name := range walking {
		b.wrap(arrays, name, b.walk)
	}
	b.wrap(of(global, "Array"), "from", b.list(0))
	b.wrap(function, "apply", b.list(1))
	b.wrap(of(global, "Reflect"), "apply", b.list(2))
	b.wrap(of(global, "Reflect"), "construct", b.list(1))
	b.wrap(of(global, "JSON"), "parse", b.parse)
	if err := of(global, "JSON").Set("stringify", b.json); err != nil {
		return nil, err
	}
	shell := vm.ToValue(func(goja.ConstructorCall) *goja.Object { panic(vm.NewTypeError("there is no code but the script's")) }).ToObject(vm)
	if err := errors.Join(shell.DefineDataProperty("prototype", function, goja.FLAG_FALSE, goja.FLAG_FALSE, goja.FLAG_FALSE),
		function.Set("constructor", shell), global.Set("Function", shell)); err != nil {
		return nil, err
	}
	for _, name := range absent {
		if err := global.Delete(name); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// wrap has look see the calls of a method before it does, and change them.
func (b *bounds) wrap(of *goja.Object, name string, look func(name string, call *goja.FunctionCall)) {
	f, ok := goja.AssertFunction(of.Get(name))
	if !ok {
		return
	}
	_ = of.DefineDataProperty(name, b.vm.ToValue(func(call goja.FunctionCall) goja.Value {
		look(name, &call)
		b.goOn()
		result, err := f(call.This, call.Arguments...)
		if err != nil {
			panic(b.thrown(err))
		}
		return result
	}), goja.FLAG_TRUE, goja.FLAG_TRUE, goja.FLAG_FALSE)
}

// goOn ends the script once its time is over, also where functions of the language call each other only.
func (b *bounds) goOn() {
	if b.ctx.Err() != nil {
		panic(&goja.InterruptedError{})
	}
}

// thrown is what goes on through a script of an error of a call.
func (b *bounds) thrown(err error) any {
	if exception, ok := err.(*goja.Exception); ok { //nolint:errorlint // goja gives no other
		return exception.Value()
	}
	return err
}

func (b *bounds) tooMuch(name string, most int) {
	panic(b.vm.NewTypeError("%s: more than %d", name, most))
}

// text makes a text of this, once and for all.
func (b *bounds) text(v *goja.Value) int {
	if goja.IsUndefined(*v) || goja.IsNull(*v) {
		return 0
	}
	*v = (*v).ToString()
	if s, ok := (*v).(goja.String); ok {
		return s.Length()
	}
	return 0
}

func (b *bounds) number(call *goja.FunctionCall, at int) int64 {
	if len(call.Arguments) <= at {
		return 0
	}
	n := call.Arguments[at].ToInteger()
	call.Arguments[at] = b.vm.ToValue(n)
	return n
}

func (b *bounds) repeat(name string, call *goja.FunctionCall) {
	size := int64(b.text(&call.This))
	if n := b.number(call, 0); n > 0 && size > 0 && n > maxChars/size {
		b.tooMuch(name, maxChars)
	}
}

func (b *bounds) pad(name string, call *goja.FunctionCall) {
	if b.number(call, 0) > maxChars {
		b.tooMuch(name, maxChars)
	}
}

func (b *bounds) concat(name string, call *goja.FunctionCall) {
	size := b.text(&call.This)
	for i := range call.Arguments {
		if size += b.text(&call.Arguments[i]); size > maxChars {
			b.tooMuch(name, maxChars)
		}
	}
}

// replace bounds what comes of a text in place of another.
func (b *bounds) replace(name string, call *goja.FunctionCall) {
	if len(call.Arguments) < 2 {
		return
	}
	if _, ok := goja.AssertFunction(call.Arguments[1]); ok {
		return
	}
	size, by := b.text(&call.This), b.text(&call.Arguments[1])
	times := size + 1
	if _, pattern := call.Arguments[0].(*goja.Object); !pattern {
		if b.text(&call.Arguments[0]); name == "replace" {
			times = 1
		} else {
			times = strings.Count(call.This.String(), call.Arguments[0].String())
		}
	}
	if times > 0 && by > (maxChars-min(size, maxChars))/times {
		b.tooMuch(name, maxChars)
	}
}

func (b *bounds) walk(name string, call *goja.FunctionCall) {
	n := b.length(name, call.This)
	if name != "join" || len(call.Arguments) == 0 || goja.IsUndefined(call.Arguments[0]) {
		return
	}
	if separator := b.text(&call.Arguments[0]); n > 0 && int64(separator) > maxChars/n {
		b.tooMuch(name, maxChars)
	}
}

// list is for functions that take a list as an argument.
func (b *bounds) list(at int) func(string, *goja.FunctionCall) {
	return func(name string, call *goja.FunctionCall) {
		if len(call.Arguments) > at {
			b.length(name, call.Arguments[at])
		}
	}
}

// length is that of something like an array: not of one whose length may be another the next time.
func (b *bounds) length(name string, of goja.Value) int64 {
	o, ok := of.(*goja.Object)
	if !ok {
		return 0 // a text, at most
	}
	for at := o; at != nil; at = at.Prototype() {
		if at.ExportType() == proxyType {
			panic(b.vm.NewTypeError("%s: it takes no proxy", name))
		}
		property, err := b.propertyOf(goja.Undefined(), at, b.vm.ToValue("length"))
		if err != nil {
			panic(b.thrown(err))
		}
		described, ok := property.(*goja.Object)
		if !ok {
			continue
		}
		value := described.Get("value")
		if value == nil {
			panic(b.vm.NewTypeError("%s: it takes no object whose length is calculated", name))
		}
		if _, object := value.(*goja.Object); object {
			panic(b.vm.NewTypeError("%s: the length is no number", name))
		}
		n := value.ToInteger()
		if n > maxItems {
			b.tooMuch(name, maxItems)
		}
		return n
	}
	return 0
}

// parse bounds how deep what is read may be.
func (b *bounds) parse(name string, call *goja.FunctionCall) {
	if len(call.Arguments) == 0 {
		return
	}
	if b.text(&call.Arguments[0]) > maxChars {
		b.tooMuch("JSON."+name, maxChars)
	}
	deep, text := 0, false
	in := call.Arguments[0].String()
	for i := 0; i < len(in); i++ {
		switch c := in[i]; {
		case text && c == '\\':
			i++
		case c == '"':
			text = !text
		case text:
		case c == '[' || c == '{':
			if deep++; deep > maxDeep {
				panic(b.vm.NewTypeError("JSON.parse: nested more than %d deep", maxDeep))
			}
		case c == ']' || c == '}':
			deep--
		}
	}
}

// json is JSON.stringify.
func (b *bounds) json(call goja.FunctionCall) goja.Value {
	text, err := b.write(maxChars, call.Argument(0), call.Argument(1), call.Argument(2))
	if err != nil {
		panic(b.thrown(err))
	}
	return text
}

// write is JSON.stringify, whose every value is counted: one that is there many times is written as often.
func (b *bounds) write(most int, value, replacer, space goja.Value) (goja.Value, error) {
	change, _ := goja.AssertFunction(replacer)
	var only []string
	list := false
	if o, ok := replacer.(*goja.Object); ok && change == nil && o.ClassName() == "Array" {
		list = true
		for i := range b.length("JSON.stringify", o) {
			only = append(only, o.Get(fmt.Sprint(i)).String())
		}
	}
	left := most
	count := func(call goja.FunctionCall) goja.Value {
		key, v := call.Argument(0), call.Argument(1)
		if change != nil {
			var err error
			if v, err = change(call.This, key, v); err != nil {
				panic(b.thrown(err))
			}
		}
		left -= 2
		if s, ok := key.(goja.String); ok {
			left -= s.Length()
		}
		switch v := v.(type) {
		case goja.String:
			left -= v.Length()
		case *goja.Object:
			if !list || v.ClassName() == "Array" {
				break
			}
			some := b.vm.NewObject()
			for _, name := range only {
				if value := v.Get(name); value != nil && !goja.IsUndefined(value) {
					_ = some.Set(name, value)
				}
			}
			return some
		}
		if b.goOn(); left < 0 {
			panic(b.vm.NewTypeError("JSON.stringify: more than %d", most))
		}
		return v
	}
	return b.stringify(goja.Undefined(), value, b.vm.ToValue(count), space)
}

// number writes numbers as scripts read them: what is larger than any is the largest.
func number(n json.Number) any {
	if _, err := n.Float64(); err != nil {
		if strings.HasPrefix(n.String(), "-") {
			return json.Number("-1.7976931348623157e308")
		}
		return json.Number("1.7976931348623157e308")
	}
	return n
}
