package templateplugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"text/template"
	"text/template/parse"
	"time"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Functions that templates call without having said so: tick before whatever takes time, so that it ends in time, enter and
// leave at the ends of each template, so that they do not call each other without end.
const (
	tick  = "tick__"
	enter = "enter__"
	leave = "leave__"
)

// maxCalls is how deep templates may call each other.
const maxCalls = 100

// maxPart is the most that a function makes.
const maxPart = 8 << 20 // the largest payload, and escapes

var errPart = fmt.Errorf("a function has made more than %d bytes", maxPart)

// read reads a template and has it tick.
func read(text string) (*template.Template, error) {
	none := &execution{ctx: context.Background()}
	t, err := template.New("template").Funcs(none.functions()).Parse(text)
	if err != nil {
		return nil, err
	}
	calls, err := template.New("calls").Funcs(none.functions()).Parse("{{" + tick + "}}{{" + enter + "}}{{" + leave + "}}")
	if err != nil {
		return nil, err
	}
	node := calls.Root.Nodes
	for _, part := range t.Templates() {
		if part.Tree != nil {
			haveTick(part.Root, node[0])
			part.Root.Nodes = append(append([]parse.Node{node[1]}, part.Root.Nodes...), node[2])
		}
	}
	return t, nil
}

// haveTick puts the node before all that is more than text, and at the beginning of each loop's body.
func haveTick(list *parse.ListNode, node parse.Node) {
	if list == nil {
		return
	}
	var nodes []parse.Node
	for _, n := range list.Nodes {
		if n.Type() != parse.NodeText {
			nodes = append(nodes, node)
		}
		nodes = append(nodes, n)
		switch n := n.(type) {
		case *parse.RangeNode:
			haveTick(n.List, node)
			haveTick(n.ElseList, node)
			n.List.Nodes = append([]parse.Node{node}, n.List.Nodes...)
		case *parse.IfNode:
			haveTick(n.List, node)
			haveTick(n.ElseList, node)
		case *parse.WithNode:
			haveTick(n.List, node)
			haveTick(n.ElseList, node)
		}
	}
	list.Nodes = nodes
}

// limited takes as much as a body may hold.
type limited struct{ bytes.Buffer }

func (l *limited) Write(b []byte) (int, error) {
	if n := l.Len() + len(b); n > plugin.MaxTransformed {
		return 0, script.TooLarge(n)
	}
	return l.Buffer.Write(b)
}

func execute(ctx context.Context, t *template.Template, dot any) ([]byte, error) {
	own, err := t.Clone() // functions are a template's, and this one is an execution's
	if err != nil {
		return nil, err
	}
	own.Funcs((&execution{ctx: ctx}).functions())
	var out limited
	if err := own.Execute(&out, dot); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// execution is one of a template.
type execution struct {
	ctx   context.Context //nolint:containedctx // the execution's
	depth int             // of the calls of templates
}

func (x *execution) functions() template.FuncMap {
	return template.FuncMap{
		tick: func() (string, error) { return "", x.ctx.Err() },
		enter: func() (string, error) {
			if x.depth++; x.depth > maxCalls {
				return "", fmt.Errorf("templates call each other more than %d deep", maxCalls)
			}
			return "", x.ctx.Err()
		},
		leave:  func() string { x.depth--; return "" },
		"drop": func(reason string) (string, error) { return "", plugin.Drop(reason) },
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return x.part(string(b), err)
		},
		"pretty":   func(v any) (string, error) { return x.part(pretty(v)) },
		"text":     func(v any) (string, error) { return x.part(textOf(v), nil) },
		"default":  orElse,
		"upper":    func(v any) (string, error) { return x.part(strings.ToUpper(textOf(v)), nil) },
		"lower":    func(v any) (string, error) { return x.part(strings.ToLower(textOf(v)), nil) },
		"trim":     func(v any) (string, error) { return x.part(strings.TrimSpace(textOf(v)), nil) },
		"truncate": func(most int, v any) (string, error) { return x.part(truncate(most, v)) },
		"join":     func(separator string, v any) (string, error) { return x.part(join(separator, v)) },
		"replace":  func(from, to string, v any) (string, error) { return x.part(replace(from, to, v)) },
		"date":     func(layout string, v any) (string, error) { return x.part(date(layout, v)) },
		// Those of the library, bounded.
		"printf": func(format string, args ...any) (string, error) {
			if err := x.room(widths(format), format, args); err != nil {
				return "", err
			}
			for i, a := range args {
				if n, ok := a.(json.Number); ok {
					args[i] = figure(n)
				}
			}
			return x.part(fmt.Sprintf(format, args...), nil)
		},
		"print":    x.of(fmt.Sprint),
		"println":  x.of(fmt.Sprintln),
		"html":     x.of(template.HTMLEscaper),
		"js":       x.of(template.JSEscaper),
		"urlquery": x.of(template.URLQueryEscaper),
	}
}

