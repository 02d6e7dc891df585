package subscription

import (
	"fmt"
	"math"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// maxStoredBytes keeps a subscription far below etcd's limit for one request.
const maxStoredBytes = 256 << 10

// maxWritten bounds the violations that are put into words; the rest is counted.
const maxWritten = 64

// checker collects violations.
type checker struct {
	found      []Violation
	more       int
	conditions *conditions
}

func (c *checker) add(field, reason, format string, args ...any) {
	if len(c.found) == maxWritten {
		c.more++
		return
	}
	c.found = append(c.found, Violation{Field: field, Reason: reason, Description: fmt.Sprintf(format, args...)})
}

func (c *checker) err() error {
	if len(c.found) == 0 {
		return nil
	}
	return &InvalidError{Violations: c.found, More: c.more}
}

// validate checks a subscription whose defaults are filled in and returns its condition, compiled.
func validate(p *grapnelv1.Subscription, ns string, conds *conditions) (*condition, error) {
	c := &checker{conditions: conds}
	c.text("subscription.display_name", p.DisplayName, 63)
	c.labels("subscription.labels", p.Labels)
	c.uri("subscription.uri", p.Uri)
	c.globs("subscription.event_types", p.EventTypes)
	cond := c.condition("subscription.condition", p.Condition)
	c.headers("subscription.headers", p.Headers)
	c.eventHeaders("subscription.header_templates", "subscription.allowed_event_headers", p)
	c.shape("subscription.payload_shape", p)
	c.batching("subscription.batching", p)
	if len(p.Signers) > 8 {
		c.add("subscription.signers", "repeated.max_items", "has %d signers; want at most 8", len(p.Signers))
	}
	for i, s := range p.Signers {
		c.binding(fmt.Sprintf("subscription.signers[%d]", i), s, ns)
	}
	c.transport(p)
	c.binding("subscription.transport", p.Transport, ns)
	c.transformer("subscription.transformer", p, ns)
	c.duration("subscription.attempt_timeout", p.AttemptTimeout, time.Second, time.Minute)
	c.number("subscription.max_rate", p.MaxRate, 0, 10000)
	c.number("subscription.max_in_flight", float64(p.MaxInFlight), 1, 1000)
	if _, known := grapnelv1.Subscription_OnExhausted_name[int32(p.OnExhausted)]; !known {
		c.add("subscription.on_exhausted", "enum.defined_only", "%d is not a way to go on; want %s", p.OnExhausted, choices(grapnelv1.Subscription_OnExhausted_name))
	}
	c.retryPolicy("subscription.retry_policy", p.RetryPolicy)
	c.duration("subscription.failure_policy.disable_after", p.FailurePolicy.DisableAfter, 0, 30*24*time.Hour)
	c.deadLetter("subscription.dead_letter", p, ns)
	if n := proto.Size(p); n > maxStoredBytes {
		c.add("subscription", "size", "takes %d bytes; at most %d can be stored", n, maxStoredBytes)
	}
	return cond, c.err()
}

// deadLetter checks the name; whether there is such a subscription is for those who see the others.
func (c *checker) deadLetter(field string, p *grapnelv1.Subscription, ns string) {
	if p.DeadLetter == "" {
		return
	}
	owner, kind, _, ok := splitName(p.DeadLetter)
	switch {
	case !ok || kind != "subscriptions" || owner != ns:
		c.add(field, "dead_letter.name", "%q is not a subscription of this namespace; want namespaces/%s/subscriptions/NAME", p.DeadLetter, ns)
	case p.DeadLetter == p.Name:
		c.add(field, "dead_letter.loop", "is the subscription itself; want another one")
	}
}

func (c *checker) text(field, s string, most int) {
	if n := utf8.RuneCountInString(s); n > most {
		c.add(field, "string.max_len", "has %d characters; want at most %d", n, most)
	}
	if strings.ContainsFunc(s, unicode.IsControl) {
		c.add(field, "string.control", "holds a control character; want plain text")
	}
}

func (c *checker) labels(field string, labels map[string]string) {
	if len(labels) > 64 {
		c.add(field, "map.max_pairs", "has %d labels; want at most 64", len(labels))
	}
	for _, k := range sortedKeys(labels) {
		at := fmt.Sprintf("%s[%q]", field, k)
		switch {
		case k == "":
			c.add(at, "labels.key", "the key is empty; want 1 to 63 characters")
		case strings.ContainsFunc(k, unicode.IsSpace):
			c.add(at, "labels.key", "the key holds white space; want one word, such as team")
		}
		c.text(at, k, 63)
		c.text(at, labels[k], 63)
	}
}

func (c *checker) globs(field string, globs []string) {
	if len(globs) > 64 {
		c.add(field, "repeated.max_items", "has %d globs; want at most 64", len(globs))
	}
	for i, g := range globs {
		at := fmt.Sprintf("%s[%d]", field, i)
		switch {
		case g == "" || utf8.RuneCountInString(g) > 128:
			c.add(at, "event_types.length", "has %d characters; want 1 to 128 (leave event_types empty to match every type)", utf8.RuneCountInString(g))
		case strings.ContainsFunc(g, unicode.IsControl):
			c.add(at, "event_types.characters", "%q holds a control character; want a type, with * for any run of characters, such as order.*", g)
		case slices.Contains(globs[:i], g):
			c.add(at, "event_types.unique", "%q is listed twice", g)
		}
	}
}

func (c *checker) condition(field, text string) *condition {
	if text == "" {
		return nil
	}
	if n := utf8.RuneCountInString(text); n > 2048 {
		c.add(field, "string.max_len", "has %d characters; want at most 2048", n)
		return nil
	}
	cond := c.conditions.condition(text)
	if err := cond.compile(); err != nil {
		c.add(field, "cel.compile", "%v", err)
		return nil
	}
	for _, fault := range c.conditions.impossible(text) {
		c.add(field, "cel.impossible", "%s", fault)
	}
	return cond
}

// transport complains of a scheme that needs a transport to be named. It shows nothing but the scheme: a
// URI may hold a password.
func (c *checker) transport(p *grapnelv1.Subscription) {
	u, err := url.Parse(p.Uri)
	if p.Transport.Plugin == "" && err == nil && u.Scheme != "" {
		c.add("subscription.transport.plugin", "transport.required",
			"no transport is the default for the scheme %q; want http or https in uri, or the name of a transport, plugins/NAME", u.Scheme)
	}
}

func (c *checker) binding(field string, b *grapnelv1.PluginBinding, ns string) {
	if id, ok := strings.CutPrefix(b.Plugin, "plugins/"); b.Plugin != "" && (!ok || !validID(id)) {
		c.add(field+".plugin", "plugin.name", "%q is not a plugin's name; want plugins/NAME, such as %s", b.Plugin, defaultSigner)
	}
	if len(b.Secrets) > 8 {
		c.add(field+".secrets", "map.max_pairs", "has %d secrets; want at most 8", len(b.Secrets))
	}
	for _, slot := range sortedKeys(b.Secrets) {
		name := b.Secrets[slot]
		at := fmt.Sprintf("%s.secrets[%q]", field, slot)
		owner, kind, _, ok := splitName(name)
		switch {
		case slot == "":
			c.add(at, "secrets.slot", "the slot is empty; want the name of a slot that the plugin declares, such as key")
		case looksSecret(name):
			c.add(at, "secrets.name", "this looks like the secret itself; store it with SecretService.CreateSecret and give its name, namespaces/%s/secrets/NAME", ns)
		case !ok || kind != "secrets":
			c.add(at, "secrets.name", "%q is not a secret's name; want namespaces/%s/secrets/NAME", name, ns)
		case owner != ns:
			c.add(at, "secrets.namespace", "%q belongs to another namespace; want namespaces/%s/secrets/NAME", name, ns)
		}
	}
	c.config(field+".config", structpb.NewStructValue(b.Config))
}

// config refuses settings that hold what belongs into a secret; settings can be read by many.
func (c *checker) config(at string, v *structpb.Value) {
	switch kind := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		if looksSecret(kind.StringValue) {
			c.add(at, "config.secret", "this looks like a secret; store it with SecretService.CreateSecret and name it in the binding's secrets")
		}
	case *structpb.Value_StructValue:
		fields := kind.StructValue.GetFields()
		for _, k := range sortedKeys(fields) {
			c.config(at+"."+k, fields[k])
		}
	case *structpb.Value_ListValue:
		for i, e := range kind.ListValue.GetValues() {
			c.config(fmt.Sprintf("%s[%d]", at, i), e)
		}
	}
}

