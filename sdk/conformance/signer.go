package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func signerCases() []Case {
	const g = GroupSigner
	return []Case{
		{ID: "SG-01", Group: g, Title: "every item of a batch is answered exactly once", run: signsExactlyOnce,
			Protects: "an item without an answer holds up its delivery; one too many is a fault of the protocol"},
		{ID: "SG-02", Group: g, Title: "the same input gives the same bytes", run: signsPurely,
			Protects: "golden vectors in every language, and retries that sign as the first attempt did"},
		{ID: "SG-03", Group: g, Title: "the clock that counts is the host's: another process, later, gives the same bytes", run: signsWithoutClock,
			Protects: "receivers check timestamps; the attempt's time is the host's to say"},
		{ID: "SG-04", Group: g, Title: "batches and their order make no difference", run: signsInAnyOrder,
			Protects: "how the server batches depends on its load"},
		{ID: "SG-05", Group: g, Title: "signs any bytes: empty, NUL, CRLF, invalid UTF-8, 1 MiB", run: signsOddBodies,
			Protects: "payloads are bytes, not text"},
		{ID: "SG-06", Group: g, Title: "sets only headers that it declares, well-formed", run: signsDeclaredHeaders,
			Protects: "the server refuses signers whose headers meet; a line break in a value splits the request"},
		{ID: "SG-07", Group: g, Title: "changes nothing of the URI but its query", run: signsURI,
			Protects: "a signed request still goes where the subscription says"},
		{ID: "SG-08", Group: g, Title: "an unknown ref fails with SOURCE_CONFIG and spares its batch", run: signsUnknownRef,
			Protects: "the server configures the instance again, and no attempt is spent"},
		{ID: "SG-09", Group: g, Title: "a content index out of range spares the process", run: signsBadContent,
			Protects: "one malformed frame is not a crash"},
		{ID: "SG-10", Group: g, Title: "unknown fields are ignored", run: signsLaterMinor,
			Protects: "servers of a later minor"},
		{ID: "SG-11", Group: g, Title: "the fixture's vectors come out", run: signsVectors,
			Protects: "receivers verify with other people's code"},
		{ID: "SG-12", Group: g, Title: "signs on after a drain on Control, until Control ends", run: signsWhileDraining,
			Protects: "attempts elsewhere that the server lets finish are signed here"},
	}
}

// eachSigner runs f with a process and a configured instance of every signer that want picks.
func (t *trial) eachSigner(want func(*subject) bool, f func(*session, *subject, uint32) error) error {
	if !t.s.offers(signs) {
		return skipf("it offers no signer")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("such signer", want, func(u *subject) error {
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		return f(ses, u, in.GetRef())
	})
}

func signsExactlyOnce(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		contents := []*pluginv1.Content{newContent("evt_a", []byte("a")), newContent("evt_b", []byte("b"))}
		var excess []uint64
		for _, n := range []int{1, batchMax, 3} {
			items := make([]*pluginv1.SignItem, n)
			for i := range items {
				items[i] = signItem(ref, uint32(i%2))
			}
			_, more, err := ses.signBatch(contents, items...)
			if err != nil {
				return err
			}
			excess = append(excess, more...)
		}
		if len(excess) > 0 {
			return fmt.Errorf("answers that nothing asked for, or a second time: seq %v", excess)
		}
		return nil
	})
}

func signsPurely(t *trial) error {
	return t.eachSigner(deterministicSigner, func(ses *session, _ *subject, ref uint32) error {
		c := newContent("evt_pure", []byte(`{"pure":true}`))
		first := ""
		for range 20 {
			results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(ref, 0), signItem(ref, 0), signItem(ref, 0))
			if err != nil {
				return err
			}
			for _, r := range results {
				if err := signFailure(r); err != nil {
					return err
				}
				if first == "" {
					first = signatureText(r)
				}
				if signatureText(r) != first {
					return errors.New("two signatures of one request differ; declare deterministic: false if the algorithm draws randomness")
				}
			}
		}
		return nil
	})
}

