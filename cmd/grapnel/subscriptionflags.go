package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// subscriptionFlags are what create and update set.
type subscriptionFlags struct {
	file, displayName, uri, condition    string
	deadLetter                           string
	name                                 func(id string) (string, error) // of a subscription
	types, labels, headers               []string
	headerTemplates, eventHeaders        []string
	signers                              signerFlags
	payload, contentType                 string
	gzip                                 bool
	transport, transportConfig           string
	transportSecrets                     []string
	transformer, transformerConfig       string
	transformerSecrets                   []string
	attemptTimeout, maxAge, disableAfter time.Duration
	initialBackoff, maxBackoff           time.Duration
	multiplier, jitter, maxRate          float64
	schedule                             []string
	maxAttempts, maxInFlight             int32
	ignoreGone, ordered                  bool
	onExhausted                          string
	batching                             bool
	batchEvents, batchBytes              int32
	batchWait                            time.Duration
	batchFormat                          string
}

func (f *subscriptionFlags) register(cmd *cobra.Command, c *cli) {
	flags := cmd.Flags()
	flags.StringVarP(&f.file, "file", "f", "", "content as YAML or JSON in a `file`, or - for standard input; flags go on top")
	flags.StringVar(&f.displayName, "display-name", "", "name for people")
	flags.StringVar(&f.uri, "uri", "", "where to deliver")
	flags.StringSliceVar(&f.types, "type", nil, "event type `globs` such as order.*; none matches every type that is published; grapnel.* are operational events")
	flags.StringVar(&f.condition, "condition", "", "CEL expression over event; empty is true")
	flags.StringVar(&f.deadLetter, "dead-letter", "", "`subscription` that gets what ends here without success")
	must(cmd.RegisterFlagCompletionFunc("dead-letter", completeSubscriptions(c)))
	f.name = func(id string) (string, error) { return c.name(subscriptions, id) }
	flags.StringArrayVarP(&f.labels, "label", "l", nil, "label as `name=value`; repeat for more")
	flags.StringArrayVarP(&f.headers, "header", "H", nil, "static header as `name=value`; repeat for more; not for secrets")
	flags.StringArrayVar(&f.headerTemplates, "header-template", nil, "header made of each event as `name=text`, such as x-tenant={event.attributes.tenant}; repeat for more")
	flags.StringSliceVar(&f.eventHeaders, "allow-event-header", nil, "`names` of headers that events may bring themselves")
	f.signers.register(cmd, c)
	flags.StringVar(&f.payload, "payload", "", "`form` of the body: raw, the default, standard-webhooks or cloudevents")
	flags.BoolVar(&f.gzip, "gzip", false, "compress the body; signatures cover the compressed bytes")
	flags.StringVar(&f.contentType, "content-type", "", "media `type` to send instead of the event's; with --payload raw only")
	flags.BoolVar(&f.batching, "batching", false, "several deliveries in one request, with the defaults of the flags that follow")
	countVar(flags, &f.batchEvents, "batch-events", 0, 0, 0, "most deliveries in one request; default 100")
	countVar(flags, &f.batchBytes, "batch-bytes", 0, 0, 0, "most bytes of payloads and attributes in one request; default 262144")
	spanVar(flags, &f.batchWait, "batch-wait", 0, 0, 0, "longest time that a delivery waits for others; default 1s")
	flags.StringVar(&f.batchFormat, "batch-format", "", "`form` of the body: json-array, the default, ndjson or cloudevents")
	flags.StringVar(&f.transport, "transport", "", "plugin that sends; default by the scheme of --uri")
	flags.StringVar(&f.transportConfig, "transport-config", "", "its settings: JSON or `@file`")
	flags.StringArrayVar(&f.transportSecrets, "transport-secret", nil, "secret for the transport as `slot=ID`")
	flags.StringVar(&f.transformer, "transformer", "", "plugin that makes the body of the event: cel, jq, template, javascript or one of yours; empty is none")
	flags.StringVar(&f.transformerConfig, "transformer-config", "", "its settings: JSON or `@file`")
	flags.StringArrayVar(&f.transformerSecrets, "transformer-secret", nil, "secret for the transformer as `slot=ID`")
	spanVar(flags, &f.attemptTimeout, "attempt-timeout", 0, 0, 0, "longest time one attempt may take; default 15s")
	flags.StringSliceVar(&f.schedule, "schedule", nil, "`delays` before attempt 2, 3, … such as 5s,5m,1h")
	spanVar(flags, &f.initialBackoff, "initial-backoff", 0, 0, 0, "first delay, instead of --schedule")
	spanVar(flags, &f.maxBackoff, "max-backoff", 0, 0, 0, "longest delay, instead of --schedule")
	flags.Float64Var(&f.multiplier, "backoff-multiplier", 0, "growth of the delay, instead of --schedule")
	flags.Float64Var(&f.jitter, "jitter", 0.2, "random spread of delays, 0 to 1")
	countVar(flags, &f.maxAttempts, "max-attempts", 0, 0, 0, "attempts in all")
	spanVar(flags, &f.maxAge, "max-age", 0, 0, 0, "no attempt starts later than this after the event; default 96h")
	countVar(flags, &f.maxInFlight, "max-in-flight", 0, 0, 0, "most attempts at a time; default 16")
	flags.Float64Var(&f.maxRate, "max-rate", 0, "most attempts started per second; 0 is no limit")
	flags.BoolVar(&f.ordered, "ordered", false, "deliver events with one ordering key one after another, as they were accepted")
	flags.StringVar(&f.onExhausted, "on-exhausted", "", "`what` becomes of an ordering key when a delivery has failed for good: skip, the default, goes on; block waits")
	spanVar(flags, &f.disableAfter, "disable-after", 0, 0, 0, "disable after failing for this long; 0s never, default 120h")
	flags.BoolVar(&f.ignoreGone, "ignore-gone", false, "keep it enabled when the target answers 410 Gone")
	must(cmd.RegisterFlagCompletionFunc("payload", fixed("raw", "standard-webhooks", "cloudevents")))
	must(cmd.RegisterFlagCompletionFunc("batch-format", fixed(batchFormats()...)))
	must(cmd.RegisterFlagCompletionFunc("on-exhausted", fixed("skip", "block")))
	must(cmd.RegisterFlagCompletionFunc("transport", completePlugins(c)))
	must(cmd.RegisterFlagCompletionFunc("transformer", completePlugins(c)))
	must(cmd.MarkFlagFilename("file", "yaml", "yml", "json"))
}

