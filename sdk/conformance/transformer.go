package conformance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"mime"
	"reflect"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	// maxMade, and what follows, bound what a transformer makes.
	maxMade            = 256 << 10
	maxMadeType        = 128
	maxMadeHeaders     = 32
	maxMadeHeaderBytes = 8 << 10
	// transformWindow is how many items the server has unanswered at a time.
	transformWindow = 128
	// stuckTimeout is what items are given that are to be under way for a while.
	stuckTimeout = 6 * time.Second
	// hungAfter is how long after an item's time the server takes the process for hung.
	hungAfter = 5 * time.Second
)

func transformerCases() []Case {
	const g = GroupTransformer
	return []Case{
		{ID: "TF-01", Group: g, Title: "every item of a batch is answered exactly once, with an outcome", run: transformsExactlyOnce,
			Protects: "an item without an answer holds up its delivery; one too many is a fault of the protocol"},
		{ID: "TF-02", Group: g, Title: "batches and their order make no difference", run: transformsInAnyOrder,
			Protects: "how the server batches depends on its load"},
		{ID: "TF-03", Group: g, Title: "takes any payload: empty, NUL, invalid UTF-8, no JSON, deep JSON, 1 MiB; and others beside it come out as ever", run: transformsOddPayloads,
			Protects: "publishers send what they like, and share batches"},
		{ID: "TF-04", Group: g, Title: "what it makes is within bounds: a body of 256 KiB, a media type of 128 bytes", run: makesWithinBounds,
			Protects: "what is larger cannot be stored, and its delivery fails until it is exhausted"},
		{ID: "TF-05", Group: g, Title: "sets well-formed headers, each once, and none that it may not", run: makesHeaders,
			Protects: "a delivery with such a header fails; a line break in a value splits the request"},
		{ID: "TF-06", Group: g, Title: "an unknown ref fails with SOURCE_CONFIG and spares its batch", run: transformsUnknownRef,
			Protects: "the server configures the instance again, and no attempt is spent"},
		{ID: "TF-07", Group: g, Title: "an event index out of range spares the process", run: transformsBadEvent,
			Protects: "one malformed frame is not a crash"},
		{ID: "TF-08", Group: g, Title: "an item is answered by its timeout", run: transformsInTime,
			Protects: "5 s later the server takes the process for hung and kills it, with what others have in it"},
		{ID: "TF-09", Group: g, Title: "what one instance does for long holds up no other", run: slowSparesOthers,
			Protects: "tenants choose what it computes"},
		{ID: "TF-10", Group: g, Title: "a drop has a reason; a failure a code and a message, and is not SOURCE_CONFIG", run: saysWhy,
			Protects: "people see why nothing was sent; SOURCE_CONFIG has the server configure the instance and ask again, without end"},
		{ID: "TF-11", Group: g, Title: "no value of a secret shows in a reason or a failure", run: secretsInReasons,
			Protects: "both are shown to callers, and stored with the delivery"},
		{ID: "TF-12", Group: g, Title: "unknown fields are ignored", run: transformsLaterMinor,
			Protects: "servers of a later minor"},
		{ID: "TF-13", Group: g, Title: "transforms on after a drain on Control, until Control ends", run: transformsWhileDraining,
			Protects: "what the server lets finish is transformed first"},
		{ID: "TF-14", Group: g, Title: "when the host ends its half of the stream, all items are answered and the stream ends", run: finishesTransforms,
			Protects: "an upgrade under load loses nothing"},
		{ID: "TF-15", Group: g, Title: "takes 128 items at once, and a host that stops reading for a while finds all answers", run: transformsWholeWindow,
			Protects: "that many are what a server has unanswered, which may be busy or suspended"},
		{ID: "TF-16", Group: g, Title: "what the fixture says comes out of its events", run: transformsFixture,
			Protects: "receivers read what it makes"},
		{ID: "TF-17", Group: g, Title: "of several instances each item gets what its own makes", run: transformsApart,
			Protects: "instances are other tenants'"},
	}
}

