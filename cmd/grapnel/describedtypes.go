package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// description is what an OpenAPI or AsyncAPI file says of the events that it describes.
type description struct {
	// version is the file's, fit for a name; 1 where it has none.
	version string
	// all yields each webhook or message, made as it is asked for and kept by nobody else: schemas that refer to the same are
	// copies of it. Where it cannot be taken the error says why, and of the type only where is set.
	all iter.Seq2[describedType, error]
}

// empty reports whether there is no webhook and no message.
func (d description) empty() bool {
	for range d.all {
		return false
	}
	return true
}

// describedType is one webhook or message.
type describedType struct {
	id, where   string
	description string
	deprecated  bool
	// schema and example are JSON, or empty.
	schema, example string
	notes           []string
}

// object is a JSON object of a file.
type object = map[string]any

// describedTypes reads a file.
func describedTypes(text []byte) (description, error) {
	tree, err := treeOf(text)
	if err != nil {
		return description{}, err
	}
	root, ok := tree.(object)
	if !ok {
		return description{}, errors.New("it is no object; want OpenAPI or AsyncAPI, in JSON or YAML")
	}
	f, out := apiFile{root: root}, description{version: "1"}
	if info, ok := root["info"].(object); ok {
		if v := scalar(info["version"]); regexp.MustCompile(`^[A-Za-z0-9._~-]{1,64}$`).MatchString(v) {
			out.version = v
		}
	}
	openAPI, asyncAPI := scalar(root["openapi"]), scalar(root["asyncapi"])
	switch {
	case strings.HasPrefix(openAPI, "3.0"):
		f.old = true
		out.all = f.each(func(r *reading) { r.webhooks("x-webhooks") })
	case strings.HasPrefix(openAPI, "3."):
		out.all = f.each(func(r *reading) {
			r.webhooks("webhooks")
			r.webhooks("x-webhooks")
		})
	case strings.HasPrefix(asyncAPI, "2."), strings.HasPrefix(asyncAPI, "3."):
		f.draft7 = true
		out.all = f.each((*reading).messages)
	case openAPI != "" || asyncAPI != "":
		return description{}, fmt.Errorf("it is of version %q; want OpenAPI 3.0 or 3.1, or AsyncAPI 2 or 3", clipText(openAPI+asyncAPI, 100))
	default:
		return description{}, errors.New("it has neither openapi nor asyncapi; want OpenAPI 3.0 or 3.1, or AsyncAPI 2 or 3")
	}
	return out, nil
}

// treeOf reads JSON or YAML. Numbers of JSON stay as they are written.
func treeOf(text []byte) (any, error) {
	if trimmed := bytes.TrimSpace(text); len(trimmed) > 0 && trimmed[0] == '{' {
		d := json.NewDecoder(bytes.NewReader(text))
		d.UseNumber()
		var tree any
		if err := d.Decode(&tree); err == nil {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				return tree, nil
			}
		}
	}
	tree, err := oneDocument(text)
	if err != nil {
		return nil, err
	}
	// YAML has keys that are no texts, and numbers that JSON has not.
	plain, err := json.Marshal(tree)
	if err != nil {
		return nil, fmt.Errorf("it has what JSON has not: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(plain))
	d.UseNumber()
	err = d.Decode(&tree)
	return tree, err
}

// scalar is a text, or a number as it is written.
func scalar(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	}
	return ""
}

// apiFile is a file. Immutable.
type apiFile struct {
	root object
	// old: schemas are OpenAPI 3.0's own. draft7: they are of draft-07.
	old, draft7 bool
}

// reading is one way through a file.
type reading struct {
	apiFile
	yield func(describedType, error) bool
	// stopped: no more is wanted.
	stopped bool
	// seen are the messages that have been met, by where they are, and ids where the types are that have been taken.
	seen map[string]bool
	ids  map[string]string
}

// each has walk go through the file for each that asks.
func (f apiFile) each(walk func(*reading)) iter.Seq2[describedType, error] {
	return func(yield func(describedType, error) bool) {
		walk(&reading{apiFile: f, yield: yield, seen: map[string]bool{}, ids: map[string]string{}})
	}
}

func (r *reading) skip(where, format string, args ...any) {
	if !r.stopped {
		r.stopped = !r.yield(describedType{where: where}, fmt.Errorf(format, args...))
	}
}

