package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// serves reports with an error when the instance does not serve: it is used, and is not unknown.
func (ses *session) serves(u *subject, ref uint32) error {
	known, err := ses.known(u, ref)
	if err == nil && !known {
		err = fmt.Errorf("ref %d is answered as unknown", ref)
	}
	return err
}

// known uses the instance and reports whether the plugin has it. How the use ends does not matter.
func (ses *session) known(u *subject, ref uint32) (bool, error) {
	c := newContent("evt_known", []byte(`{"known":true}`))
	if u.signer() {
		results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(ref, 0))
		if err != nil {
			return false, err
		}
		return results[0].GetFailure().GetSource() != pluginv1.Failure_SOURCE_CONFIG, nil
	}
	if u.transformer() {
		res, err := ses.transformOne(ref, newEvent("evt_known", []byte(`{"known":true}`)))
		return res.GetFailure().GetSource() != pluginv1.Failure_SOURCE_CONFIG, err
	}
	a, err := ses.sharedAttempts()
	if err != nil {
		return false, err
	}
	res, err := a.one(c, newAttempt(ref, 2*time.Second))
	if err != nil {
		return false, err
	}
	return res.GetFailure().GetSource() != pluginv1.Failure_SOURCE_CONFIG, nil
}

func statusesInOrder(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		good1, bad, good2 := ses.instance(u, ""), ses.instance(u, ""), ses.instance(u, "")
		bad.Kind = "no-such-kind"
		statuses, err := ses.configure(good1, bad, good2)
		if err != nil {
			return err
		}
		for i, in := range []*pluginv1.Instance{good1, bad, good2} {
			if statuses[i].GetRef() != in.GetRef() {
				return fmt.Errorf("status %d is about ref %d, want %d", i, statuses[i].GetRef(), in.GetRef())
			}
			refused := len(complaints(statuses[i].GetDiagnostics())) > 0
			if refused && in != bad {
				return fmt.Errorf("a good instance beside a bad one is refused: %s", diagnosticsText(statuses[i].GetDiagnostics()))
			}
		}
		return errors.Join(ses.serves(u, good1.GetRef()), ses.serves(u, good2.GetRef()))
	})
}

func idempotent(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		for range 3 {
			if err := ses.take(in); err != nil {
				return err
			}
		}
		again := proto.CloneOf(in) // the same generation under a ref of its own, as after a lost answer
		again.Ref = ses.nextRef()
		if err := ses.take(again); err != nil {
			return fmt.Errorf("under another ref: %w", err)
		}
		return errors.Join(ses.serves(u, in.GetRef()), ses.serves(u, again.GetRef()))
	})
}

// generationOf is another generation of an instance, under a ref of its own.
func (ses *session) generationOf(in *pluginv1.Instance, generation uint64) *pluginv1.Instance {
	next := proto.CloneOf(in)
	next.Ref, next.Generation = ses.nextRef(), generation
	return next
}

func staleGeneration(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		in.Generation = 5
		if err := ses.take(in); err != nil {
			return err
		}
		statuses, err := ses.configure(ses.generationOf(in, 4))
		if err != nil {
			return err
		}
		if err := mustSay(statuses[0].GetDiagnostics(), codeStale); err != nil {
			return fmt.Errorf("generation 4 after generation 5: %w", err)
		}
		return ses.serves(u, in.GetRef())
	})
}

func badGeneration(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		bad := ses.generationOf(in, 2)
		bad.ConfigJson = []byte(`"no object"`)
		if _, err := ses.configure(bad); err != nil {
			return err
		}
		if err := ses.serves(u, in.GetRef()); err != nil {
			return fmt.Errorf("after a bad generation 2: %w", err)
		}
		return nil
	})
}

func bothGenerations(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		next := ses.generationOf(in, 2)
		if err := errors.Join(ses.take(in), ses.take(next)); err != nil {
			return err
		}
		if err := errors.Join(ses.serves(u, in.GetRef()), ses.serves(u, next.GetRef())); err != nil {
			return err
		}
		if err := ses.remove(in.GetRef()); err != nil {
			return err
		}
		if err := ses.serves(u, next.GetRef()); err != nil {
			return fmt.Errorf("after the older was removed: %w", err)
		}
		return nil
	})
}