// eachTransformer runs f with a process and a configured instance of every transformer that can be used.
func (t *trial) eachTransformer(f func(*session, *subject, uint32) error) error {
	if !t.s.offers(transforming) {
		return skipf("it offers no transformer")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("transformer", usableTransformer, func(u *subject) error {
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		return f(ses, u, in.GetRef())
	})
}

// event is one that the transformer is made for, where the fixture has one, else any.
func (u *subject) event(messageID string) *pluginv1.Event {
	if len(u.fixture.Events) > 0 {
		return u.fixture.Events[0].event(messageID)
	}
	return newEvent(messageID, []byte(`{"conformance":true,"n":1,"text":"é","list":[1,2,3],"deep":{"x":null}}`))
}

func transformsExactlyOnce(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		tr, err := ses.sharedTransforms()
		if err != nil {
			return err
		}
		events := []*pluginv1.Event{u.event("evt_a"), newEvent("evt_b", []byte(`"b"`))}
		for _, n := range []int{1, batchMax, 3} {
			items := make([]*pluginv1.TransformItem, n)
			for i := range items {
				items[i] = newTransform(ref, i%2)
			}
			results, err := ses.transformBatch(events, items...)
			if err != nil {
				return err
			}
			for _, r := range results {
				if r.GetOutcome() == nil {
					return errors.New("a result is neither transformed nor dropped nor failure")
				}
			}
		}
		return tr.surplus()
	})
}

func transformsInAnyOrder(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		const n = 24
		events := make([]*pluginv1.Event, 6)
		for i := range events {
			events[i] = u.event(fmt.Sprintf("evt_%d", i))
			if i > 2 {
				events[i].Data = fmt.Appendf(nil, `{"n":%d}`, i)
			}
		}
		alone := make([]string, len(events))
		for i, e := range events {
			for range 2 {
				r, err := ses.transformOne(ref, e)
				if err != nil {
					return err
				}
				if alone[i] != "" && transformText(r) != alone[i] {
					return skipf("it makes something else of the same event each time, as it may")
				}
				alone[i] = transformText(r)
			}
		}
		items := make([]*pluginv1.TransformItem, n)
		order := rand.New(rand.NewPCG(1, 2)).Perm(n)
		for at, i := range order {
			items[at] = newTransform(ref, i%len(events))
		}
		results, err := ses.transformBatch(events, items...)
		if err != nil {
			return err
		}
		for at, i := range order {
			if got, want := transformText(results[at]), alone[i%len(events)]; got != want {
				return fmt.Errorf("in a batch an event is transformed otherwise than alone: %.300s; alone %.300s", got, want)
			}
		}
		return nil
	})
}

// oddEvents are as publishers send them, by name.
func oddEvents() map[string]*pluginv1.Event {
	out := map[string]*pluginv1.Event{}
	for name, data := range oddBodies() {
		out[name] = newEvent("evt_odd", data)
	}
	for name, data := range map[string]string{
		"10,000 levels of JSON":  strings.Repeat(`{"a":`, 10_000) + "1" + strings.Repeat("}", 10_000),
		"a number of 400 digits": `{"n":` + strings.Repeat("9", 400) + `}`, "half a surrogate": `{"s":"\ud800"}`,
		"JSON cut short": `{"n":`, "a JSON null": "null", "256 KiB of JSON": `{"s":"` + strings.Repeat("x", 256<<10) + `"}`,
	} {
		out[name] = newEvent("evt_odd", []byte(data))
	}
	form, bare := newEvent("evt_odd", []byte("a=1&b=2")), newEvent("evt_odd", []byte(`{"bare":true}`))
	form.ContentType = "application/x-www-form-urlencoded"
	bare.Subject, bare.DataSchema, bare.Attributes, bare.ContentType = "", "", nil, ""
	out["a form"], out["JSON without optional attributes"] = form, bare
	return out
}

func transformsOddPayloads(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		good := u.event("evt_good")
		alone, err := ses.transformOne(ref, good)
		if err != nil {
			return err
		}
		for name, odd := range oddEvents() {
			items := []*pluginv1.TransformItem{newTransform(ref, 0), newTransform(ref, 1), newTransform(ref, 0)}
			results, err := ses.transformBatch([]*pluginv1.Event{good, odd}, items...)
			if err != nil {
				return fmt.Errorf("a payload of %s: %w", name, err)
			}
			for _, i := range []int{0, 2} {
				if got, want := transformClass(results[i]), transformClass(alone); got != want {
					return fmt.Errorf("beside a payload of %s, what comes of another event is %s, and %s alone", name, transformText(results[i]), want)
				}
			}
		}
		return ses.alive()
	})
}

