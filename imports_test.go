package grapnel_test

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/grapnel/grapnel"

// allowed is the architecture: which packages of this module each package may import, tests left out.
// A trailing /... covers everything below.
var allowed = map[string][]string{
	"proto/grapnel/v1":             {},
	"proto/grapnel/plugin/v1":      {},
	"proto/grapnel/store/v1":       {},
	"sdk/client":                   {"proto/grapnel/v1"},
	"internal/wire":                {},
	"internal/redact":              {},
	"internal/garbage":             {},
	"internal/gate":                {},
	"internal/header":              {},
	"internal/required":            {}, // of tests only
	"sdk/plugin":                   {"proto/grapnel/plugin/v1", "internal/..."},
	"sdk/plugintest":               {"proto/grapnel/plugin/v1", "sdk/plugin", "internal/wire"},
	"sdk/webhook":                  {},
	"proto/grapnel/receiver/v1":    {},
	"sdk/keys":                     {},
	"sdk/conformance":              {"proto/grapnel/plugin/v1", "internal/wire"},
	"plugins":                      {"plugins/...", "sdk/plugin"},
	"plugins/...":                  {"sdk/plugin", "sdk/webhook", "sdk/keys", "proto/grapnel/plugin/v1"},
	"plugins/grpc":                 {"internal/gate", "sdk/plugin", "proto/grapnel/receiver/v1", "plugins/internal/..."},
	"plugins/http":                 {"internal/gate", "internal/header", "sdk/plugin", "plugins/oauth2", "plugins/internal/...", "plugins/http/internal/..."},
	"plugins/http/internal/answer": {},
	"plugins/http/internal/h1":     {"plugins/http/internal/answer"},
	"plugins/http/internal/h2":     {"plugins/http/internal/answer", "plugins/internal/meter"},
	"plugins/internal/meter":       {"internal/gate"},
	"plugins/internal/outbound":    {"internal/gate", "sdk/plugin", "sdk/keys", "plugins/internal/..."},
	"plugins/nats":                 {"internal/gate", "sdk/plugin", "plugins/internal/..."},
	"plugins/oauth2":               {"sdk/plugin", "sdk/keys", "plugins/jose"},
	"plugins/cel":                  {"sdk/plugin", "plugins/internal/script"},
	"plugins/jq":                   {"sdk/plugin", "plugins/internal/script"},
	"plugins/template":             {"sdk/plugin", "plugins/internal/script"},
	"plugins/javascript":           {"sdk/plugin", "plugins/internal/script"},
	"plugins/internal/script":      {"sdk/plugin"},
	"server/keyspace":              {},
	"server/keyspace/keyspacetest": {},
	"server/delivery":              {"proto/...", "server/delivery/highwater", "server/delivery/salvage"},
	"server/delivery/highwater":    {},
	"server/delivery/salvage":      {},
	"server/subscription":          {"proto/...", "server/keyspace", "internal/header"},
	"server/secret":                {"proto/...", "server/keyspace"},
	"server/eventtype":             {"proto/grapnel/v1", "internal/gate", "server/keyspace", "server/eventtype/schema"},
	"server/eventtype/schema":      {},
	"server/dirlock":               {},
	"server/plugindir":             {"server/dirlock", "server/pluginhost", "proto/grapnel/plugin/v1"},
	"server/ingest":                {"server/subscription", "server/eventtype", "server/delivery", "server/tracing", "proto/grapnel/v1"},
	"server/tracing":               {"server/delivery", "internal/redact"},
	"server/notice":                {"server/ingest", "server/subscription", "server/delivery"},
	"server/dispatch":              {"server/dispatch/health", "server/dispatch/window", "server/subscription", "server/delivery", "proto/grapnel/v1"},
	"server/dispatch/health":       {"server/delivery"},
	"server/dispatch/window":       {"server/delivery"},
	"server/replay":                {"server/ingest", "server/subscription", "server/delivery", "proto/grapnel/v1"},
	"server/pluginhost":            {"server/pluginhost/...", "server/subscription", "server/delivery", "server/tracing", "proto/grapnel/v1", "proto/grapnel/plugin/v1", "sdk/plugin", "internal/redact", "internal/wire"},
	"server/pluginhost/process":    {},
	"server/pluginhost/check":      {"proto/grapnel/v1", "proto/grapnel/plugin/v1", "internal/redact", "internal/header"},
	"server/pluginhost/wire":       {"server/delivery", "proto/grapnel/v1", "proto/grapnel/plugin/v1", "internal/wire"},
	"server/api":                   {"server/ingest", "server/subscription", "server/secret", "server/eventtype", "server/delivery", "server/tracing", "server/api/filter", "proto/grapnel/v1"},
	"server/api/filter":            {},
	"server":                       {"server/...", "internal/garbage", "proto/grapnel/v1"},
	"server/servertest":            {"server", "sdk/...", "plugins", "proto/grapnel/v1"},
	"cmd/grapnel":                  {"server", "server/plugindir", "server/pluginhost", "server/delivery", "server/delivery/salvage", "server/subscription", "proto/grapnel/plugin/v1", "sdk/...", "plugins", "proto/grapnel/v1"},
	"cmd/grapnel-bench":            {"sdk/...", "proto/grapnel/v1"},
}

