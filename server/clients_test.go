package server_test

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/grapnel/grapnel/internal/required"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/servertest"
)

// requires is required.Tool for what is either there or not.
func requires(t *testing.T, language, how string, found bool) {
	t.Helper()
	if !found {
		required.Tool(t, language, errors.New("is not installed"), how)
	}
}

func installed(names ...string) bool {
	for _, name := range names {
		if _, err := exec.LookPath(name); err != nil {
			return false
		}
	}
	return true
}

// codeBlocks takes the blocks of a language out of a page.
func codeBlocks(t *testing.T, path, language string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, after := range strings.Split(string(text), "```"+language+"\n")[1:] {
		block, _, found := strings.Cut(after, "```\n")
		if !found {
			t.Fatalf("%s: a block of %s does not end", path, language)
		}
		blocks = append(blocks, block)
	}
	return blocks
}

func TestClientsPagePrintsThePrograms(t *testing.T) {
	for language, path := range map[string]string{
		"python": "python/shop.py", "js": "node/shop.mjs", "java": "java/Shop.java", "csharp": "csharp/Shop.cs",
	} {
		program, err := os.ReadFile("../docs/clients/" + path)
		if err != nil {
			t.Fatal(err)
		}
		if blocks := codeBlocks(t, "../docs/clients.md", language); len(blocks) != 1 || blocks[0] != string(program) {
			t.Errorf("docs/clients.md does not print docs/clients/%s as it is", path)
		}
	}
	page, err := os.ReadFile("../docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
	for number, name := range grapnelv1.ErrorReason_name {
		if reason := strings.TrimPrefix(name, "ERROR_REASON_"); number != 0 && !strings.Contains(string(page), reason) {
			t.Errorf("docs/clients.md does not mention the reason %s", reason)
		}
	}
}

// TestDescriptorSetIsForClients: it links by itself, has the details of errors, and nothing private.
func TestDescriptorSetIsForClients(t *testing.T) {
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(grapnelv1.Descriptors(), set); err != nil {
		t.Fatal(err)
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"grapnel/v1/event.proto", "grapnel/plugin/v1/plugin.proto", "grapnel/receiver/v1/receiver.proto", "google/rpc/error_details.proto", "google/rpc/status.proto", "buf/validate/validate.proto"} {
		if _, err := files.FindFileByPath(path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	for _, f := range set.GetFile() {
		if strings.HasPrefix(f.GetPackage(), "grapnel.store") {
			t.Errorf("%s is private and in the set", f.GetName())
		}
	}
}

// checkout is a directory like a checkout in which commands of docs/clients.md may write.
func checkout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"proto", "docs", "sdk"} {
		target, err := filepath.Abs("../" + name)
		if err == nil {
			err = os.Symlink(target, filepath.Join(dir, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// inCheckout runs commands and returns what they print.
func inCheckout(t *testing.T, dir, path, commands string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-ec", commands)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PATH="+path+string(os.PathListSeparator)+os.Getenv("PATH"))
	printed, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("$ %s\n%s%v", commands, printed, err)
	}
	return string(printed)
}

// losingWire forwards connections to a server, and breaks one at the moment when the answer to a stored event comes:
// the publisher cannot know about it.
type losingWire struct {
	to     string
	stored func() bool
	lost   atomic.Bool
}

// listen returns the address to connect to. It ends with the test.
func (l *losingWire) listen(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { _ = listener.Close() })
	wg.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { l.forward(client) })
		}
	})
	return listener.Addr().String()
}

