package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// maxLine is well above the largest event: 1 MiB of payload in base64 and its attributes.
const maxLine = 4 << 20

// progress counts what became of the lines. Its fields are read while they rise.
type progress struct {
	read, stored, duplicates, failed atomic.Int64
	begin                            time.Time
}

// sentLine is a line that was handed to the publisher.
type sentLine struct {
	number int
	result *client.Result
}

// publishLines publishes standard input line by line. Memory stays bounded: the publisher blocks when too
// much is unanswered, and outcomes are taken in the order of the lines.
func (f *publishFlags) publishLines(cmd *cobra.Command, c *cli, ns string) error {
	cl, err := c.dial(cmd.Context())
	if err != nil {
		return err
	}
	defer func() { _ = cl.Close() }()
	if err := f.checkNamespace(cmd, c, cl, ns); err != nil {
		return err
	}
	p := cl.Publisher(ns, client.PublisherOptions{Stream: f.stream, ResendFor: c.patient()})
	count := &progress{begin: time.Now()}
	sent := make(chan sentLine, 1000) // as many as the publisher holds
	var settled sync.WaitGroup
	settled.Go(func() { c.settleLines(sent, count) })
	stopProgress := c.showProgress(count)

	readErr := f.readLines(cmd.Context(), c, p, sent, count)
	closing, cancel := context.WithTimeout(context.WithoutCancel(cmd.Context()), c.patient())
	defer cancel()
	if cmd.Context().Err() != nil { // interrupted: what is in flight gets a moment, no more
		closing, cancel = context.WithTimeout(closing, 2*time.Second)
		defer cancel()
	}
	closeErr := p.Close(closing)
	close(sent)
	settled.Wait()
	stopProgress()
	if err := c.summarize(count); err != nil {
		return err
	}
	if cmd.Context().Err() != nil {
		return readErr // which says how far it came
	}
	if err := errors.Join(readErr, closeErr); err != nil {
		return err
	}
	if count.failed.Load() > 0 {
		return quietError{}
	}
	return nil
}

// checkNamespace fails early, and with one sentence, where else every line would fail.
func (f *publishFlags) checkNamespace(cmd *cobra.Command, c *cli, cl *client.Client, ns string) error {
	ctx := cmd.Context()
	_, err := cl.NamespaceService().GetNamespace(ctx, &grapnelv1.GetNamespaceRequest{Name: "namespaces/" + ns})
	if errors.Is(err, client.ErrPermissionDenied) { // may publish all the same
		return nil
	}
	return c.suggest(ctx, cl, err)
}

// patient is how long lines may wait for a server: --timeout, and as good as ever for 0.
func (c *cli) patient() time.Duration {
	if c.timeout == 0 {
		return 365 * 24 * time.Hour
	}
	return max(c.timeout, time.Second)
}

func (f *publishFlags) readLines(ctx context.Context, c *cli, p *client.Publisher, sent chan<- sentLine, count *progress) error {
	scanner := bufio.NewScanner(c.stdin)
	scanner.Buffer(make([]byte, 64<<10), maxLine)
	number := 0
	for ctx.Err() == nil && scanner.Scan() {
		number++
		line := bytes.TrimSpace(scanner.Bytes())
		if len(line) == 0 {
			continue
		}
		count.read.Add(1)
		e, err := f.parseLine(line)
		if err != nil {
			count.failed.Add(1)
			fmt.Fprintf(c.stderr, "line %d: %s\n", number, clean(err.Error()))
			continue
		}
		sent <- sentLine{number, p.PublishProto(ctx, e)}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted after line %d", number)
	}
	if err := scanner.Err(); errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("line %d is longer than %d MiB", number+1, maxLine>>20)
	} else if err != nil {
		return fmt.Errorf("read standard input after line %d: %w", number, err)
	}
	return nil
}

func (f *publishFlags) parseLine(line []byte) (*grapnelv1.Event, error) {
	e := &grapnelv1.Event{}
	if err := decodeJSON(line, e); err != nil {
		return nil, err
	}
	e.Type = cmp.Or(e.GetType(), f.event.GetType())
	e.Source = cmp.Or(e.GetSource(), f.event.GetSource())
	e.Subject = cmp.Or(e.GetSubject(), f.event.GetSubject())
	if e.GetType() == "" {
		return nil, errors.New(`no "type", and no --type either`)
	}
	return e, nil
}

func (c *cli) settleLines(sent <-chan sentLine, count *progress) {
	for line := range sent {
		_, err := line.result.Result()
		switch {
		case err != nil:
			count.failed.Add(1)
			fmt.Fprintf(c.stderr, "line %d: event %s: %s\n", line.number, clean(line.result.ID()), clean(err.Error()))
		case line.result.Duplicate():
			count.duplicates.Add(1)
		default:
			count.stored.Add(1)
		}
	}
}

// showProgress keeps one line up to date when stderr is a terminal. The returned function ends it.
func (c *cli) showProgress(count *progress) func() {
	if !isTerminal(c.stderr) {
		return func() {}
	}
	file := os.Stderr // what steers the terminal is our own here
	stop := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				fmt.Fprintf(file, "\r\x1b[K%s", count.text())
			case <-stop:
				fmt.Fprint(file, "\r\x1b[K")
				return
			}
		}
	})
	return func() {
		close(stop)
		done.Wait()
	}
}

func (p *progress) text() string {
	took := time.Since(p.begin)
	ended := p.stored.Load() + p.duplicates.Load()
	text := fmt.Sprintf("%d events read, %d stored, %d published before, %d failed", p.read.Load(), p.stored.Load(), p.duplicates.Load(), p.failed.Load())
	if took > time.Second {
		text += fmt.Sprintf(", %.0f a second", float64(ended)/took.Seconds())
	}
	return text
}

func (c *cli) summarize(count *progress) error {
	if c.output != formatJSON {
		_, err := fmt.Fprintln(c.stdout, count.text())
		return err
	}
	return json.NewEncoder(c.stdout).Encode(map[string]any{
		"read": count.read.Load(), "stored": count.stored.Load(), "duplicates": count.duplicates.Load(),
		"failed": count.failed.Load(), "seconds": time.Since(count.begin).Seconds(),
	})
}