func looksSecret(s string) bool {
	return strings.HasPrefix(s, "whsec_") || strings.HasPrefix(s, "whsk_") || strings.Contains(s, "-----BEGIN ")
}

func (c *checker) retryPolicy(field string, r *grapnelv1.RetryPolicy) {
	if len(r.Schedule) > 0 && usesBackoff(r) {
		c.add(field+".schedule", "retry_policy.exclusive",
			"schedule and the backoff fields (initial_backoff, max_backoff, multiplier) exclude each other; clear one of them")
	}
	if len(r.Schedule) > 99 {
		c.add(field+".schedule", "repeated.max_items", "has %d delays; want at most 99", len(r.Schedule))
	}
	for i, d := range r.Schedule {
		c.duration(fmt.Sprintf("%s.schedule[%d]", field, i), d, 0, 24*time.Hour)
	}
	c.number(field+".max_attempts", float64(r.MaxAttempts), 1, 100)
	if usesBackoff(r) && len(r.Schedule) == 0 {
		c.duration(field+".initial_backoff", r.InitialBackoff, time.Second, time.Hour)
		c.duration(field+".max_backoff", r.MaxBackoff, time.Second, 24*time.Hour)
		c.number(field+".multiplier", r.Multiplier, 1, 10)
		if r.InitialBackoff.AsDuration() > r.MaxBackoff.AsDuration() {
			c.add(field+".initial_backoff", "retry_policy.order", "%v is longer than max_backoff, %v",
				r.InitialBackoff.AsDuration(), r.MaxBackoff.AsDuration())
		}
	}
	c.number(field+".jitter", r.GetJitter(), 0, 1)
	c.duration(field+".max_age", r.MaxAge, time.Minute, 30*24*time.Hour)
}

