package plugin

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/grapnel/grapnel/internal/redact"
)

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
func (s Secret) String() string { return redact.Mark }

// GoString is [redacted].
func (s Secret) GoString() string { return redact.Mark }

// Format writes [redacted] whatever the verb.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redact.Mark) }

// LogValue is [redacted].
func (s Secret) LogValue() slog.Value { return slog.StringValue(redact.Mark) }

// MarshalJSON writes "[redacted]".
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redact.Mark + `"`), nil }
