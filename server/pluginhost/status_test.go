//go:build linux

package pluginhost

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

func TestStatus(t *testing.T) {
	f := start(t, nil, self("plugin-all")).ready(t)
	f.secrets.set("namespaces/acme/secrets/token", "tok-canary-12345")
	sum, err := Checksum(self().Path)
	if err != nil {
		t.Fatal(err)
	}
	sub := newSub(t, 1, map[string]any{"mode": "loud"})
	sub.Proto().Transport.Secrets = map[string]string{"token": "namespaces/acme/secrets/token"}
	for i := range 100 {
		f.attempt(t, sub, newJob(i, "x"))
	}
	s := newSink()
	load(f, newSub(t, 2, map[string]any{"delay": "300ms"}), s, 7)
	eventually(t, "they are under way", func() bool {
		p, _ := f.Plugin("mem")
		return p.GetInstances()[0].GetInFlight() == 7
	})
	got, _ := f.Plugin("mem")
	in := got.GetInstances()[0]
	if p50, p99 := in.GetP50Latency().AsDuration(), in.GetP99Latency().AsDuration(); p50 <= 0 || p50 > p99 || p99 > time.Second {
		t.Errorf("p50 %v, p99 %v", p50, p99)
	}
	if time.Since(in.GetStartTime().AsTime()) > time.Minute {
		t.Errorf("started %v", in.GetStartTime().AsTime())
	}
	want := &grapnelv1.Plugin{
		Name: "plugins/mem", Roles: []grapnelv1.Plugin_Role{grapnelv1.Plugin_ROLE_TRANSPORT}, Version: "1.0.0",
		ProtocolVersion: got.GetProtocolVersion(), Description: "Answers from memory.", UriSchemes: []string{"mem"},
		ConfigSchema: got.GetConfigSchema(), ConfigExample: got.GetConfigExample(), Builtin: true,
		SecretSlots: []*grapnelv1.SecretSlot{{Slot: "token", Description: "Bearer token"}},
		Provider:    "test/all", Headers: []string{"user-agent"}, Health: grapnelv1.Plugin_HEALTH_SERVING,
		Instances: []*grapnelv1.PluginInstance{{
			Health: grapnelv1.Plugin_HEALTH_SERVING, Checksum: sum, Version: "1.0.0", Pid: int32(f.Pids()["test/all"]),
			StartTime: in.GetStartTime(), P50Latency: in.GetP50Latency(), P99Latency: in.GetP99Latency(), InFlight: 7,
		}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	s.wait(t, 7)

	_ = syscall.Kill(f.Pids()["test/all"], syscall.SIGKILL)
	eventually(t, "it is back", func() bool {
		p, _ := f.Plugin("mem")
		in = p.GetInstances()[0]
		return in.GetRestartCount() == 1 && in.GetHealth() != grapnelv1.Plugin_HEALTH_NOT_SERVING
	})
	if in.GetHealth() != grapnelv1.Plugin_HEALTH_DEGRADED || in.GetLastError() != "signal: killed" || time.Since(in.GetLastCrashTime().AsTime()) > time.Minute {
		t.Errorf("after a crash: %v", in)
	}
	last := strings.Join(in.GetLastOutput(), "\n")
	if !strings.Contains(last, "raw [redacted]") || strings.Contains(last, "canary") || len(in.GetLastOutput()) != 20 {
		t.Errorf("last output:\n%s", last)
	}
}

func TestSlotsSayWhatTheyTake(t *testing.T) {
	f := start(t, nil, self("plugin-slots"))
	eventually(t, "it is listed", func() bool { _, ok := f.Plugin("formatted"); return ok })
	got, _ := f.Plugin("formatted")
	want := []*grapnelv1.SecretSlot{{
		Slot: "key", Description: "Signing key", Required: true, Kinds: []string{"HMAC"},
		Algorithms: []string{"rot13", "rot26"}, Format: "thirteen letters",
	}}
	if diff := cmp.Diff(want, got.GetSecretSlots(), protocmp.Transform()); diff != "" {
		t.Errorf("slots (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"x-formatted"}, got.GetHeaders()); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}
