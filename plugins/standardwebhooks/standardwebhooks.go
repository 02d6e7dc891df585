// Package standardwebhooks signs requests as the Standard Webhooks specification says
// (https://www.standardwebhooks.com): HMAC-SHA256 as v1 with keys that start with whsec_, and ed25519 as
// v1a with keys that start with whsk_. The kind svix puts the same bytes under the header names that
// Svix's libraries look for first (https://docs.svix.com/receiving/verifying-payloads/how-manual).
//
// The signature covers "ID.TIMESTAMP.BODY": the webhook-id of the message, the unix seconds of this
// attempt and the body byte for byte. Every live version of the key signs, newest first, so that a
// receiver verifies throughout a rotation whichever version it has. The package makes and reads its own
// keys; it verifies nothing, for the receiver's side is sdk/webhook.
package standardwebhooks

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"hash"
	"strconv"
	"sync"

	"github.com/grapnel/grapnel/sdk/keys"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// Config is what a subscription says about its signatures: nothing but the key.
type Config struct {
	Key plugin.Secret `json:"-" slot:"key" doc:"Signing key: whsec_ and base64 of 24 to 64 bytes, or whsk_ and base64 of an ed25519 key. While two versions are live, the request carries a signature of each, newest first." required:"true" kinds:"HMAC,ED25519"`
}

// names are the headers a kind uses.
type names struct{ id, timestamp, signature string }

// Kinds are all signers of this package.
func Kinds() []plugin.Kind { return []plugin.Kind{Kind(), svix()} }

// Kind is the signer "standard-webhooks". The host has set webhook-id before it runs.
func Kind() plugin.Kind {
	n := names{"webhook-id", "webhook-timestamp", "webhook-signature"}
	return plugin.Signer("standard-webhooks", build(n),
		plugin.Doc("Standard Webhooks signatures (https://www.standardwebhooks.com): v1 (HMAC-SHA256) and v1a (ed25519); "+
			"both keys sign during a rotation"),
		plugin.Emits(n.timestamp, n.signature),
		plugin.Example(struct{}{}),
		plugin.Format("key", format()))
}

// svix is the signer "svix".
func svix() plugin.Kind {
	n := names{"svix-id", "svix-timestamp", "svix-signature"}
	return plugin.Signer("svix", build(n),
		plugin.Doc("Svix signatures (https://docs.svix.com/receiving/verifying-payloads/how-manual): those of Standard Webhooks "+
			"under svix-id, svix-timestamp and svix-signature; both keys sign during a rotation"),
		plugin.Emits(n.id, n.timestamp, n.signature),
		plugin.Example(struct{}{}),
		plugin.Format("key", format()))
}

func build(n names) func(Config, plugin.Target) (plugin.SignFunc, error) {
	return func(c Config, _ plugin.Target) (plugin.SignFunc, error) {
		s := &signer{names: n}
		for _, value := range c.Key.Values() {
			k, err := parseKey(value)
			if err != nil {
				return nil, err
			}
			s.keys = append(s.keys, k)
		}
		if len(s.keys) == 0 {
			return nil, errNoKey
		}
		return s.sign, nil
	}
}

// signer is one instance; it is immutable but for the pools in its keys.
type signer struct {
	names names
	keys  []*key
}

// key is one live version: ed25519 when private is set, else HMAC with ready-keyed states to reuse,
// which spares two SHA-256 blocks and the allocations of each signature.
type key struct {
	pair    *keys.Key
	private ed25519.PrivateKey
	states  sync.Pool // of *state
}

// state is a keyed HMAC and room for what leads the content and for the signature.
type state struct {
	mac hash.Hash
	buf []byte
}

func newHMACKey(secret []byte) *key {
	k := &key{}
	k.states.New = func() any {
		return &state{mac: hmac.New(sha256.New, secret), buf: make([]byte, 0, 128)}
	}
	return k
}

func (s *signer) sign(r *plugin.Request) error {
	timestamp := strconv.FormatInt(r.Created.Unix(), 10)
	room := make([]byte, 0, 48) // "v1," and 44 characters: one HMAC signature without growing
	for i, k := range s.keys {
		if i > 0 {
			room = append(room, ' ')
		}
		room = k.append(room, r.MessageID, timestamp, r.Body)
	}
	r.Set(s.names.id, r.MessageID)
	r.Set(s.names.timestamp, timestamp)
	r.Set(s.names.signature, string(room))
	return nil
}

// append adds one entry of webhook-signature to dst.
func (k *key) append(dst []byte, id, timestamp string, body []byte) []byte {
	if k.private != nil {
		content := make([]byte, 0, len(id)+len(timestamp)+2+len(body))
		content = append(appendLead(content, id, timestamp), body...)
		dst = append(dst, "v1a,"...)
		return base64.StdEncoding.AppendEncode(dst, ed25519.Sign(k.private, content))
	}
	st := k.states.Get().(*state)
	st.mac.Reset()
	st.buf = appendLead(st.buf[:0], id, timestamp)
	st.mac.Write(st.buf)
	st.mac.Write(body)
	st.buf = st.mac.Sum(st.buf[:0])
	dst = append(dst, "v1,"...)
	dst = base64.StdEncoding.AppendEncode(dst, st.buf)
	k.states.Put(st)
	return dst
}

func appendLead(dst []byte, id, timestamp string) []byte {
	dst = append(dst, id...)
	dst = append(dst, '.')
	dst = append(dst, timestamp...)
	return append(dst, '.')
}