func removeFrees(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in, other := ses.instance(u, ""), ses.instance(u, "")
		if err := ses.take(in, other); err != nil {
			return err
		}
		if err := ses.remove(in.GetRef(), 1<<24); err != nil {
			return err
		}
		known, err := ses.known(u, in.GetRef())
		if err != nil {
			return err
		}
		if known {
			return errors.New("a removed instance is used, want a failure with SOURCE_CONFIG")
		}
		return ses.serves(u, other.GetRef())
	})
}

// givesBack changes an instance time and again, as subscriptions and secrets are, and uses each generation once.
func givesBack(t *trial) error {
	const (
		generations = 24
		most        = 4 // connections, and files beyond those before, however many generations
		patience    = 5 * time.Second
	)
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		uri := ""
		var k *sink
		if overHTTP(u) {
			var err error
			if k, err = t.receiver(u, answer200); err != nil {
				return err
			}
			uri = u.uriOf(k, k.url+"/generation")
		}
		last := ses.instance(u, uri)
		if err := errors.Join(ses.take(last), ses.serves(u, last.GetRef())); err != nil {
			return err
		}
		before, known := usageOf(ses.proc.pid()) // what the first brings along is not counted
		for n := range uint64(generations) {
			next := ses.generationOf(last, n+2)
			if k != nil {
				next.Target.Uri = u.uriOf(k, fmt.Sprintf("%s/generation/%d", k.url, n))
			}
			if err := errors.Join(ses.take(next), ses.serves(u, next.GetRef()), ses.remove(last.GetRef())); err != nil {
				return fmt.Errorf("generation %d: %w", n+2, err)
			}
			last = next
		}
		defer func() { _ = ses.remove(last.GetRef()) }()
		var held error
		for until := time.Now().Add(patience); time.Now().Before(until); ses.proc.pause(t.ctx) {
			held = nil
			if after, _ := usageOf(ses.proc.pid()); known && after.fds > before.fds+most {
				held = fmt.Errorf("after %d generations, all but one removed, the process holds %d files more than with the first", generations+1, after.fds-before.fds)
			}
			if k != nil && k.connected() > most {
				held = fmt.Errorf("after %d generations, all but one removed, %d connections to the receiver are open", generations+1, k.connected())
			}
			if held == nil {
				break
			}
		}
		return held
	})
}

func manyInstances(t *trial) error {
	const all, each = 1000, 100 << 10
	ses, err := t.session()
	if err != nil {
		return err
	}
	kinds := 0
	for _, u := range t.s.subjects {
		if usable(u) {
			kinds++
		}
	}
	n := max(all/max(kinds, 1), 101) // spread over the kinds
	return t.each("kind", usable, func(u *subject) error {
		list := make([]*pluginv1.Instance, n)
		for i := range list {
			list[i] = ses.instance(u, "")
		}
		if err := ses.take(list[0]); err != nil { // what the first brings along is not counted
			return err
		}
		before, known := usageOf(ses.proc.pid())
		for part := range slices.Chunk(list[1:], 100) {
			if err := ses.take(part...); err != nil {
				return err
			}
		}
		after, _ := usageOf(ses.proc.pid())
		if grown := after.rss - before.rss; known && grown > int64(n)*each+(16<<20) {
			return fmt.Errorf("%d instances take %d MiB", n, grown>>20)
		}
		refs := make([]uint32, n)
		for i := range list {
			refs[i] = list[i].GetRef()
		}
		if err := errors.Join(ses.serves(u, refs[0]), ses.serves(u, refs[n-1])); err != nil {
			return err
		}
		return ses.remove(refs...)
	})
}

func configureUnderLoad(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		if err := ses.take(in); err != nil {
			return err
		}
		stop := make(chan struct{})
		var changes sync.WaitGroup
		var changing error
		changes.Go(func() {
			for changing == nil {
				select {
				case <-stop:
					return
				default:
				}
				other := ses.instance(u, "")
				if changing = ses.take(other); changing == nil {
					changing = ses.remove(other.GetRef())
				}
			}
		})
		var err error
		for range 40 {
			if err = ses.serves(u, in.GetRef()); err != nil {
				break
			}
		}
		close(stop)
		changes.Wait()
		return errors.Join(err, changing)
	})
}

