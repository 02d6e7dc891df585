package conformance

import (
	"cmp"
	"fmt"
	"slices"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	soakAttempts = 100_000
	soakRounds   = 200
	// soakGrowth is what a process may grow by in the course of a soak.
	soakGrowth = 16 << 20
	// soakSlack is how many descriptors or threads more may be open at the end.
	soakSlack = 16
)

func soakCases() []Case {
	const g = GroupSoak
	return []Case{
		{ID: "SO-01", Group: g, Title: "100,000 attempts leave memory, descriptors and threads where they were", run: soakTransport, soak: true,
			Protects: "a leak ends the process in the middle of the night"},
		{ID: "SO-02", Group: g, Title: "100,000 signatures leave memory, descriptors and threads where they were", run: soakSigner, soak: true,
			Protects: "a leak ends the process in the middle of the night"},
		{ID: "SO-03", Group: g, Title: "20,000 instances that come and go leave memory where it was", run: soakInstances, soak: true,
			Protects: "subscriptions are changed all the time"},
		{ID: "SO-04", Group: g, Title: "100,000 transformations leave memory, descriptors and threads where they were", run: soakTransformer, soak: true,
			Protects: "a leak ends the process in the middle of the night"},
	}
}

// steady runs work in parts and looks at what the process holds as it goes. Memory goes up and down with the
// collection of garbage, so a leak is when the least of the last third is above the most of the first, the
// very beginning left out.
func (ses *session) steady(parts int, work func() error) error {
	var early, late []usage
	for i := range parts {
		if err := work(); err != nil {
			return fmt.Errorf("part %d of %d: %w", i+1, parts, err)
		}
		now, known := usageOf(ses.proc.pid())
		switch {
		case !known:
			return skipf("this system does not tell what a process holds")
		case i >= parts/10 && i < parts*4/10:
			early = append(early, now)
		case i >= parts*7/10:
			late = append(late, now)
		}
	}
	grown := func(of func(usage) int64) (from, to int64) {
		most := slices.MaxFunc(early, func(a, b usage) int { return cmp.Compare(of(a), of(b)) })
		least := slices.MinFunc(late, func(a, b usage) int { return cmp.Compare(of(a), of(b)) })
		return of(most), of(least)
	}
	if from, to := grown(func(u usage) int64 { return u.rss }); to-from > soakGrowth {
		return fmt.Errorf("it grew from %d to %d MiB", from>>20, to>>20)
	}
	if from, to := grown(func(u usage) int64 { return int64(u.fds) }); to-from > soakSlack {
		return fmt.Errorf("descriptors went from %d to %d", from, to)
	}
	if from, to := grown(func(u usage) int64 { return int64(u.threads) }); to-from > soakSlack {
		return fmt.Errorf("threads went from %d to %d", from, to)
	}
	return nil
}

func soakTransport(t *trial) error {
	c, err := t.flow(func(x *exchange) {
		switch x.n % 100 {
		case 0:
			reset(x.Conn)
		case 1:
			x.reply(500, "Retry-After: 1\r\n", "no")
		default:
			answer200(x)
		}
		x.forgetBody()
	})
	if err != nil {
		return err
	}
	return c.ses.steady(100, func() error {
		if c.sink != nil {
			c.sink.forgetSeen()
		}
		sent, err := c.a.submit(twoContents(), c.attempts(soakAttempts/100, attemptTimeout)...)
		if err != nil {
			return err
		}
		for _, p := range sent {
			if _, err := c.a.wait(p); err != nil {
				return err
			}
		}
		c.a.mu.Lock()
		clear(c.a.done)
		c.a.mu.Unlock()
		return nil
	})
}

func soakSigner(t *trial) error {
	return t.eachSigner(usableSigner, func(ses *session, _ *subject, ref uint32) error {
		return ses.steady(100, func() error {
			for range soakAttempts / 100 / batchMax {
				items := make([]*pluginv1.SignItem, batchMax)
				for i := range items {
					items[i] = signItem(ref, uint32(i%2))
				}
				if _, _, err := ses.signBatch(twoContents(), items...); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

func soakTransformer(t *trial) error {
	return t.eachTransformer(func(ses *session, u *subject, ref uint32) error {
		tr, err := ses.sharedTransforms()
		if err != nil {
			return err
		}
		return ses.steady(100, func() error {
			for range soakAttempts / 100 / batchMax {
				items := make([]*pluginv1.TransformItem, batchMax)
				for i := range items {
					items[i] = newTransform(ref, 0)
				}
				if _, err := ses.transformBatch([]*pluginv1.Event{u.event("evt_soak")}, items...); err != nil {
					return err
				}
			}
			tr.forget()
			return nil
		})
	})
}

func soakInstances(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	return t.each("kind", usable, func(u *subject) error {
		return ses.steady(soakRounds, func() error {
			list := make([]*pluginv1.Instance, 100)
			refs := make([]uint32, len(list))
			for i := range list {
				list[i] = ses.instance(u, "")
				refs[i] = list[i].GetRef()
			}
			if err := ses.take(list...); err != nil {
				return err
			}
			return ses.remove(refs...)
		})
	})
}

// forgetBody and forgetSeen keep a soak from growing itself.
func (x *exchange) forgetBody() { x.body = nil }

func (k *sink) forgetSeen() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.requests = nil
}
