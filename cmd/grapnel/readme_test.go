package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestCommandLinePage runs the commands of docs/cli.md as they are printed.
func TestCommandLinePage(t *testing.T) {
	runPage(t, "cli", 10, `serve
exec grapnel namespace create acme
exec grapnel secret create orders-key -n acme
exec grapnel subscription create orders -n acme --uri http://127.0.0.1:9000/hooks --type 'order.*' --secret orders-key
exec grapnel publish -n acme --type order.created --data x
env GRAPNEL_CONTEXTS=$WORK/contexts.yaml
exec sh -eux page.sh
stdout '^namespaces/acme/subscriptions/orders order\.\* plugins/standard-webhooks$'
stdout '^namespaces/acme/subscriptions/orders unchanged$'
stdout '^namespaces/acme/subscriptions/orders deleted, '
`)
}

// TestReplayPage runs the commands of docs/replay.md as they are printed, but for their receiver.
func TestReplayPage(t *testing.T) {
	runPage(t, "replay", 20, `receiver
serve
exec sh -eux page.sh
stdout '^2 deliveries would be made; looked at 2$'
stdout '^namespaces/acme/replayJobs/incident-42 is SUCCEEDED: 2 deliveries made, '
stdout '^Created: +2$'
stdout '^namespaces/acme/replayJobs/to-v2 is SUCCEEDED: 2 deliveries made'
stdout '^namespaces/acme/replayJobs/backfill is SUCCEEDED: 2 deliveries made'
await ' SUCCEEDED ' grapnel delivery list -n acme --filter 'trigger = DEAD_LETTER'
`)
}

// TestErasurePage runs the commands of docs/erasure.md as they are printed.
func TestErasurePage(t *testing.T) {
	runPage(t, "erasure", 10, `serve
exec sh -eux page.sh
stdout '^purged namespaces/acme/events/o-1; 1 delivery cancelled$'
stdout 'payload purged 20'
stdout '^2 events would be purged; looked at 3$'
stdout '^namespaces/acme/erasures/gdpr-1001 is SUCCEEDED: 2 events purged of 3, 2 deliveries cancelled$'
stdout '^Verified: +20'
stdout '^gdpr-1001 +SUCCEEDED '
! exec grapnel event get o-1 -n acme --raw
stderr 'no longer kept'
! exec grapnel erasure create -n acme
stderr '--filter is required'
! exec grapnel erasure create -n acme --filter 'subject = a'
stderr '--yes does it'
`)
}

// TestBatchingPage runs the commands of docs/batching.md as they are printed, but for their receiver.
func TestBatchingPage(t *testing.T) {
	runPage(t, "batching", 10, `receiver
serve
exec sh -eux page.sh
stdout 'bat_[0-9a-v]+ of [12]'
stdout '^Batching: +json-array of up to 50 events or 262144 bytes, after 1s$'
exec grapnel subscription get orders -n acme
! stdout '^Batching: +[a-z]'
! exec grapnel subscription update orders -n acme --batch-format yaml
stderr 'must be json-array, ndjson or cloudevents'
! exec grapnel subscription update orders -n acme --batching=false --batch-events 10
stderr 'batch-events'
`)
}

// TestOperationalEventsPage runs the commands of docs/operational-events.md as they are printed, but for their receiver.
func TestOperationalEventsPage(t *testing.T) {
	runPage(t, "operational-events", 8, `receiver
serve
exec sh -eux page.sh
stdout 'grapnel\.delivery\.exhausted'
! exec grapnel publish -n acme --type grapnel.mine --data x
stderr 'event\.type: must not begin with grapnel\.'
! exec grapnel publish -n acme --type order.created --source //grapnel/namespaces/acme --data x
stderr 'event\.source: must not begin with //grapnel/namespaces/'
`)
}

// TestTracingPage runs the commands of docs/tracing.md as they are printed, but for their receiver, beside a collector that takes
// nothing.
func TestTracingPage(t *testing.T) {
	runPage(t, "tracing", 3, `receiver
env OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:1
env OTEL_TRACES_SAMPLER=parentbased_always_off
serve
exec sh -eux page.sh
exec grapnel delivery list -n acme
stdout ' SUCCEEDED '
stop
env OTEL_TRACES_SAMPLER=sometimes
! exec grapnel server --data-dir other --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0
stderr 'OTEL_TRACES_SAMPLER: "sometimes" given; always_on'
`)
}

// TestEventTypesPage runs the commands of docs/event-types.md as they are printed, but for their receiver.
func TestEventTypesPage(t *testing.T) {
	runPage(t, "event-types", 15, `receiver
serve
exec sh -eux page.sh
stderr 'event\.payload/id: must be a string, not a number'
stderr 'event\.payload/total: must be at least 0'
stderr 'EVENT_TYPE_NOT_REGISTERED'
stdout '^Deprecated: +yes: use order\.placed$'
stdout '^\{"currency":"string","id":"o-1","total":0\}$'
stdout '^namespaces/acme/eventTypes/shop\.invoice\.paid created$'
stdout '^0 created, 0 changed, 1 unchanged, 0 not taken$'
`)
}