// maxPointer is how long a JSON Pointer may be, since each message is known by one.
const maxPointer = 1024

// resolve follows $ref within the file, and returns where it ends, as a JSON Pointer.
func (f *apiFile) resolve(v any, at string) (object, string, error) {
	for range 32 {
		o, ok := v.(object)
		if !ok {
			return nil, at, errors.New("it is no object")
		}
		ref, ok := o["$ref"].(string)
		if !ok {
			return o, at, nil
		}
		found, pointer, err := f.find(ref)
		if err != nil {
			return nil, at, err
		}
		v, at = found, pointer
	}
	return nil, at, errors.New("its $ref goes round in circles")
}

// find returns what a reference within the file means, and where that is as a JSON Pointer, however the reference spells it.
func (f *apiFile) find(ref string) (any, string, error) {
	fragment, local := strings.CutPrefix(ref, "#/")
	if !local {
		return nil, "", fmt.Errorf("it refers to %q, which is not within the file: bundle it into one, for nothing is fetched", clipText(ref, 100))
	}
	if len(ref) > maxPointer {
		return nil, "", fmt.Errorf("it refers to %q, which is longer than %d bytes", clipText(ref, 100), maxPointer)
	}
	if decoded, err := url.PathUnescape(fragment); err == nil {
		fragment = decoded
	}
	var v any = f.root
	var pointer strings.Builder
	for token := range strings.SplitSeq(fragment, "/") {
		token = unescapeToken(token)
		found := false
		switch here := v.(type) {
		case object:
			v, found = here[token]
		case []any:
			if i, err := strconv.Atoi(token); err == nil && i >= 0 && i < len(here) && strconv.Itoa(i) == token {
				v, found = here[i], true
			}
		}
		if !found {
			return nil, "", fmt.Errorf("it refers to %q, which the file does not have", clipText(ref, 100))
		}
		pointer.WriteString("/" + escapeToken(token))
	}
	return v, pointer.String(), nil
}

func unescapeToken(token string) string {
	return strings.NewReplacer("~1", "/", "~0", "~").Replace(token)
}

// lastToken is the name of what a JSON Pointer points to.
func lastToken(pointer string) string {
	return unescapeToken(pointer[strings.LastIndexByte(pointer, '/')+1:])
}

func escapeToken(s string) string { return strings.NewReplacer("~", "~0", "/", "~1").Replace(s) }

