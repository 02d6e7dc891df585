package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// skipped is one that cannot be taken.
type skipped struct{ where, why string }

// allOf reads all that a file describes.
func allOf(text string) (types []describedType, none []skipped, err error) {
	d, err := describedTypes([]byte(text))
	if err != nil {
		return nil, nil, err
	}
	for one, err := range d.all {
		if err != nil {
			none = append(none, skipped{one.where, err.Error()})
		} else {
			types = append(types, one)
		}
	}
	return types, none, nil
}

// hooks is an OpenAPI file of webhooks with these schemas, and more members.
func hooks(more string, schemas ...string) string {
	var b strings.Builder
	for i, schema := range schemas {
		fmt.Fprintf(&b, `,"w%d":{"post":{"requestBody":{"content":{"application/json":{"schema":%s}}}}}`, i, schema)
	}
	return `{"openapi":"3.1.0","webhooks":{` + strings.TrimPrefix(b.String(), ",") + `},` + more + `}`
}

func TestOpenAPIFileOfAHundredWebhooks(t *testing.T) {
	text, err := os.ReadFile("testdata/webhooks.openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, none, err := allOf(string(text))
	if err != nil || len(got) != 100 || len(none) != 0 {
		t.Fatal(len(got), none, err)
	}
	if d, err := describedTypes(text); err != nil || d.version != "2026-11-01" || d.empty() {
		t.Fatal(d.version, err)
	}
	again, _, _ := allOf(string(text))
	for i, d := range got {
		if d.schema == "" || d.description == "" || d.schema != again[i].schema || strings.Contains(d.schema, "#/components") {
			t.Errorf("%+v", d)
		}
	}
}

func TestDescribedTypes(t *testing.T) {
	for name, c := range map[string]struct {
		text    string
		want    []describedType
		skipped []skipped
	}{
		"3.0": {`{"openapi":"3.0.3","x-webhooks":{"order/created":{"post":{"deprecated":true,"requestBody":{"$ref":"#/components/requestBodies/o"}}}},
			"components":{"requestBodies":{"o":{"content":{"application/json; charset=utf-8":{"schema":{"$ref":"#/components/schemas/a~1b"},"examples":{"one":{"value":{"n":12345678901234567890}}}}}}},
			"schemas":{"a/b":{"type":"object","discriminator":{"propertyName":"k"},"x-own":1,"properties":{"n":{"type":"integer","nullable":true,"minimum":1,"exclusiveMinimum":true,"example":5},
			"nullable":{"$ref":"#/components/schemas/a~1b","description":"dropped"}}}}}}`,
			[]describedType{{
				id: "order/created", where: "x-webhooks/order/created", deprecated: true, example: `{"n":12345678901234567890}`,
				schema: `{"$defs":{"a_b":{"properties":{"n":{"examples":[5],"exclusiveMinimum":1,"type":["integer","null"]},"nullable":{"$ref":"#/$defs/a_b"}},"type":"object"}},"$ref":"#/$defs/a_b"}`,
			}}, nil},
		"names that meet": {`{"openapi":"3.1.0","webhooks":{"w":{"post":{"requestBody":{"content":{"application/json":{"schema":{"allOf":[{"$ref":"#/components/schemas/A"},{"$ref":"#/components/x/A"}]}}}}}}},
			"components":{"schemas":{"A":true},"x":{"A":{"type":"null"}}}}`,
			[]describedType{{id: "w", where: "webhooks/w", schema: `{"$defs":{"A":true,"A_2":{"type":"null"}},"allOf":[{"$ref":"#/$defs/A"},{"$ref":"#/$defs/A_2"}]}`}}, nil},
		"names that meet, the same each time": {hooks(`"x":[{"A":1},{"A":2},{"A":3},{"A":4}]`, `{"properties":{"d":{"$ref":"#/x/3/A"},"a":{"$ref":"#/x/0/A"},"c":{"$ref":"#/x/2/A"},"b":{"$ref":"#/x/1/A"}}}`),
			[]describedType{{id: "w0", where: "webhooks/w0", schema: `{"$defs":{"A":1,"A_2":2,"A_3":3,"A_4":4},"properties":{"a":{"$ref":"#/$defs/A"},"b":{"$ref":"#/$defs/A_2"},"c":{"$ref":"#/$defs/A_3"},"d":{"$ref":"#/$defs/A_4"}}}`}}, nil},
		"one reference, spelt otherwise": {hooks(`"x":{"a~{/":[true]}`, `{"allOf":[{"$ref":"#/x/a~0%7B~1/0"},{"$ref":"#/x/a~%7b%7e1/0"},{"$ref":"#/%78/a%7E0{~1/%30"}]}`, `{"$ref":"#/x/a~{~1/00"}`),
			[]describedType{{id: "w0", where: "webhooks/w0", schema: `{"$defs":{"0":true},"allOf":[{"$ref":"#/$defs/0"},{"$ref":"#/$defs/0"},{"$ref":"#/$defs/0"}]}`}},
			[]skipped{{"webhooks/w1", `it refers to "#/x/a~{~1/00", which the file does not have`}}},
		"a reference into a channel of a path": {`{"asyncapi":"3.0.0","channels":{"user/{id}%41":{"messages":{"one":{"payload":{"$ref":"#/channels/user~1%7Bid%7D%2541/messages/x%2Fy/payload"}},"x":{"y":{"payload":{}}}}}}}`,
			[]describedType{
				{id: "one", where: "channels/user~1{id}%41/messages/one", schema: `{"$schema":"http://json-schema.org/draft-07/schema#","allOf":[{"$ref":"#/definitions/payload"}],"definitions":{"payload":{}}}`},
				{id: "x", where: "channels/user~1{id}%41/messages/x", notes: []string{"it has no payload, and so no schema"}},
			}, nil},
		"properties that look like keywords": {`{"openapi":"3.1.0","webhooks":{"w":{"post":{"requestBody":{"content":{"application/json":{"schema":{"properties":{"$ref":{"type":"string"},"example":{"const":{"$ref":"x"}}}}}}}}}}}`,
			[]describedType{{id: "w", where: "webhooks/w", schema: `{"properties":{"$ref":{"type":"string"},"example":{"const":{"$ref":"x"}}}}`}}, nil},
		"what cannot be taken": {`{"openapi":"3.1.0","webhooks":{"a":{"$ref":"#/b"},"b":{"parameters":[]},"c":{"post":{"requestBody":{"content":{"application/json":{"schema":{"items":{"$ref":"https://example.com/x"}}}}}}},
			"d":{"post":{}}}}`,
			[]describedType{{id: "d", where: "webhooks/d", notes: []string{"it has no body, and so no schema"}}},
			[]skipped{
				{"webhooks/a", `it refers to "#/b", which the file does not have`}, {"webhooks/b", "it has no post"},
				{"webhooks/c", `it refers to "https://example.com/x", which is not within the file: bundle it into one, for nothing is fetched`},
			}},
		"AsyncAPI 3": {`{"asyncapi":"3.0.0","channels":{"c":{"messages":{"m":{"$ref":"#/components/messages/paid"}}}},
			"components":{"messages":{"paid":{"name":"order.paid","title":"Paid","examples":[{"payload":{"a":1}}],"payload":{"schemaFormat":"application/schema+json;version=draft-07","schema":{"$ref":"#/components/schemas/p"}}},
			"avro":{"payload":{"schemaFormat":"application/vnd.apache.avro;version=1.9.0","schema":{}}}},"schemas":{"p":{"type":"object"}}}}`,
			[]describedType{{
				id: "order.paid", where: "components/messages/paid", description: "Paid", example: `{"a":1}`,
				schema: `{"$schema":"http://json-schema.org/draft-07/schema#","allOf":[{"$ref":"#/definitions/p"}],"definitions":{"p":{"type":"object"}}}`,
			}},
			[]skipped{{"components/messages/avro", "its schema is not JSON Schema, but application/vnd.apache.avro;version=1.9.0"}}},
		"AsyncAPI 2, one of several": {"asyncapi: 2.6.0\nchannels:\n  a/b:\n    subscribe:\n      message:\n        oneOf:\n          - {name: one, payload: {type: string}}\n          - {messageId: two, contentType: text/plain}\n          - {name: one}\n",
			[]describedType{{id: "one", where: "channels/a~1b/subscribe/message/oneOf/0", schema: `{"$schema":"http://json-schema.org/draft-07/schema#","type":"string"}`}},
			[]skipped{
				{"channels/a~1b/subscribe/message/oneOf/1", "its payload is not JSON, but text/plain"},
				{"channels/a~1b/subscribe/message/oneOf/2", "channels/a~1b/subscribe/message/oneOf/0 is of the same name"},
			}},
	} {
		got, none, err := allOf(c.text)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(describedType{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if diff := cmp.Diff(c.skipped, none, cmp.AllowUnexported(skipped{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	for _, text := range []string{"", "[]", "a: b", `{"openapi":"2.0"}`, `{"swagger":"2.0"}`, "\x00", "openapi: [", `{"asyncapi":"1.2.0"}`} {
		if got, err := describedTypes([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// Schemas that refer to each other are not nested, however many they are; what a server does not take is not sent.
func TestDescribedTypesHaveBounds(t *testing.T) {
	var chain strings.Builder
	for i := range 200 {
		fmt.Fprintf(&chain, `"s%d":{"properties":{"next":{"$ref":"#/x/s%d"}}},`, i, i+1)
	}
	large := `{"description":"` + strings.Repeat("x", 100<<10) + `"}`
	got, none, err := allOf(hooks(`"x":{`+chain.String()+`"s200":true,"l0":`+large+`,"l1":`+large+`,"l2":`+large+`}`,
		`{"$ref":"#/x/s0"}`,
		strings.Repeat(`{"not":`, 150)+"{}"+strings.Repeat("}", 150),
		`{"allOf":[{"$ref":"#/x/l0"},{"$ref":"#/x/l1"},{"$ref":"#/x/l2"}]}`,
		`{"allOf":[{"$ref":"#/x/l0"},{"$ref":"#/x/l1"}]}`,
		`{"description":"`+strings.Repeat("x", 300<<10)+`"}`,
		`{"description":"`+strings.Repeat(`\t`, 200<<10)+`"}`,
		`{"$ref":"#/`+strings.Repeat("x", 2000)+`"}`,
	))
	if err != nil || len(got) != 2 || got[0].id != "w0" || got[1].id != "w3" || strings.Count(got[0].schema, `"$ref"`) != 201 {
		t.Error(len(got), err)
	}
	want := []skipped{
		{"webhooks/w1", "its schema is nested too deep"},
		{"webhooks/w2", `its schema with all that it refers to has more than the 256 KiB that a server takes, which were reached in "#/x/l2"`},
		{"webhooks/w4", "its schema has more than the 256 KiB that a server takes"},
		{"webhooks/w5", "its schema with all that it refers to has 409,618 bytes; a server takes 256 KiB"},
		{"webhooks/w6", `it refers to "#/` + strings.Repeat("x", 98) + `…", which is longer than 1024 bytes`},
	}
	if diff := cmp.Diff(want, none, cmp.AllowUnexported(skipped{})); diff != "" {
		t.Error(diff)
	}
}

// Many types of one schema are copies of it, and each is made only when it is asked for.
func TestDescribedTypesAreMadeInTurn(t *testing.T) {
	text := hooks(`"x":{"description":"`+strings.Repeat("x", 100<<10)+`"}`, slices.Repeat([]string{`{"$ref":"#/x"}`}, 200)...)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d, err := describedTypes([]byte(text))
	if err != nil || d.empty() {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 5<<20 { // all of them are 20 MiB
		t.Errorf("%d bytes for a file of %d", n, len(text))
	}
	for range 2 { // it can be read again
		count := 0
		for _, err := range d.all {
			if count++; err != nil || count == 5 {
				break
			}
		}
		if count != 5 {
			t.Error(count)
		}
	}
}

// What aliases stand for is bounded in bytes, over all documents: import and apply would write each of them out.
func TestAliasesThatRepeatMuchAreRefused(t *testing.T) {
	long := func(aliases int) string {
		return "a: &a " + strings.Repeat("x", 20<<10) + "\nb: [" + strings.Repeat("*a,", aliases) + "]\n"
	}
	laughs := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		laughs += fmt.Sprintf("%c: &%[1]c [%s]\n", c, strings.Repeat(fmt.Sprintf("*%c,", c-1), 9))
	}
	for name, text := range map[string]string{"one": long(10_000), "nested": laughs, "keys": strings.Replace(long(10_000), "b: [", "b: [{*a : 1},", 1)} {
		_, _, err := allOf("openapi: 3.1.0\n" + text)
		if err == nil || !strings.Contains(err.Error(), "what aliases repeat has more than 32 MiB") {
			t.Errorf("%s: import: %v", name, err)
		}
		if _, err := documentsOf([]byte(text)); err == nil || !strings.Contains(err.Error(), "what aliases repeat has more than 32 MiB") {
			t.Errorf("%s: apply: %v", name, err)
		}
	}
	stream := newYAMLStream([]byte(long(1000) + "---\n" + long(1000)))
	if _, err := stream.next(); err != nil {
		t.Error(err)
	}
	if _, err := stream.next(); err == nil || !strings.Contains(err.Error(), "with the alias *a, what aliases repeat") {
		t.Error(err)
	}
	if _, err := documentsOf([]byte("a: &a [*a]\n")); err == nil || !strings.Contains(err.Error(), "contains itself") {
		t.Error(err)
	}
	got, err := documentsOf([]byte("a: &a {x: &b [1, 2020-01-01], y: *b}\nb: {<<: *a, z: *b}\n"))
	if want := `{"a":{"x":[1,"2020-01-01"],"y":[1,"2020-01-01"]},"b":{"x":[1,"2020-01-01"],"y":[1,"2020-01-01"],"z":[1,"2020-01-01"]}}`; err != nil || len(got) != 1 || string(got[0]) != want {
		t.Errorf("%s %v", got, err)
	}
}