// signsWithoutClock lets more than a second pass between two processes, since that is how fine most
// schemes' timestamps are.
func signsWithoutClock(t *trial) error {
	if !slices.ContainsFunc(t.s.subjects, deterministicSigner) {
		return skipf("it offers no deterministic signer")
	}
	first := map[string]string{}
	began := time.Now()
	for range 2 {
		if len(first) > 0 {
			rest := time.NewTimer(time.Until(began.Add(1100 * time.Millisecond)))
			select {
			case <-rest.C:
			case <-t.ctx.Done():
				return t.ctx.Err()
			}
		}
		err := t.eachSigner(deterministicSigner, func(ses *session, u *subject, ref uint32) error {
			r, err := ses.signOne(ref, newContent("evt_clock", []byte(`{"clock":"the host's"}`)))
			if err != nil {
				return err
			}
			id := u.kind.GetId()
			if was, ok := first[id]; ok && was != signatureText(r) {
				return errors.New("a second process, a second later, signs the same request otherwise")
			}
			first[id] = signatureText(r)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func signsInAnyOrder(t *trial) error {
	return t.eachSigner(deterministicSigner, func(ses *session, _ *subject, ref uint32) error {
		const n = 24
		contents := make([]*pluginv1.Content, 6)
		for i := range contents {
			contents[i] = newContent(fmt.Sprintf("evt_%d", i), fmt.Appendf(nil, `{"n":%d}`, i))
		}
		item := func(i int) *pluginv1.SignItem {
			it := signItem(ref, uint32(i%len(contents)))
			it.Created = timestamppb.New(signTime().Add(time.Duration(i) * time.Hour))
			return it
		}
		alone := make([]string, n)
		for i := range alone {
			results, _, err := ses.signBatch(contents, item(i))
			if err != nil {
				return err
			}
			alone[i] = signatureText(results[0])
		}
		order := rand.New(rand.NewPCG(1, 2)).Perm(n)
		items := make([]*pluginv1.SignItem, n)
		for at, i := range order {
			items[at] = item(i)
		}
		results, _, err := ses.signBatch(contents, items...)
		if err != nil {
			return err
		}
		for at, i := range order {
			if signatureText(results[at]) != alone[i] {
				return errors.New("in a batch a request is signed otherwise than alone")
			}
		}
		return nil
	})
}

func signsOddBodies(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		for name, body := range oddBodies() {
			if _, err := ses.signOne(ref, newContent("evt_odd", body)); err != nil {
				return fmt.Errorf("a body of %s: %w", name, err)
			}
		}
		return nil
	})
}

func signsDeclaredHeaders(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, u *subject, ref uint32) error {
		r, err := ses.signOne(ref, newContent("evt_headers", []byte(`{}`)))
		if err != nil {
			return err
		}
		declared, err := ses.declaredHeaders(u)
		if err != nil {
			return err
		}
		for _, h := range r.GetHeaders() {
			switch {
			case !headerName(h.GetName()):
				return fmt.Errorf("header %q is not a lower-case field name", h.GetName())
			case !slices.Contains(declared, h.GetName()):
				return fmt.Errorf("it sets %q, and declares %s", h.GetName(), oneOf(declared))
			case strings.ContainsAny(h.GetValue(), "\r\n\x00"):
				return fmt.Errorf("the value of %q holds CR, LF or NUL", h.GetName())
			}
		}
		return nil
	})
}

func signsURI(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		r, err := ses.signOne(ref, newContent("evt_uri", []byte(`{}`)))
		if err != nil || r.GetUri() == "" {
			return err
		}
		was, _ := url.Parse(signerTarget)
		is, err := url.Parse(r.GetUri())
		if err != nil {
			return errors.New("the URI that it returns cannot be read")
		}
		if is.Scheme != was.Scheme || is.Host != was.Host || is.EscapedPath() != was.EscapedPath() || is.Fragment != "" || is.User != nil {
			return fmt.Errorf("it changes %s to %s", signerTarget, r.GetUri())
		}
		return nil
	})
}

