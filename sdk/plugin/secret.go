package plugin

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"strings"
)

const redacted = "[redacted]"

// Secret holds the live versions of one secret. A config field of this type, tagged
// `slot:"key" doc:"…" required:"true" kinds:"HMAC"`, declares a slot that the subscription fills with the
// name of a stored secret; it is not part of the config's schema. However it is printed, logged or
// marshalled, it shows as [redacted].
type Secret struct {
	values [][]byte
}

// NewSecret makes a secret of its live versions, newest first; for tests.
func NewSecret(values ...string) Secret {
	s := Secret{values: make([][]byte, len(values))}
	for i, v := range values {
		s.values[i] = []byte(v)
	}
	return s
}

// Values are the live versions as stored, newest first: more than one while a rotation overlaps, none
// when the slot is empty. They must not be changed.
func (s Secret) Values() [][]byte { return s.values }

// Empty reports whether the slot was left empty.
func (s Secret) Empty() bool { return len(s.values) == 0 }

// String is [redacted].
func (s Secret) String() string { return redacted }

// GoString is [redacted].
func (s Secret) GoString() string { return redacted }

// Format writes [redacted] whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue is [redacted].
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON writes "[redacted]".
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// redact takes the values of secrets out of a text that is about to leave the process.
func redact(text string, secrets [][]byte) string {
	for _, v := range secrets {
		text = cutOut(text, string(v))
		if i := bytes.IndexByte(v, '_'); i > 0 && i < 12 {
			text = cutOut(text, string(v[i+1:])) // whsec_…: the part that counts
		}
	}
	return text
}

func cutOut(text, value string) string {
	if len(value) < 6 {
		return text // would tear ordinary words apart and protects nothing
	}
	return strings.ReplaceAll(text, value, redacted)
}