// eachOutcome runs f with what comes of a score of events, odd ones among them.
func (t *trial) eachOutcome(f func(*pluginv1.TransformResult) error) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		events := oddEvents()
		events["the usual kind"] = u.event("evt_usual")
		for i, f := range u.fixture.Events {
			events[fmt.Sprintf("the fixture's event %d", i)] = f.event("evt_fixture")
		}
		for _, name := range slices.Sorted(maps.Keys(events)) {
			r, err := ses.transformOne(ref, events[name])
			if err == nil {
				err = f(r)
			}
			if err != nil {
				return fmt.Errorf("a payload of %s: %w", name, err)
			}
		}
		return nil
	})
}

func makesWithinBounds(t *trial) error {
	return t.eachOutcome(func(r *pluginv1.TransformResult) error {
		made := r.GetTransformed()
		if n := len(made.GetBody()); n > maxMade {
			return fmt.Errorf("the body that it makes has %d bytes, want at most %d", n, maxMade)
		}
		media := made.GetContentType()
		if media == "" {
			return nil
		}
		if len(media) > maxMadeType {
			return fmt.Errorf("its content_type has %d bytes, want at most %d", len(media), maxMadeType)
		}
		if name, _, err := mime.ParseMediaType(media); err != nil || !strings.Contains(name, "/") {
			return fmt.Errorf("its content_type %q is no media type", media)
		}
		return nil
	})
}

// notMade says why a transformer may not set a header; empty when it may. Those that signers set depend on the subscription.
func notMade(name string) string {
	name = strings.ReplaceAll(name, "_", "-") // many receivers cannot tell them apart
	switch {
	case strings.HasPrefix(name, "webhook-"):
		return "headers that begin with webhook- are the signers'"
	case strings.HasPrefix(name, "ce-"):
		return "headers that begin with ce- carry the event's attributes"
	case slices.Contains([]string{"authorization", "proxy-authorization", "cookie"}, name):
		return "it holds a credential, and what is made is stored and shown"
	case slices.Contains([]string{"content-type", "traceparent", "content-encoding"}, name):
		return "the server sets it"
	case slices.Contains([]string{"host", "user-agent", "accept-encoding", "connection", "content-length", "expect", "http2-settings", "keep-alive", "proxy-connection",
		"te", "trailer", "transfer-encoding", "upgrade"}, name):
		return "the transport sets it"
	}
	return ""
}

func makesHeaders(t *trial) error {
	return t.eachOutcome(func(r *pluginv1.TransformResult) error {
		headers := r.GetTransformed().GetHeaders()
		if n := len(headers); n > maxMadeHeaders {
			return fmt.Errorf("it sets %d headers, want at most %d", n, maxMadeHeaders)
		}
		size := 0
		seen := map[string]bool{}
		for _, h := range headers {
			size += len(h.GetName()) + len(h.GetValue())
			switch why := notMade(h.GetName()); {
			case !headerName(h.GetName()):
				return fmt.Errorf("header %q is not a lower-case field name", h.GetName())
			case why != "":
				return fmt.Errorf("it sets the header %s: %s", h.GetName(), why)
			case seen[h.GetName()]:
				return fmt.Errorf("it sets the header %s twice", h.GetName())
			case strings.ContainsFunc(h.GetValue(), func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }):
				return fmt.Errorf("the value of %q holds a control character", h.GetName())
			case h.GetValue() != strings.TrimSpace(h.GetValue()):
				return fmt.Errorf("the value of %q begins or ends with a blank", h.GetName())
			}
			seen[h.GetName()] = true
		}
		if size > maxMadeHeaderBytes {
			return fmt.Errorf("its headers have %d bytes, want at most %d", size, maxMadeHeaderBytes)
		}
		return nil
	})
}

