//go:build unix

package conformance_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// recorder notes of every message that a plugin is sent which fields are set: a line each, of the message's name and
// the fields, written once.
type recorder struct {
	path string

	mu   sync.Mutex // guards seen
	seen map[string]bool
}

func (r *recorder) options() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			r.note(req.(proto.Message).ProtoReflect())
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			return next(srv, recordedStream{s, r})
		}),
	}
}

type recordedStream struct {
	grpc.ServerStream
	r *recorder
}

func (s recordedStream) RecvMsg(m any) error {
	err := s.ServerStream.RecvMsg(m)
	if err == nil {
		s.r.note(m.(proto.Message).ProtoReflect())
	}
	return err
}

func (r *recorder) note(m protoreflect.Message) {
	var fields []string
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		fields = append(fields, string(f.Name()))
		switch {
		case f.IsMap() && f.MapValue().Message() == nil:
		case f.IsMap():
			v.Map().Range(func(_ protoreflect.MapKey, e protoreflect.Value) bool {
				r.note(e.Message())
				return true
			})
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				r.note(v.List().Get(i).Message())
			}
		case f.Message() != nil:
			r.note(v.Message())
		}
		return true
	})
	slices.Sort(fields)
	line := string(m.Descriptor().Name()) + " " + strings.Join(fields, " ") + "\n"
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.seen[line] {
		return
	}
	r.seen[line] = true
	if f, err := os.OpenFile(r.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
		_, _ = fmt.Fprint(f, line)
		_ = f.Close()
	}
}

// recorded reads what recorders noted: by message, the fields that were ever set and those that always were.
func recorded(t *testing.T, path string) (ever, always map[string][]string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	ever, always = map[string][]string{}, map[string][]string{}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		name, set := fields[0], fields[1:]
		if _, ok := ever[name]; !ok {
			always[name] = set
		}
		always[name] = slices.DeleteFunc(slices.Clone(always[name]), func(f string) bool { return !slices.Contains(set, f) })
		for _, f := range set {
			if !slices.Contains(ever[name], f) {
				ever[name] = append(ever[name], f)
			}
		}
	}
	return ever, always
}

// TestSuiteSendsWhatTheServerSends: a plugin that the suite passes meets nothing less in production. Fields that the
// suite always sets the server always sets, with signers and without; and what the server sets the suite sets, too.
func TestSuiteSendsWhatTheServerSends(t *testing.T) {
	t.Parallel()
	ofServer, ofSuite := filepath.Join(t.TempDir(), "server"), filepath.Join(t.TempDir(), "suite")
	for _, mode := range []string{"", "unary"} {
		deliver(t, true, mode, ofServer)
		deliver(t, false, mode, ofServer)
		report := run(t, conformance.Options{
			Command: self("plugin-raw", mode, ofSuite), Fixture: rawFixture(),
			Only: []string{"TR-01", "TR-02", "TR-21", "FL-02", "SG-01", "TF-03", "CF-14", "CF-21", "HS-09"},
		})
		if ids, reasons := failures(report); len(ids) > 0 {
			t.Errorf("failed:%s", reasons)
		}
	}
	serverEver, serverAlways := recorded(t, ofServer)
	suiteEver, suiteAlways := recorded(t, ofSuite)
	for _, message := range []string{"Attempt", "Content", "Hello", "Target", "HostSettings", "AttemptBatch", "DescribeRequest", "Event", "TransformItem"} {
		for _, f := range suiteAlways[message] {
			if !slices.Contains(serverAlways[message], f) {
				t.Errorf("the suite always sets %s.%s, and the server does not", message, f)
			}
		}
		for _, f := range serverEver[message] {
			if !slices.Contains(suiteEver[message], f) {
				t.Errorf("the server sets %s.%s, and the suite never does", message, f)
			}
		}
		if len(serverEver[message]) == 0 {
			t.Errorf("the server sent no %s", message)
		}
	}
	if !slices.Contains(serverAlways["Attempt"], "nonce") {
		t.Error("the server sends attempts without a nonce, and the page says that it is always there")
	}
}
