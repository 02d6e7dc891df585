package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func configCases() []Case {
	const g = GroupConfig
	return []Case{
		{ID: "CF-01", Group: g, Title: "Describe answers within 2 s, and the same every time", run: describeStable,
			Protects: "the server reads it once, and compares it with the manifest"},
		{ID: "CF-02", Group: g, Title: "Describe is well-formed: ids, traits, headers, slots, capabilities", run: describeWellFormed,
			Protects: "a plugin that the server refuses as a whole"},
		{ID: "CF-03", Group: g, Title: "config schemas are whole JSON Schemas (2020-12), and the examples pass them", run: schemas,
			Protects: "checks and forms that are made from the schema"},
		{ID: "CF-04", Group: g, Title: "an instance with the example's config is taken", run: exampleTaken,
			Protects: "people who copy the example"},
		{ID: "CF-05", Group: g, Title: "an unknown field is refused, with its pointer", run: unknownField,
			Protects: "a misspelt setting is not silently its default"},
		{ID: "CF-06", Group: g, Title: "a value of the wrong type is refused, with its pointer", run: wrongType,
			Protects: "people see which setting is wrong"},
		{ID: "CF-07", Group: g, Title: "a missing required field is refused, with its pointer", run: missingField,
			Protects: "people see which setting is missing"},
		{ID: "CF-08", Group: g, Title: "a config that is no JSON object is refused, not an error of the call", run: brokenConfig,
			Protects: "a bad config reaches its author and not the operator's log"},
		{ID: "CF-09", Group: g, Title: "an unknown kind is refused, not an error of the call", run: unknownKind,
			Protects: "a plugin that was replaced by one with fewer kinds"},
		{ID: "CF-10", Group: g, Title: "no value of a secret shows in a diagnostic", run: secretsInDiagnostics,
			Protects: "diagnostics are shown to callers and logged"},
		{ID: "CF-11", Group: g, Title: "no value of a secret shows in logs, output, arguments or environment", run: secretsInLogs,
			Protects: "logs are read by more people than secrets are for"},
		{ID: "CF-12", Group: g, Title: "an unknown secret slot and a missing required one are refused, with their pointer", run: slotPointers,
			Protects: "people see which secret is wrong"},
		{ID: "CF-13", Group: g, Title: "Configure answers one status per instance, in order; a bad one keeps no other out", run: statusesInOrder,
			Protects: "one tenant's mistake does not stop the others"},
		{ID: "CF-14", Group: g, Title: "the same instance may be configured again", run: idempotent,
			Protects: "the server repeats a Configure whose answer it did not get"},
		{ID: "CF-15", Group: g, Title: "an older generation is refused, and the newer serves on", run: staleGeneration,
			Protects: "a late Configure does not bring back old settings or a revoked key"},
		{ID: "CF-16", Group: g, Title: "a new generation that is refused leaves the old one serving", run: badGeneration,
			Protects: "a mistaken change does not stop deliveries"},
		{ID: "CF-17", Group: g, Title: "both generations serve until the older is removed", run: bothGenerations,
			Protects: "attempts under way while a change is made"},
		{ID: "CF-18", Group: g, Title: "a removed instance is gone; unknown refs are ignored", run: removeFrees,
			Protects: "a deleted subscription's key is not used any more"},
		{ID: "CF-19", Group: g, Title: "takes 1,000 instances: 100 within 10 s, and 100 KiB of memory for each", run: manyInstances,
			Protects: "many tenants share one process"},
		{ID: "CF-20", Group: g, Title: "Configure while attempts run loses none", run: configureUnderLoad,
			Protects: "changes happen all the time"},
		{ID: "CF-21", Group: g, Title: "two live versions of a secret are taken; an expired one is not used", run: rotatedSecrets,
			Protects: "rotation of keys without a gap"},
		{ID: "CF-22", Group: g, Title: "Validate configures nothing", run: validateIsPure,
			Protects: "a check of a subscription must not become one"},
		{ID: "CF-23", Group: g, Title: "unknown fields in requests are ignored", run: laterMinor,
			Protects: "servers of a later minor"},
		{ID: "CF-29", Group: g, Title: "what an instance held is given back once it is removed", run: givesBack,
			Protects: "each change of a subscription or a secret makes a new generation: what stays behind piles up"},
	}
}