func (c *checker) duration(field string, d *durationpb.Duration, least, most time.Duration) {
	if err := d.CheckValid(); err != nil {
		c.add(field, "duration", "is not a valid duration")
	} else if v := d.AsDuration(); v < least || v > most {
		c.add(field, "duration.range", "%v is out of range; want %v to %v", v, least, most)
	}
}

func (c *checker) number(field string, v, least, most float64) {
	if math.IsNaN(v) || v < least || v > most {
		c.add(field, "range", "%v is out of range; want %v to %v", v, least, most)
	}
}

func (c *checker) quota(field string, q *grapnelv1.Quota) {
	const most = math.MaxInt32
	c.number(field+".max_subscriptions", float64(q.GetMaxSubscriptions()), 0, most)
	c.number(field+".max_publish_rate", float64(q.GetMaxPublishRate()), 0, most)
	c.number(field+".max_event_bytes", float64(q.GetMaxEventBytes()), 0, 1<<20)
	c.number(field+".max_open_deliveries", float64(q.GetMaxOpenDeliveries()), 0, most)
	for _, r := range []struct {
		name string
		d    *durationpb.Duration
	}{
		{"retention", q.GetRetention()}, {"dead_letter_retention", q.GetDeadLetterRetention()},
		{"payload_retention", q.GetPayloadRetention()}, {"attempt_retention", q.GetAttemptRetention()},
	} {
		if r.d != nil {
			c.duration(field+"."+r.name, r.d, time.Hour, 90*24*time.Hour)
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
