// Package script is what transformers share that run what tenants have written: the event as scripts see it, what is made
// of their results, and the bounds of one evaluation (Guard).
package script

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"mime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// Forms of what a script gives.
const (
	// Body: it is the body.
	Body = "body"
	// Request: it is an object with body, content_type, headers and drop, of which all may be absent.
	Request = "request"
)

// Event is the event as scripts see it: id, source, type, subject, time, data_content_type, data_schema, attributes,
// webhook_id and data, under the names of the conditions of subscriptions. Data is what the payload holds where that is JSON,
// else the payload as text, or in base64 where it is no UTF-8. Numbers in it are as number makes them.
func Event(e *plugin.Event, number func(json.Number) any) map[string]any {
	attributes := make(map[string]any, len(e.Attributes))
	for name, value := range e.Attributes {
		attributes[name] = value
	}
	return map[string]any{
		"id": e.ID, "source": e.Source, "type": e.Type, "subject": e.Subject, "time": e.Time.UTC().Format(time.RFC3339Nano),
		"data_content_type": e.ContentType, "data_schema": e.Schema, "webhook_id": e.MessageID, "attributes": attributes,
		"data": data(e, number),
	}
}

func data(e *plugin.Event, number func(json.Number) any) any {
	if IsJSON(e.ContentType) {
		if v, err := decode(e.Data); err == nil {
			return convert(v, number)
		}
	}
	if utf8.Valid(e.Data) {
		return string(e.Data)
	}
	return base64.StdEncoding.EncodeToString(e.Data)
}

// IsJSON reports whether a media type, empty for none, is that of JSON.
func IsJSON(contentType string) bool {
	if contentType == "" {
		return true
	}
	media, _, err := mime.ParseMediaType(contentType)
	return err == nil && (media == "application/json" || media == "text/json" || strings.HasSuffix(media, "+json"))
}

// CheckContentType says what is wrong with the setting content_type of a transformer; nothing when it can be one, or is empty.
func CheckContentType(contentType string) []plugin.Problem {
	if contentType == "" {
		return nil
	}
	if _, _, err := mime.ParseMediaType(contentType); err != nil || !strings.Contains(contentType, "/") {
		return []plugin.Problem{{Pointer: "/config/content_type", Code: "config.content_type", Summary: fmt.Sprintf("%q is no media type; want one such as application/json or text/plain; charset=utf-8", contentType)}}
	}
	return nil
}

func decode(data []byte) (v any, err error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more behind the first value")
	}
	return v, nil
}

// convert changes v in place.
func convert(v any, number func(json.Number) any) any {
	switch v := v.(type) {
	case json.Number:
		return number(v)
	case []any:
		for i := range v {
			v[i] = convert(v[i], number)
		}
	case map[string]any:
		for name := range v {
			v[name] = convert(v[name], number)
		}
	}
	return v
}

// Number is an int where a number is whole and fits, else a *big.Int where it is whole, else a float64.
func Number(n json.Number) any {
	if i, err := strconv.Atoi(n.String()); err == nil {
		return i
	}
	if i, ok := new(big.Int).SetString(n.String(), 10); ok {
		return i
	}
	f, _ := n.Float64() // out of range it is infinite
	return f
}

// Finish makes of what a script has given, as JSON, what is sent. A text is sent as it is where contentType is not JSON.
func Finish(given []byte, form, contentType string) (*plugin.Transformed, error) {
	out := &plugin.Transformed{ContentType: contentType}
	if form == Request {
		var r struct {
			Body        json.RawMessage   `json:"body"`
			ContentType string            `json:"content_type"`
			Headers     map[string]string `json:"headers"`
			Drop        *string           `json:"drop"`
		}
		d := json.NewDecoder(bytes.NewReader(given))
		d.DisallowUnknownFields()
		if err := d.Decode(&r); err != nil {
			return nil, fmt.Errorf(`it does not give a request, {"body": …, "content_type": TEXT, "headers": {NAME: TEXT}} or {"drop": REASON}: %w`, err)
		}
		if r.Drop != nil {
			return nil, plugin.Drop(*r.Drop)
		}
		if r.ContentType != "" {
			out.ContentType = r.ContentType
		}
		for _, name := range slices.Sorted(maps.Keys(r.Headers)) {
			out.Headers = append(out.Headers, plugin.Header{Name: name, Value: r.Headers[name]})
		}
		given = r.Body
	}
	if !IsJSON(out.ContentType) && len(given) > 0 && given[0] == '"' {
		var text string
		if err := json.Unmarshal(given, &text); err != nil {
			return nil, fmt.Errorf("read the body: %w", err)
		}
		given = []byte(text)
	}
	if len(given) > plugin.MaxTransformed {
		return nil, TooLarge(len(given))
	}
	out.Body = given
	return out, nil
}

// TooLarge is the error of a body that is.
func TooLarge(n int) error {
	return fmt.Errorf("the body has %d bytes; at most %d can be sent", n, plugin.MaxTransformed)
}