// TestTransformersPage runs the commands of docs/transformers.md as they are printed, but for their receiver.
func TestTransformersPage(t *testing.T) {
	runPage(t, "transformers", 15, `receiver
serve
exec sh -eux page.sh
stdout 'sent as application/json: {"text":"Order 1001 is order.created"}'
stdout 'dropped by the transformer: 12 is not large'
stdout 'sent as application/json: {"order":1001}'
stdout '^{"large":true,"order":1001}$'
stdout 'Ada has paid 12'
stdout '^{"text":"Ada"}$'
exec grapnel plugin try jq --config '{"program": "drop(\"no\")"}'
stderr '^dropped: no$'
! exec grapnel plugin try http
stderr 'plugins/http is a transport, want a transformer'
! exec grapnel plugin try jq --config '{"program": "error(\"mine\")"}'
stderr 'transform: error: mine'
exec grapnel delivery list -n acme --filter 'event = a-1'
stdout ' SUCCEEDED '
exec grapnel subscription update orders -n acme --transformer ''
exec grapnel subscription get orders -n acme
! stdout '^Transformer: +[a-z]'
! exec grapnel subscription update orders -n acme --transformer http
stderr 'plugins/http is a transport, want a transformer, such as plugins/cel, plugins/javascript, plugins/jq, plugins/template'
! exec grapnel subscription update chat -n acme --transformer-config '{"ready": "fax"}'
stderr 'slack'
`)
}

// runPage runs a script in which page.sh is the commands of a page of docs, of which there are least or more. Receivers at
// port 9001 are the script's.
func runPage(t *testing.T, name string, least int, script string) {
	t.Helper()
	page, err := os.ReadFile("../../docs/" + name + ".md")
	if err != nil {
		t.Fatal(err)
	}
	var commands []string
	for _, section := range guideSections(string(page)) {
		commands = append(commands, section.commands...)
	}
	if len(commands) < least {
		t.Fatalf("the page has %d commands: %v", len(commands), commands)
	}
	text := strings.ReplaceAll(strings.Join(commands, "\n"), "http://127.0.0.1:9001", "$RECEIVER/204")
	file := filepath.Join(t.TempDir(), name+".txtar")
	if err := os.WriteFile(file, []byte(script+"-- page.sh --\n"+text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	params := scripts("")
	params.Files = []string{file}
	testscript.Run(t, params)
}

// TestPagesWhereLocalhostIsV6 runs the pages' commands on a host whose name localhost is ::1 before it is 127.0.0.1: in
// namespaces of its own, with a hosts file that says so. Commands reach their server as localhost.
func TestPagesWhereLocalhostIsV6(t *testing.T) {
	if os.Getenv(insideNamespace) != "" {
		t.Skip("is what runs here")
	}
	hosts := filepath.Join(t.TempDir(), "hosts")
	if err := os.WriteFile(hosts, []byte("::1 localhost\n127.0.0.1 localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	inside := func(command string) *exec.Cmd {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		t.Cleanup(cancel)
		cmd := exec.CommandContext(ctx, "unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
			`mount --bind "$HOSTS" /etc/hosts && `+command)
		cmd.Env = append(os.Environ(), "HOSTS="+hosts, insideNamespace+"=1")
		return cmd
	}
	if out, err := inside("grep -q ::1 /etc/hosts").CombinedOutput(); err != nil {
		t.Skipf("another hosts file is not permitted here: %v: %s", err, out)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := inside(fmt.Sprintf("exec %q -test.v -test.run '^(TestReadme|TestCommandLinePage)$'", self)).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestReadme")) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// insideNamespace is set for the tests that TestPagesWhereLocalhostIsV6 runs.
const insideNamespace = "GRAPNEL_TEST_LOCALHOST_V6"

// TestReadme runs the commands of the README's five minutes as they are printed, so that they cannot rot.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	script := "serve\n"
	commands := 0
	text := string(readme)
	if os.Getenv(insideNamespace) != "" { // what a reader may well write instead, and of which the policy allows one address
		text = strings.ReplaceAll(text, "127.0.0.1:9000", "localhost:9000")
	}
	for line := range strings.Lines(text) {
		command, ok := strings.CutPrefix(line, "bin/grapnel ")
		if !ok || strings.HasPrefix(command, "server ") {
			continue
		}
		script += "exec grapnel " + command
		commands++
	}
	if commands < 5 {
		t.Fatalf("the README has %d commands: %s", commands, script)
	}
	script += "stdout orders\n" // the last one lists the delivery
	script += "env GRAPNEL_NAMESPACE=acme\nawait ' SCHEDULED ' grapnel delivery list\n"
	file := filepath.Join(t.TempDir(), "readme.txtar")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	params := scripts("")
	params.Files = []string{file}
	testscript.Run(t, params)
}