func (l *losingWire) forward(client net.Conn) {
	defer func() { _ = client.Close() }()
	server, err := net.Dial("tcp", l.to)
	if err != nil {
		return
	}
	var up sync.WaitGroup
	defer up.Wait()
	defer func() { _ = server.Close() }()
	up.Go(func() {
		_, _ = io.Copy(server, client)
		_ = server.Close()
	})
	defer func() { _ = client.Close() }() // before the wait, so that it ends
	// HTTP/2: nine bytes, of which the first three are the length of what follows and the fourth is the type.
	const headersFrame = 1
	frame := make([]byte, 9+1<<24)
	for {
		if _, err := io.ReadFull(server, frame[:9]); err != nil {
			return
		}
		n := 9 + int(frame[0])<<16 + int(frame[1])<<8 + int(frame[2])
		if _, err := io.ReadFull(server, frame[9:n]); err != nil {
			return
		}
		if frame[3] == headersFrame && l.stored() && l.lost.CompareAndSwap(false, true) {
			return
		}
		if _, err := client.Write(frame[:n]); err != nil {
			return
		}
	}
}

// TestClientsInOtherLanguages compiles the protos as docs/clients.md says, with the protoc there is, and runs the
// programs of that page, with the commands that it prints, against a live server whose first answer is lost: it is
// stored once all the same.
func TestClientsInOtherLanguages(t *testing.T) {
	if testing.Short() || runtime.GOOS == "windows" {
		t.Skip("builds grapnel, needs a POSIX shell")
	}
	t.Parallel()
	s := servertest.Start(t, servertest.Options{})
	receiver := servertest.NewReceiver(t, nil)
	run := func(t *testing.T, dir, path, language, program string) {
		ns := "shop-" + language
		s.In(t).Namespace(ns)
		s.In(t).Subscribe(ns, "orders", receiver.URL, nil)
		var command string
		for _, block := range codeBlocks(t, "../docs/clients.md", "console") {
			if strings.Contains(block, program) {
				command = strings.TrimPrefix(block, "$ ")
			}
		}
		wire := &losingWire{to: s.Addr, stored: func() bool {
			_, err := s.Client.GetEvent(t.Context(), ns, "o-1001-created")
			return err == nil
		}}
		command = strings.NewReplacer("127.0.0.1:7070", wire.listen(t), " acme ", " "+ns+" ").Replace(command)
		if command == "" {
			t.Fatalf("docs/clients.md does not say how to run %s", program)
		}
		printed := inCheckout(t, dir, path, command)
		for _, want := range []string{
			"stored namespaces/" + ns + "/events/o-1001-created webhook-id evt_",
			"again namespaces/" + ns + "/events/o-1001-created duplicate",
			"refused o-4-paid type: ", "(INVALID_FIELD)",
			"error ALREADY_EXISTS EVENT_ID_CONFLICT",
			"delivery STATE_SUCCEEDED after 1 attempts",
		} {
			if !strings.Contains(printed, want) {
				t.Errorf("$ %s\n%s\ndoes not print %q", command, printed, want)
			}
		}
		if !wire.lost.Load() {
			t.Error("no answer was lost, so nothing was repeated")
		}
		if n := len(s.In(t).Deliveries(ns, "")); n != 4 {
			t.Errorf("%d deliveries, want those of 4 events", n)
		}
	}
	t.Run("python", func(t *testing.T) {
		requires(t, "python", "install protobuf-compiler and protobuf-compiler-grpc", installed("protoc", "grpc_python_plugin"))
		needs(t, "python")
		bin := t.TempDir()
		build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../cmd/grapnel")
		if printed, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build grapnel: %v\n%s", err, printed)
		}
		// The distribution's Python is the one that has the distribution's packages.
		if err := os.Symlink("/usr/bin/python3", filepath.Join(bin, "python3")); err != nil {
			t.Fatal(err)
		}
		dir := checkout(t)
		for _, block := range codeBlocks(t, "../docs/clients.md", "sh") {
			inCheckout(t, dir, bin, block)
		}
		// The whole of what plugin authors and receivers need compiles as well.
		inCheckout(t, dir, bin, "protoc -I proto --python_out=gen proto/grapnel/receiver/v1/receiver.proto")
		run(t, dir, bin, "python", "shop.py")
	})
	t.Run("node", func(t *testing.T) {
		_, err := os.Stat("../docs/clients/node/node_modules")
		requires(t, "node", "install node and run `npm ci` in docs/clients/node", err == nil && installed("node"))
		run(t, checkout(t), "", "node", "shop.mjs")
	})
}