func describeStable(t *trial) error {
	var first *pluginv1.DescribeResponse
	for range 2 {
		ses, err := t.start(launch{})
		if err != nil {
			return err
		}
		if _, err := ses.describe(t.ctx); err != nil { // also connects, which is not the call's time
			return err
		}
		for _, minor := range []uint32{hostMinor, 0, 99, hostMinor} {
			began := time.Now()
			desc, err := ses.plugin.Describe(t.ctx, &pluginv1.DescribeRequest{HostVersion: "conformance", HostProtocolMinor: minor})
			if err != nil {
				return fmt.Errorf("describe to a host of minor %d: %w", minor, err)
			}
			if took := time.Since(began); took > describeLimit {
				return latef("it took %v", took.Round(time.Millisecond))
			}
			if first == nil {
				first = desc
			}
			if minor == hostMinor && !proto.Equal(first, desc) {
				return errors.New("two answers differ")
			}
		}
	}
	return nil
}

func describeWellFormed(t *trial) error {
	d := t.s.described
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if d.GetName() == "" {
		wrong("name is empty")
	}
	if !regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+-]*$`).MatchString(d.GetVersion()) {
		wrong("version is %q, want a semantic one such as 1.0.0", d.GetVersion())
	}
	if len(d.GetKinds()) == 0 {
		wrong("it offers no kind")
	}
	seen := map[string]bool{}
	var signs, carries, transforms, formats bool
	for _, k := range d.GetKinds() {
		if !regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`).MatchString(k.GetId()) {
			wrong("kind %q: the id must match ^[a-z][a-z0-9-]{0,62}$", k.GetId())
		}
		if seen[k.GetId()] {
			wrong("kind %q is offered twice", k.GetId())
		}
		seen[k.GetId()] = true
		signs, carries = signs || k.GetSigner() != nil, carries || k.GetTransport() != nil
		transforms = transforms || k.GetTransformer() != nil
		for _, complaint := range kindFaults(k) {
			wrong("kind %q: %s", k.GetId(), complaint)
		}
		for _, slot := range k.GetSecretSlots() {
			formats = formats || slot.GetFormat() != ""
		}
	}
	can := t.s.can
	if signs && !can("sign.stream") {
		wrong(`it offers a signer without the capability "sign.stream"`)
	}
	if carries && !can("attempt.stream") && !can("attempt.unary") {
		wrong(`it offers a transport without the capability "attempt.stream" or "attempt.unary"`)
	}
	if transforms && !can("transform.stream") {
		wrong(`it offers a transformer without the capability "transform.stream"`)
	}
	if formats && !can("secret.prepare") {
		wrong(`a secret slot has a format, but the capability "secret.prepare" is not there`)
	}
	return errors.Join(errs...)
}

func kindFaults(k *pluginv1.Kind) []string {
	var faults []string
	if k.GetSigner() == nil && k.GetTransport() == nil && k.GetTransformer() == nil {
		faults = append(faults, "it is neither signer nor transport nor transformer")
	}
	headers := slices.Concat(k.GetSigner().GetEmitsHeaders(), k.GetTransport().GetMayAddHeaders())
	for _, h := range headers {
		if !headerName(h) {
			faults = append(faults, fmt.Sprintf("header %q is not a lower-case field name", h))
		}
	}
	for _, s := range k.GetTransport().GetUriSchemes() {
		if !regexp.MustCompile(`^[a-z][a-z0-9+.-]*$`).MatchString(s) {
			faults = append(faults, fmt.Sprintf("URI scheme %q is not a lower-case scheme without colon", s))
		}
	}
	slots := map[string]bool{}
	for _, s := range k.GetSecretSlots() {
		if s.GetName() == "" || slots[s.GetName()] {
			faults = append(faults, fmt.Sprintf("secret slot %q has no name, or that of another", s.GetName()))
		}
		slots[s.GetName()] = true
		if len(s.GetAlgorithms()) > 0 && s.GetFormat() == "" {
			faults = append(faults, fmt.Sprintf("secret slot %q has algorithms and no format, so that PrepareSecret is never asked", s.GetName()))
		}
	}
	return faults
}