// field is one flag, the path of what it sets, and how.
type field struct {
	flag, path string
	set        func() error
}

// apply puts the file and the flags that were given into s and returns the paths of what it set, "*" when
// there was a file. Signers without a file are those that the flags name; to change stored ones, merge.
func (f *subscriptionFlags) apply(cmd *cobra.Command, c *cli, parent string, s *grapnelv1.Subscription) ([]string, error) {
	if err := excludes(cmd, "schedule", "a schedule is the delays themselves", "initial-backoff", "max-backoff", "backoff-multiplier"); err != nil {
		return nil, err
	}
	if cmd.Flags().Changed("batching") && !f.batching {
		if err := excludes(cmd, "batching", "false leaves nothing to set", "batch-events", "batch-bytes", "batch-wait", "batch-format"); err != nil {
			return nil, err
		}
	}
	var paths []string
	if f.file != "" {
		if err := c.readMessage(f.file, s); err != nil {
			return nil, err
		}
		paths = []string{"*"}
	}
	for _, field := range slices.Concat(f.plain(s), f.shape(s), f.together(s), f.transportFields(c, parent, s), f.transformerFields(c, parent, s), f.retry(cmd, s)) {
		if !cmd.Flags().Changed(field.flag) {
			continue
		}
		if err := field.set(); err != nil {
			return nil, err
		}
		if f.file == "" && !slices.Contains(paths, field.path) {
			paths = append(paths, field.path)
		}
	}
	if f.signers.given() {
		if err := f.signers.read(c, parent); err != nil {
			return nil, err
		}
		s.Signers = f.signers.merge(s.GetSigners())
		if f.file == "" {
			paths = append(paths, signersPath)
		}
	}
	return paths, nil
}

// sameName refuses a file about another subscription than the one that is named.
func (f *subscriptionFlags) sameName(s *grapnelv1.Subscription, name string) error {
	if given := s.GetName(); given != "" && given != name {
		return usagef("--file %s is about %s, and the command about %s; name the same one, or take name out of the file", f.file, given, name)
	}
	return nil
}

