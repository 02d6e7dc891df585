package main

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOpenAPIFileOfAHundredWebhooks(t *testing.T) {
	text, err := os.ReadFile("testdata/webhooks.openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := describedTypes(text)
	if err != nil || len(got.types) != 100 || len(got.skipped) != 0 || got.version != "2026-11-01" {
		t.Fatal(len(got.types), got.skipped, got.version, err)
	}
	again, _ := describedTypes(text)
	for i, d := range got.types {
		if d.schema == "" || d.description == "" || d.schema != again.types[i].schema || strings.Contains(d.schema, "#/components") {
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
		got, err := describedTypes([]byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(c.want, got.types, cmp.AllowUnexported(describedType{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		if diff := cmp.Diff(c.skipped, got.skipped, cmp.AllowUnexported(skipped{})); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	for _, text := range []string{"", "[]", "a: b", `{"openapi":"2.0"}`, `{"swagger":"2.0"}`, "\x00", "openapi: [", `{"asyncapi":"1.2.0"}`} {
		if got, err := describedTypes([]byte(text)); err == nil {
			t.Errorf("%q: %+v", text, got)
		}
	}
}