func transformsUnknownRef(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		e := u.event("evt_ref")
		alone, err := ses.transformOne(ref, e)
		if err != nil {
			return err
		}
		results, err := ses.transformBatch([]*pluginv1.Event{e}, newTransform(ref, 0), newTransform(1<<20, 0), newTransform(0, 0), newTransform(ref, 0))
		if err != nil {
			return err
		}
		for _, r := range results[1:3] {
			if err := outcome(r.GetFailure(), pluginv1.Failure_SOURCE_CONFIG, []string{"config"}); r.GetFailure() == nil || err != nil {
				return fmt.Errorf("an unknown ref is answered %s, want a failure with SOURCE_CONFIG and the code config", transformText(r))
			}
		}
		for _, i := range []int{0, 3} {
			if got, want := transformClass(results[i]), transformClass(alone); got != want {
				return fmt.Errorf("beside an unknown ref, what comes of another item is %s, and %s alone", transformText(results[i]), want)
			}
		}
		return nil
	})
}

func transformsBadEvent(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		e := u.event("evt_index")
		alone, err := ses.transformOne(ref, e)
		if err != nil {
			return err
		}
		results, err := ses.transformBatch([]*pluginv1.Event{e}, newTransform(ref, 7))
		if err == nil && results[0].GetFailure() == nil {
			return fmt.Errorf("an item that names event 7 of 1 is answered %s", transformText(results[0]))
		}
		if isLate(err) {
			return err
		}
		if err := ses.alive(); err != nil { // an error of the stream is a good answer too
			return err
		}
		after, err := ses.transformOne(ref, e)
		if err == nil && transformClass(after) != transformClass(alone) {
			err = fmt.Errorf("after an item that names event 7 of 1, another is answered %s", transformText(after))
		}
		return err
	})
}

// slowOf is an instance and an event that take it long, where the fixture names them.
func (ses *session) slowOf(u *subject) (ref uint32, e *pluginv1.Event, err error) {
	slow := u.fixture.Slow
	if slow == nil {
		return 0, nil, skipf("the fixture names nothing that takes it long (slow)")
	}
	with := *u
	if len(slow.Config) > 0 {
		with.config = slow.Config
	}
	in := ses.instance(&with, "")
	in.Tenant += "-slow" // what tenants do is held against them alone
	if err := ses.take(in); err != nil {
		return 0, nil, err
	}
	if slow.Event == nil {
		return in.GetRef(), u.event("evt_slow"), nil
	}
	return in.GetRef(), slow.Event.event("evt_slow"), nil
}

func transformsInTime(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		if err := ses.answersHurried(u, ref); err != nil {
			return err
		}
		ref, e, err := ses.slowOf(u)
		var skip skipError
		switch {
		case errors.As(err, &skip):
			return nil
		case err != nil:
			return err
		}
		var took time.Duration
		for range timingTries {
			item := newTransform(ref, 0)
			item.TimeoutMs = uint32(shortTimeout.Milliseconds())
			began := time.Now()
			results, err := ses.transformBatch([]*pluginv1.Event{e}, item)
			if err != nil {
				return err
			}
			took = time.Since(began)
			if results[0].GetTransformed() != nil && took < shortTimeout {
				return fmt.Errorf("what the fixture says takes it long (slow) is done in %v", took.Round(time.Millisecond))
			}
			if took <= shortTimeout+tolerance {
				return nil
			}
		}
		return latef("an item with a timeout of %v was answered after %v", shortTimeout, took.Round(time.Millisecond))
	})
}

// answersHurried gives a batch of large payloads no time: what cannot be done is answered all the same.
func (ses *session) answersHurried(u *subject, ref uint32) error {
	large := newEvent("evt_hurry", []byte(`{"s":"`+strings.Repeat("x", 64<<10)+`"}`))
	items := make([]*pluginv1.TransformItem, batchMax)
	for i := range items {
		items[i] = newTransform(ref, i%2)
		items[i].TimeoutMs = 1
	}
	tr, err := ses.sharedTransforms()
	if err != nil {
		return err
	}
	if err := tr.send([]*pluginv1.Event{u.event("evt_hurry"), large}, items...); err != nil {
		return err
	}
	if _, err := tr.await(hungAfter, items...); err != nil {
		return fmt.Errorf("with a timeout of 1 ms: %w", err)
	}
	return nil
}

