package templateplugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/template"
	"text/template/parse"
	"time"
	"unicode/utf8"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// tick is a function that is called at the beginning of each template and each turn of a loop, so that both end in time.
const tick = "tick__"

// maxPart is the most that a function makes.
const maxPart = 8 << 20 // the largest payload, and escapes

var errPart = fmt.Errorf("a function has made more than %d bytes", maxPart)

// read reads a template and has it tick.
func read(text string) (*template.Template, error) {
	t, err := template.New("template").Funcs(functions()).Parse(text)
	if err != nil {
		return nil, err
	}
	ticking, err := template.New("tick").Funcs(functions()).Parse("{{" + tick + "}}")
	if err != nil {
		return nil, err
	}
	node := ticking.Root.Nodes[0]
	for _, part := range t.Templates() {
		if part.Tree != nil {
			haveTick(part.Root, node)
			part.Root.Nodes = append([]parse.Node{node}, part.Root.Nodes...)
		}
	}
	return t, nil
}

// haveTick puts the node at the beginning of each loop's body.
func haveTick(list *parse.ListNode, node parse.Node) {
	if list == nil {
		return
	}
	for _, n := range list.Nodes {
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
	own.Funcs(template.FuncMap{tick: func() (string, error) { return "", ctx.Err() }})
	var out limited
	if err := own.Execute(&out, dot); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func functions() template.FuncMap {
	return template.FuncMap{
		tick:   func() string { return "" },
		"drop": func(reason string) (string, error) { return "", plugin.Drop(reason) },
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return part(string(b), err)
		},
		"pretty": func(v any) (string, error) {
			var out bytes.Buffer
			e := json.NewEncoder(&out)
			e.SetEscapeHTML(false) // for people
			e.SetIndent("", "  ")
			err := e.Encode(v)
			return part(strings.TrimSuffix(out.String(), "\n"), err)
		},
		"text":     func(v any) (string, error) { return part(textOf(v), nil) },
		"default":  orElse,
		"upper":    func(v any) (string, error) { return part(strings.ToUpper(textOf(v)), nil) },
		"lower":    func(v any) (string, error) { return part(strings.ToLower(textOf(v)), nil) },
		"trim":     func(v any) string { return strings.TrimSpace(textOf(v)) },
		"truncate": truncate,
		"join":     join,
		"replace":  replace,
		"date":     date,
		// Those of the library, bounded.
		"printf":   func(format string, args ...any) (string, error) { return part(fmt.Sprintf(format, args...), nil) },
		"print":    func(args ...any) (string, error) { return part(fmt.Sprint(args...), nil) },
		"println":  func(args ...any) (string, error) { return part(fmt.Sprintln(args...), nil) },
		"html":     func(args ...any) (string, error) { return part(template.HTMLEscaper(args...), nil) },
		"js":       func(args ...any) (string, error) { return part(template.JSEscaper(args...), nil) },
		"urlquery": func(args ...any) (string, error) { return part(template.URLQueryEscaper(args...), nil) },
	}
}

func part(s string, err error) (string, error) {
	if err == nil && len(s) > maxPart {
		err = errPart
	}
	return s, err
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
	if utf8.RuneCountInString(s) <= most {
		return s, nil
	}
	return string([]rune(s)[:most-1]) + "…", nil
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
	return part(at.Format(layout), nil)
}