func clipText(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// webhooks takes the path items under a member of the file.
func (r *reading) webhooks(member string) {
	all, ok := r.root[member].(object)
	if !ok {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		where := member + "/" + name
		item, _, err := r.resolve(all[name], "")
		if err != nil {
			r.skip(where, "%w", err)
			continue
		}
		operation := object(nil)
		for _, method := range []string{"post", "put", "patch", "delete", "get"} {
			if o, ok := item[method].(object); ok {
				operation = o
				break
			}
		}
		if operation == nil {
			r.skip(where, "it has no post")
			continue
		}
		t := describedType{id: name, where: where, description: purpose(operation, item)}
		t.deprecated, _ = operation["deprecated"].(bool)
		r.add(t, func(t *describedType) error { return r.body(t, operation["requestBody"]) })
	}
}

// purpose is in words what a thing is for.
func purpose(of ...object) string {
	for _, o := range of {
		for _, member := range []string{"description", "summary", "title"} {
			if text := strings.TrimSpace(scalar(o[member])); text != "" {
				if utf8.RuneCountInString(text) > 2048 {
					text = string([]rune(text)[:2047]) + "…"
				}
				return text
			}
		}
	}
	return ""
}

// add takes a type, unless another one has its name.
func (r *reading) add(t describedType, fill func(*describedType) error) {
	if r.stopped {
		return
	}
	if other := r.ids[t.id]; other != "" {
		r.skip(t.where, "%s is of the same name", clipText(other, 200))
		return
	}
	if err := fill(&t); err != nil {
		r.skip(t.where, "%w", err)
		return
	}
	r.ids[t.id] = t.where
	r.stopped = !r.yield(t, nil)
}

// body takes schema and example of a request body.
func (f *apiFile) body(t *describedType, body any) error {
	if body == nil {
		t.notes = append(t.notes, "it has no body, and so no schema")
		return nil
	}
	b, _, err := f.resolve(body, "")
	if err != nil {
		return err
	}
	content, _ := b["content"].(object)
	media := ""
	for _, name := range slices.Sorted(maps.Keys(content)) {
		kind, _, _ := strings.Cut(strings.ToLower(name), ";")
		if kind = strings.TrimSpace(kind); kind == "application/json" {
			media = name
			break
		} else if media == "" && (strings.HasSuffix(kind, "+json") || kind == "*/*") {
			media = name
		}
	}
	if media == "" {
		return fmt.Errorf("its body is not JSON, but %s", clipText(strings.Join(slices.Sorted(maps.Keys(content)), ", "), 200))
	}
	m, _, err := f.resolve(content[media], "")
	if err != nil {
		return err
	}
	if examples, ok := m["examples"].(object); ok {
		for _, name := range slices.Sorted(maps.Keys(examples)) {
			if e, _, err := f.resolve(examples[name], ""); err == nil && e["value"] != nil {
				t.exampleOf(e["value"])
				break
			}
		}
	}
	if e, ok := m["example"]; ok {
		t.exampleOf(e)
	}
	if m["schema"] == nil {
		t.notes = append(t.notes, "it has no schema")
		return nil
	}
	t.schema, err = f.bundle(m["schema"])
	return err
}

// exampleOf takes an example, if it is small enough.
func (t *describedType) exampleOf(v any) {
	if leastSize(v, maxExample) <= maxExample {
		if text, err := compactJSON(v); err == nil && len(text) <= maxExample {
			t.example = text
			return
		}
	}
	t.notes = append(t.notes, "its example is left out: it has more than 64 KiB")
}

// maxExample and maxSchema are how many bytes of each a server takes.
const (
	maxExample = 64 << 10
	maxSchema  = 256 << 10
)

// leastSize is how many bytes a value has as JSON at least; it looks no further than a bit beyond most.
func leastSize(v any, most int) int {
	size := 1 // what closes it, as each comma or what opens it is counted with what follows
	switch v := v.(type) {
	case string:
		return len(v) + 2
	case json.Number:
		return len(v)
	case []any:
		for _, one := range v {
			if size += 1 + leastSize(one, most-size); size > most {
				break
			}
		}
		return max(size, 2)
	case object:
		for name, one := range v {
			if size += 1 + len(name) + 3 + leastSize(one, most-size); size > most {
				break
			}
		}
		return max(size, 2)
	}
	return len("null")
}

func compactJSON(v any) (string, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return strings.TrimSpace(b.String()), err
}

// messages takes the messages of channels, and those that no channel has.
func (r *reading) messages() {
	channels, _ := r.root["channels"].(object)
	for _, name := range slices.Sorted(maps.Keys(channels)) {
		at := "/channels/" + escapeToken(name)
		channel, at, err := r.resolve(channels[name], at)
		if err != nil {
			r.skip("channels/"+name, "%w", err)
			continue
		}
		if len(at) > maxPointer {
			r.skip("channels/"+clipText(name, 100), "its name is longer than %d bytes", maxPointer)
			continue
		}
		for _, operation := range []string{"publish", "subscribe"} { // of AsyncAPI 2
			o, ok := channel[operation].(object)
			if !ok || o["message"] == nil {
				continue
			}
			at := at + "/" + operation + "/message"
			m, at, err := r.resolve(o["message"], at)
			if alternatives, ok := m["oneOf"].([]any); err == nil && ok {
				for i, one := range alternatives {
					r.message(one, fmt.Sprintf("%s/oneOf/%d", at, i), "")
				}
				continue
			}
			r.message(o["message"], at, "")
		}
		r.messagesIn(channel["messages"], at+"/messages") // of AsyncAPI 3
	}
	components, _ := r.root["components"].(object)
	r.messagesIn(components["messages"], "/components/messages")
}

func (r *reading) messagesIn(v any, at string) {
	all, _ := v.(object)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		r.message(all[name], at+"/"+escapeToken(name), name)
	}
}

