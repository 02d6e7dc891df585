package conformance

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// canary is a text that is in no plugin, to be looked for where no secret may be.
const canary = "canary5Rk2vQ9sLx7Tz1Wb"

func secretCases() []Case {
	const g = GroupConfig
	return []Case{
		{ID: "CF-24", Group: g, Title: "a secret that it makes is taken, and is another one each time", run: generatedSecrets,
			limit:    5 * time.Minute, // a score of kinds that make RSA keys
			Protects: "secrets made for tenants work, and nobody shares one"},
		{ID: "CF-25", Group: g, Title: "a malformed secret is refused with the pointer /value and no value", run: malformedSecrets,
			Protects: "a bad key is refused when it is stored, not at the first delivery"},
		{ID: "CF-26", Group: g, Title: "a prepared secret is canonical: prepared again it is the same", run: canonicalSecrets,
			Protects: "the server stores and compares the canonical form"},
		{ID: "CF-27", Group: g, Title: "PrepareSecret refuses an unknown kind, slot or algorithm by diagnostic", run: unknownSecretNames,
			Protects: "a mistake in a request is the caller's, not a fault of the plugin"},
		{ID: "CF-28", Group: g, Title: "the public half of a key holds nothing of the private one", run: publicHalves,
			Protects: "public keys are published to everyone"},
	}
}

// eachSlot runs f for the slots that PrepareSecret is asked about.
func (t *trial) eachSlot(makes bool, f func(*session, *subject, *pluginv1.SecretSlot) error) error {
	if !t.s.can("secret.prepare") {
		return skipf(`it does not have the capability "secret.prepare"`)
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	asked := func(u *subject) bool {
		return slices.ContainsFunc(u.kind.GetSecretSlots(), func(s *pluginv1.SecretSlot) bool {
			return s.GetFormat() != "" && (!makes || len(s.GetAlgorithms()) > 0)
		})
	}
	what := "secret slot with a format"
	if makes {
		what = "secret slot with algorithms"
	}
	return t.each(what, asked, func(u *subject) error {
		for _, slot := range u.kind.GetSecretSlots() {
			if slot.GetFormat() == "" || makes && len(slot.GetAlgorithms()) == 0 {
				continue
			}
			if err := f(ses, u, slot); err != nil {
				return fmt.Errorf("slot %s: %w", slot.GetName(), err)
			}
		}
		return nil
	})
}

// makeSecret has the plugin make a value.
func (ses *session) makeSecret(k *pluginv1.Kind, slot, algorithm string) (*pluginv1.PrepareSecretResponse, error) {
	resp, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: k.GetId(), Slot: slot, Algorithm: algorithm})
	if err != nil {
		return nil, err
	}
	if found := complaints(resp.GetDiagnostics()); len(found) > 0 {
		return nil, fmt.Errorf("algorithm %q: it makes no value: %s", algorithm, diagnosticsText(found))
	}
	if len(resp.GetValue()) == 0 {
		return nil, fmt.Errorf("algorithm %q: the value is empty", algorithm)
	}
	return resp, nil
}

// madeSecrets are values that cases share, since some take a second to make.
type madeSecrets struct {
	mu   sync.Mutex // guards made
	made map[string]*madeSecret
}

type madeSecret struct {
	mu   sync.Mutex // held while it is made, which callLimit bounds
	resp *pluginv1.PrepareSecretResponse
}

// sharedSecret is makeSecret, done once in a run. What fails for one case is tried again for the next, which has time of
// its own.
func (ses *session) sharedSecret(k *pluginv1.Kind, slot, algorithm string) (*pluginv1.PrepareSecretResponse, error) {
	m := &ses.t.s.made
	key := k.GetId() + "/" + slot + "/" + algorithm
	m.mu.Lock()
	if m.made == nil {
		m.made = map[string]*madeSecret{}
	}
	one := m.made[key]
	if one == nil {
		one = &madeSecret{}
		m.made[key] = one
	}
	m.mu.Unlock()
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.resp != nil {
		return one.resp, nil
	}
	resp, err := ses.makeSecret(k, slot, algorithm)
	if err == nil {
		one.resp = resp
	}
	return resp, err
}

func generatedSecrets(t *trial) error {
	return t.eachSlot(true, func(ses *session, u *subject, slot *pluginv1.SecretSlot) error {
		if _, err := ses.makeSecret(u.kind, slot.GetName(), ""); err != nil {
			return err
		}
		for _, algorithm := range slot.GetAlgorithms() {
			first, err := ses.sharedSecret(u.kind, slot.GetName(), algorithm)
			if err != nil {
				return err
			}
			second, err := ses.makeSecret(u.kind, slot.GetName(), algorithm)
			if err != nil {
				return err
			}
			if bytes.Equal(first.GetValue(), second.GetValue()) {
				return fmt.Errorf("algorithm %q: two values are the same", algorithm)
			}
			if u.unusable != "" {
				continue
			}
			in := ses.instance(u, "")
			in.Secrets[slot.GetName()] = versions(first.GetValue(), nil, signTime())
			if err := ses.take(in); err != nil {
				return fmt.Errorf("algorithm %q: %w", algorithm, err)
			}
		}
		return nil
	})
}

