package conformance

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// signerTarget is where requests of signers under test go; none is ever sent there.
const signerTarget = "https://receiver.example/hooks/orders?tenant=a%20b&x="

// subject is a kind with the settings that it is tested with.
type subject struct {
	kind    *pluginv1.Kind
	fixture KindFixture
	config  []byte
	secrets map[string][]byte
	// uri is one that a transport takes; it reaches somebody only if it is the fixture's.
	uri string
	// unusable says why no instance of it can be made; empty when one can.
	unusable string
	// excused is set when that is for want of a fixture, not a fault.
	excused bool
}

func (u *subject) signer() bool      { return u.kind.GetSigner() != nil }
func (u *subject) transport() bool   { return u.kind.GetTransport() != nil }
func (u *subject) transformer() bool { return u.kind.GetTransformer() != nil }

// subjectOf finds settings and secrets that the kind takes.
func (ses *session) subjectOf(k *pluginv1.Kind) *subject {
	u := &subject{kind: k, fixture: ses.t.s.fixture.Kinds[k.GetId()], secrets: map[string][]byte{}}
	switch {
	case len(u.fixture.Config) > 0:
		u.config = u.fixture.Config
	case k.GetConfigExample() != "":
		u.config = []byte(k.GetConfigExample())
	}
	for slot, value := range u.fixture.Secrets {
		u.secrets[slot] = []byte(value)
	}
	var open []*pluginv1.SecretSlot
	for _, slot := range k.GetSecretSlots() {
		if _, ok := u.secrets[slot.GetName()]; !ok && slot.GetRequired() {
			open = append(open, slot)
		}
	}
	for _, u.uri = range u.uris() {
		if ses.fill(u, open); u.unusable == "" {
			break
		}
	}
	return u
}

// httpPrefix is what stands before http in the URIs of a transport that carries HTTP under a scheme of its own,
// such as acme+ in acme+http.
func (u *subject) httpPrefix() string {
	for _, scheme := range u.kind.GetTransport().GetUriSchemes() {
		if prefix, ok := strings.CutSuffix(scheme, "http"); ok && (prefix == "" || strings.HasSuffix(prefix, "+")) {
			return prefix
		}
	}
	return ""
}

// uris are what to try as targets. Those of http come first, since the suite can play their receivers.
func (u *subject) uris() []string {
	if u.fixture.URI != "" {
		return []string{u.fixture.URI}
	}
	if u.fixture.Receiver != nil {
		return []string{u.uriOf(nil, "http://127.0.0.1:9/conformance")}
	}
	uris := []string{""}
	for _, scheme := range u.kind.GetTransport().GetUriSchemes() {
		at := len(uris)
		if scheme == u.httpPrefix()+"http" {
			at = 0
		}
		uris = slices.Insert(uris, at, scheme+"://127.0.0.1:9/conformance", scheme+"://127.0.0.1:9")
	}
	return uris
}

// fill tries values for the open slots, one slot after the other, until the plugin takes an instance.
func (ses *session) fill(u *subject, open []*pluginv1.SecretSlot) {
	u.unusable, u.excused = "", false
	refused := ses.refusal(u)
	for _, slot := range open {
		for _, value := range ses.candidates(u.kind, slot) {
			u.secrets[slot.GetName()] = value
			refused = ses.refusal(u)
			about := "/secrets/" + escapePointer(slot.GetName())
			if !slices.ContainsFunc(refused.diagnostics, func(d *pluginv1.Diagnostic) bool { return d.GetPointer() == about }) {
				break
			}
		}
	}
	if refused.err != nil {
		u.unusable = refused.err.Error()
		return
	}
	if len(refused.diagnostics) == 0 {
		return
	}
	u.unusable = "it takes no instance: " + diagnosticsText(refused.diagnostics)
	u.excused = !slices.ContainsFunc(refused.diagnostics, func(d *pluginv1.Diagnostic) bool {
		secret := strings.HasPrefix(d.GetPointer(), "/secrets/")
		target := strings.HasPrefix(d.GetPointer(), "/target") && u.transport()
		return !secret && !target
	})
}

type refusal struct {
	diagnostics []*pluginv1.Diagnostic
	err         error
}

// refusal configures an instance for a moment.
func (ses *session) refusal(u *subject) refusal {
	in := ses.instance(u, "")
	statuses, err := ses.configure(in)
	if err != nil {
		return refusal{err: err}
	}
	_ = ses.remove(in.GetRef())
	return refusal{diagnostics: complaints(statuses[0].GetDiagnostics())}
}

