package subscription

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/overloads"
	"cel.dev/cel-go/common/types"
)

// impossible says what in a condition can never be evaluated, whatever the event: attributes that no event can have and
// time zones that do not exist. It is empty when there is nothing.
func (e *conditions) impossible(text string) []string {
	compiled, issues := e.env.Compile(text)
	if issues.Err() != nil {
		return nil // told by compile
	}
	var out []string
	visit := func(expr ast.Expr) {
		if name, ok := attributeOf(expr); ok {
			if fault := attributeFault(name); fault != "" {
				out = append(out, fault)
			}
		}
		if zone, ok := zoneOf(expr); ok && !isZone(zone) {
			out = append(out, fmt.Sprintf("there is no time zone %q; want a name such as Europe/Berlin, or an offset such as +02:00", zone))
		}
	}
	ast.PreOrderVisit(compiled.NativeRep().Expr(), ast.NewExprVisitor(visit))
	return out
}

// attributeOf returns the name in event.attributes.NAME, event.attributes["NAME"] and "NAME" in event.attributes.
func attributeOf(expr ast.Expr) (string, bool) {
	switch expr.Kind() {
	case ast.SelectKind:
		if s := expr.AsSelect(); isAttributes(s.Operand()) {
			return s.FieldName(), true
		}
	case ast.CallKind:
		call := expr.AsCall()
		args := call.Args()
		switch {
		case len(args) != 2:
		case call.FunctionName() == operators.Index && isAttributes(args[0]):
			return literal(args[1])
		case call.FunctionName() == operators.In && isAttributes(args[1]):
			return literal(args[0])
		}
	}
	return "", false
}

func isAttributes(expr ast.Expr) bool {
	if expr.Kind() != ast.SelectKind {
		return false
	}
	s := expr.AsSelect()
	return s.FieldName() == "attributes" && s.Operand().Kind() == ast.IdentKind && s.Operand().AsIdent() == "event"
}

func literal(expr ast.Expr) (string, bool) {
	if expr.Kind() != ast.LiteralKind {
		return "", false
	}
	s, ok := expr.AsLiteral().(types.String)
	return string(s), ok
}

// attributeFault says why no event has an attribute of this name, as the proto of Event has it.
func attributeFault(name string) string {
	switch name {
	case "id", "source", "type", "subject", "time":
		return fmt.Sprintf("no event has the attribute %q; it is event.%s", name, name)
	case "data", "specversion", "datacontenttype", "dataschema":
		return fmt.Sprintf("no event has the attribute %q, which is a name of CloudEvents itself", name)
	}
	if name == "" || len(name) > 20 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return fmt.Sprintf("no event has the attribute %q: their names are 1 to 20 lower-case letters and digits", name)
	}
	return ""
}

// zoneOf returns the time zone given to a function of a timestamp.
func zoneOf(expr ast.Expr) (string, bool) {
	if expr.Kind() != ast.CallKind {
		return "", false
	}
	call := expr.AsCall()
	if !call.IsMemberFunction() || len(call.Args()) != 1 {
		return "", false
	}
	switch call.FunctionName() {
	case overloads.TimeGetFullYear, overloads.TimeGetMonth, overloads.TimeGetDate, overloads.TimeGetDayOfMonth,
		overloads.TimeGetDayOfWeek, overloads.TimeGetDayOfYear, overloads.TimeGetHours, overloads.TimeGetMinutes,
		overloads.TimeGetSeconds, overloads.TimeGetMilliseconds:
		return literal(call.Args()[0])
	}
	return "", false
}

// isZone reports whether CEL takes a zone: an offset when there is a colon in it, else a name.
func isZone(zone string) bool {
	hours, minutes, offset := strings.Cut(zone, ":")
	if !offset {
		_, err := time.LoadLocation(zone)
		return err == nil
	}
	h, err := strconv.Atoi(hours)
	m, err2 := strconv.Atoi(minutes)
	return err == nil && err2 == nil && h >= -14 && h <= 14 && m >= 0 && m < 60
}
