package subscription

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	_ "time/tzdata" // conditions name time zones, and small images have none

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
)

const (
	eventTypeName = "grapnel.Event"
	// costLimit bounds one evaluation: a few milliseconds at worst.
	costLimit = 50_000
)

var (
	errNotBool = errors.New("condition did not give a boolean")
	errNoData  = errors.New("the payload is not JSON")
)

// conditions compiles CEL conditions over the variable event.
type conditions struct {
	env *cel.Env
}

// newConditions returns the ones that all share: they do not change, and are not cheap to make.
var newConditions = sync.OnceValues(makeConditions)

func makeConditions() (*conditions, error) {
	registry, err := types.NewRegistry()
	if err != nil {
		return nil, fmt.Errorf("make CEL type registry: %w", err)
	}
	env, err := cel.NewEnv(
		cel.CustomTypeAdapter(registry),
		cel.CustomTypeProvider(&eventTypes{Registry: registry}),
		cel.Variable("event", cel.ObjectType(eventTypeName)),
		cel.CrossTypeNumericComparisons(true),
		cel.DefaultUTCTimeZone(true),
	)
	if err != nil {
		return nil, fmt.Errorf("make CEL environment: %w", err)
	}
	return &conditions{env: env}, nil
}

// condition is a CEL expression, compiled when it is first needed: stored ones are numerous and may never
// be asked.
type condition struct {
	text    string
	env     *conditions
	once    sync.Once
	program cel.Program
	err     error

	// errors counts the events for which it could not be evaluated; last is the latest error, give or take a second.
	errors atomic.Int64
	last   atomic.Pointer[ConditionError]
}

// ConditionError is a condition that could not be evaluated.
type ConditionError struct {
	// Text says why, in 200 bytes at most; it may show parts of the payload.
	Text string
	Time time.Time
}

// maxErrorText bounds the text of one error, whatever of the payload stands in it.
const maxErrorText = 200

func errorText(err error) string { return clipped(oneLine(err.Error()), maxErrorText) }

// failed counts an error and returns its text.
func (c *condition) failed(err error) string {
	c.errors.Add(1)
	text := errorText(err)
	now := time.Now()
	if last := c.last.Load(); last == nil || now.Sub(last.Time) > time.Second {
		c.last.Store(&ConditionError{text, now})
	}
	return text
}

// ConditionErrors tells for how many events the condition could not be evaluated, since it was set or the process
// started, and the latest error; nil when there was none.
func (s *Subscription) ConditionErrors() (int64, *ConditionError) {
	if s.condition == nil {
		return 0, nil
	}
	return s.condition.errors.Load(), s.condition.last.Load()
}

func (e *conditions) condition(text string) *condition {
	if text == "" {
		return nil
	}
	return &condition{text: text, env: e}
}

// compile returns an error that says where the text is wrong.
func (c *condition) compile() error {
	c.once.Do(func() { c.program, c.err = c.env.program(c.text) })
	return c.err
}

func (e *conditions) program(text string) (cel.Program, error) {
	ast, issues := e.env.Compile(text)
	if err := issues.Err(); err != nil {
		return nil, describe(issues.Errors())
	}
	if t := ast.OutputType(); !t.IsExactType(cel.BoolType) && !t.IsExactType(cel.DynType) {
		return nil, fmt.Errorf("gives %s; want a boolean, such as event.type == 'order.created'", t)
	}
	program, err := e.env.Program(ast, cel.CostLimit(costLimit), cel.EvalOptions(cel.OptOptimize))
	if err != nil {
		return nil, fmt.Errorf("cannot be run: %w", err)
	}
	return program, nil
}

// describe puts the compiler's complaints into one line; the first few say enough.
func describe(issues []*cel.Error) error {
	var texts []string
	for _, e := range issues[:min(len(issues), 3)] {
		texts = append(texts, fmt.Sprintf("line %d, column %d: %s",
			e.Location.Line(), e.Location.Column()+1, strings.ReplaceAll(e.Message, " (in container '')", "")))
	}
	return errors.New(strings.Join(texts, "; "))
}

// holds evaluates the condition. Every error means that the event does not match.
func (c *condition) holds(ev *eventView) (bool, error) {
	if err := c.compile(); err != nil {
		return false, err
	}
	out, _, err := c.program.Eval(ev)
	if err != nil {
		return false, err
	}
	result, ok := out.Value().(bool)
	if !ok {
		return false, errNotBool
	}
	return result, nil
}

// eventView is a Candidate as CEL sees it; it is also the activation that holds it. Not for use by several
// goroutines.
type eventView struct {
	*Candidate
	parsed  bool
	data    any
	dataErr error
}