func rotatedSecrets(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind with a secret", func(u *subject) bool { return usable(u) && len(u.secrets) > 0 }, func(u *subject) error {
		newer, older, err := ses.rotation(u)
		if err != nil {
			return err
		}
		both, late := ses.instance(u, ""), ses.instance(u, "")
		for slot, value := range newer {
			both.Secrets[slot] = versions(value, older[slot], time.Now().Add(time.Hour))
			late.Secrets[slot] = versions(value, older[slot], time.Now().Add(-time.Hour))
		}
		alone := ses.instance(u, "")
		for slot, value := range newer {
			alone.Secrets[slot] = versions(value, nil, time.Time{})
		}
		if err := ses.take(both, late, alone); err != nil {
			return fmt.Errorf("with two versions of a secret: %w", err)
		}
		if err := ses.serves(u, both.GetRef()); err != nil {
			return err
		}
		if !deterministicSigner(u) {
			return nil
		}
		c := newContent("evt_rotate", []byte("{}"))
		results, _, err := ses.signBatch([]*pluginv1.Content{c}, signItem(late.GetRef(), 0), signItem(alone.GetRef(), 0))
		if err != nil {
			return err
		}
		if signatureText(results[0]) != signatureText(results[1]) {
			return errors.New("a version whose expire_time is over still signs")
		}
		return nil
	})
}

func versions(newest, older []byte, expire time.Time) *pluginv1.SecretVersions {
	v := &pluginv1.SecretVersions{Versions: []*pluginv1.SecretVersion{{Version: 2, Value: newest}}}
	if older != nil {
		v.Versions = append(v.Versions, &pluginv1.SecretVersion{Version: 1, Value: older, ExpireTime: timestamppb.New(expire)})
	}
	return v
}

// rotation finds two values for every slot that is filled: made by the plugin, or of the common ones.
func (ses *session) rotation(u *subject) (newer, older map[string][]byte, err error) {
	newer, older = map[string][]byte{}, u.secrets
	for _, slot := range u.kind.GetSecretSlots() {
		current, filled := u.secrets[slot.GetName()]
		if !filled {
			continue
		}
		others := commonSecrets("of a later version")
		if len(slot.GetAlgorithms()) > 0 {
			others = append(ses.candidates(u.kind, slot)[:1:1], others...)
		}
		for _, value := range others {
			trial := &subject{kind: u.kind, fixture: u.fixture, config: u.config, uri: u.uri, secrets: map[string][]byte{}}
			for s, v := range u.secrets {
				trial.secrets[s] = v
			}
			trial.secrets[slot.GetName()] = value
			if r := ses.refusal(trial); r.err == nil && len(r.diagnostics) == 0 && !bytes.Equal(value, current) {
				newer[slot.GetName()] = value
				break
			}
		}
		if newer[slot.GetName()] == nil {
			return nil, nil, skipf("no second value is known for secret slot %q", slot.GetName())
		}
	}
	return newer, older, nil
}

func validateIsPure(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		if _, err := ses.validate(in); err != nil {
			return err
		}
		known, err := ses.known(u, in.GetRef())
		if err == nil && known {
			err = errors.New("an instance that was only validated is used")
		}
		return err
	})
}

// laterField is an unknown field as a later minor may add.
func laterField() []byte {
	b := protowire.AppendTag(nil, 1999, protowire.BytesType)
	b = protowire.AppendString(b, "of a later minor")
	b = protowire.AppendTag(b, 1998, protowire.VarintType)
	return protowire.AppendVarint(b, 7)
}

func laterMinor(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	ask := &pluginv1.DescribeRequest{HostVersion: "conformance", HostProtocolMinor: 99}
	ask.ProtoReflect().SetUnknown(laterField())
	if _, err := ses.plugin.Describe(t.ctx, ask); err != nil {
		return fmt.Errorf("describe: %w", err)
	}
	return t.each("kind", usable, func(u *subject) error {
		in := ses.instance(u, "")
		in.ProtoReflect().SetUnknown(laterField())
		in.Target.ProtoReflect().SetUnknown(laterField())
		ds, err := ses.validate(in)
		if err != nil {
			return err
		}
		if found := complaints(ds); len(found) > 0 {
			return fmt.Errorf("validate refuses it: %s", diagnosticsText(found))
		}
		if err := ses.take(in); err != nil {
			return err
		}
		return ses.serves(u, in.GetRef())
	})
}
