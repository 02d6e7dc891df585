package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// column is one property of a resource as people read it.
type column[T any] struct {
	head  string
	value func(T) string
	// detail is shown for a single resource, and not in lists.
	detail bool
}

// show prints one resource: its properties one a line, or what --output asks for.
func show[T proto.Message](c *cli, m T, columns []column[T]) error {
	if c.forPrograms() {
		text, err := c.encode(m, true)
		if err != nil {
			return err
		}
		_, err = c.stdout.Write(text)
		return err
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	for _, col := range columns {
		if text := col.value(m); text != "" {
			fmt.Fprintf(w, "%s:\t%s\n", sentence(col.head), clean(text))
		}
	}
	return w.Flush()
}

// list prints many: a table, or what --output asks for, an object a line; in YAML, a document each. It stops at limit (0: never) and says so.
func list[T proto.Message](c *cli, items iter.Seq2[T, error], limit int, columns []column[T]) error {
	w := newTable(c, columns)
	n := 0
	for item, err := range items {
		if err != nil {
			w.flush()
			return err
		}
		if limit > 0 && n == limit {
			fmt.Fprintf(c.stderr, "only the first %d are shown; see --limit and --filter\n", limit)
			break
		}
		if err := w.row(item); err != nil {
			return err
		}
		n++
	}
	if n == 0 && !c.forPrograms() {
		fmt.Fprintln(c.stderr, "none found")
		return nil
	}
	return w.flush()
}

// table writes rows, a screen at a time so that long lists start to show early.
type table[T proto.Message] struct {
	c       *cli
	columns []column[T]
	w       *tabwriter.Writer
	rows    int
}

func newTable[T proto.Message](c *cli, columns []column[T]) *table[T] {
	return &table[T]{c: c, columns: columns, w: tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)}
}

func (t *table[T]) row(item T) error {
	t.rows++
	if t.c.forPrograms() {
		text, err := t.c.encode(item, false)
		if err != nil {
			return err
		}
		if t.c.output == formatYAML && t.rows > 1 {
			text = append([]byte("---\n"), text...)
		}
		_, err = t.c.stdout.Write(text)
		return err
	}
	if t.rows == 1 {
		t.line(func(col column[T]) string { return col.head })
	}
	t.line(func(col column[T]) string { return cmp.Or(clean(col.value(item)), "-") })
	if t.rows%500 == 0 {
		return t.w.Flush()
	}
	return nil
}

func (t *table[T]) line(cell func(column[T]) string) {
	var cells []string
	for _, col := range t.columns {
		if !col.detail || t.c.output == formatWide {
			cells = append(cells, cell(col))
		}
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table[T]) flush() error { return t.w.Flush() }

// marshal is protojson on one line. The library varies its blanks on purpose; Compact takes them out, so
// that scripts can compare.
func marshal(m proto.Message) ([]byte, error) {
	text, err := protojson.Marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Compact(&b, text); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// sentence turns a column's head into a property's name.
func sentence(head string) string {
	lower := strings.ToLower(head)
	return strings.ToUpper(lower[:1]) + lower[1:]
}

// lastSegment is the ID in a resource name.
func lastSegment(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

// enumText is an enum's value without its prefix, such as SUCCEEDED.
func enumText(value fmt.Stringer) string {
	text := value.String()
	for _, prefix := range []string{"STATE_", "OUTCOME_", "KIND_", "HEALTH_", "ROLE_", "TRIGGER_", "VERDICT_", "ENFORCEMENT_"} {
		text = strings.TrimPrefix(text, prefix)
	}
	if text == "UNSPECIFIED" {
		return ""
	}
	return text
}

func timeText(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().Local().Format("2006-01-02 15:04:05")
}

// age is how long ago t was, or how far ahead, as kubectl writes it.
func age(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	d := time.Since(t.AsTime())
	if d < 0 {
		return "in " + brief(-d)
	}
	return brief(d)
}

func brief(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func durationText(d *durationpb.Duration) string {
	if d == nil {
		return ""
	}
	return shortDuration(d.AsDuration())
}

// shortDuration is 5m instead of 5m0s.
func shortDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

func number[N int | int32 | int64](n N) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

// said prints a sentence about what was done, unless the output is for programs.
func (c *cli) said(format string, args ...any) {
	if c.forPrograms() {
		return
	}
	for i, arg := range args {
		if text, ok := arg.(string); ok {
			args[i] = clean(text)
		}
	}
	fmt.Fprintf(c.stdout, format+"\n", args...)
}

// warn prints the server's warnings on stderr.
func (c *cli) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(c.stderr, "warning: %s\n", clean(w))
	}
}