func signsUnknownRef(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		c := newContent("evt_ref", []byte(`{}`))
		results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(ref, 0), signItem(1<<20, 0), signItem(ref, 0))
		if err != nil {
			return err
		}
		if f := results[1].GetFailure(); f.GetSource() != pluginv1.Failure_SOURCE_CONFIG {
			return fmt.Errorf("an unknown ref is answered %s, want a failure with SOURCE_CONFIG", failureText(f))
		}
		return errors.Join(signFailure(results[0]), signFailure(results[2]))
	})
}

func signsBadContent(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		c := newContent("evt_content", []byte(`{}`))
		results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(ref, 7))
		if err == nil && results[0].GetFailure() == nil {
			return errors.New("an item that names content 7 of 1 is signed")
		}
		ses.mu.Lock()
		ses.sign = nil // an error of the stream is a good answer too
		ses.mu.Unlock()
		if err := ses.alive(); err != nil {
			return err
		}
		_, err = ses.signOne(ref, c)
		return err
	})
}

func signsLaterMinor(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		c, item := newContent("evt_later", []byte(`{}`)), signItem(ref, 0)
		c.ProtoReflect().SetUnknown(laterField())
		item.ProtoReflect().SetUnknown(laterField())
		results, _, err := ses.signBatch([]*pluginv1.Content{c}, item)
		if err != nil {
			return err
		}
		return signFailure(results[0])
	})
}

func signsWhileDraining(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		drain := &pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_Drain{Drain: &pluginv1.Drain{Grace: durationpb.New(10 * time.Second)}}}
		if err := ses.control.send(drain); err != nil {
			return err
		}
		if _, err := ses.control.beat(t.ctx, callLimit); err != nil { // by then it has seen the drain
			return err
		}
		_, err := ses.signOne(ref, newContent("evt_drain", []byte(`{}`)))
		return err
	})
}

func signsVectors(t *trial) error {
	withVectors := func(u *subject) bool { return u.signer() && len(u.fixture.Vectors) > 0 }
	if !slices.ContainsFunc(t.s.subjects, withVectors) {
		return skipf("the fixture has no vectors")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("signer with vectors", withVectors, func(u *subject) error {
		for _, v := range u.fixture.Vectors {
			if err := ses.vector(u, v); err != nil {
				return fmt.Errorf("vector %q: %w", v.Name, err)
			}
		}
		return nil
	})
}

func (ses *session) vector(u *subject, v Vector) error {
	with := *u
	if len(v.Config) > 0 {
		with.config = v.Config
	}
	if len(v.Secrets) > 0 {
		with.secrets = map[string][]byte{}
		for slot, value := range v.Secrets {
			with.secrets[slot] = []byte(value)
		}
	}
	in := ses.instance(&with, v.URI)
	if v.Method != "" {
		in.Target.Method = v.Method
	}
	if err := ses.take(in); err != nil {
		return err
	}
	c := &pluginv1.Content{MessageId: v.MessageID, Body: []byte(v.Body)}
	if len(v.BodyBase64) > 0 {
		c.Body = bytes.Clone(v.BodyBase64)
	}
	for _, name := range slices.Sorted(maps.Keys(v.Headers)) {
		c.Headers = append(c.Headers, &pluginv1.Header{Name: name, Value: v.Headers[name]})
	}
	item := signItem(in.GetRef(), 0)
	item.Created = timestamppb.New(v.Created)
	if len(v.Nonce) > 0 {
		item.Nonce = v.Nonce
	}
	results, _, err := ses.signBatch([]*pluginv1.Content{c}, item)
	if err != nil {
		return err
	}
	if err := signFailure(results[0]); err != nil {
		return err
	}
	got := map[string]string{}
	for _, h := range results[0].GetHeaders() {
		got[h.GetName()] = h.GetValue()
	}
	for _, name := range slices.Sorted(maps.Keys(v.Want)) {
		if got[name] != v.Want[name] {
			text, _ := json.Marshal(got)
			return fmt.Errorf("%s is %q, want %q; it set %s", name, got[name], v.Want[name], text)
		}
	}
	if v.WantURI != "" && results[0].GetUri() != v.WantURI {
		return fmt.Errorf("the URI is %q, want %q", results[0].GetUri(), v.WantURI)
	}
	return nil
}