// headerName reports whether name is a lower-case field name (RFC 9110, section 5.1).
func headerName(name string) bool {
	return regexp.MustCompile("^[a-z0-9!#$%&'*+.^_`|~-]+$").MatchString(name)
}

func exampleTaken(t *trial) error {
	return t.each("kind", any1, func(u *subject) error {
		switch {
		case u.unusable == "":
			return nil
		case u.excused:
			return skipf("it needs a fixture: %s", u.unusable)
		}
		return errors.New(u.unusable)
	})
}

// atPointer reports whether a diagnostic is about a field: by the field's pointer, or by its parent's and
// the field's name in the text, as validators of JSON Schema put it.
func atPointer(d *pluginv1.Diagnostic, parent, field string) bool {
	return d.GetPointer() == parent+"/"+escapePointer(field) || d.GetPointer() == parent && strings.Contains(d.GetSummary(), field)
}

// refusedAt checks that an instance with this config is refused for the field. It asks Validate.
func (ses *session) refusedAt(u *subject, config []byte, field, what string) error {
	in := ses.instance(u, "")
	in.ConfigJson = config
	ds, err := ses.validate(in)
	if err != nil {
		return err
	}
	found := complaints(ds)
	if len(found) == 0 {
		return fmt.Errorf("%s is accepted", what)
	}
	if !slices.ContainsFunc(found, func(d *pluginv1.Diagnostic) bool { return atPointer(d, "/config", field) }) {
		return fmt.Errorf("%s is refused without the pointer %q: %s", what, "/config/"+escapePointer(field), diagnosticsText(found))
	}
	for _, d := range found {
		if d.GetSummary() == "" || d.GetCode() == "" {
			return fmt.Errorf("%s is refused without a code and a summary", what)
		}
	}
	return nil
}

// eachConfig runs f with a process and the kind's config as a tree.
func (t *trial) eachConfig(f func(*session, *subject, *shape, map[string]any) error) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		sh, err := shapeOf(u.kind)
		if err != nil {
			return skipf("its schema cannot be read (see CF-03)")
		}
		tree := map[string]any{}
		if len(bytes.TrimSpace(u.config)) > 0 {
			dec := json.NewDecoder(bytes.NewReader(u.config))
			dec.UseNumber()
			if err := dec.Decode(&tree); err != nil {
				return skipf("its example cannot be read (see CF-03)")
			}
		}
		return f(ses, u, sh, tree)
	})
}

func unknownField(t *trial) error {
	return t.eachConfig(func(ses *session, u *subject, sh *shape, tree map[string]any) error {
		const field = "conformance_unknown"
		tree[field] = true
		if sh.valid(tree) {
			return skipf("its schema allows fields of any name")
		}
		return ses.refusedAt(u, marshalConfig(tree), field, "a field that the schema does not have")
	})
}

func wrongType(t *trial) error {
	return t.eachConfig(func(ses *session, u *subject, sh *shape, tree map[string]any) error {
		tried := false
		for _, field := range sh.fields() {
			for _, wrong := range []any{true, "conformance", json.Number("17"), []any{json.Number("1")}, map[string]any{"a": json.Number("1")}} {
				changed := withField(tree, field, wrong)
				if sh.valid(changed) || !sh.wrongType(field, wrong) {
					continue
				}
				tried = true
				if err := ses.refusedAt(u, marshalConfig(changed), field, fmt.Sprintf("%v for %q", wrong, field)); err != nil {
					return err
				}
				break
			}
		}
		if !tried {
			return skipf("it has no setting with a type")
		}
		return nil
	})
}