func (f *subscriptionFlags) plain(s *grapnelv1.Subscription) []field {
	failure := func() *grapnelv1.FailurePolicy {
		if s.FailurePolicy == nil {
			s.FailurePolicy = &grapnelv1.FailurePolicy{}
		}
		return s.FailurePolicy
	}
	pairs := func(flag string, words []string, to *map[string]string) func() error {
		return func() (err error) { *to, err = parsePairs(flag, words); return err }
	}
	return []field{
		{"display-name", "display_name", func() error { s.DisplayName = f.displayName; return nil }},
		{"uri", "uri", func() error { s.Uri = f.uri; return nil }},
		{"type", "event_types", func() error { s.EventTypes = nonEmpty(f.types); return nil }},
		{"condition", "condition", func() error { s.Condition = f.condition; return nil }},
		{"dead-letter", "dead_letter", func() (err error) {
			if s.DeadLetter = f.deadLetter; f.deadLetter != "" {
				s.DeadLetter, err = f.name(f.deadLetter)
			}
			return err
		}},
		{"label", "labels", pairs("label", f.labels, &s.Labels)},
		{"header", "headers", pairs("header", f.headers, &s.Headers)},
		{"header-template", "header_templates", pairs("header-template", f.headerTemplates, &s.HeaderTemplates)},
		{"allow-event-header", "allowed_event_headers", func() error { s.AllowedEventHeaders = nonEmpty(f.eventHeaders); return nil }},
		{"attempt-timeout", "attempt_timeout", func() error { s.AttemptTimeout = durationpb.New(f.attemptTimeout); return nil }},
		{"max-in-flight", "max_in_flight", func() error { s.MaxInFlight = f.maxInFlight; return nil }},
		{"max-rate", "max_rate", func() error { s.MaxRate = f.maxRate; return nil }},
		{"ordered", "ordered", func() error { s.Ordered = f.ordered; return nil }},
		{"on-exhausted", "on_exhausted", func() (err error) { s.OnExhausted, err = onExhausted(f.onExhausted); return err }},
		{"disable-after", "failure_policy.disable_after", func() error { failure().DisableAfter = durationpb.New(f.disableAfter); return nil }},
		{"ignore-gone", "failure_policy.ignore_gone", func() error { failure().IgnoreGone = f.ignoreGone; return nil }},
	}
}

// transportFields: a change of one flag of the transport replaces that part only.
func (f *subscriptionFlags) transportFields(c *cli, parent string, s *grapnelv1.Subscription) []field {
	transport := func() *grapnelv1.PluginBinding {
		if s.Transport == nil {
			s.Transport = &grapnelv1.PluginBinding{}
		}
		return s.Transport
	}
	return []field{
		{"transport", "transport.plugin", func() error { transport().Plugin = pluginName(f.transport); return nil }},
		{"transport-config", "transport.config", func() (err error) {
			transport().Config, err = c.readStruct("transport-config", f.transportConfig)
			return err
		}},
		{"transport-secret", "transport.secrets", func() (err error) {
			transport().Secrets, err = secretSlots("transport-secret", parent, f.transportSecrets)
			return err
		}},
	}
}

// transformerFields: as transportFields; an empty name takes the transformer away.
func (f *subscriptionFlags) transformerFields(c *cli, parent string, s *grapnelv1.Subscription) []field {
	transformer := func() *grapnelv1.PluginBinding {
		if s.Transformer == nil {
			s.Transformer = &grapnelv1.PluginBinding{}
		}
		return s.Transformer
	}
	plugin := field{"transformer", "transformer.plugin", func() error { transformer().Plugin = pluginName(f.transformer); return nil }}
	if f.transformer == "" {
		plugin = field{"transformer", "transformer", func() error { s.Transformer = nil; return nil }}
	}
	return []field{
		plugin,
		{"transformer-config", "transformer.config", func() (err error) {
			transformer().Config, err = c.readStruct("transformer-config", f.transformerConfig)
			return err
		}},
		{"transformer-secret", "transformer.secrets", func() (err error) {
			transformer().Secrets, err = secretSlots("transformer-secret", parent, f.transformerSecrets)
			return err
		}},
	}
}

// usualSlot is what a signer calls its only key.
const usualSlot = "key"

// secretSlots reads words such as ID and slot=ID into names of secrets by slot.
func secretSlots(flag, parent string, words []string) (map[string]string, error) {
	slots := map[string]string{}
	for _, word := range nonEmpty(words) {
		slot, id, ok := strings.Cut(word, "=")
		if !ok {
			slot, id = usualSlot, word
		}
		if !strings.Contains(id, "/") {
			id = parent + "/secrets/" + id
		}
		if _, twice := slots[slot]; twice {
			return nil, usagef("--%s: slot %q is given twice; each slot takes one secret", flag, slot)
		}
		slots[slot] = id
	}
	return slots, nil
}

