package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"text/template"

	"github.com/spf13/cobra"

	firstparty "github.com/grapnel/grapnel/plugins"
)

//go:embed scaffold
var scaffold embed.FS

// project is what the templates of `grapnel plugin new` are filled with.
type project struct {
	// Name is the plugin's, and its only kind's.
	Name string
	// Kind is signer, transport or transformer.
	Kind string
	// SDK is the directory of a checkout to build against; empty takes the released module of Version.
	SDK string
	// Version is the module's that this binary was built from, v0.0.0 beside SDK.
	Version string

	language, dir string
}

// scaffoldKinds and scaffoldLanguages are what a plugin can be started with.
var (
	scaffoldKinds     = []string{"signer", "transport", "transformer"}
	scaffoldLanguages = []string{"go", "python", "node", "ruby"}
)

func newPluginNew(c *cli) *cobra.Command {
	p := &project{}
	cmd := &cobra.Command{
		Use:   "new DIR",
		Short: "Start a plugin of your own",
		Long: `Writes a small plugin that builds, passes the conformance suite and delivers. DIR is made; its last element
names the plugin and its kind. A plugin in Go builds against the SDK of this grapnel's version, or with --sdk against
a checkout, which a grapnel that was built from one needs.`,
		Example: `  grapnel plugin new --kind signer --sdk ~/src/grapnel acme-sign
  grapnel plugin new --kind transport --lang python acme-post
  grapnel plugin new --kind transformer --lang ruby acme-shape`,
		Args: exactly("DIR"),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := p.check(args[0]); err != nil {
				return err
			}
			if err := p.write(); err != nil {
				return err
			}
			c.said("%s is there. Next:\n", p.dir)
			for line := range strings.Lines(p.next()) {
				c.said("%s", strings.TrimSuffix(line, "\n"))
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.Kind, "kind", "signer", "signer, transport or transformer")
	f.StringVar(&p.language, "lang", "go", "go, python, node or ruby")
	f.StringVar(&p.SDK, "sdk", "", "build a Go plugin against this `checkout` of Grapnel")
	must(cmd.RegisterFlagCompletionFunc("kind", fixed(scaffoldKinds...)))
	must(cmd.RegisterFlagCompletionFunc("lang", fixed(scaffoldLanguages...)))
	return cmd
}

func (p *project) check(dir string) (err error) {
	if p.dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	p.Name = filepath.Base(p.dir)
	switch {
	case !slices.Contains(scaffoldKinds, p.Kind):
		return usagef("--kind %s: must be signer, transport or transformer", p.Kind)
	case !slices.Contains(scaffoldLanguages, p.language):
		return usagef("--lang %s: must be go, python, node or ruby", p.language)
	case p.SDK != "" && p.language != "go":
		return usagef("--sdk is for Go plugins; one in %s carries what it needs", p.language)
	case !regexp.MustCompile(`^[a-z][a-z0-9-]{0,40}$`).MatchString(p.Name):
		return usagef("DIR ends in %q, which names the plugin: want lower-case letters, digits and hyphens, beginning with a letter", p.Name)
	}
	if p.Version = "v0.0.0"; p.language == "go" && p.SDK == "" {
		if p.Version = released(); p.Version == "" {
			return usagef("this grapnel was built from a checkout, and no released SDK is its own: give --sdk CHECKOUT, the directory with Grapnel's go.mod")
		}
	}
	if p.SDK != "" {
		if p.SDK, err = filepath.Abs(p.SDK); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(p.SDK, "sdk", "plugin")); err != nil {
			return usagef("--sdk %s: not a checkout of Grapnel: %w", p.SDK, err)
		}
	}
	if entries, err := os.ReadDir(p.dir); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is there and not empty; give a new directory", p.dir)
	}
	return nil
}

// released is the version of the module that this binary was built from, as `go install` fetches it; "" when it was built
// from a checkout, whose version a module proxy does not have.
func released() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Sum == "" {
		return ""
	}
	return info.Main.Version
}

// Vector is the signature in the scaffolded test.
func (p *project) Vector() string {
	mac := hmac.New(sha256.New, []byte("0123456789abcdef"))
	mac.Write([]byte("msg_1.1700000000.hello"))
	return hex.EncodeToString(mac.Sum(nil))
}

// write makes the files: those of the language, those of the kind, and the language's runtime.
func (p *project) write() error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	for _, from := range []string{path.Join("scaffold", p.language), path.Join("scaffold", p.language, p.Kind)} {
		files, err := fs.ReadDir(scaffold, from)
		if err != nil {
			return err
		}
		for _, f := range files {
			if f.IsDir() {
				continue
			}
			raw, err := scaffold.ReadFile(path.Join(from, f.Name()))
			if err != nil {
				return err
			}
			if err := p.writeFile(strings.TrimSuffix(f.Name(), ".tmpl"), raw); err != nil {
				return err
			}
		}
	}
	if p.language == "go" {
		return nil
	}
	runtime, err := firstparty.Runtime(p.language)
	if err != nil {
		return err
	}
	return os.CopyFS(p.dir, runtime)
}

func (p *project) writeFile(name string, raw []byte) error {
	t, err := template.New(name).Parse(string(raw))
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := t.Execute(&text, p); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if bytes.HasPrefix(raw, []byte("#!")) {
		mode = 0o755
	}
	return os.WriteFile(filepath.Join(p.dir, name), text.Bytes(), mode)
}

func (p *project) next() string {
	build := map[string]string{
		"go":     "go mod tidy && go test . && go build -o plugin .",
		"python": "apt-get install python3-grpcio python3-protobuf",
		"node":   "npm install",
		"ruby":   "apt-get install ruby-grpc ruby-google-protobuf",
	}[p.language]
	what := "."
	if p.language == "go" {
		what = "plugin"
	}
	return fmt.Sprintf(`  cd %s
  %s
  grapnel plugin test ./plugin
  grapnel plugin install --plugin-dir ../plugins %s`, p.dir, build, what)
}
