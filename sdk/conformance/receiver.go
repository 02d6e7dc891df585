package conformance

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// bridgeLimit is how long a fixture's command may take to be ready.
const bridgeLimit = 10 * time.Second

// bridge is a fixture's way to one receiver of the suite.
type bridge struct{ dir string }

// fill puts a receiver's address into a text of a fixture.
func (b *bridge) fill(text string, u *url.URL) string {
	host := strings.TrimSuffix(u.Host, ":"+u.Port())
	return strings.NewReplacer("{host}", host, "{port}", u.Port(), "{path}", u.RequestURI(), "{dir}", b.dir).Replace(text)
}

// receiver is a sink for the subject's requests, with the fixture's command in front of it.
func (t *trial) receiver(u *subject, handle func(*exchange)) (*sink, error) {
	k, err := t.newSink(handle)
	if err != nil || u.fixture.Receiver == nil {
		return k, err
	}
	target, err := url.Parse(k.url)
	if err != nil {
		return nil, err
	}
	k.bridge = &bridge{}
	if k.bridge.dir, err = os.MkdirTemp(t.s.dir, "r"); err != nil {
		return nil, fmt.Errorf("make a directory for the receiver: %w", err)
	}
	t.atEnd(func() { _ = os.RemoveAll(k.bridge.dir) })
	if len(u.fixture.Receiver.Command) == 0 {
		return k, nil
	}
	return k, t.startBridge(k.bridge, u.fixture.Receiver.Command, target)
}

// startBridge starts the command and waits until something stands in its directory, or it has written a line.
func (t *trial) startBridge(b *bridge, command []string, target *url.URL) error {
	words := make([]string, len(command))
	for i, w := range command {
		words[i] = b.fill(w, target)
	}
	refuse := func(err error) error {
		return fmt.Errorf("the fixture's receiver.command %s: %w", shellWords(words), err)
	}
	cmd := exec.Command(words[0], words[1:]...)
	ownGroup(cmd)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return refuse(err)
	}
	if err := cmd.Start(); err != nil {
		return refuse(err)
	}
	line, ended := make(chan struct{}), make(chan struct{})
	go func() {
		br := bufio.NewReader(stdout)
		if _, err := br.ReadString('\n'); err == nil {
			close(line)
		}
		_, _ = io.Copy(io.Discard, br)
		_ = cmd.Wait()
		close(ended)
	}()
	t.atEnd(func() {
		killGroup(cmd.Process)
		<-ended
	})
	limit := time.NewTimer(bridgeLimit)
	defer limit.Stop()
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for {
		select {
		case <-line:
			return nil
		case <-ended:
			return refuse(errors.New("it has ended"))
		case <-limit.C:
			return refuse(fmt.Errorf("after %v nothing stands in {dir}, and it has written no line", bridgeLimit))
		case <-t.ctx.Done():
			return t.ctx.Err()
		case <-look.C:
			if entries, err := os.ReadDir(b.dir); err == nil && len(entries) > 0 {
				return nil
			}
		}
	}
}

// uriOf is the URI by which the subject is sent to a receiver of the suite, whose plain one is given.
func (u *subject) uriOf(k *sink, plain string) string {
	if u.fixture.Receiver == nil {
		return u.httpPrefix() + plain
	}
	target, err := url.Parse(plain)
	if err != nil { // it is of the suite
		return plain
	}
	b := &bridge{dir: "/nonexistent"}
	if k != nil && k.bridge != nil {
		b = k.bridge
	}
	return b.fill(u.fixture.Receiver.URI, target)
}

// bridged reports whether a command stands between the plugin and the receiver, so that the connection is not the
// suite's to break.
func (u *subject) bridged() bool {
	return u.fixture.Receiver != nil && len(u.fixture.Receiver.Command) > 0
}

// answers reports whether what the receiver answers comes back.
func answers(u *subject) bool {
	return overHTTP(u) && (u.fixture.Receiver == nil || !u.fixture.Receiver.OneWay)
}

// fault says what the fixture names that the plugin does not have.
func (f *Fixture) fault(s *suite) error {
	ids := make([]string, 0, len(s.described.GetKinds()))
	slots := map[string][]string{}
	for _, k := range s.described.GetKinds() {
		ids = append(ids, k.GetId())
		for _, slot := range k.GetSecretSlots() {
			slots[k.GetId()] = append(slots[k.GetId()], slot.GetName())
		}
	}
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(f.Kinds)) {
		k := f.Kinds[id]
		if !slices.Contains(ids, id) {
			errs = append(errs, fmt.Errorf("the fixture is about kind %q, and the plugin has %s", id, oneOf(ids)))
			continue
		}
		secrets := slices.Sorted(maps.Keys(k.Secrets))
		for _, v := range k.Vectors {
			secrets = append(secrets, slices.Sorted(maps.Keys(v.Secrets))...)
		}
		for _, slot := range secrets {
			if !slices.Contains(slots[id], slot) {
				errs = append(errs, fmt.Errorf("the fixture fills secret slot %q of %s, which has %s", slot, id, oneOf(slots[id])))
			}
		}
		if k.Receiver != nil && k.Receiver.URI == "" {
			errs = append(errs, fmt.Errorf("the fixture's receiver of %s has no uri", id))
		}
	}
	return errors.Join(errs...)
}

// oneOf lists names for people.
func oneOf(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