// fenced are the outside modules that only some packages may touch.
var fenced = map[string][]string{
	"go.etcd.io/etcd/client/v3":       {"server", "server/keyspace", "server/keyspace/keyspacetest", "server/subscription", "server/secret", "server/eventtype"},
	"go.etcd.io/etcd/server/v3":       {"server", "server/keyspace/keyspacetest"},
	"go.etcd.io/bbolt":                {"server"},
	"github.com/cockroachdb/pebble":   {"server/delivery", "server/delivery/salvage"},
	"github.com/hashicorp/go-plugin":  {"server/pluginhost", "sdk/plugin", "sdk/plugintest"},
	"github.com/spf13/cobra":          {"cmd/grapnel"},
	"google.golang.org/grpc/status":   {"server/api", "sdk/conformance", "plugins/grpc", "proto/grapnel/receiver/v1", "server/pluginhost", "server/pluginhost/check", "sdk/client", "sdk/plugin", "sdk/plugintest", "cmd/grapnel", "cmd/grapnel-bench", "proto/grapnel/v1", "proto/grapnel/plugin/v1"},
	"go.etcd.io/etcd/client/pkg/v3":   {"server", "server/keyspace"},
	"github.com/prometheus/":          {"server", "server/api", "server/delivery", "server/dispatch", "server/pluginhost", "server/ingest", "server/replay", "server/notice", "server/subscription", "server/secret", "server/tracing"},
	"go.opentelemetry.io/":            {"server/tracing"},
	"cel.dev/":                        {"server/subscription", "plugins/cel"},
	"github.com/itchyny/gojq":         {"plugins/jq"},
	"github.com/dop251/goja":          {"plugins/javascript"},
	"github.com/dlclark/regexp2":      {"plugins/javascript"},
	"github.com/tidwall/btree":        {"server/dispatch", "server/subscription", "server/eventtype"},
	"github.com/santhosh-tekuri/":     {"server/eventtype/schema", "server/pluginhost/check", "sdk/plugin", "sdk/conformance"},
	"buf.build/go/protovalidate":      {"server/api"},
	"github.com/standard-webhooks/":   {},
	"github.com/svix/":                {},
	"github.com/nats-io/":             {"plugins/nats"},
	"google.golang.org/grpc/testdata": {},
}

// TestImports holds the import directions: a package that is not in the table, or imports what its row
// does not name, fails.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for dec.More() {
		var pkg struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&pkg); err != nil {
			t.Fatal(err)
		}
		from := strings.TrimPrefix(strings.TrimPrefix(pkg.ImportPath, module), "/")
		if from == "" {
			continue
		}
		row, ok := lookup(from)
		if !ok {
			t.Errorf("%s: not in the table; a new package needs a place in ARCHITECTURE.md and here", from)
			continue
		}
		for _, imp := range pkg.Imports {
			if to, inside := strings.CutPrefix(imp, module+"/"); inside {
				if !slices.ContainsFunc(row, func(p string) bool { return covers(p, to) }) {
					t.Errorf("%s imports %s, which its row does not allow", from, to)
				}
				continue
			}
			for prefix, may := range fenced {
				if strings.HasPrefix(imp, prefix) && !slices.Contains(may, from) {
					t.Errorf("%s imports %s, which is fenced to %v", from, imp, may)
				}
			}
		}
	}
}

func lookup(pkg string) ([]string, bool) {
	if row, ok := allowed[pkg]; ok {
		return row, true
	}
	for p, row := range allowed {
		if strings.HasSuffix(p, "/...") && covers(p, pkg) {
			return row, true
		}
	}
	return nil, false
}

func covers(pattern, pkg string) bool {
	if below, ok := strings.CutSuffix(pattern, "/..."); ok {
		return pkg == below || strings.HasPrefix(pkg, below+"/")
	}
	return pattern == pkg
}
