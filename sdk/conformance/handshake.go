package conformance

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func handshakeCases() []Case {
	const g = GroupHandshake
	return []Case{
		{ID: "HS-01", Group: g, Title: "prints the handshake line within 10 s, answers Describe and takes settings", run: comesUp,
			Protects: "the server gives up on a plugin that does not come up, and parks its deliveries"},
		{ID: "HS-02", Group: g, Title: "the handshake line is 1|1|unix|PATH|grpc|", run: lineFields,
			Protects: "a line that the server reads otherwise than it is meant"},
		{ID: "HS-03", Group: g, Title: "writes nothing to standard output before the line", run: nothingBefore,
			Protects: "a banner or a log line that is taken for the handshake"},
		{ID: "HS-04", Group: g, Title: "its socket is in the directory it was given, and nothing else is", run: socketDirectory,
			Protects: "other users of the machine cannot connect; no sockets pile up"},
		{ID: "HS-05", Group: g, Title: "started by hand it says what it is and exits with an error", run: startedByHand,
			Protects: "people who run the binary, and supervisors that do by mistake"},
		{ID: "HS-06", Group: g, Title: "starts with nothing in its environment but PATH and the handshake, in / and without standard input", run: bareStart,
			Protects: "the server passes on nothing of its own environment"},
		{ID: "HS-07", Group: g, Title: "is up within 5 s", run: quickStart,
			Protects: "a restart after a crash keeps deliveries waiting that long"},
		{ID: "HS-08", Group: g, Title: "keeps serving when nobody reads its standard output", run: deafHost,
			Protects: "a busy log reader cannot stall deliveries"},
		{ID: "HS-09", Group: g, Title: "SIGTERM and SIGINT are ignored while Control is open", run: ignoresSignals,
			Protects: "stopping the service signals the whole group; deliveries at work must not be cut off"},
		{ID: "HS-10", Group: g, Title: "exits within 5 s of the end of Control", run: exitsAfterControl,
			Protects: "an orderly stop is one, and ends without a kill"},
		{ID: "HS-11", Group: g, Title: "exits within 5 s when the connection breaks", run: exitsAfterHost,
			Protects: "a killed server leaves no orphans that go on sending"},
		{ID: "HS-12", Group: g, Title: "leaves no process behind", run: noDescendants,
			Protects: "helpers of a plugin do not outlive it"},
		{ID: "HS-13", Group: g, Title: "calls it does not know are answered UNIMPLEMENTED and do no harm", run: unknownCalls,
			Protects: "the server may be newer, and go-plugin opens streams of its own"},
	}
}

// standalone cases are of use for a plugin that does not come up.
func standalone(id string) bool { return id == "HS-01" }

func comesUp(t *trial) error {
	ses, err := t.start(launch{})
	if err != nil {
		return err
	}
	if _, err := ses.describe(t.ctx); err != nil {
		return err
	}
	return ses.settle(loopbackOpen())
}

func lineFields(t *trial) error {
	p, err := t.launch(launch{})
	if err != nil {
		return err
	}
	line, err := p.handshake(t.ctx)
	if err != nil {
		return err
	}
	var errs []error
	want := []string{"1", "1", "unix", "", "grpc"}
	name := []string{"core protocol version", "protocol version", "network", "", "protocol"}
	if len(line) != 5 && len(line) != 6 {
		errs = append(errs, fmt.Errorf("%d fields, want 6, of which the last is empty", len(line)))
	}
	for i := range want {
		if i < len(line) && want[i] != "" && line[i] != want[i] {
			errs = append(errs, fmt.Errorf("field %d (%s) is %q, want %q", i+1, name[i], line[i], want[i]))
		}
	}
	if len(line) == 6 && line[5] != "" {
		errs = append(errs, fmt.Errorf("field 6 (certificate) is %q, want none: the server asked for no TLS", line[5]))
	}
	if len(line) > 3 && !filepath.IsAbs(line[3]) {
		errs = append(errs, fmt.Errorf("field 4 (address) is %q, want an absolute path", line[3]))
	}
	return errors.Join(errs...)
}

