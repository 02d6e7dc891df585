package conformance

import (
	"fmt"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const (
	soakAttempts = 100_000
	soakRounds   = 200
	// soakGrowth is what a process may grow by between a fifth of a soak and its end.
	soakGrowth = 24 << 20
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
	}
}

// steady runs work in parts and compares what the process holds after the first fifth and at the end.
func (ses *session) steady(parts int, work func() error) error {
	var early usage
	for i := range parts {
		if err := work(); err != nil {
			return fmt.Errorf("part %d of %d: %w", i+1, parts, err)
		}
		if i == parts/5 {
			var known bool
			if early, known = usageOf(ses.proc.pid()); !known {
				return skipf("this system does not tell what a process holds")
			}
		}
	}
	ses.proc.hasEnded(ses.t.ctx, 2*time.Second) // what is to be given back takes a moment
	late, _ := usageOf(ses.proc.pid())
	switch {
	case late.rss-early.rss > soakGrowth:
		return fmt.Errorf("it grew from %d to %d MiB", early.rss>>20, late.rss>>20)
	case late.fds-early.fds > soakSlack:
		return fmt.Errorf("descriptors went from %d to %d", early.fds, late.fds)
	case late.threads-early.threads > soakSlack:
		return fmt.Errorf("threads went from %d to %d", early.threads, late.threads)
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
