package subscription

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/common/types/traits"
	"cel.dev/cel-go/interpreter"
	"cel.dev/cel-go/parser"
)

// Verdict is what a subscription makes of an event, whatever its state.
type Verdict int

const (
	// Wanted: its globs cover the event's type and its condition holds.
	Wanted Verdict = iota
	// OtherType: none of its globs covers the event's type, or it is operational and about the subscription itself.
	OtherType
	// ConditionFalse: its condition does not hold.
	ConditionFalse
	// ConditionFails: its condition cannot be evaluated for the event.
	ConditionFails
)

// Opinion is a verdict and what it is due to.
type Opinion struct {
	Verdict Verdict
	// Text says why the event is not wanted, for people, in some 300 bytes; empty when it is.
	Text string
	// Seen are the parts of the event that the condition has read, in the order of the text, maxSeen at most.
	Seen []Seen
}

// Seen is a part of an event as a condition saw it. It may be of the payload.
type Seen struct {
	// Expression is as in the condition, for example event.data.amount.
	Expression string
	// Value is JSON, cut to maxSeenBytes, or says how much is in a list or an object.
	Value string
}

const (
	maxSeen      = 16
	maxSeenBytes = 128
	// namedGlobs is how many globs a text names.
	namedGlobs = 4
)

// Explain says what the subscription makes of the event and why. It costs more than Wants, since it compiles the condition
// and watches it, and counts no error. Any number of goroutines may ask, each with a Candidate of its own.
func (s *Subscription) Explain(c *Candidate) Opinion {
	if !s.covers(c.Type) {
		return Opinion{Verdict: OtherType, Text: s.otherType(c.Type)}
	}
	if s.about(c) {
		return Opinion{Verdict: OtherType, Text: "the event is operational and about the subscription itself, which is not told of it"}
	}
	if s.condition == nil {
		return Opinion{}
	}
	holds, seen, err := s.condition.watch(c.view())
	o := Opinion{Seen: seen}
	switch {
	case err != nil:
		o.Verdict, o.Text = ConditionFails, "its condition cannot be evaluated for the event: "+errorText(err)
	case !holds:
		o.Verdict, o.Text = ConditionFalse, "its condition does not hold"
	}
	return o
}

func (s *Subscription) otherType(eventType string) string {
	text := "it has no event_types"
	if len(s.globs) > 0 {
		text = "its event_types cover " + s.globsText() + ", not " + quoted(eventType)
	}
	if Operational(eventType) {
		text += ": operational events want a type that begins with " + OperationalPrefix
	}
	return text
}

func (s *Subscription) globsText() string {
	named := make([]string, 0, namedGlobs)
	for _, glob := range s.globs[:min(len(s.globs), namedGlobs)] {
		named = append(named, quoted(glob))
	}
	text := strings.Join(named, ", ")
	if more := len(s.globs) - namedGlobs; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// quoted is a type or glob, which may hold anything but control characters.
func quoted(text string) string { return `"` + clipped(oneLine(text), maxSeenBytes) + `"` }

// clipped is text in so many bytes at most.
func clipped(text string, most int) string {
	if len(text) <= most {
		return text
	}
	cut := most - len("…")
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return text[:cut] + "…"
}

// watch evaluates the condition and tells which parts of the event it read.
func (c *condition) watch(ev *eventView) (holds bool, seen []Seen, err error) {
	if err := c.compile(); err != nil { // says where, and refuses what is no condition
		return false, nil, err
	}
	checked, issues := c.env.env.Compile(c.text)
	if err := issues.Err(); err != nil {
		return false, nil, err
	}
	program, err := c.env.env.Program(checked, cel.CostLimit(costLimit), cel.EvalOptions(cel.OptTrackState))
	if err != nil {
		return false, nil, err
	}
	out, details, err := program.Eval(ev)
	if details != nil {
		seen = readings(checked.NativeRep(), details.State())
	}
	if err != nil {
		return false, seen, err
	}
	holds, ok := out.Value().(bool)
	if !ok {
		return false, seen, errNotBool
	}
	return holds, seen, nil
}

// readings are the longest paths from the event that have a value, each once.
func readings(text *ast.AST, state interpreter.EvalState) []Seen {
	var seen []Seen
	var visit func(e ast.NavigableExpr)
	visit = func(e ast.NavigableExpr) {
		if len(seen) == maxSeen {
			return
		}
		if fromEvent(e) {
			if value, ok := state.Value(e.ID()); ok && !types.IsUnknownOrError(value) {
				expression, err := parser.Unparse(e, text.SourceInfo())
				expression = clipped(oneLine(expression), maxSeenBytes)
				if err == nil && !slices.ContainsFunc(seen, func(s Seen) bool { return s.Expression == expression }) {
					seen = append(seen, Seen{expression, valueText(value)})
				}
				return
			}
		}
		for _, below := range e.Children() {
			visit(below)
		}
	}
	visit(ast.NavigateAST(text))
	return seen
}

// fromEvent reports whether e is a field of the event, or of what is in it, and not the event itself.
func fromEvent(e ast.Expr) bool {
	depth := 0
	for ; ; depth++ {
		switch e.Kind() {
		case ast.SelectKind:
			if e.AsSelect().IsTestOnly() {
				return false
			}
			e = e.AsSelect().Operand()
		case ast.CallKind:
			call := e.AsCall()
			if call.FunctionName() != "_[_]" || len(call.Args()) != 2 || call.Args()[1].Kind() != ast.LiteralKind {
				return false
			}
			e = call.Args()[0]
		case ast.IdentKind:
			return depth > 0 && e.AsIdent() == "event"
		default:
			return false
		}
	}
}

// valueText is a value as JSON. Of a list or an object it tells how much is in it, since they may be as large as a payload.
func valueText(v ref.Val) string {
	switch v := v.(type) {
	case traits.Mapper:
		return fmt.Sprintf("an object of %v", v.Size().Value())
	case traits.Lister:
		return fmt.Sprintf("a list of %v", v.Size().Value())
	case types.String:
		text, err := json.Marshal(clipped(oneLine(string(v)), maxSeenBytes))
		if err != nil {
			return ""
		}
		return string(text)
	case types.Timestamp:
		return v.UTC().Format(time.RFC3339Nano)
	case types.Null:
		return "null"
	}
	return clipped(oneLine(fmt.Sprint(v.Value())), maxSeenBytes)
}
