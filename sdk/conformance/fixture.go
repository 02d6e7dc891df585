package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Fixture tells the suite what a plugin's Describe cannot: settings that work where the suite runs, secrets
// in a format of the kind's own, a URI that reaches a receiver, and what signatures must come out. Without
// one the suite uses Describe's example, PrepareSecret, and receivers of its own for http and https.
type Fixture struct {
	// Kinds by id.
	Kinds map[string]KindFixture `json:"kinds"`
}

// KindFixture is about one kind. All of it is optional.
type KindFixture struct {
	// Config is used instead of Describe's example.
	Config json.RawMessage `json:"config,omitempty"`
	// Secrets by slot.
	Secrets map[string]string `json:"secrets,omitempty"`
	// URI of a receiver that takes what it is sent. Transports with the scheme http, or one that ends in +http, get one from the suite.
	URI string `json:"uri,omitempty"`
	// Receiver says how transports of other schemes get to the suite's receivers; nil leaves them to URI.
	Receiver *ReceiverFixture `json:"receiver,omitempty"`
	// Headers that all requests carry, by lower-case name.
	Headers map[string]string `json:"headers,omitempty"`
	// Vectors are signatures known to be right.
	Vectors []Vector `json:"vectors,omitempty"`
}

// ReceiverFixture leads a transport to the receivers that the suite plays, which speak HTTP/1.1 on loopback. In URI and
// Command {host}, {port} and {path}, with the query, are a receiver's, and {dir} is a private directory.
type ReceiverFixture struct {
	// URI of a receiver. Required.
	URI string `json:"uri"`
	// Command, when not empty, is started for each receiver and carries what arrives to {host}:{port} as HTTP. It is
	// ready when something stands in {dir}, or when it has written a line to standard output. A socket has its name a
	// moment before it takes connections: make it elsewhere and rename it.
	Command []string `json:"command,omitempty"`
	// OneWay says that answers do not come back: only what arrives is judged.
	OneWay bool `json:"one_way,omitempty"`
}

// Vector is a request and what a signer must add to it.
type Vector struct {
	// Name for people.
	Name string `json:"name"`
	// Config and Secrets replace the kind's.
	Config  json.RawMessage   `json:"config,omitempty"`
	Secrets map[string]string `json:"secrets,omitempty"`
	// MessageID is the webhook-id.
	MessageID string `json:"message_id,omitempty"`
	// Created is the time to sign with.
	Created time.Time `json:"created"`
	// Nonce in base64.
	Nonce []byte `json:"nonce,omitempty"`
	// Method and URI of the target; empty means POST and an https URI.
	Method string `json:"method,omitempty"`
	URI    string `json:"uri,omitempty"`
	// Headers of the event, by lower-case name.
	Headers map[string]string `json:"headers,omitempty"`
	// Body as text, or BodyBase64 when it is none.
	Body       string `json:"body,omitempty"`
	BodyBase64 []byte `json:"body_base64,omitempty"`
	// Want are headers that must be added, by lower-case name; others are not looked at.
	Want map[string]string `json:"want,omitempty"`
	// WantURI is the URI as changed by the signer; empty does not look at it.
	WantURI string `json:"want_uri,omitempty"`
}

// ReadFixture reads a fixture from JSON. Fields that it does not know are refused.
func ReadFixture(r io.Reader) (*Fixture, error) {
	text, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("read fixture: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	var f Fixture
	if err := dec.Decode(&f); err != nil {
		return nil, fmt.Errorf("read fixture: %w", err)
	}
	return &f, nil
}