func slowSparesOthers(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		slow, e, err := ses.slowOf(u)
		if err != nil {
			return err
		}
		tr, err := ses.sharedTransforms()
		if err != nil {
			return err
		}
		stuck := make([]*pluginv1.TransformItem, batchMax/2)
		for i := range stuck {
			stuck[i] = newTransform(slow, 0)
			stuck[i].TimeoutMs = uint32(stuckTimeout.Milliseconds())
		}
		if err := tr.send([]*pluginv1.Event{e}, stuck...); err != nil {
			return err
		}
		var slowest time.Duration
		for range 10 {
			began := time.Now()
			if _, err := ses.transformOne(ref, u.event("evt_lively")); err != nil {
				return fmt.Errorf("with %d items of another instance under way: %w", len(stuck), err)
			}
			slowest = max(slowest, time.Since(began))
		}
		if slowest > stuckTimeout*2/3 {
			return latef("with %d items of another instance under way, an item takes %v", len(stuck), slowest.Round(time.Millisecond))
		}
		_, err = tr.await(stuckTimeout+hungAfter, stuck...)
		return err
	})
}

func saysWhy(t *trial) error {
	return t.eachOutcome(func(r *pluginv1.TransformResult) error {
		f := r.GetFailure()
		switch {
		case r.GetDropped() != nil && r.GetDropped().GetReason() == "":
			return errors.New("it drops it without a reason")
		case f == nil:
			return nil
		case f.GetSource() == pluginv1.Failure_SOURCE_CONFIG:
			return fmt.Errorf("an instance that there is fails with SOURCE_CONFIG: %s", failureText(f))
		case f.GetCode() == "" || f.GetMessage() == "":
			return fmt.Errorf("a failure has no code, or no message: %s", failureText(f))
		}
		return nil
	})
}

// secretsInReasons fills every slot, also those that need not be, and has many events fail.
func secretsInReasons(t *trial) error {
	if !t.s.offers(transforming) {
		return skipf("it offers no transformer")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	withSlots := func(u *subject) bool { return usableTransformer(u) && len(u.kind.GetSecretSlots()) > 0 }
	return t.each("transformer that takes a secret", withSlots, func(u *subject) error {
		with := *u
		with.secrets = maps.Clone(u.secrets)
		for _, slot := range u.kind.GetSecretSlots() {
			for _, value := range ses.candidates(u.kind, slot) {
				if with.secrets[slot.GetName()] != nil {
					break
				}
				with.secrets[slot.GetName()] = value
				if r := ses.refusal(&with); r.err != nil || len(r.diagnostics) > 0 {
					delete(with.secrets, slot.GetName())
				}
			}
		}
		if len(with.secrets) == 0 {
			return skipf("no value for its slots is known")
		}
		in := ses.instance(&with, "")
		if err := ses.take(in); err != nil {
			return err
		}
		events := oddEvents()
		events["the usual kind"] = u.event("evt_usual")
		for name, e := range events {
			r, err := ses.transformOne(in.GetRef(), e)
			if err != nil {
				return err
			}
			for slot, value := range with.secrets {
				if leaks(r.GetDropped().GetReason()+r.GetFailure().GetCode()+r.GetFailure().GetMessage(), value) {
					return fmt.Errorf("a payload of %s: the reason or failure holds the value of the secret %s", name, slot)
				}
			}
		}
		return nil
	})
}

func transformsLaterMinor(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		e := u.event("evt_later")
		alone, err := ses.transformOne(ref, e)
		if err != nil {
			return err
		}
		later := proto.CloneOf(e)
		later.ProtoReflect().SetUnknown(laterField())
		item := newTransform(ref, 0)
		item.ProtoReflect().SetUnknown(laterField())
		results, err := ses.transformBatch([]*pluginv1.Event{later}, item)
		if err != nil {
			return err
		}
		if got, want := transformClass(results[0]), transformClass(alone); got != want {
			return fmt.Errorf("with unknown fields: %s, and %s without", transformText(results[0]), want)
		}
		return nil
	})
}