// shape: what the body is made of.
func (f *subscriptionFlags) shape(s *grapnelv1.Subscription) []field {
	shape := func() *grapnelv1.PayloadShape {
		if s.PayloadShape == nil {
			s.PayloadShape = &grapnelv1.PayloadShape{}
		}
		return s.PayloadShape
	}
	const in = "payload_shape."
	return []field{
		{"payload", in + "format", func() (err error) { shape().Format, err = payloadFormat(f.payload); return err }},
		{"gzip", in + "compression", func() error {
			shape().Compression = grapnelv1.PayloadShape_COMPRESSION_NONE
			if f.gzip {
				shape().Compression = grapnelv1.PayloadShape_COMPRESSION_GZIP
			}
			return nil
		}},
		{"content-type", in + "content_type", func() error { shape().ContentType = f.contentType; return nil }},
	}
}

// together: deliveries that share a request.
func (f *subscriptionFlags) together(s *grapnelv1.Subscription) []field {
	batching := func() *grapnelv1.Batching {
		if s.Batching == nil {
			s.Batching = &grapnelv1.Batching{}
		}
		return s.Batching
	}
	const in = "batching."
	return []field{
		{"batching", "batching", func() error {
			if s.Batching = nil; f.batching {
				batching()
			}
			return nil
		}},
		{"batch-events", in + "max_events", func() error { batching().MaxEvents = f.batchEvents; return nil }},
		{"batch-bytes", in + "max_bytes", func() error { batching().MaxBytes = f.batchBytes; return nil }},
		{"batch-wait", in + "max_wait", func() error { batching().MaxWait = durationpb.New(f.batchWait); return nil }},
		{"batch-format", in + "format", func() (err error) { batching().Format, err = batchFormat(f.batchFormat); return err }},
	}
}

func batchFormats() []string { return []string{"json-array", "ndjson", "cloudevents"} }

// batchFormat reads --batch-format; empty is the default.
func batchFormat(text string) (grapnelv1.Batching_Format, error) {
	switch text {
	case "":
		return grapnelv1.Batching_FORMAT_UNSPECIFIED, nil
	case "json-array":
		return grapnelv1.Batching_FORMAT_JSON_ARRAY, nil
	case "ndjson":
		return grapnelv1.Batching_FORMAT_NDJSON, nil
	case "cloudevents":
		return grapnelv1.Batching_FORMAT_CLOUDEVENTS, nil
	}
	return 0, usagef("--batch-format %s: must be json-array, ndjson or cloudevents%s", text, didYouMean(text, batchFormats()))
}

// payloadFormat reads --payload; empty is the default.
func payloadFormat(text string) (grapnelv1.PayloadShape_Format, error) {
	switch text {
	case "":
		return grapnelv1.PayloadShape_FORMAT_UNSPECIFIED, nil
	case "raw":
		return grapnelv1.PayloadShape_FORMAT_RAW, nil
	case "standard-webhooks":
		return grapnelv1.PayloadShape_FORMAT_STANDARD_WEBHOOKS, nil
	case "cloudevents":
		return grapnelv1.PayloadShape_FORMAT_CLOUDEVENTS, nil
	}
	return 0, usagef("--payload %s: must be raw, standard-webhooks or cloudevents%s", text, didYouMean(text, []string{"raw", "standard-webhooks", "cloudevents"}))
}

// onExhausted reads --on-exhausted; empty is the default.
func onExhausted(text string) (grapnelv1.Subscription_OnExhausted, error) {
	switch text {
	case "":
		return grapnelv1.Subscription_ON_EXHAUSTED_UNSPECIFIED, nil
	case "skip":
		return grapnelv1.Subscription_ON_EXHAUSTED_SKIP, nil
	case "block":
		return grapnelv1.Subscription_ON_EXHAUSTED_BLOCK, nil
	}
	return 0, usagef("--on-exhausted %s: must be skip or block%s", text, didYouMean(text, []string{"skip", "block"}))
}

func pluginName(id string) string {
	if id == "" || strings.Contains(id, "/") {
		return id
	}
	return "plugins/" + id
}

