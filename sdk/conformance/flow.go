package conformance

import (
	"errors"
	"fmt"
	"slices"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func flowCases() []Case {
	const g = GroupFlow
	return []Case{
		{ID: "FL-01", Group: g, Title: "the attempt stream begins with a welcome that grants credits", run: welcomes,
			Protects: "without credits the server can send nothing"},
		{ID: "FL-02", Group: g, Title: "every attempt is answered exactly once", run: answersExactlyOnce,
			Protects: "an attempt without an answer is indeterminate; one too many ends the plugin's process"},
		{ID: "FL-03", Group: g, Title: "takes as many attempts at once as it grants credits", run: wholeWindow, limit: 3 * time.Minute,
			Protects: "the server uses the window that it is granted"},
		{ID: "FL-04", Group: g, Title: "receivers that do not answer hold up no other", run: stuckSparesOthers,
			Protects: "one tenant's outage is not everybody's"},
		{ID: "FL-05", Group: g, Title: "a cancel of unknown attempts is ignored", run: cancelUnknown,
			Protects: "an answer and a cancel may cross"},
		{ID: "FL-06", Group: g, Title: "a cancelled attempt ends at once, and is not held against the receiver", run: cancels,
			Protects: "a stop of the server, and the receiver's failure counters"},
		{ID: "FL-07", Group: g, Title: "a drain loses nothing: each attempt is answered or returned, and Drained is last", run: drains,
			Protects: "an upgrade under load loses no delivery and doubles none"},
		{ID: "FL-08", Group: g, Title: "a drain ends by its grace", run: drainDeadline,
			Protects: "a stop of the server is not held up by stuck receivers"},
		{ID: "FL-09", Group: g, Title: "malformed frames end the stream at most, not the process", run: malformedFrames,
			Protects: "one bad frame is not a crash of everything in flight"},
		{ID: "FL-10", Group: g, Title: "unknown fields and frames on streams are ignored", run: laterFrames,
			Protects: "servers of a later minor"},
		{ID: "FL-11", Group: g, Title: "attempts that fail spare the others of their batch", run: failuresSpareOthers,
			Protects: "a bad subscription shares batches with good ones"},
		{ID: "FL-12", Group: g, Title: "an unknown ref fails with SOURCE_CONFIG and nothing sent", run: unknownRef,
			Protects: "the server configures the instance again, and no attempt is spent"},
		{ID: "FL-13", Group: g, Title: "heartbeats are answered with their number, under load too", run: heartbeats,
			Protects: "three without an answer, and the server takes the plugin for hung and kills it"},
		{ID: "FL-14", Group: g, Title: "AttemptOne does what the stream does", run: attemptOne,
			Protects: "the server adapts plugins without a stream"},
		{ID: "FL-15", Group: g, Title: "a host that stops reading for a while loses no answer", run: pausedHost,
			Protects: "a busy or suspended server"},
		{ID: "FL-16", Group: g, Title: "a batch with bodies of 1 MiB passes", run: largeBatch,
			Protects: "the server's batches are that large"},
	}
}

// anyTransport is what flow can be tested with: for the choice, transports of http come first.
func (t *trial) anyTransport() *subject {
	for _, want := range []func(*subject) bool{answers, overHTTP, usableTransport} {
		if i := slices.IndexFunc(t.s.subjects, want); i >= 0 {
			return t.s.subjects[i]
		}
	}
	return nil
}

// flow starts a process, a receiver for transports of http, and an instance.
func (t *trial) flow(handle func(*exchange)) (*carrier, error) {
	u := t.anyTransport()
	if u == nil {
		return nil, t.noTransport("http")
	}
	ses, err := t.session()
	if err != nil {
		return nil, err
	}
	c := &carrier{ses: ses, u: u}
	if c.a, err = ses.sharedAttempts(); err != nil {
		return nil, err
	}
	uri := ""
	if overHTTP(u) {
		if !answers(u) {
			handle = answer200 // it is a way for messages to go
		}
		if c.sink, err = t.receiver(u, handle); err != nil {
			return nil, err
		}
		uri = c.sink.url + "/flow"
	}
	c.ref, err = c.instance(uri)
	return c, err
}

// flowHTTP is flow for cases that need a receiver that the suite plays.
func (t *trial) flowHTTP(handle func(*exchange)) (*carrier, error) {
	if !slices.ContainsFunc(t.s.subjects, answers) {
		return nil, t.noTransport("http")
	}
	return t.flow(handle)
}

// streaming skips the case for plugins that take attempts one by one.
func (t *trial) streaming() error {
	if t.s.offers(carrying) && !t.s.can("attempt.stream") {
		return skipf(`it takes attempts one by one: it does not have the capability "attempt.stream"`)
	}
	return nil
}

func (c *carrier) attempts(n int, timeout time.Duration) []*pluginv1.Attempt {
	list := make([]*pluginv1.Attempt, n)
	for i := range list {
		list[i] = newAttempt(c.ref, timeout)
		list[i].Content = uint32(i % 2)
	}
	return list
}

func twoContents() []*pluginv1.Content {
	return []*pluginv1.Content{newContent("evt_1", []byte(`{"n":1}`)), newContent("evt_2", []byte(`{"n":2}`))}
}

func welcomes(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	if !t.s.offers(carrying) {
		return t.noTransport("http")
	}
	ses, err := t.session()
	if err != nil {
		return err
	}
	_, err = ses.openAttempts()
	return err
}

func answersExactlyOnce(t *trial) error {
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	for range 5 {
		sent, err := c.a.submit(twoContents(), c.attempts(200, attemptTimeout)...)
		if err != nil {
			return err
		}
		for _, p := range sent {
			if _, err := c.a.wait(p); err != nil {
				return err
			}
		}
	}
	// What was answered twice may have its second answer on the way still.
	if _, err := c.send([]byte(`{}`), attemptTimeout); err != nil {
		return err
	}
	if broken := c.a.broken(); len(broken) > 0 {
		return fmt.Errorf("%s (%d such faults)", broken[0], len(broken))
	}
	return nil
}

func wholeWindow(t *trial) error {
	c, err := t.flow(hang)
	if err != nil {
		return err
	}
	n := min(c.a.credits, 1024)
	c.a.grace = 40 * time.Second // so many connections take a busy machine a while
	sent, err := c.a.submit(twoContents(), c.attempts(n, 2*time.Second)...)
	if err != nil {
		return err
	}
	if err := c.a.waitForAll(sent, c.a.grace); err != nil { // as long as answers come, there is no hurry
		return fmt.Errorf("with %d of %d credits used: %w", n, c.a.credits, err)
	}
	return nil
}

func stuckSparesOthers(t *trial) error {
	c, err := t.flowHTTP(hang)
	if err != nil {
		return err
	}
	lively, err := t.receiver(c.u, answer200)
	if err != nil {
		return err
	}
	quick := *c
	quick.sink = lively
	if quick.ref, err = quick.instance(lively.url + "/lively"); err != nil {
		return err
	}
	stuck, err := c.a.submit(twoContents(), c.attempts(min(64, c.a.credits/2), 20*time.Second)...)
	if err != nil {
		return err
	}
	var slowest time.Duration
	for range timingTries {
		slowest = 0
		for range 20 {
			began := time.Now()
			resp, err := quick.send([]byte(`{}`), 3*time.Second)
			if err != nil {
				return fmt.Errorf("with %d attempts stuck: %w", len(stuck), err)
			}
			if resp.GetResponse() == nil {
				return fmt.Errorf("with %d attempts stuck, another fails: %s", len(stuck), failureText(resp.GetFailure()))
			}
			slowest = max(slowest, time.Since(began))
		}
		if slowest < time.Second {
			return nil
		}
	}
	return fmt.Errorf("with %d attempts stuck, another takes %v", len(stuck), slowest.Round(time.Millisecond))
}

func cancelUnknown(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	c, err := t.flow(answer200)
	if err != nil {
		return err
	}
	res, err := c.a.submit(twoContents(), c.attempts(3, attemptTimeout)...)
	if err != nil {
		return err
	}
	for _, p := range res {
		if _, err := c.a.wait(p); err != nil {
			return err
		}
	}
	many := make([]uint64, 3000)
	for i := range many {
		many[i] = 1<<50 + uint64(i)
	}
	if err := errors.Join(c.a.cancelSeqs(1<<60, res[0].seq), c.a.cancelSeqs(many...), c.a.cancelSeqs()); err != nil {
		return err
	}
	after, err := c.send([]byte(`{}`), attemptTimeout)
	if err != nil {
		return err
	}
	if after.GetFailure().GetCode() == "cancelled" {
		return errors.New("an attempt that nobody cancelled is")
	}
	return nil
}

func cancels(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	c, err := t.flowHTTP(hang)
	if err != nil {
		return err
	}
	const n = 20
	for range timingTries {
		before, _ := c.sink.seen()
		sent, err := c.a.submit(twoContents(), c.attempts(n, 20*time.Second)...)
		if err != nil {
			return err
		}
		if err := c.sink.await(t, len(before)+n/2, attemptTimeout); err != nil {
			return err
		}
		began := time.Now()
		seqs := make([]uint64, n)
		for i, p := range sent {
			seqs[i] = p.seq
		}
		if err := c.a.cancelSeqs(seqs...); err != nil {
			return err
		}
		for _, p := range sent {
			res, err := c.a.waitFor(p, began.Sub(p.sent)+2*time.Second)
			if err != nil {
				return fmt.Errorf("cancelled while the receiver is silent: %w", err)
			}
			f, err := mustFail(res)
			if err != nil {
				return err
			}
			if err := outcome(f, pluginv1.Failure_SOURCE_PLUGIN, []string{"cancelled"}); err != nil {
				return err
			}
		}
		if time.Since(began) < time.Second {
			return nil
		}
	}
	return errors.New("cancelled attempts end more than a second later")
}

func drains(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	slow := func(x *exchange) {
		timer := time.NewTimer(100 * time.Millisecond)
		defer timer.Stop()
		select {
		case <-timer.C:
			answer200(x)
		case <-x.stop:
		}
	}
	c, err := t.flow(slow)
	if err != nil {
		return err
	}
	sent, err := c.a.submit(twoContents(), c.attempts(min(200, c.a.credits), attemptTimeout)...)
	if err != nil {
		return err
	}
	if err := c.a.drain(10*time.Second, 15*time.Second); err != nil {
		return err
	}
	c.a.mu.Lock()
	defer c.a.mu.Unlock()
	if c.a.drained == nil {
		return fmt.Errorf("the stream ended without Drained: %v", c.a.err)
	}
	if slices.Contains(c.a.faults, "a frame came after drained") {
		return errors.New("a frame came after Drained")
	}
	returned := c.a.drained.GetReturned()
	for _, p := range sent {
		answered, back := p.result != nil, slices.Contains(returned, p.seq)
		if answered && back {
			return fmt.Errorf("seq %d was answered and returned: it would be sent twice", p.seq)
		}
		if !answered && !back {
			return fmt.Errorf("seq %d was neither answered nor returned", p.seq)
		}
	}
	if len(returned) > len(sent) {
		return fmt.Errorf("%d attempts were returned of %d", len(returned), len(sent))
	}
	return nil
}

func drainDeadline(t *trial) error {
	if err := t.streaming(); err != nil {
		return err
	}
	c, err := t.flowHTTP(hang)
	if err != nil {
		return err
	}
	if _, err := c.a.submit(twoContents(), c.attempts(min(32, c.a.credits), 30*time.Second)...); err != nil {
		return err
	}
	if err := c.sink.await(t, 1, attemptTimeout); err != nil {
		return err
	}
	return c.a.drain(500*time.Millisecond, 3*time.Second)
}
