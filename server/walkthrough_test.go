package server_test

import (
	"errors"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/grapnel/grapnel/server/servertest"
)

// walkthroughStep says what a block of docs/grpcurl.md prints.
type walkthroughStep struct {
	// heading is the section; the blocks of one section follow each other.
	heading string
	// want must all be printed, refuse must not.
	want, refuse []string
	// exit is the exit code of the block's last command.
	exit int
	// settles marks a block that reads what takes a moment: it is repeated until it prints what is wanted.
	settles bool
}

func walkthroughSteps() []walkthroughStep {
	const invalidArgument = 64 + 3
	return []walkthroughStep{
		{heading: "What is here", want: []string{
			"grapnel.v1.AdminService", "grapnel.v1.DeliveryService", "grapnel.v1.EventService", "grapnel.v1.NamespaceService",
			"grapnel.v1.PluginService", "grapnel.v1.PublishService", "grapnel.v1.SecretService", "grapnel.v1.SubscriptionService",
			"grpc.health.v1.Health",
			"message CreateSubscriptionRequest", "// Check everything and store nothing.", "must look like namespaces/NAME",
			`"secretId": ""`,
		}},
		{heading: "The server, and its health as a load balancer sees it", want: []string{
			`"state": "STATE_READY"`, `"storeHealthy": true`, `"name": "nodes/test"`, `"status": "SERVING"`,
		}},
		{heading: "Plugins", want: []string{
			`"name": "plugins/http"`, `"name": "plugins/standard-webhooks"`, `"configSchema"`, `"slot": "key"`,
		}},
		{heading: "A tenant", want: []string{`"name": "namespaces/acme"`, `"maxSubscriptions": 200`, `"STATE_ACTIVE"`}},
		{heading: "A signing key", want: []string{
			`"generatedValue": "whsec_`, `"name": "namespaces/acme/secrets/orders-key"`, `"fingerprint"`,
		}},
		{heading: "A subscription", want: []string{
			`"name": "namespaces/acme/subscriptions/orders"`, `"plugin": "plugins/http"`, `"attemptTimeout": "15s"`,
			"plain http", `"etag"`,
		}, refuse: []string{"whsec_"}},
		{heading: "Does the target answer", want: []string{`"outcome": "OUTCOME_SUCCEEDED"`, `"responseCode": 204`}},
		{heading: "Publish", want: []string{
			`"name": "namespaces/acme/events/o-1001-created"`, `"matchedSubscriptions": 1`, `"duplicate": true`,
		}},
		{heading: "What became of it", want: []string{`"state": "STATE_SUCCEEDED"`, `"attemptCount": 1`}, settles: true},
		{heading: "What became of it", want: []string{
			`"cause": "the target accepted attempt 1: 204"`, `"number": 1`, `"verdict": "VERDICT_TYPE_DIFFERS"`, `not \"invoice.paid\"`,
		}},
		{heading: "A target that fails", want: []string{`"name": "namespaces/acme/events/o-1001-cancelled"`}},
		{heading: "What failed, and every attempt at it", want: []string{`"state": "STATE_EXHAUSTED"`, `"OUTCOME_UNREACHABLE"`}, settles: true},
		{heading: "What failed, and every attempt at it", want: []string{`"number": 1`, `"outcome": "OUTCOME_UNREACHABLE"`, `"error"`}},
		{heading: "What failed, and every attempt at it", want: []string{`"status": {`, `"failingSince"`, `"open": true`}},
		{heading: "Try it again now", want: []string{`"maxAttempts": 2`}},
		{heading: "Stop, and go on", want: []string{
			`"STATE_DISABLED"`, `"stateReason": "receiver migration"`, `"STATE_PAUSED"`, `"stateReason": "their network is being moved"`, `"etag"`,
		}},
		{heading: "Patience, without touching the rest", want: []string{
			`"maxAttempts": 20`, `"initialBackoff": "30s"`, `"maxAge": "345600s"`,
		}, refuse: []string{`"schedule"`}},
		{heading: "A condition that cannot be evaluated", want: []string{
			`"conditionErrorCount": 1`, `"subscription": "namespaces/acme/subscriptions/large"`, "no such key: totl", `"dataContentType": "application/json"`,
		}},
		{heading: "Wrong requests", exit: invalidArgument, want: []string{
			"Code: InvalidArgument", `"reason": "INVALID_FIELD"`,
			"parent: must look like namespaces/NAME",
			"subscription_id: must be 1 to 63 lower-case letters, digits and hyphens, and begin with a letter, or be empty",
			"subscription.attempt_timeout: must be greater than or equal to 1s and less than or equal to 60s",
			`"field": "subscription.attempt_timeout"`,
		}, refuse: []string{"regex", "[a-z]"}},
		{heading: "Wrong requests", exit: invalidArgument, want: []string{
			`"field": "subscription.condition"`, `"field": "subscription.signers[0].secrets[\"key\"]"`,
			"namespaces/acme/secrets/no-such-key does not exist",
		}},
		{heading: "Wrong requests", exit: invalidArgument, want: []string{
			`"reason": "INVALID_FILTER"`, "status", "subscription", "event_type",
		}},
	}
}