// retry: a schedule and backoff exclude each other, so that giving either replaces the whole of both.
func (f *subscriptionFlags) retry(cmd *cobra.Command, s *grapnelv1.Subscription) []field {
	policy := func() *grapnelv1.RetryPolicy {
		if s.RetryPolicy == nil {
			s.RetryPolicy = &grapnelv1.RetryPolicy{}
		}
		return s.RetryPolicy
	}
	const in = "retry_policy."
	fields := []field{
		{"max-attempts", in + "max_attempts", func() error { policy().MaxAttempts = f.maxAttempts; return nil }},
		{"jitter", in + "jitter", func() error { policy().Jitter = &f.jitter; return nil }},
		{"max-age", in + "max_age", func() error { policy().MaxAge = durationpb.New(f.maxAge); return nil }},
		{"schedule", in + "schedule", func() error { return f.setSchedule(policy()) }},
		{"initial-backoff", in + "initial_backoff", func() error { policy().InitialBackoff = durationpb.New(f.initialBackoff); return nil }},
		{"max-backoff", in + "max_backoff", func() error { policy().MaxBackoff = durationpb.New(f.maxBackoff); return nil }},
		{"backoff-multiplier", in + "multiplier", func() error { policy().Multiplier = f.multiplier; return nil }},
	}
	backoff := []string{"initial-backoff", "max-backoff", "backoff-multiplier"}
	reset := func(flag string, paths ...string) {
		for _, path := range paths {
			fields = append(fields, field{flag, in + path, func() error { policy(); return nil }})
		}
	}
	reset("schedule", "initial_backoff", "max_backoff", "multiplier")
	for _, flag := range backoff {
		reset(flag, "schedule")
	}
	// The number of attempts follows the delays unless it is given too.
	if slices.ContainsFunc(append(backoff, "schedule"), cmd.Flags().Changed) && !cmd.Flags().Changed("max-attempts") {
		reset("schedule", "max_attempts")
		for _, flag := range backoff {
			reset(flag, "max_attempts")
		}
	}
	return fields
}

func (f *subscriptionFlags) setSchedule(p *grapnelv1.RetryPolicy) error {
	p.Schedule = nil
	for _, text := range nonEmpty(f.schedule) {
		d, err := time.ParseDuration(strings.TrimSpace(text))
		if err != nil || d < 0 {
			return usagef("--schedule: %q is not a duration such as 5s", text)
		}
		p.Schedule = append(p.Schedule, durationpb.New(d))
	}
	return nil
}

// nonEmpty drops empty words, so that an empty flag clears.
func nonEmpty(words []string) []string {
	return slices.DeleteFunc(slices.Clone(words), func(w string) bool { return w == "" })
}

// readFile reads what --file names; - is standard input.
func (c *cli) readFile(path string) (text []byte, err error) {
	if path == "-" {
		text, err = c.readValue("-")
	} else {
		text, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("read --file: %w", err)
	}
	return text, nil
}

// readMessage reads YAML or JSON into m; unknown fields are refused by name.
func (c *cli) readMessage(path string, m proto.Message) error {
	text, err := c.readFile(path)
	if err != nil {
		return err
	}
	if !json.Valid(text) {
		tree, err := oneDocument(text)
		if err != nil {
			return usagef("%s: %w", path, err)
		}
		if text, err = json.Marshal(tree); err != nil {
			return usagef("%s: %w", path, err)
		}
	}
	if err := decodeJSON(text, m); err != nil {
		return usagef("%s: %w", path, err)
	}
	return nil
}

// protoText is protojson's complaint without the library's own prefix, whose blank varies.
func protoText(err error) string {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	return strings.TrimPrefix(text, "proto: ")
}

// withoutPosition drops the line and column of a text that nobody has seen.
func withoutPosition(text string) string {
	before, after, found := strings.Cut(text, "(line ")
	_, rest, closed := strings.Cut(after, "): ")
	if !found || !closed {
		return text
	}
	return before + rest
}

// readStruct reads a JSON object from a flag; empty is none.
func (c *cli) readStruct(flag, value string) (*structpb.Struct, error) {
	if value == "" {
		return nil, nil
	}
	text, err := c.readValue(value)
	if err != nil {
		return nil, fmt.Errorf("read --%s: %w", flag, err)
	}
	s := &structpb.Struct{}
	text = bytes.TrimSpace(text)
	if err := protojson.Unmarshal(text, s); err != nil {
		var tree map[string]any
		if broken := json.Unmarshal(text, &tree); !json.Valid(text) && broken != nil {
			return nil, usagef("--%s: must be a JSON object: %w", flag, broken)
		}
		if jsonKind(text) != "an object" {
			return nil, usagef("--%s: must be a JSON object, not %s", flag, jsonKind(text))
		}
		return nil, usagef("--%s: must be a JSON object: %s", flag, protoText(err))
	}
	return s, nil
}
