package notice

import (
	"crypto/sha256"
	"encoding/json"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/grapnel/grapnel/server/delivery"
)

// Type is the type of an operational event.
type Type string

// Types of operational events. A namespace gets those of its resources, System the others.
const (
	// SubscriptionFailing has the data State, and so have SubscriptionDisabled and SubscriptionRecovered.
	SubscriptionFailing   Type = "grapnel.subscription.failing"
	SubscriptionDisabled  Type = "grapnel.subscription.disabled"
	SubscriptionRecovered Type = "grapnel.subscription.recovered"
	// DeliveryExhausted has the data Exhausted, ReplayDone Replay, QuotaNear Quota, SecretExpiring Secret.
	DeliveryExhausted Type = "grapnel.delivery.exhausted"
	ReplayDone        Type = "grapnel.replay.done"
	QuotaNear         Type = "grapnel.quota.near"
	SecretExpiring    Type = "grapnel.secret.expiring"
	// PluginFailed has the data Plugin, and DiskFilling Disk.
	PluginFailed Type = "grapnel.plugin.failed"
	DiskFilling  Type = "grapnel.disk.filling"
)

const statePrefix = "grapnel.subscription."

// isState reports whether of several only the last one counts.
func (t Type) isState() bool { return strings.HasPrefix(string(t), statePrefix) }

// topic is what notices have in common of which one resource is told once in an Interval.
func (n *Notice) topic() string {
	switch d := n.Data.(type) {
	case *State:
		return statePrefix
	case *Quota:
		return string(n.Type) + " " + d.Quota
	case *Secret:
		return string(n.Type) + " " + strconv.Itoa(d.Version)
	}
	return string(n.Type)
}

// State is how a subscription stands.
type State struct {
	// Subscription is its full name.
	Subscription string `json:"subscription"`
	// Reason is for people: why it counts as failing, or was disabled.
	Reason string `json:"reason,omitempty"`
	// FailingSince is when the first attempt of those failed among which none has succeeded.
	FailingSince time.Time `json:"failing_since,omitzero"`
	// DisableTime is when it will be disabled if none succeeds.
	DisableTime time.Time `json:"disable_time,omitzero"`
	// LastOutcome and LastResponseCode are those of an attempt as DeliveryService shows them.
	LastOutcome      string `json:"last_outcome,omitempty"`
	LastResponseCode int    `json:"last_response_code,omitempty"`
}

// Exhausted are deliveries of one subscription that have ended without success.
type Exhausted struct {
	// Subscription is its full name.
	Subscription string `json:"subscription"`
	// Count is how many there were from FirstTime to LastTime.
	Count     int       `json:"count"`
	FirstTime time.Time `json:"first_time"`
	LastTime  time.Time `json:"last_time"`
	// Deliveries are the first of them, maxNamed at most.
	Deliveries []Ended `json:"deliveries"`
}

// Ended is one delivery that has ended without success.
type Ended struct {
	ID delivery.ID `json:"-"`
	// Delivery is its full name; it is made of ID.
	Delivery string `json:"delivery"`
	// State is EXHAUSTED or REJECTED, Reason for people.
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

// Replay is a replay job that has ended.
type Replay struct {
	// ReplayJob is its full name, State SUCCEEDED, FAILED or CANCELLED, and Reason why it has failed.
	ReplayJob    string    `json:"replay_job"`
	State        string    `json:"state"`
	Reason       string    `json:"reason,omitempty"`
	CreatedCount int64     `json:"created_count"`
	SkippedCount int64     `json:"skipped_count"`
	CreateTime   time.Time `json:"create_time"`
	CompleteTime time.Time `json:"complete_time"`
}

// Quota is a limit that is nearly or wholly used.
type Quota struct {
	// Resource is the full name of the namespace or node that has it.
	Resource string `json:"resource"`
	// Quota is the field of the namespace's quota, or the server's option.
	Quota string `json:"quota"`
	Used  int64  `json:"used"`
	Limit int64  `json:"limit"`
}

// Secret is a version of a secret that is about to go out of use.
type Secret struct {
	// Secret is its full name.
	Secret     string    `json:"secret"`
	Version    int       `json:"version"`
	ExpireTime time.Time `json:"expire_time"`
}

// Plugin is a plugin whose process crashes again and again.
type Plugin struct {
	// Plugin is its full name.
	Plugin  string `json:"plugin"`
	Version string `json:"version,omitempty"`
	// CrashCount is how often it has crashed within five minutes, Reason how the last time.
	CrashCount int       `json:"crash_count"`
	Reason     string    `json:"reason"`
	RetryTime  time.Time `json:"retry_time"`
}

// Disk is a disk that is about to be too full for new events.
type Disk struct {
	// Node is its full name.
	Node string `json:"node"`
	// FreeBytes are left; below MinFreeBytes new events and configuration are refused.
	FreeBytes    uint64 `json:"free_bytes"`
	MinFreeBytes uint64 `json:"min_free_bytes"`
}

const (
	// maxNamed is how many deliveries one event names.
	maxNamed = 10
	// maxReason bounds a reason or a name, in bytes.
	maxReason = 256
)

// bound cuts what others choose the size of. A subject is sent in a header.
func bound(n *Notice) {
	n.Subject = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, clip(n.Subject))
	switch d := n.Data.(type) {
	case *State:
		d.Reason = clip(d.Reason)
	case *Exhausted:
		for i := range d.Deliveries {
			d.Deliveries[i].Reason = clip(d.Deliveries[i].Reason)
		}
	case *Replay:
		d.Reason = clip(d.Reason)
	case *Plugin:
		d.Reason = clip(d.Reason)
	}
}

// clip is text in maxReason bytes, all of it valid.
func clip(text string) string {
	if len(text) > maxReason {
		cut := maxReason - len("…")
		for cut > 0 && !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = strings.Clone(text[:cut]) + "…"
	}
	return strings.ToValidUTF8(text, "�")
}

// merge is what is told instead of two notices of one place.
func merge(was, now *Notice) *Notice {
	before, ok := was.Data.(*Exhausted)
	more, also := now.Data.(*Exhausted)
	if !ok || !also {
		return now
	}
	before.Count += more.Count
	before.LastTime = more.LastTime
	before.Deliveries = append(before.Deliveries, more.Deliveries[:min(len(more.Deliveries), maxNamed-len(before.Deliveries))]...)
	was.Time = now.Time
	return was
}

// encode writes the data as JSON, times in UTC and whole microseconds.
func encode(data any) ([]byte, error) {
	utc := func(times ...*time.Time) {
		for _, t := range times {
			*t = t.UTC().Truncate(time.Microsecond)
		}
	}
	switch d := data.(type) {
	case *State:
		utc(&d.FailingSince, &d.DisableTime)
	case *Exhausted:
		utc(&d.FirstTime, &d.LastTime)
		space, _, _ := strings.Cut(d.Subscription, "/subscriptions/")
		for i := range d.Deliveries {
			d.Deliveries[i].Delivery = space + "/deliveries/" + d.Deliveries[i].ID.String()
		}
	case *Replay:
		utc(&d.CreateTime, &d.CompleteTime)
	case *Secret:
		utc(&d.ExpireTime)
	case *Plugin:
		utc(&d.RetryTime)
	}
	return json.Marshal(data)
}

// hash is the same for the same texts.
func hash(texts ...string) (sum [16]byte) {
	full := sha256.Sum256([]byte(strings.Join(texts, "\n")))
	copy(sum[:], full[:])
	return sum
}