func missingField(t *trial) error {
	return t.eachConfig(func(ses *session, u *subject, sh *shape, tree map[string]any) error {
		if len(sh.required()) == 0 {
			return skipf("it has no required setting")
		}
		for _, field := range sh.required() {
			changed := withField(tree, field, nil)
			delete(changed, field)
			if err := ses.refusedAt(u, marshalConfig(changed), field, fmt.Sprintf("a config without the required %q", field)); err != nil {
				return err
			}
		}
		return nil
	})
}

func brokenConfig(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	deep := strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000)
	return t.each("kind", usable, func(u *subject) error {
		for name, config := range map[string]string{
			"text that is no JSON": "{not json", "an array": "[]", "a string": `"x"`, "two values": "{} {}",
			"bytes that are no text": "\xff\xfe\x00", "10,000 levels": deep,
		} {
			in := ses.instance(u, "")
			in.ConfigJson = []byte(config)
			ds, err := ses.validate(in)
			if err != nil {
				return fmt.Errorf("%s as config: %w", name, err)
			}
			if len(complaints(ds)) == 0 && name != "10,000 levels" { // that is an object, after all
				return fmt.Errorf("%s is accepted as config", name)
			}
		}
		return nil
	})
}

func unknownKind(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	in := &pluginv1.Instance{Id: "conformance/kind", Generation: 1, Ref: ses.nextRef(), Kind: "no-such-kind", Target: &pluginv1.Target{Method: "POST", Uri: signerTarget}}
	ds, err := ses.validate(in)
	if err != nil {
		return err
	}
	if err := mustSay(ds, codeUnknownKind); err != nil {
		return fmt.Errorf("validate: %w", err)
	}
	statuses, err := ses.configure(in)
	if err != nil {
		return err
	}
	if err := mustSay(statuses[0].GetDiagnostics(), codeUnknownKind); err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return nil
}

const (
	codeUnknownKind = "config.unknown_kind"
	codeStale       = "config.stale"
)

// mustSay reports with an error that nothing is refused, or not with the code.
func mustSay(ds []*pluginv1.Diagnostic, code string) error {
	found := complaints(ds)
	switch {
	case len(found) == 0:
		return fmt.Errorf("it is taken, want it refused with the code %s", code)
	case !slices.ContainsFunc(found, func(d *pluginv1.Diagnostic) bool { return d.GetCode() == code }):
		return fmt.Errorf("it is refused without the code %s: %s", code, diagnosticsText(found))
	}
	return nil
}

func slotPointers(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		at := func(in *pluginv1.Instance, slot, what string) error {
			statuses, err := ses.configure(in)
			if err != nil {
				return err
			}
			found := complaints(statuses[0].GetDiagnostics())
			if len(found) == 0 {
				return fmt.Errorf("%s is accepted", what)
			}
			if !slices.ContainsFunc(found, func(d *pluginv1.Diagnostic) bool { return atPointer(d, "/secrets", slot) }) {
				return fmt.Errorf("%s is refused without the pointer %q: %s", what, "/secrets/"+slot, diagnosticsText(found))
			}
			return nil
		}
		in := ses.instance(u, "")
		in.Secrets["conformance-unknown"] = &pluginv1.SecretVersions{Versions: []*pluginv1.SecretVersion{{Version: 1, Value: []byte("conformance")}}}
		if err := at(in, "conformance-unknown", "a secret for a slot that there is not"); err != nil {
			return err
		}
		for _, slot := range u.kind.GetSecretSlots() {
			if !slot.GetRequired() {
				continue
			}
			in := ses.instance(u, "")
			delete(in.Secrets, slot.GetName())
			if err := at(in, slot.GetName(), fmt.Sprintf("an instance without the required secret %q", slot.GetName())); err != nil {
				return err
			}
		}
		return nil
	})
}

func marshalConfig(tree map[string]any) []byte {
	text, err := json.Marshal(tree)
	if err != nil { // it was read from JSON
		panic(err)
	}
	return text
}

func withField(tree map[string]any, field string, value any) map[string]any {
	changed := make(map[string]any, len(tree)+1)
	for k, v := range tree {
		changed[k] = v
	}
	changed[field] = value
	return changed
}
