package schema_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/server/eventtype/schema"
)

// orderSchema is what a schema of an order looks like: texts, a pattern, a format, an enum, a list of objects by $ref.
const orderSchema = `{
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "type": "object",
  "required": ["id", "customer", "items", "total"],
  "properties": {
    "id": {"type": "string", "pattern": "^ord_[a-z0-9]+$"},
    "status": {"enum": ["new", "paid", "sent"]},
    "created": {"type": "string", "format": "date-time"},
    "customer": {"$ref": "#/$defs/customer"},
    "items": {"type": "array", "minItems": 1, "maxItems": 100, "items": {"$ref": "#/$defs/item"}},
    "total": {"type": "number", "minimum": 0},
    "currency": {"type": "string", "minLength": 3, "maxLength": 3},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}
  },
  "additionalProperties": false,
  "$defs": {
    "customer": {
      "type": "object",
      "required": ["id", "email"],
      "properties": {
        "id": {"type": "integer"},
        "email": {"type": "string", "format": "email"},
        "name": {"type": "string"},
        "address": {
          "type": "object",
          "properties": {
            "street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": "string"},
            "country": {"type": "string", "minLength": 2, "maxLength": 2}
          }
        }
      }
    },
    "item": {
      "type": "object",
      "required": ["sku", "quantity"],
      "properties": {
        "sku": {"type": "string"}, "name": {"type": "string"},
        "quantity": {"type": "integer", "minimum": 1}, "price": {"type": "number", "minimum": 0}
      }
    }
  }
}`

// order is a payload of 1 KiB.
func order() []byte {
	var b strings.Builder
	b.WriteString(`{"id":"ord_1001","status":"paid","created":"2026-11-30T12:00:00Z","customer":{"id":4711,"email":"ada@example.com",` +
		`"name":"Ada Lovelace","address":{"street":"12 St James's Square","city":"London","zip":"SW1Y 4JH","country":"GB"}},"items":[`)
	for i := range 6 {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"sku":"SKU-%04d","name":"A thing of some name","quantity":2,"price":19.99}`, i)
	}
	b.WriteString(`],"total":239.88,"currency":"EUR","note":"`)
	b.WriteString(strings.Repeat("n", 1024-b.Len()-2) + `"}`)
	return []byte(b.String())
}

// BenchmarkCheck is what enforcement costs an event of 1 KiB, its payload taken apart included.
func BenchmarkCheck(b *testing.B) {
	s, err := schema.Compile([]byte(orderSchema))
	if err != nil {
		b.Fatal(err)
	}
	payload := order()
	b.SetBytes(int64(len(payload)))
	b.ReportAllocs()
	for b.Loop() {
		if bad, err := s.Check(b.Context(), payload); bad != nil || err != nil {
			b.Fatal(bad, err)
		}
	}
}

// BenchmarkCompile is what the first event of a type pays.
func BenchmarkCompile(b *testing.B) {
	b.SetBytes(int64(len(orderSchema)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := schema.Compile([]byte(orderSchema)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSize tells what a compiled schema takes, and what it says of itself.
func BenchmarkSize(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		kept := make([]*schema.Schema, 200)
		for i := range kept {
			kept[i], _ = schema.Compile([]byte(orderSchema))
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(len(kept)), "heap-B/schema")
		b.ReportMetric(float64(kept[0].Size()), "said-B/schema")
	}
}