// figure is a number of the payload in printf: a number where the verb wants one, else its text.
type figure json.Number

func (n figure) Format(f fmt.State, verb rune) {
	var v any = string(n)
	switch verb {
	case 'd', 'b', 'o', 'x', 'X':
		if whole, ok := new(big.Int).SetString(string(n), 10); ok {
			v = whole
		}
	case 'e', 'E', 'f', 'F', 'g', 'G':
		if x, err := json.Number(n).Float64(); err == nil {
			v = x
		}
	default:
	}
	fmt.Fprintf(f, fmt.FormatString(f, verb), v)
}

// part is what a function has made, where that may go on.
func (x *execution) part(s string, err error) (string, error) {
	switch {
	case err != nil:
		return "", err
	case len(s) > maxPart:
		return "", errPart
	}
	return s, x.ctx.Err()
}

// of is f for as much as there is room for.
func (x *execution) of(f func(...any) string) func(...any) (string, error) {
	return func(args ...any) (string, error) {
		if err := x.room(0, "", args); err != nil {
			return "", err
		}
		return x.part(f(args...), nil)
	}
}

// room looks at what would be made of arguments, in a format that may name each of them several times, before it is.
func (x *execution) room(size int, format string, args []any) error {
	times := 1
	if strings.Contains(format, "[") {
		times = strings.Count(format, "%")
	}
	for _, a := range args {
		switch a := a.(type) {
		case string:
			size += len(a) * times
		case int, bool, nil, json.Number:
			size += 20 * times
		default:
			size += len(fmt.Sprint(a)) * times
		}
		if size > maxPart {
			return errPart
		}
		if err := x.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// widths is how wide a format says that its parts are at least, in sum.
func widths(format string) (sum int) {
	n := 0
	for _, c := range []byte(format) {
		if c < '0' || c > '9' {
			sum, n = sum+n, 0
		} else if n < maxPart {
			n = n*10 + int(c-'0')
		}
	}
	return sum
}

// pretty is JSON for people, as json.MarshalIndent writes it but for signs of HTML, and in one line where that has blanks
// before all: what the lines begin with grows with the square of how deep they are.
func pretty(v any) (string, error) {
	var compact bytes.Buffer
	e := json.NewEncoder(&compact)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return "", err
	}
	var out bytes.Buffer
	deep, text := 0, false
	line := func() {
		out.WriteByte('\n')
		for range deep {
			out.WriteString("  ")
		}
	}
	in := bytes.TrimSpace(compact.Bytes())
	for i := 0; i < len(in); i++ {
		if out.Len() > min(16*len(in)+1<<10, maxPart-len(in)) {
			return string(in), nil
		}
		c := in[i]
		switch {
		case text && c == '\\':
			out.Write(in[i : i+2])
			i++
			continue
		case c == '"':
			text = !text
		case text:
		case (c == '[' || c == '{') && (in[i+1] == ']' || in[i+1] == '}'):
			out.Write(in[i : i+2])
			i++
			continue
		case c == ']' || c == '}':
			deep--
			line()
		}
		out.WriteByte(c)
		switch {
		case text:
		case c == ':':
			out.WriteByte(' ')
		case c == '[' || c == '{':
			deep++
			line()
		case c == ',':
			line()
		}
	}
	return out.String(), nil
}

// textOf is a text as it is, nothing as nothing, and all else as JSON.
func textOf(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}

// orElse is v, or what is given where v is absent or empty.
func orElse(given, v any) any {
	if v == nil || v == "" {
		return given
	}
	return v
}

// truncate is the first so many characters, the last of which is … where there were more.
func truncate(most int, v any) (string, error) {
	s := textOf(v)
	if most < 1 {
		return "", errors.New("truncate: want at least one character")
	}
	last, n := 0, 0 // where the last of as many begins
	for i := range s {
		if n++; n == most {
			last = i
		}
		if n > most {
			return s[:last] + "…", nil
		}
	}
	return s, nil
}

func join(separator string, v any) (string, error) {
	list, ok := v.([]any)
	if !ok {
		return "", fmt.Errorf("join: %T is no list", v)
	}
	texts := make([]string, len(list))
	size := len(separator) * len(list)
	for i, e := range list {
		texts[i] = textOf(e)
		if size += len(texts[i]); size > maxPart {
			return "", errPart
		}
	}
	return strings.Join(texts, separator), nil
}

func replace(from, to string, v any) (string, error) {
	s := textOf(v)
	if len(s)+strings.Count(s, from)*(len(to)-len(from)) > maxPart {
		return "", errPart
	}
	return strings.ReplaceAll(s, from, to), nil
}

// date writes a time in a layout of Go, such as 2006-01-02.
func date(layout string, v any) (string, error) {
	at, err := time.Parse(time.RFC3339Nano, textOf(v))
	if err != nil {
		return "", fmt.Errorf("date: %w", err)
	}
	return at.Format(layout), nil
}
