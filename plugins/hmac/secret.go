package hmacplugin

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// minSecret is the least length of a secret that is text. Whoever has one signed request can try secrets
// at leisure, so a short one is no secret.
const minSecret = 16

// secretText says how the secrets of a scheme look that takes them as text and uses their bytes as key.
type secretText struct {
	doc       string
	algorithm string
	// make returns a new secret.
	make func() []byte
	// blanks may be in a secret, for people have chosen some as sentences.
	blanks bool
	// mistakes are other things of the vendor's that are easily taken for the secret.
	mistakes []mistake
}

// mistake is something given in place of a secret: how it begins and what it is.
type mistake struct{ prefix, is string }

// format is the scheme's say over its slot.
func (t secretText) format() plugin.SecretFormat {
	return plugin.SecretFormat{
		Doc:        t.doc,
		Algorithms: []string{t.algorithm},
		Generate:   func(string) ([]byte, error) { return t.make(), nil },
		Read: func(value []byte) (plugin.SecretInfo, error) {
			return plugin.SecretInfo{Algorithm: t.algorithm}, t.check(string(value))
		},
	}
}

// check says what is wrong with a secret, and shows nothing of it.
func (t secretText) check(value string) error {
	switch {
	case value == "":
		return errors.New("no secret is given")
	case value != strings.TrimSpace(value):
		return errors.New("the secret begins or ends with a blank or a line break; remove it")
	case !utf8.ValidString(value):
		return errors.New("the secret is not text; want " + t.doc)
	case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return errors.New("the secret has a line break or another control character in it; it must be one line of text")
	case !t.blanks && strings.Contains(value, " "):
		return errors.New("the secret has a blank in it; want " + t.doc)
	}
	for _, m := range t.mistakes {
		if strings.HasPrefix(value, m.prefix) {
			return fmt.Errorf("this begins with %s, so it is %s; want %s", m.prefix, m.is, t.doc)
		}
	}
	if len(value) < minSecret {
		return fmt.Errorf("the secret has %d characters, want at least %d: a shorter one can be guessed from one signed request", len(value), minSecret)
	}
	return nil
}

// randomHex is a text of 2n hexadecimal digits.
func randomHex(n int) string {
	raw := make([]byte, n)
	_, _ = rand.Read(raw) // never fails
	return hex.EncodeToString(raw)
}
