package conformance_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/internal/required"
	"github.com/grapnel/grapnel/sdk/conformance"
)

func protocolPage(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile("../../proto/grapnel/plugin/v1/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(page)
}

// TestPageNamesEveryCase: each sentence that the suite checks says so, and every case has its sentence. The soak
// is a measurement and demands nothing of its own.
func TestPageNamesEveryCase(t *testing.T) {
	page := protocolPage(t)
	var cited []string
	for _, bracket := range regexp.MustCompile(`\[([A-Z]{2}-[0-9]{2}[^\]]*)\]`).FindAllStringSubmatch(page, -1) {
		cited = append(cited, regexp.MustCompile(`[A-Z]{2}-[0-9]{2}`).FindAllString(bracket[1], -1)...)
	}
	var ids []string
	for _, c := range conformance.Cases() {
		ids = append(ids, c.ID)
		if c.Group != conformance.GroupSoak && !slices.Contains(cited, c.ID) {
			t.Errorf("PROTOCOL.md does not say what %s demands: %s", c.ID, c.Title)
		}
	}
	for _, id := range cited {
		if !slices.Contains(ids, id) {
			t.Errorf("PROTOCOL.md names %s, and the suite has no such case", id)
		}
	}
}

// TestPageSaysWhatTheSuiteDemands: pointers, codes, capabilities and variables of the environment that the suite
// looks for, and codes that the SDK gives, stand in the page.
func TestPageSaysWhatTheSuiteDemands(t *testing.T) {
	page := protocolPage(t)
	says := func(where, text string) {
		if !strings.Contains(page, "`"+text) {
			t.Errorf("%s: PROTOCOL.md does not say `%s`", where, text)
		}
	}
	pointer := regexp.MustCompile(`^/(config|secrets|target|value|algorithm)(/|$)`)
	code := regexp.MustCompile(`^(config|secret|sign|attempt)\.[a-z_]+$`)
	variable := regexp.MustCompile(`^(GRAPNEL_PLUGIN|PLUGIN_[A-Z_]+)`)
	for _, dir := range []string{".", "../plugin"} {
		eachLiteral(t, dir, func(where, text string) {
			if pointer.MatchString(text) || code.MatchString(text) && !strings.HasSuffix(text, ".json") {
				says(where, text)
			}
			if found := variable.FindString(text); found != "" && dir == "." {
				says(where, found)
			}
		})
	}
	// What outcomes may be called is given to outcome, or compared with a failure's code.
	for name, file := range parsed(t, ".") {
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				if id, ok := n.Fun.(*ast.Ident); ok && id.Name == "outcome" && len(n.Args) > 2 {
					ast.Inspect(n.Args[2], func(arg ast.Node) bool { return literal(arg, func(text string) { says(name, text) }) })
				}
			case *ast.BinaryExpr:
				if call, ok := n.X.(*ast.CallExpr); ok {
					if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "GetCode" {
						literal(n.Y, func(text string) { says(name, text) })
					}
				}
			}
			return true
		})
	}
}

// TestProtoCompilesWithProtoc uses whatever protoc the system has: those of distributions lag years behind. It
// needs one.
func TestProtoCompilesWithProtoc(t *testing.T) {
	t.Parallel()
	_, err := exec.LookPath("protoc")
	required.Tool(t, "protoc", err, "install protobuf-compiler")
	for _, dir := range []string{"../../proto/grapnel/plugin/v1", "../../plugins/example-node"} {
		out, err := exec.CommandContext(t.Context(), "protoc", "-I", dir, "--descriptor_set_out", filepath.Join(t.TempDir(), "p"), "plugin.proto").CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", dir, err, out)
		}
	}
}

func parsed(t *testing.T, dir string) map[string]*ast.File {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*ast.File{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		if files[path], err = parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution); err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func eachLiteral(t *testing.T, dir string, f func(where, text string)) {
	t.Helper()
	for name, file := range parsed(t, dir) {
		ast.Inspect(file, func(n ast.Node) bool { return literal(n, func(text string) { f(name, text) }) })
	}
}

// literal calls f for a string; it always returns true.
func literal(n ast.Node, f func(string)) bool {
	if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
		if text, err := strconv.Unquote(lit.Value); err == nil && text != "" {
			f(text)
		}
	}
	return true
}