// message takes one; key is what the file calls it where it has no name.
func (r *reading) message(v any, at, key string) {
	m, at, err := r.resolve(v, at)
	where := strings.TrimPrefix(at, "/")
	if err != nil {
		r.skip(where, "%w", err)
		return
	}
	if r.seen[at] {
		return
	}
	r.seen[at] = true
	if key == "" || strings.HasPrefix(at, "/components/messages/") {
		key = lastToken(at)
	}
	id := scalar(m["name"])
	if id == "" {
		id = scalar(m["messageId"])
	}
	if id == "" {
		id = key
	}
	t := describedType{id: id, where: where, description: purpose(m)}
	t.deprecated, _ = m["deprecated"].(bool)
	if !t.deprecated {
		t.deprecated, _ = m["x-deprecated"].(bool)
	}
	r.add(t, func(t *describedType) error { return r.payload(t, m) })
}

// payload takes schema and example of a message.
func (f *apiFile) payload(t *describedType, m object) error {
	if kind := scalar(m["contentType"]); kind != "" && !strings.Contains(strings.ToLower(kind), "json") {
		return fmt.Errorf("its payload is not JSON, but %s", clipText(kind, 80))
	}
	payload, format := m["payload"], scalar(m["schemaFormat"])
	if o, ok := payload.(object); ok && o["schemaFormat"] != nil && o["schema"] != nil { // of AsyncAPI 3
		payload, format = o["schema"], scalar(o["schemaFormat"])
	}
	if format != "" && !strings.Contains(format, "aai.asyncapi") && !strings.Contains(format, "schema+") {
		return fmt.Errorf("its schema is not JSON Schema, but %s", clipText(format, 80))
	}
	if examples, ok := m["examples"].([]any); ok && len(examples) > 0 {
		if e, ok := examples[0].(object); ok && e["payload"] != nil {
			t.exampleOf(e["payload"])
		}
	}
	if payload == nil {
		t.notes = append(t.notes, "it has no payload, and so no schema")
		return nil
	}
	var err error
	t.schema, err = f.bundle(payload)
	return err
}

// bundle is a schema with all that it refers to within the file, under $defs; of 256 KiB at most, as nobody takes more.
func (f *apiFile) bundle(v any) (string, error) {
	b := bundler{file: f, names: map[string]string{}, same: map[string]int{}, defs: object{}, under: "$defs"}
	if f.draft7 {
		b.under = "definitions"
	}
	root, err := b.schema(v, 0)
	if err != nil {
		return "", err
	}
	for len(b.open) > 0 {
		next := b.open[0]
		b.open = b.open[1:]
		b.at = next.pointer
		if b.defs[next.name], err = b.schema(next.found, 0); err != nil {
			return "", err
		}
	}
	o, ok := root.(object)
	if !ok {
		o = object{"allOf": []any{root}}
	}
	if f.draft7 && o["$schema"] == nil {
		o["$schema"] = "http://json-schema.org/draft-07/schema#"
		if o["$ref"] != nil { // beside which draft-07 ignores all
			o = object{"$schema": o["$schema"], "allOf": []any{object{"$ref": o["$ref"]}}}
		}
	}
	if len(b.defs) > 0 {
		own, _ := o[b.under].(object)
		for name, def := range own {
			if _, taken := b.defs[name]; !taken {
				b.defs[name] = def
			}
		}
		o[b.under] = b.defs
	}
	text, err := compactJSON(o)
	if len(text) > maxSchema {
		return "", fmt.Errorf("its schema with all that it refers to has %s; a server takes 256 KiB", several(len(text), "byte", "bytes"))
	}
	return text, err
}

// bundler copies one schema.
type bundler struct {
	file *apiFile
	// names are those under which what is referred to is kept, by where it is in the file; same counts those that would be equal.
	names map[string]string
	same  map[string]int
	defs  object
	under string
	// open are those whose place is taken in defs, and which are to be copied. at is where the one is that is being copied.
	open []definition
	at   string
	size int
}

// definition is what a schema refers to.
type definition struct {
	name, pointer string
	found         any
}

// take counts a piece of the copy, which has at least size bytes.
func (b *bundler) take(size int) error {
	if b.size += size; b.size <= maxSchema {
		return nil
	}
	if b.at == "" {
		return errors.New("its schema has more than the 256 KiB that a server takes")
	}
	return fmt.Errorf("its schema with all that it refers to has more than the 256 KiB that a server takes, which were reached in %q", clipText("#"+b.at, 100))
}

// maxSchemaNesting is deeper than a server takes.
const maxSchemaNesting = 100