func transformsWhileDraining(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		e := u.event("evt_drain")
		alone, err := ses.transformOne(ref, e)
		if err != nil {
			return err
		}
		drain := &pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_Drain{Drain: &pluginv1.Drain{Grace: durationpb.New(10 * time.Second)}}}
		if err := ses.control.send(drain); err != nil {
			return err
		}
		if _, err := ses.control.beat(t.ctx, callLimit); err != nil { // by then it has seen the drain
			return err
		}
		after, err := ses.transformOne(ref, e)
		if err == nil && transformClass(after) != transformClass(alone) {
			err = fmt.Errorf("after the drain: %s", transformText(after))
		}
		return err
	})
}

func finishesTransforms(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		tr, err := ses.openTransforms()
		if err != nil {
			return err
		}
		items := make([]*pluginv1.TransformItem, batchMax)
		for i := range items {
			items[i] = newTransform(ref, 0)
		}
		if err := tr.send([]*pluginv1.Event{u.event("evt_last")}, items...); err != nil {
			return err
		}
		if err := tr.finish(callLimit); err != nil {
			return err
		}
		_, err = tr.await(callLimit, items...)
		return err
	})
}

func transformsWholeWindow(t *trial) error {
	const megabyte = 1 << 20
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		tr, err := ses.openTransforms()
		if err != nil {
			return err
		}
		large := newEvent("evt_large", []byte(`{"s":"`+strings.Repeat("x", megabyte-8)+`"}`))
		var all []*pluginv1.TransformItem
		for range transformWindow / batchMax {
			items := make([]*pluginv1.TransformItem, batchMax)
			for i := range items {
				items[i] = newTransform(ref, 0)
			}
			items[0].Event = 1
			if err := tr.send([]*pluginv1.Event{u.event("evt_window"), large}, items...); err != nil {
				return err
			}
			all = append(all, items...)
		}
		// Reading goes on in the background; holding the lock that it takes stops it.
		tr.mu.Lock()
		ses.proc.hasEnded(t.ctx, 200*time.Millisecond)
		tr.mu.Unlock()
		_, err = tr.await(callLimit, all...)
		return err
	})
}

func transformsFixture(t *trial) error {
	return t.eachWithEvents("the fixture has no events", func(u *subject) []EventFixture { return u.fixture.Events }, func(ses *session, u *subject) error {
		for i, f := range u.fixture.Events {
			if err := ses.fixtureEvent(u, f); err != nil {
				return fmt.Errorf("event %d (%s): %w", i, f.Name, err)
			}
		}
		return nil
	})
}

