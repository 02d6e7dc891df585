package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/grapnel/grapnel/internal/required"
)

var allLanguages = flag.Bool("languages.all", false, "the guide's pages in Python, JavaScript and Ruby, too, on whose plugins the suite takes minutes")

// TestPluginGuide runs the commands of docs/plugins.md as they are printed: every kind in every language, from
// nothing to a webhook that verifies. Only the server's ports, the receiver's and the path of the checkout differ.
// It is in Go unless all languages are asked for, as `make check` does.
func TestPluginGuide(t *testing.T) {
	if testing.Short() || runtime.GOOS == "windows" {
		t.Skip("builds plugins and runs the suite on them; needs bash")
	}
	t.Parallel()
	page, err := os.ReadFile("../../docs/plugins.md")
	if err != nil {
		t.Fatal(err)
	}
	checkout, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	g := &guide{dir: t.TempDir(), checkout: checkout, receiver: freeAddr(t)}
	if out, err := exec.Command("go", "build", "-o", filepath.Join(g.dir, "bin", "grapnel"), ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	sections := guideSections(string(page))
	for i, s := range sections {
		if i == 0 { // the server, and what all others use
			g.run(t, s.commands)
			continue
		}
		if s.title != "Go" && !*allLanguages {
			continue
		}
		t.Run(s.title, func(t *testing.T) {
			needsLanguage(t, s.title)
			g.run(t, s.commands)
		})
	}
	if len(sections) != 5 {
		t.Fatalf("the page has %d sections with commands, want 5", len(sections))
	}
}

// needsLanguage skips what cannot run here.
func needsLanguage(t *testing.T, title string) {
	t.Helper()
	switch title {
	case "Python":
		err := exec.Command("/usr/bin/python3", "-c", "import grpc, google.protobuf").Run()
		required.Tool(t, "python", err, "install python3-grpcio and python3-protobuf")
	case "Ruby":
		err := exec.Command("ruby", "-e", "require 'grpc'; require 'google/protobuf'").Run()
		required.Tool(t, "ruby", err, "install ruby-grpc and ruby-google-protobuf")
	case "JavaScript":
		if !required.Named("node") {
			t.Skip("npm install fetches packages: set GRAPNEL_REQUIRE=node")
		}
	}
}

type guideSection struct {
	title    string
	commands []string
}

// guideSections are the lines of the page's sh blocks, by heading; headings without any are left out.
func guideSections(page string) []guideSection {
	var all []guideSection
	var title string
	inside := false
	for line := range strings.Lines(page) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "```"):
			inside = line == "```sh"
		case strings.HasPrefix(line, "## "):
			title = line[3:]
		case inside:
			if len(all) == 0 || all[len(all)-1].title != title {
				all = append(all, guideSection{title: title})
			}
			all[len(all)-1].commands = append(all[len(all)-1].commands, line)
		}
	}
	return all
}

// guide runs commands in one directory.
type guide struct {
	dir, checkout, receiver string
	env                     []string
	receiving               *background
}

func (g *guide) run(t *testing.T, commands []string) {
	t.Helper()
	for _, line := range commands {
		line = strings.NewReplacer("127.0.0.1:9000", g.receiver, "--sdk . ", "--sdk "+g.checkout+" ").Replace(line)
		switch {
		case strings.HasPrefix(line, "go build -o bin/"): // done, for this checkout
		case strings.HasPrefix(line, "bin/grapnel server "):
			addr := freeAddr(t)
			g.env = append(os.Environ(), "GRAPNEL_ADDR="+addr)
			g.start(t, line+" --listen "+addr+" --admin-listen 127.0.0.1:0", addr)
		case strings.HasPrefix(line, "bin/grapnel receive "):
			g.receiving = g.start(t, line+" --listen "+g.receiver, "listening on")
		default:
			g.command(t, line)
		}
		if g.receiving != nil && strings.HasPrefix(line, "bin/grapnel publish ") {
			g.receiving.wait(t)
			g.receiving = nil
		}
	}
}

func (g *guide) command(t *testing.T, line string) {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), testEnd(t))
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", line)
	cmd.Dir, cmd.Env = g.dir, g.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("$ %s\n%s\n%v", line, out, err)
	}
}

// testEnd is when the test has to be over; a little before go test ends it without a word. How long a command takes is a
// matter of what else the machine does, and nothing is promised of it.
func testEnd(t *testing.T) time.Time {
	if at, ok := t.Deadline(); ok {
		return at.Add(-10 * time.Second)
	}
	return time.Now().Add(time.Hour)
}

// background is a command that goes on while others run.
type background struct {
	line string
	cmd  *exec.Cmd
	done chan struct{}
	err  error

	mu  sync.Mutex
	out bytes.Buffer
}

// start runs a command in the background and waits until it has said the words. The test's end interrupts it.
func (g *guide) start(t *testing.T, line, words string) *background {
	t.Helper()
	args := strings.Fields(line)
	b := &background{line: line, done: make(chan struct{}), cmd: exec.Command(filepath.Join(g.dir, args[0]), args[1:]...)}
	b.cmd.Dir, b.cmd.Env = g.dir, g.env
	b.cmd.WaitDelay = 10 * time.Second
	pipe, err := b.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	b.cmd.Stderr = b
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(chan struct{})
	go func() {
		defer close(b.done)
		lines := bufio.NewScanner(pipe)
		for heard := false; lines.Scan(); {
			fmt.Fprintln(b, lines.Text())
			if !heard && strings.Contains(lines.Text(), words) {
				heard = true
				close(said)
			}
		}
		b.err = b.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = b.cmd.Process.Signal(syscall.SIGTERM)
		<-b.done
	})
	select {
	case <-said:
	case <-b.done:
		t.Fatalf("$ %s\n%s\nended: %v", line, b.text(), b.err)
	case <-time.After(time.Until(testEnd(t))):
		t.Fatalf("$ %s\n%s\nhas not said %q", line, b.text(), words)
	}
	return b
}

// wait wants the command to end with success.
func (b *background) wait(t *testing.T) {
	t.Helper()
	select {
	case <-b.done:
	case <-time.After(time.Until(testEnd(t))):
		b.err = errors.New("it still runs")
	}
	if b.err != nil {
		t.Fatalf("$ %s\n%s\n%v", b.line, b.text(), b.err)
	}
}

func (b *background) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.Write(p)
}

func (b *background) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.out.String()
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