func nothingBefore(t *trial) error {
	p, err := t.launch(launch{})
	if err != nil {
		return err
	}
	if _, err := p.handshake(t.ctx); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.before) > 0 {
		return fmt.Errorf("it wrote %q first; standard output belongs to the handshake, use standard error", firstLine(string(p.before)))
	}
	return nil
}

func socketDirectory(t *trial) error {
	ses, err := t.start(launch{})
	if err != nil {
		return err
	}
	if dir := filepath.Dir(filepath.Clean(ses.line[3])); dir != ses.proc.dir {
		return fmt.Errorf("the socket is in %s, want PLUGIN_UNIX_SOCKET_DIR, which was %s", dir, ses.proc.dir)
	}
	if _, err := ses.describe(t.ctx); err != nil {
		return err
	}
	found, err := filepath.Glob(filepath.Join(ses.proc.dir, "*"))
	if err != nil {
		return err
	}
	if len(found) != 1 {
		return fmt.Errorf("the directory holds %q, want the socket alone", found)
	}
	return nil
}

func startedByHand(t *trial) error {
	for _, cookie := range []string{"", "another host's cookie"} {
		p, err := t.launch(launch{cookie: &cookie})
		if err != nil {
			return err
		}
		how := "without " + cookieKey
		if cookie != "" {
			how = "with a wrong " + cookieKey
		}
		if !p.hasEnded(t.ctx, exitLimit) {
			return latef("started %s it still runs after %v", how, exitLimit)
		}
		if code := p.status(); code == 0 {
			return fmt.Errorf("started %s it exits with 0, which says that all is well", how)
		}
		if strings.TrimSpace(p.written()) == "" {
			return fmt.Errorf("started %s it says nothing; tell people what it is", how)
		}
		select {
		case <-p.line:
			return fmt.Errorf("started %s it prints a handshake line all the same", how)
		default:
		}
	}
	return nil
}

func bareStart(t *trial) error {
	ses, err := t.sessionWith(launch{cwd: "/"}, &pluginv1.HostSettings{EgressAllow: []string{loopback4}})
	if err != nil {
		return err
	}
	_, err = ses.control.beat(t.ctx, callLimit)
	return err
}

func quickStart(t *trial) error {
	const limit = 5 * time.Second
	began := time.Now()
	ses, err := t.start(launch{})
	if err != nil {
		return err
	}
	if _, err := ses.describe(t.ctx); err != nil {
		return err
	}
	if took := time.Since(began); took > limit {
		return latef("it took %v", took.Round(time.Millisecond))
	}
	return nil
}

// deafHost gives the plugin more to do than a pipe holds lines about.
func deafHost(t *trial) error {
	ses, err := t.sessionWith(launch{deafAfterLine: true}, loopbackOpen())
	if err != nil {
		return err
	}
	level := &pluginv1.ControlRequest{Frame: &pluginv1.ControlRequest_SetLogLevel{SetLogLevel: &pluginv1.SetLogLevel{Level: "DEBUG"}}}
	if err := ses.control.send(level); err != nil {
		return err
	}
	if err := ses.load(2000); err != nil {
		return fmt.Errorf("with nobody reading: %w", err)
	}
	_, err = ses.control.beat(t.ctx, callLimit)
	return err
}

// load has the plugin do n pieces of work of whatever kind it offers; how they end does not matter, that
// they end does. Sent to no instance, an attempt costs little.
func (ses *session) load(n int) error {
	if ses.t.s.offers(carrying) && !ses.t.s.noWelcome {
		a, err := ses.sharedAttempts()
		if err != nil {
			return err
		}
		for range n / batchMax {
			list := make([]*pluginv1.Attempt, batchMax)
			for i := range list {
				list[i] = newAttempt(1<<20, attemptTimeout)
			}
			sent, err := a.submit([]*pluginv1.Content{newContent("evt_load", []byte(`{}`))}, list...)
			if err != nil {
				return err
			}
			for _, p := range sent {
				if _, err := a.wait(p); err != nil {
					return err
				}
			}
		}
	}
	if ses.t.s.offers(transforming) {
		for range n / batchMax {
			items := make([]*pluginv1.TransformItem, batchMax)
			for i := range items {
				items[i] = newTransform(1<<20, 0)
			}
			if _, err := ses.transformBatch([]*pluginv1.Event{newEvent("evt_load", []byte(`{}`))}, items...); err != nil {
				return err
			}
		}
	}
	if !ses.t.s.offers(signs) {
		return nil
	}
	for range n / batchMax {
		items := make([]*pluginv1.SignItem, batchMax)
		for i := range items {
			items[i] = signItem(1<<20, 0)
		}
		if _, _, err := ses.signBatch([]*pluginv1.Content{newContent("evt_load", []byte(`{}`))}, items...); err != nil {
			return err
		}
	}
	return nil
}

