package webhook

import (
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strings"
)

// structured reports whether a media type is that of one CloudEvent in JSON.
func structured(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	return err == nil && media == "application/cloudevents+json"
}

// addEnvelope takes the attributes out of a CloudEvent in JSON, which the signature covers.
func (e *Event) addEnvelope(body []byte) error {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil || members == nil {
		return fmt.Errorf("%w: no CloudEvent in JSON", errBody)
	}
	return e.addMembers(members)
}

// addMembers takes attributes that are members of a JSON object.
func (e *Event) addMembers(members map[string]json.RawMessage) error {
	size := 0
	for name, raw := range members {
		if name == "data" || name == "data_base64" || string(raw) == "null" { // null stands for absent
			continue
		}
		value, ok := attributeText(raw)
		if !ok {
			return fmt.Errorf("%w: CloudEvents attribute %q is neither text, a number nor a truth value", errBody, name)
		}
		if err := e.add(name, value, &size); err != nil {
			return err
		}
	}
	return nil
}

// attributeText is the value of an attribute as text.
func attributeText(raw json.RawMessage) (string, bool) {
	switch raw[0] {
	case '"':
		var text string
		err := json.Unmarshal(raw, &text)
		return text, err == nil
	case '{', '[':
		return "", false
	}
	return string(raw), true
}

// addHeaders takes the attributes out of the headers of a CloudEvent in binary mode.
func (e *Event) addHeaders(header http.Header) error {
	size := 0
	for name, values := range header {
		attribute, found := strings.CutPrefix(name, "Ce-")
		if !found || attribute == "" || len(values) == 0 {
			continue
		}
		if err := e.add(strings.ToLower(attribute), attributeValue(values[0]), &size); err != nil {
			return err
		}
	}
	return nil
}

// add sets an attribute within the bounds; size counts the bytes of all.
func (e *Event) add(name, value string, size *int) error {
	if *size += len(name) + len(value); *size > maxAttributeBytes || len(e.Attributes) == maxAttributes {
		return errAttributes
	}
	switch name {
	case "type":
		e.Type = value
	case "source":
		e.Source = value
	case "subject":
		e.Subject = value
	default:
		e.Attributes[name] = value
	}
	return nil
}

// attributeValue undoes the percent-encoding that the CloudEvents HTTP binding puts on header values.
func attributeValue(value string) string {
	decoded, err := url.PathUnescape(value)
	if err != nil {
		return value
	}
	return decoded
}