func malformedSecrets(t *trial) error {
	return t.eachSlot(false, func(ses *session, u *subject, slot *pluginv1.SecretSlot) error {
		refused := 0
		for _, value := range garbageSecrets() {
			resp, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: u.kind.GetId(), Slot: slot.GetName(), Value: value})
			if err != nil {
				return err
			}
			found := complaints(resp.GetDiagnostics())
			switch {
			case len(found) == 0:
				continue // some formats take nearly anything
			case len(resp.GetValue()) > 0 || resp.GetPublicKey() != "" || resp.GetJwk() != "":
				return errors.New("a refused value comes back with a value all the same")
			case !slices.ContainsFunc(found, func(d *pluginv1.Diagnostic) bool { return d.GetPointer() == "/value" }):
				return fmt.Errorf("a malformed value is refused without the pointer /value: %s", diagnosticsText(found))
			}
			refused++
		}
		if refused == 0 {
			return errors.New("it has a format, and takes a single byte, a NUL, and text that is no key alike")
		}
		return nil
	})
}

// garbageSecrets are values that formats refuse, with a canary in each that has room.
func garbageSecrets() [][]byte {
	return [][]byte{
		{'x'}, {0, 0xff, 0xfe}, []byte("whsec_" + canary + "!"), []byte("-----BEGIN PRIVATE KEY-----\n" + canary + "\n-----END PRIVATE KEY-----\n"),
		[]byte(`{"kty":"OKP","crv":"Ed25519","d":"` + canary + `"}`), []byte(" " + canary + "\r\n"), []byte(canary + "\x00" + canary),
	}
}

func canonicalSecrets(t *trial) error {
	return t.eachSlot(false, func(ses *session, u *subject, slot *pluginv1.SecretSlot) error {
		var given [][]byte
		for _, algorithm := range slot.GetAlgorithms() {
			if made, err := ses.sharedSecret(u.kind, slot.GetName(), algorithm); err == nil { // CF-24 has the rest
				given = append(given, made.GetValue())
			}
		}
		if value := u.secrets[slot.GetName()]; value != nil {
			given = append(given, value)
		}
		if len(given) == 0 {
			return skipf("no value for slot %q is known", slot.GetName())
		}
		for _, value := range given {
			once, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: u.kind.GetId(), Slot: slot.GetName(), Value: value})
			if err != nil {
				return err
			}
			if found := complaints(once.GetDiagnostics()); len(found) > 0 {
				return fmt.Errorf("a value that instances take is refused: %s", diagnosticsText(found))
			}
			twice, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: u.kind.GetId(), Slot: slot.GetName(), Value: once.GetValue()})
			if err != nil {
				return err
			}
			if !proto.Equal(once, twice) {
				return errors.New("prepared again, the value or what is said about it differs")
			}
		}
		return nil
	})
}

func unknownSecretNames(t *trial) error {
	if !t.s.can("secret.prepare") {
		return skipf(`it does not have the capability "secret.prepare"`)
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	known := t.s.described.GetKinds()[0]
	ask := []*pluginv1.PrepareSecretRequest{
		{Kind: "no-such-kind", Slot: "key"}, {Kind: known.GetId(), Slot: "no-such-slot", Value: []byte("x")},
	}
	for _, k := range t.s.described.GetKinds() {
		for _, slot := range k.GetSecretSlots() {
			if len(slot.GetAlgorithms()) > 0 {
				ask = append(ask, &pluginv1.PrepareSecretRequest{Kind: k.GetId(), Slot: slot.GetName(), Algorithm: "no-such-algorithm"})
			}
		}
	}
	for _, req := range ask {
		resp, err := ses.prepareSecret(req)
		if err != nil {
			return err
		}
		if len(complaints(resp.GetDiagnostics())) == 0 {
			return fmt.Errorf("kind %q, slot %q, algorithm %q is accepted", req.GetKind(), req.GetSlot(), req.GetAlgorithm())
		}
	}
	return nil
}

func publicHalves(t *trial) error {
	asymmetric := 0
	err := t.eachSlot(true, func(ses *session, u *subject, slot *pluginv1.SecretSlot) error {
		for _, algorithm := range slot.GetAlgorithms() {
			made, err := ses.sharedSecret(u.kind, slot.GetName(), algorithm)
			if err != nil {
				continue // CF-24 has that
			}
			if made.GetPublicKey() != "" || made.GetJwk() != "" {
				asymmetric++
			}
			for name, text := range map[string]string{"public_key": made.GetPublicKey(), "jwk": made.GetJwk(), "key_id": made.GetKeyId()} {
				if leaks(text, made.GetValue()) || strings.Contains(text, "PRIVATE KEY") {
					return fmt.Errorf("algorithm %q: %s holds the private key", algorithm, name)
				}
			}
			if made.GetJwk() == "" {
				continue
			}
			var jwk map[string]any
			if err := json.Unmarshal([]byte(made.GetJwk()), &jwk); err != nil || jwk["kty"] == nil {
				return fmt.Errorf("algorithm %q: jwk is no JSON Web Key", algorithm)
			}
			for _, private := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} { // RFC 7518, section 6
				if jwk[private] != nil {
					return fmt.Errorf("algorithm %q: jwk has the private member %q", algorithm, private)
				}
			}
		}
		return nil
	})
	if err == nil && asymmetric == 0 {
		return skipf("it makes no key with a public half")
	}
	return err
}

