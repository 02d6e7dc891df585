package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/theory/jsonpath"
	"google.golang.org/protobuf/proto"
	"gopkg.in/yaml.v3"
)

// Values of --output. wide is a table of all columns; jsonpath goes with a template: jsonpath='{.name} {.state}'.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
	formatYAML  = "yaml"
	formatName  = "name"
	formatPath  = "jsonpath"
)

// plainFormats marks commands whose answers are no resources: a table or JSON is all there is.
const plainFormats = "grapnel/plain-formats"

// plain marks a command so.
func plain(cmd *cobra.Command) *cobra.Command {
	if cmd.Annotations == nil {
		cmd.Annotations = map[string]string{}
	}
	cmd.Annotations[plainFormats] = "true"
	return cmd
}

// formats are the formats that cmd can print.
func formats(cmd *cobra.Command) []string {
	if cmd.Annotations[plainFormats] != "" {
		return []string{formatTable, formatJSON}
	}
	return []string{formatTable, formatWide, formatJSON, formatYAML, formatName, formatPath + "="}
}

func completeFormats(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return formats(cmd), cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}

// readOutput checks --output and takes a template apart, before anything is done.
func (c *cli) readOutput(cmd *cobra.Command) error {
	flag := cmd.Flags().Lookup("output")
	if flag == nil {
		return nil
	}
	kind, text, hasText := strings.Cut(flag.Value.String(), "=")
	allowed := formats(cmd)
	switch {
	case slices.Contains(allowed, kind) && !hasText:
		return nil
	case kind != formatPath || !slices.Contains(allowed, formatPath+"="):
		return usagef("--output %s: must be %s%s", flag.Value, either(allowed), didYouMean(kind, allowed))
	case text == "":
		return usagef("--output jsonpath: wants a template, such as jsonpath='{.name}'")
	}
	var err error
	if c.template, err = parseTemplate(text); err != nil {
		return usagef("--output %s: %w", flag.Value, err)
	}
	c.output = formatPath
	return nil
}

// forPrograms reports whether the output is data and nothing else.
func (c *cli) forPrograms() bool { return c.output != formatTable && c.output != formatWide }

// encode returns m as --output asks for it, with the line's end; indent is for a single resource.
func (c *cli) encode(m proto.Message, indent bool) ([]byte, error) {
	text, err := marshal(m)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	switch c.output {
	case formatYAML:
		return toYAML(text)
	case formatName:
		if named, ok := m.(interface{ GetName() string }); ok {
			b.WriteString(clean(named.GetName()))
			break
		}
		return nil, nil // an answer that is no resource has no name
	case formatPath:
		line, err := c.template.apply(text)
		if err != nil {
			return nil, err
		}
		b.WriteString(strings.TrimSuffix(line, "\n"))
	default:
		if !indent {
			b.Write(text)
		} else if err := json.Indent(&b, text, "", "  "); err != nil {
			return nil, err
		}
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// toYAML turns JSON, which is YAML, into the form with blocks, in the same order.
func toYAML(text []byte) ([]byte, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(text, &document); err != nil {
		return nil, err
	}
	blocks(&document)
	var b bytes.Buffer
	encoder := yaml.NewEncoder(&b)
	encoder.SetIndent(2)
	if err := encoder.Encode(&document); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// blocks takes the braces and quotes of JSON away; what does not print stays quoted, so that it can be escaped.
func blocks(n *yaml.Node) {
	n.Style = 0
	if n.Kind == yaml.ScalarNode && clean(n.Value) != n.Value {
		n.Style = yaml.DoubleQuotedStyle
	}
	if len(n.Content) == 0 && n.Kind != yaml.ScalarNode {
		n.Style = yaml.FlowStyle // {} and []
	}
	for _, below := range n.Content {
		blocks(below)
	}
}

// pathTemplate is kubectl's: text, and paths in braces. A path alone needs none.
type pathTemplate []segment

// segment is literal text, or a path.
type segment struct {
	text string
	path *jsonpath.Path
}

func parseTemplate(text string) (pathTemplate, error) {
	if !strings.Contains(text, "{") {
		text = "{" + text + "}"
	}
	var t pathTemplate
	for text != "" {
		before, rest, found := strings.Cut(text, "{")
		if before != "" {
			t = append(t, segment{text: before})
		}
		if !found {
			break
		}
		inside, after, closed := cutBrace(rest)
		if !closed {
			return nil, fmt.Errorf("a { without its }")
		}
		s, err := parseSegment(strings.TrimSpace(inside))
		if err != nil {
			return nil, err
		}
		t, text = append(t, s), after
	}
	return t, nil
}

// cutBrace cuts at the brace that closes, not at one within quotes.
func cutBrace(text string) (inside, after string, closed bool) {
	var quote rune
	for i, r := range text {
		switch {
		case quote != 0:
			if r == quote {
				quote = 0
			}
		case r == '"' || r == '\'':
			quote = r
		case r == '}':
			return text[:i], text[i+1:], true
		}
	}
	return "", "", false
}

func parseSegment(text string) (segment, error) {
	if word, _, _ := strings.Cut(text, " "); word == "range" || word == "end" {
		return segment{}, fmt.Errorf("{%s}: there is no range; a path may select several values: {.versions[*].version}", text)
	}
	if strings.HasPrefix(text, `"`) || strings.HasPrefix(text, "'") {
		literal, err := strconv.Unquote(`"` + strings.Trim(text, `"'`) + `"`)
		if err != nil {
			return segment{}, fmt.Errorf("{%s} is not a text in quotes", text)
		}
		return segment{text: literal}, nil
	}
	switch {
	case strings.HasPrefix(text, "$"):
	case strings.HasPrefix(text, ".") || strings.HasPrefix(text, "["):
		text = "$" + text
	default:
		text = "$." + text
	}
	path, err := jsonpath.Parse(text)
	if err != nil {
		return segment{}, fmt.Errorf("{%s} is not a path such as {.state}: %s", text, strings.TrimPrefix(err.Error(), "jsonpath: "))
	}
	return segment{path: path}, nil
}

// apply fills the template from an object. Several values of a path stand apart by a blank; a path that selects nothing
// leaves nothing.
func (t pathTemplate) apply(object []byte) (string, error) {
	decoder := json.NewDecoder(bytes.NewReader(object))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return "", err
	}
	var b strings.Builder
	for _, s := range t {
		if s.path == nil {
			b.WriteString(s.text)
			continue
		}
		for i, selected := range s.path.Select(value) {
			if i > 0 {
				b.WriteByte(' ')
			}
			text, err := plainText(selected)
			if err != nil {
				return "", err
			}
			b.WriteString(cleanLines(text)) // a key in PEM has lines
		}
	}
	return b.String(), nil
}

// plainText is a text as it is, and anything else as JSON.
func plainText(value any) (string, error) {
	if text, ok := value.(string); ok {
		return text, nil
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(value)
	return strings.TrimSuffix(b.String(), "\n"), err
}