// eachWithEvents runs f for every transformer whose fixture has events of some sort, or skips where none has.
func (t *trial) eachWithEvents(none string, of func(*subject) []EventFixture, f func(*session, *subject) error) error {
	some := func(u *subject) bool { return u.transformer() && len(of(u)) > 0 }
	if !slices.ContainsFunc(t.s.subjects, some) {
		return skipf("%s", none)
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("transformer with events", some, func(u *subject) error { return f(ses, u) })
}

func (ses *session) fixtureEvent(u *subject, f EventFixture) error {
	with := *u
	if len(f.Config) > 0 {
		with.config = f.Config
	}
	in := ses.instance(&with, "")
	if err := ses.take(in); err != nil {
		return err
	}
	r, err := ses.transformOne(in.GetRef(), f.event("evt_fixture"))
	if err != nil || f.Want == nil {
		return err
	}
	return f.Want.check(r)
}

// check says in what a result is not what is wanted.
func (want *WantFixture) check(r *pluginv1.TransformResult) error {
	made := r.GetTransformed()
	switch {
	case want.Dropped != "":
		if !strings.Contains(r.GetDropped().GetReason(), want.Dropped) {
			return fmt.Errorf("%s, want it dropped for %q", transformText(r), want.Dropped)
		}
		return nil
	case want.Failure != "":
		if !strings.Contains(r.GetFailure().GetMessage(), want.Failure) {
			return fmt.Errorf("%s, want a failure with %q", transformText(r), want.Failure)
		}
		return nil
	case made == nil:
		return errors.New(transformText(r))
	case want.Text != "" && string(made.GetBody()) != want.Text:
		return fmt.Errorf("the body is %q, want %q", made.GetBody(), want.Text)
	case len(want.JSON) > 0 && !sameJSON(made.GetBody(), want.JSON):
		return fmt.Errorf("the body is %s, want %s", made.GetBody(), want.JSON)
	case want.ContentType != "" && made.GetContentType() != want.ContentType:
		return fmt.Errorf("the content type is %q, want %q", made.GetContentType(), want.ContentType)
	}
	for _, name := range slices.Sorted(maps.Keys(want.Headers)) {
		if !slices.ContainsFunc(made.GetHeaders(), func(h *pluginv1.Header) bool { return h.GetName() == name && h.GetValue() == want.Headers[name] }) {
			return fmt.Errorf("header %s is not %q: it sets %v", name, want.Headers[name], made.GetHeaders())
		}
	}
	return nil
}

func sameJSON(a, b []byte) bool {
	var x, y any
	read := func(text []byte, to *any) error {
		dec := json.NewDecoder(bytes.NewReader(text))
		dec.UseNumber()
		return dec.Decode(to)
	}
	return read(a, &x) == nil && read(b, &y) == nil && reflect.DeepEqual(x, y)
}

// event is the fixture's with this message ID.
func (f EventFixture) event(messageID string) *pluginv1.Event {
	e := newEvent(messageID, f.Data)
	if len(f.DataBase64) > 0 {
		e.Data = bytes.Clone(f.DataBase64)
	}
	e.Subject, e.DataSchema, e.Attributes = f.Subject, f.DataSchema, f.Attributes
	if f.ID != "" {
		e.Id = f.ID
	}
	if f.Source != "" {
		e.Source = f.Source
	}
	if f.Type != "" {
		e.Type = f.Type
	}
	if f.ContentType != "" {
		e.ContentType = f.ContentType
	}
	if !f.Time.IsZero() {
		e.Time = timestamppb.New(f.Time)
	}
	return e
}

// transformsApart configures an instance for each event of a fixture that says what comes of it, and then asks all of them, in one
// batch and one by one, the first one last: instances of their own, and then generations of one.
func transformsApart(t *trial) error {
	wanted := func(u *subject) []EventFixture {
		var events, more []EventFixture // one of each configuration comes first
		configs := map[string]bool{}
		for _, f := range u.fixture.Events {
			switch {
			case f.Want == nil:
			case configs[string(f.Config)]:
				more = append(more, f)
			default:
				events, configs[string(f.Config)] = append(events, f), true
			}
		}
		if len(configs) < 2 {
			return nil
		}
		events = append(events, more...)
		return events[:min(len(events), batchMax)]
	}
	return t.eachWithEvents("the fixture has no events with different configurations that say what is wanted", wanted, func(ses *session, u *subject) error {
		for _, among := range []string{"instances", "generations"} {
			if err := ses.transformedApart(u, wanted(u), among == "generations"); err != nil {
				return fmt.Errorf("beside %s of other configurations: %w", among, err)
			}
		}
		return nil
	})
}

func (ses *session) transformedApart(u *subject, wanted []EventFixture, generations bool) error {
	var events []*pluginv1.Event
	var items []*pluginv1.TransformItem
	var first *pluginv1.Instance
	for i, f := range wanted {
		with := *u
		if len(f.Config) > 0 {
			with.config = f.Config
		}
		in := ses.instance(&with, "")
		if first == nil {
			first = in
		}
		if generations {
			in.Id, in.Generation = first.GetId(), uint64(i+1)
		}
		if err := ses.take(in); err != nil {
			return err
		}
		events = append(events, f.event("evt_fixture"))
		items = append(items, newTransform(in.GetRef(), i))
	}
	results, err := ses.transformBatch(events, items...)
	if err != nil {
		return err
	}
	for i, f := range slices.Backward(wanted) {
		alone, err := ses.transformOne(items[i].GetInstanceRef(), events[i])
		if err != nil {
			return err
		}
		for _, r := range []*pluginv1.TransformResult{results[i], alone} {
			if err := f.Want.check(r); err != nil {
				return fmt.Errorf("event %d (%s): %w", i, f.Name, err)
			}
		}
	}
	return nil
}
