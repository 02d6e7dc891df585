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
	// Events for a transformer, with what it makes of them. The first is what other cases send, too.
	Events []EventFixture `json:"events,omitempty"`
	// Slow is what takes a transformer long; nil leaves untested that it holds up nobody else.
	Slow *SlowFixture `json:"slow,omitempty"`
}

// EventFixture is an event. What is left out has a value of the suite's, or none where an event need not have it.
type EventFixture struct {
	// Name for people.
	Name string `json:"name,omitempty"`
	// Config replaces the kind's.
	Config json.RawMessage `json:"config,omitempty"`
	// ID, and what follows, are the event's attributes.
	ID          string            `json:"id,omitempty"`
	Source      string            `json:"source,omitempty"`
	Type        string            `json:"type,omitempty"`
	Subject     string            `json:"subject,omitempty"`
	Time        time.Time         `json:"time,omitzero"`
	ContentType string            `json:"content_type,omitempty"`
	DataSchema  string            `json:"data_schema,omitempty"`
	Attributes  map[string]string `json:"attributes,omitempty"`
	// Data is the payload as JSON, byte for byte as it stands here, or DataBase64 where it is none.
	Data       json.RawMessage `json:"data,omitempty"`
	DataBase64 []byte          `json:"data_base64,omitempty"`
	// Want is what must come of it; nil does not look.
	Want *WantFixture `json:"want,omitempty"`
}

// WantFixture is what must come of an event: the body as Text or as JSON, which may be written otherwise, with the
// content type and the headers, by lower-case name; or part of the reason that it is Dropped for; or part of what the
// Failure says. What is left out is not looked at.
type WantFixture struct {
	Text        string            `json:"text,omitempty"`
	JSON        json.RawMessage   `json:"json,omitempty"`
	ContentType string            `json:"content_type,omitempty"`
	Headers     map[string]string `json:"headers,omitempty"`
	Dropped     string            `json:"dropped,omitempty"`
	Failure     string            `json:"failure,omitempty"`
}

// SlowFixture is a config with which, or an event of which, a transformer computes for a second or more, or until its
// time is over. What is left out is as in other cases.
type SlowFixture struct {
	Config json.RawMessage `json:"config,omitempty"`
	Event  *EventFixture   `json:"event,omitempty"`
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