// schema copies a schema, and has its references go to the copy.
func (b *bundler) schema(v any, depth int) (any, error) {
	o, ok := v.(object)
	if !ok {
		return v, b.take(leastSize(v, maxSchema)) // true, false, or what the server says is wrong
	}
	if depth > maxSchemaNesting {
		return nil, errors.New("its schema is nested too deep")
	}
	if ref, ok := o["$ref"]; ok && b.file.old { // beside which OpenAPI 3.0 ignores all
		o = object{"$ref": ref}
	}
	if err := b.take(len("{}")); err != nil {
		return nil, err
	}
	out := object{}
	for _, name := range slices.Sorted(maps.Keys(o)) {
		_, flag := o[name].(bool)
		switch {
		case name == "discriminator" || name == "xml" || name == "externalDocs" || strings.HasPrefix(name, "x-"):
			continue
		case name == "example" && o["examples"] != nil:
			continue
		case b.file.old && flag && (name == "nullable" || name == "exclusiveMinimum" || name == "exclusiveMaximum"):
			out[name] = o[name] // for modernise
			continue
		}
		if err := b.take(len(name) + len(`"":`)); err != nil {
			return nil, err
		}
		value, err := b.keyword(name, o[name], depth)
		if err != nil {
			return nil, err
		}
		if name == "example" {
			name, value = "examples", []any{value}
		}
		out[name] = value
	}
	if b.file.old {
		modernise(out)
	}
	return out, nil
}

// keyword copies the value of a keyword, which holds schemas or does not.
func (b *bundler) keyword(name string, v any, depth int) (any, error) {
	switch name {
	case "$ref":
		ref, ok := v.(string)
		if !ok {
			break
		}
		return b.reference(ref)
	case "items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
		"unevaluatedItems", "unevaluatedProperties", "allOf", "anyOf", "oneOf", "prefixItems":
		if list, ok := v.([]any); ok {
			out := make([]any, len(list))
			for i, one := range list {
				var err error
				if out[i], err = b.schema(one, depth+1); err != nil {
					return nil, err
				}
			}
			return out, nil
		}
		return b.schema(v, depth+1)
	case "properties", "patternProperties", "$defs", "definitions", "dependentSchemas":
		all, ok := v.(object)
		if !ok {
			break
		}
		out := object{}
		for _, key := range slices.Sorted(maps.Keys(all)) {
			if err := b.take(len(key) + len(`"":`)); err != nil {
				return nil, err
			}
			var err error
			if out[key], err = b.schema(all[key], depth+1); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return v, b.take(leastSize(v, maxSchema))
}

// reference has what is referred to be kept, once, and returns the reference to it.
func (b *bundler) reference(ref string) (string, error) {
	found, pointer, err := b.file.find(ref)
	if err != nil {
		return "", err
	}
	name, known := b.names[pointer]
	if !known {
		name = b.name(lastToken(pointer))
		b.names[pointer] = name
		b.defs[name] = true // its place
		b.open = append(b.open, definition{name, pointer, found})
		if err := b.take(len(name) + len(`"":`)); err != nil {
			return "", err
		}
	}
	to := "#/" + b.under + "/" + name
	return to, b.take(len(to) + len(`""`))
}

// name is one that no other has. As it stands in a URI in references, it has no characters that would be escaped there.
func (b *bundler) name(last string) string {
	base := strings.Map(func(r rune) rune {
		if r < 0x80 && unreserved(byte(r)) {
			return r
		}
		return '_'
	}, last)
	name := base
	for {
		b.same[base]++
		if n := b.same[base]; n > 1 {
			name = fmt.Sprintf("%s_%d", base, n)
		}
		if _, taken := b.defs[name]; !taken {
			return name
		}
	}
}

// unreserved reports whether a byte needs no escape in a URI.
func unreserved(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

// modernise turns what OpenAPI 3.0 has of its own into JSON Schema.
func modernise(s object) {
	if nullable, _ := s["nullable"].(bool); nullable {
		if kind, ok := s["type"].(string); ok {
			s["type"] = []any{kind, "null"}
		}
		if values, ok := s["enum"].([]any); ok && !slices.Contains(values, nil) {
			s["enum"] = append(slices.Clone(values), nil)
		}
	}
	delete(s, "nullable")
	for exclusive, bound := range map[string]string{"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"} {
		if is, ok := s[exclusive].(bool); ok {
			if delete(s, exclusive); is && s[bound] != nil {
				s[exclusive] = s[bound]
				delete(s, bound)
			}
		}
	}
}