// TestGrpcurlWalkthrough runs every command of docs/grpcurl.md with the real grpcurl against a live
// server and looks at what it prints.
func TestGrpcurlWalkthrough(t *testing.T) {
	if testing.Short() {
		t.Skip("builds grpcurl")
	}
	if _, err := exec.LookPath("sh"); err != nil || runtime.GOOS == "windows" {
		t.Skip("needs a POSIX shell")
	}
	bin := buildGrpcurl(t)
	receiver := servertest.NewReceiver(t, nil)
	s := servertest.Start(t, servertest.Options{})
	target, err := url.Parse(receiver.URL)
	if err != nil {
		t.Fatal(err)
	}
	page := readPage(t, "../docs/grpcurl.md", strings.NewReplacer("127.0.0.1:7070", s.Addr, "127.0.0.1:9000", target.Host))
	steps := walkthroughSteps()
	if len(page) != len(steps)+1 {
		t.Fatalf("the page has %d blocks of commands, the test knows %d", len(page), len(steps)+1)
	}
	sh := &shell{path: bin, prelude: page[0].commands, state: filepath.Join(t.TempDir(), "state")}
	for i, step := range steps {
		block := page[i+1]
		if block.heading != step.heading {
			t.Fatalf("block %d stands under %q, the test expects %q", i+1, block.heading, step.heading)
		}
		t.Run(strconv.Itoa(i+1)+" "+step.heading, func(t *testing.T) { runStep(t, sh, block.commands, step) })
		if t.Failed() {
			return
		}
	}
	checkArrivals(t, receiver)
}

func runStep(t *testing.T, sh *shell, commands string, step walkthroughStep) {
	deadline := time.Now().Add(20 * time.Second)
	for {
		output, exit := sh.run(t, commands)
		fault := ""
		for _, want := range step.want {
			if !strings.Contains(output, want) {
				fault = "does not print " + want
			}
		}
		for _, refuse := range step.refuse {
			if strings.Contains(output, refuse) {
				fault = "prints " + refuse
			}
		}
		if exit != step.exit {
			fault = "ends with " + strconv.Itoa(exit) + ", not " + strconv.Itoa(step.exit)
		}
		if fault == "" {
			t.Logf("$ %s\n%s", commands, output)
			return
		}
		if !step.settles || time.Now().After(deadline) {
			t.Fatalf("%s\n$ %s\n%s", fault, commands, output)
		}
	}
}

// checkArrivals asserts that the receiver saw the test request and both events, each once and signed.
func checkArrivals(t *testing.T, receiver *servertest.Receiver) {
	servertest.Await(t, "three requests", func() bool { return len(receiver.Requests()) >= 3 })
	types := map[string]int{}
	for _, r := range receiver.Requests() {
		types[r.Header.Get("ce-type")]++
		if r.Header.Get("webhook-signature") == "" || r.ID == "" {
			t.Errorf("request of type %q is not signed: %v", r.Header.Get("ce-type"), r.Header)
		}
	}
	want := map[string]int{"grapnel.test": 1, "order.created": 1, "order.cancelled": 1}
	if !maps.Equal(types, want) {
		t.Errorf("arrivals by type = %v, want %v", types, want)
	}
}

// pageBlock is one block of commands.
type pageBlock struct {
	heading, commands string
}

// readPage takes the blocks marked sh out of a page.
func readPage(t *testing.T, path string, replace *strings.Replacer) []pageBlock {
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var (
		blocks  []pageBlock
		heading string
		fence   string
	)
	for line := range strings.Lines(replace.Replace(string(text))) {
		kind, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case isFence && fence == "":
			fence = kind
			if kind == "sh" {
				blocks = append(blocks, pageBlock{heading: heading})
			}
		case isFence:
			fence = ""
		case fence == "sh":
			blocks[len(blocks)-1].commands += line
		case fence == "" && strings.HasPrefix(line, "## "):
			heading = strings.TrimSpace(line[3:])
		}
	}
	return blocks
}

// shell runs blocks one after the other, as a terminal would: what the prelude defines and the variables
// set on the way stay.
type shell struct {
	path, prelude, state string
}

// run returns what the commands print, errors included, and the exit code of the last one.
func (s *shell) run(t *testing.T, commands string) (output string, exit int) {
	script := s.prelude + "\n[ ! -f \"$STATE\" ] || . \"$STATE\"\n" + commands +
		"\nexit=$?; [ -z \"${D:-}\" ] || echo \"D=$D\" > \"$STATE\"; exit $exit\n"
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Env = append(os.Environ(), "PATH="+s.path+string(os.PathListSeparator)+os.Getenv("PATH"), "STATE="+s.state)
	printed, err := cmd.CombinedOutput()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		return string(printed), failed.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(printed), 0
}

// buildGrpcurl builds the grpcurl that tools/go.mod pins and returns the directory it is in.
func buildGrpcurl(t *testing.T) string {
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "go", "build", "-modfile=tools/go.mod", "-o", filepath.Join(dir, "grpcurl"),
		"github.com/fullstorydev/grpcurl/cmd/grpcurl")
	cmd.Dir = ".."
	if printed, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build grpcurl: %v\n%s", err, printed)
	}
	return dir
}