// offers reports whether there is a kind of that role.
func (s *suite) offers(role func(*pluginv1.Kind) bool) bool {
	return slices.ContainsFunc(s.described.GetKinds(), role)
}

func signs(k *pluginv1.Kind) bool        { return k.GetSigner() != nil }
func carrying(k *pluginv1.Kind) bool     { return k.GetTransport() != nil }
func transforming(k *pluginv1.Kind) bool { return k.GetTransformer() != nil }

func ignoresSignals(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	if _, err := ses.control.beat(t.ctx, callLimit); err != nil {
		return err
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGTERM} {
		signalGroup(ses.proc.cmd.Process, sig)
		// It may take a moment to end.
		if ses.proc.hasEnded(t.ctx, 300*time.Millisecond) {
			return fmt.Errorf("it ended by signal %v while its host was there%s", sig, ses.proc.lastWords())
		}
		if err := ses.alive(); err != nil {
			return fmt.Errorf("after signal %v: %w", sig, err)
		}
	}
	return ses.load(batchMax)
}

func exitsAfterControl(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	if _, err := ses.control.beat(t.ctx, callLimit); err != nil {
		return err
	}
	if err := ses.control.stream.CloseSend(); err != nil {
		return err
	}
	return ses.mustEnd("the host half-closed Control")
}

func exitsAfterHost(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	if _, err := ses.control.beat(t.ctx, callLimit); err != nil {
		return err
	}
	if err := ses.conn.Close(); err != nil {
		return err
	}
	return ses.mustEnd("the connection broke, as when the server is killed")
}

func (ses *session) mustEnd(when string) error {
	// A little more than is promised, for the system to notice.
	if ses.proc.hasEnded(ses.t.ctx, exitLimit+500*time.Millisecond) {
		return nil
	}
	return latef("it still runs %v after %s", exitLimit, when)
}

func noDescendants(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	if err := ses.load(batchMax); err != nil {
		return err
	}
	if err := ses.control.stream.CloseSend(); err != nil {
		return err
	}
	if !ses.proc.hasEnded(t.ctx, exitLimit+500*time.Millisecond) {
		return skipf("it does not end (see HS-10)")
	}
	var left []int
	for range 20 { // what ends with its parent takes a moment to
		var known bool
		if left, known = descendants(ses.proc); !known {
			return skipf("this system does not tell which processes a plugin has started")
		}
		if len(left) == 0 {
			return nil
		}
		ses.proc.pause(t.ctx)
	}
	return fmt.Errorf("processes %v are still there when it has ended", left)
}

// pause is a moment of waiting between looks at something that is about to change.
func (p *process) pause(ctx context.Context) {
	timer := time.NewTimer(50 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func unknownCalls(t *trial) error {
	ses, err := t.session()
	if err != nil {
		return err
	}
	for _, method := range []string{"/grapnel.plugin.v1.PluginService/OfALaterMinor", "/grapnel.plugin.v9.PluginService/Describe"} {
		ctx, cancel := context.WithTimeout(t.ctx, callLimit)
		err := ses.conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{}, grpc.WaitForReady(false))
		cancel()
		if status.Code(err) != codes.Unimplemented {
			return fmt.Errorf("%s: answered %v, want UNIMPLEMENTED", method, err)
		}
	}
	return ses.alive()
}