// candidates are values for a slot: what the plugin makes itself, then what is common.
func (ses *session) candidates(k *pluginv1.Kind, slot *pluginv1.SecretSlot) [][]byte {
	var out [][]byte
	if len(slot.GetAlgorithms()) > 0 {
		resp, err := ses.prepareSecret(&pluginv1.PrepareSecretRequest{Kind: k.GetId(), Slot: slot.GetName()})
		if err == nil && len(resp.GetValue()) > 0 {
			out = append(out, resp.GetValue())
		}
	}
	return append(out, commonSecrets("of the suite")...)
}

// commonSecrets are well-formed values of formats in use, made of a seed. Each is of no use to anybody.
func commonSecrets(seed string) [][]byte {
	sum := sha256.Sum256([]byte("conformance secret " + seed))
	var key bytes.Buffer
	if der, err := x509.MarshalPKCS8PrivateKey(ed25519.NewKeyFromSeed(sum[:])); err == nil {
		_ = pem.Encode(&key, &pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	return [][]byte{
		[]byte("whsec_" + base64.StdEncoding.EncodeToString(sum[:])),
		[]byte("conformance-" + hex.EncodeToString(sum[:])),
		[]byte(hex.EncodeToString(sum[:])),
		[]byte(base64.StdEncoding.EncodeToString(sum[:])),
		key.Bytes(),
	}
}

// instance is a new one of the subject, first generation. An empty uri means the subject's own; one of a receiver is
// written by uriOf.
func (ses *session) instance(u *subject, uri string) *pluginv1.Instance {
	ref := ses.nextRef()
	in := &pluginv1.Instance{
		Id: fmt.Sprintf("conformance/%d", ref), Generation: 1, Ref: ref, Kind: u.kind.GetId(), Tenant: "namespaces/conformance",
		ConfigJson: bytes.Clone(u.config), Secrets: map[string]*pluginv1.SecretVersions{}, MaxInFlight: 256,
		Target: &pluginv1.Target{Method: "POST", Uri: uri},
	}
	if uri == "" && !u.transport() {
		in.Target.Uri = signerTarget
	} else if uri == "" {
		in.Target.Uri = u.uri
	}
	for _, name := range slices.Sorted(maps.Keys(u.fixture.Headers)) {
		in.Target.Headers = append(in.Target.Headers, &pluginv1.Header{Name: name, Value: u.fixture.Headers[name]})
	}
	for slot, value := range u.secrets {
		in.Secrets[slot] = &pluginv1.SecretVersions{Versions: []*pluginv1.SecretVersion{{Version: 1, Value: value}}}
	}
	return in
}

// each runs f for the subjects that want picks and joins what is wrong. It skips the case when there is
// none, or when f skips all of them.
func (t *trial) each(what string, want func(*subject) bool, f func(*subject) error) error {
	var errs, skips []error
	n := 0
	for _, u := range t.s.subjects {
		if !want(u) {
			continue
		}
		n++
		err := f(u)
		var skip skipError
		switch {
		case errors.As(err, &skip):
			skips = append(skips, fmt.Errorf("kind %s: %s", u.kind.GetId(), skip.reason))
		case err != nil:
			errs = append(errs, fmt.Errorf("kind %s: %w", u.kind.GetId(), err))
		}
	}
	switch {
	case len(errs) > 0:
		return errors.Join(errs...)
	case n == 0:
		return t.none(what, want)
	case len(skips) == n:
		return skipf("%v", errors.Join(skips...))
	}
	return nil
}

// none says why there is nothing to test.
func (t *trial) none(what string, _ func(*subject) bool) error {
	var unusable []string
	for _, u := range t.s.subjects {
		if u.unusable != "" {
			unusable = append(unusable, fmt.Sprintf("kind %s: %s", u.kind.GetId(), u.unusable))
		}
	}
	if len(unusable) > 0 {
		return skipf("it offers no %s that an instance can be made of (see CF-04); a fixture may help: %s", what, strings.Join(unusable, "; "))
	}
	return skipf("it offers no %s", what)
}

func any1(*subject) bool              { return true }
func usable(u *subject) bool          { return u.unusable == "" }
func usableSigner(u *subject) bool    { return u.unusable == "" && u.signer() }
func usableTransport(u *subject) bool { return u.unusable == "" && u.transport() }
func usableTransformer(u *subject) bool {
	return u.unusable == "" && u.transformer()
}
func overHTTP(u *subject) bool {
	return usableTransport(u) && (u.fixture.Receiver != nil || strings.HasPrefix(u.uri, u.httpPrefix()+"http:"))
}
func overTLS(u *subject) bool {
	return overHTTP(u) && u.fixture.Receiver == nil && slices.Contains(u.kind.GetTransport().GetUriSchemes(), u.httpPrefix()+"https")
}

func deterministicSigner(u *subject) bool {
	return usableSigner(u) && u.kind.GetSigner().GetDeterministic()
}

// escapePointer is RFC 6901's.
func escapePointer(segment string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(segment)
}