// ResolveName finds the one variable.
func (v *eventView) ResolveName(name string) (any, bool) {
	return v, name == "event"
}

// Parent is nil: there is no outer scope.
func (v *eventView) Parent() cel.Activation { return nil }

// payload parses the payload when a condition first reads it.
func (v *eventView) payload() (any, error) {
	if !v.parsed {
		v.parsed = true
		switch {
		case !isJSON(v.ContentType):
			v.dataErr = fmt.Errorf("%w: its content type is %q", errNoData, v.ContentType)
		default:
			var err error
			if v.data, err = readJSON(v.Data); err != nil {
				v.data, v.dataErr = nil, fmt.Errorf("%w: %w", errNoData, err)
			}
		}
	}
	return v.data, v.dataErr
}

// readJSON reads JSON for CEL. A number without fraction and exponent is an int, or an uint when it is too large for
// one, so that identifiers of 64 bits stay what they are; all others are doubles.
func readJSON(data []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the value")
	}
	return numbers(v)
}

// numbers replaces the numbers in v, in place where it can.
func numbers(v any) (_ any, err error) {
	switch v := v.(type) {
	case json.Number:
		if n, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return n, nil
		}
		if n, err := strconv.ParseUint(v.String(), 10, 64); err == nil {
			return n, nil
		}
		return v.Float64()
	case []any:
		for i := range v {
			if v[i], err = numbers(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			if v[k], err = numbers(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	return media == "application/json" || media == "text/json" || strings.HasSuffix(media, "+json")
}

// eventTypes tells CEL the fields of the variable event, so that a misspelt one is a compile error.
type eventTypes struct {
	*types.Registry
}

// FindStructType knows the event beside CEL's own types.
func (t *eventTypes) FindStructType(name string) (*types.Type, bool) {
	if name == eventTypeName {
		return types.NewTypeTypeWithParam(types.NewObjectType(eventTypeName)), true
	}
	return t.Registry.FindStructType(name)
}

// FindStructFieldNames lists the event's fields.
func (t *eventTypes) FindStructFieldNames(name string) ([]string, bool) {
	if name == eventTypeName {
		return []string{"id", "source", "type", "subject", "time", "attributes", "data_content_type", "data"}, true
	}
	return t.Registry.FindStructFieldNames(name)
}

// FindStructFieldType says how one field is read.
func (t *eventTypes) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if name != eventTypeName {
		return t.Registry.FindStructFieldType(name, field)
	}
	text := func(get func(*eventView) string) *types.FieldType {
		return eventField(types.StringType, func(v *eventView) (any, error) { return get(v), nil },
			func(v *eventView) bool { return get(v) != "" })
	}
	switch field {
	case "id":
		return text(func(v *eventView) string { return v.ID }), true
	case "source":
		return text(func(v *eventView) string { return v.Source }), true
	case "type":
		return text(func(v *eventView) string { return v.Type }), true
	case "subject":
		return text(func(v *eventView) string { return v.Subject }), true
	case "data_content_type":
		return text(func(v *eventView) string { return v.ContentType }), true
	case "time":
		return eventField(types.TimestampType, func(v *eventView) (any, error) { return v.Time, nil },
			func(v *eventView) bool { return v.Time != time.Time{} }), true
	case "attributes":
		return eventField(types.NewMapType(types.StringType, types.StringType),
			func(v *eventView) (any, error) { return v.Attributes, nil },
			func(v *eventView) bool { return len(v.Attributes) > 0 }), true
	case "data":
		return eventField(types.DynType, (*eventView).payload,
			func(v *eventView) bool { _, err := v.payload(); return err == nil }), true
	}
	return nil, false
}

func eventField(t *types.Type, get func(*eventView) (any, error), set func(*eventView) bool) *types.FieldType {
	return &types.FieldType{
		Type: t,
		IsSet: func(target any) bool {
			v, ok := target.(*eventView)
			return ok && set(v)
		},
		GetFrom: func(target any) (any, error) {
			v, ok := target.(*eventView)
			if !ok {
				return nil, fmt.Errorf("%T is not an event", target)
			}
			return get(v)
		},
	}
}

// Condition compiles a condition apart from subscriptions, and returns what holds it against events. One for which it cannot
// be evaluated does not match. The error says where the text is wrong.
func (r *Registry) Condition(text string) (func(*Candidate) bool, error) {
	c := r.conditions.condition(text)
	if err := c.compile(); err != nil {
		return nil, err
	}
	return func(e *Candidate) bool {
		holds, err := c.holds(e.view())
		return holds && err == nil
	}, nil
}