// leaks reports whether a value, or what counts of it, is in the text in any of the usual forms.
func leaks(text string, value []byte) bool {
	parts := [][]byte{value}
	if i := bytes.IndexByte(value, '_'); i > 0 && i < 12 {
		parts = append(parts, value[i+1:])
	}
	for _, part := range parts {
		if len(part) < 8 {
			continue
		}
		for _, form := range []string{
			string(part), hex.EncodeToString(part), base64.RawStdEncoding.EncodeToString(part), base64.RawURLEncoding.EncodeToString(part),
			url.QueryEscape(string(part)),
		} {
			if strings.Contains(text, form) {
				return true
			}
		}
	}
	return false
}

func secretsInDiagnostics(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind with secrets", func(u *subject) bool { return len(u.kind.GetSecretSlots()) > 0 }, func(u *subject) error {
		var said []*pluginv1.Diagnostic
		for _, slot := range u.kind.GetSecretSlots() {
			for _, value := range append(garbageSecrets(), []byte("bad"+canary), []byte(canary)) {
				in := ses.instance(u, "")
				in.Secrets[slot.GetName()] = versions(value, nil, signTime())
				statuses, err := ses.configure(in)
				if err != nil {
					return err
				}
				said = append(said, statuses[0].GetDiagnostics()...)
				in.ConfigJson = []byte(`{"conformance_unknown":1}`)
				ds, err := ses.validate(in)
				if err != nil {
					return err
				}
				said = append(said, ds...)
				if !t.s.can("secret.prepare") || slot.GetFormat() == "" {
					continue
				}
				resp, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: u.kind.GetId(), Slot: slot.GetName(), Value: value})
				if err != nil {
					return err
				}
				said = append(said, resp.GetDiagnostics()...)
			}
		}
		for _, d := range said {
			if leaks(d.GetSummary()+d.GetCode()+d.GetPointer(), []byte(canary)) {
				return fmt.Errorf("the diagnostic %q (%s) holds the value of the secret", d.GetCode(), d.GetPointer())
			}
		}
		return nil
	})
}

// secretsInLogs uses every kind at the most talkative level, also with secrets that do not fit.
func secretsInLogs(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	level := &pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_SetLogLevel{SetLogLevel: &pluginv1.SetLogLevel{Level: "DEBUG"}}}
	if err := ses.control.send(level); err != nil {
		return err
	}
	err = t.each("kind with a secret", func(u *subject) bool { return usable(u) && len(u.kind.GetSecretSlots()) > 0 }, func(u *subject) error {
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		if _, err := ses.known(u, in.GetRef()); err != nil {
			return err
		}
		for _, slot := range u.kind.GetSecretSlots() {
			for _, value := range append(garbageSecrets(), []byte(canary)) {
				in := ses.instance(u, "")
				in.Secrets[slot.GetName()] = versions(value, nil, signTime())
				if _, err := ses.configure(in); err != nil {
					return err
				}
				if _, err := ses.known(u, in.GetRef()); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if _, err := ses.control.beat(t.ctx, callLimit); err != nil { // logs ride on the same stream
		return err
	}
	where := map[string]string{"its log": ses.control.logged(), "its arguments or environment": cmdline(ses.proc.pid())}
	ses.proc.kill()
	where["what it wrote to standard output or error"] = ses.proc.written()
	values := [][]byte{[]byte(canary)}
	for _, u := range t.s.subjects {
		for _, v := range u.secrets {
			values = append(values, v)
		}
	}
	for name, text := range where {
		if slices.ContainsFunc(values, func(v []byte) bool { return leaks(text, v) }) {
			return fmt.Errorf("%s: the value of a secret is in it", name)
		}
	}
	return nil
}
