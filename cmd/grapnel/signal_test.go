//go:build unix

package main

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDemoCleansUpWhenInterrupted interrupts a demo that stays up: it must end in order, its directory and
// all its processes gone.
func TestDemoCleansUpWhenInterrupted(t *testing.T) {
	bin, err := exec.LookPath("grapnel")
	if err != nil {
		t.Fatal(err)
	}
	tmp := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, bin, "demo")
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	log := &lockedBuffer{}
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var told strings.Builder
	scanner := bufio.NewScanner(stdout)
	for scanner.Scan() {
		told.WriteString(scanner.Text() + "\n")
		if strings.Contains(scanner.Text(), "/metrics") { // the last hint
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("demo: %v\n%s%s", err, told.String(), log.text())
	}
	if !strings.Contains(told.String(), "grpcurl -plaintext 127.0.0.1:") {
		t.Errorf("no grpcurl hints:\n%s", told.String())
	}
	left, err := filepath.Glob(filepath.Join(tmp, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// TestSecondSignalAbandons: the first signal ends the commands' context, the second closes what the server
// takes as its order to abandon attempts.
func TestSecondSignalAbandons(t *testing.T) {
	c := newCLI()
	ctx, release := c.catchSignals()
	defer release()
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, ctx.Done())
	select {
	case <-c.abandon:
		t.Fatal("the first signal abandons")
	default:
	}
	if err := self.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, c.abandon)
}

func waitFor(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("nothing happened")
	}
}
