package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// runSuite runs the suite and keeps a line on standard error up to date while it does, when that is a terminal.
// show, when not nil, is told of each case as it ends.
func (c *cli) runSuite(ctx context.Context, o conformance.Options, show func(conformance.Result)) (*conformance.Report, error) {
	chosen, err := o.Cases()
	if err != nil {
		return nil, err
	}
	p := &suiteProgress{all: len(chosen), began: time.Now(), show: show}
	if file, ok := c.stderr.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
		p.to = file
	}
	stop := p.start()
	report, err := conformance.Run(ctx, o, p.ended)
	stop()
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("interrupted after %d of %d cases of the conformance suite", p.done, p.all)
	}
	return report, err
}

// suiteProgress is the line about a run.
type suiteProgress struct {
	to    io.Writer // nil shows no line
	all   int
	began time.Time
	show  func(conformance.Result)

	mu           sync.Mutex // guards what follows, and writing
	done, failed int
}

// ended counts a case, and has it shown where the line was.
func (p *suiteProgress) ended(r conformance.Result) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done++
	if r.Outcome == conformance.Failed {
		p.failed++
	}
	if p.show == nil {
		return
	}
	if p.to != nil {
		fmt.Fprint(p.to, "\r\x1b[K")
	}
	p.show(r)
}

// start has the line written until the function that it returns is called, which takes it away.
func (p *suiteProgress) start() func() {
	if p.to == nil {
		return func() {}
	}
	stop := make(chan struct{})
	var writing sync.WaitGroup
	writing.Go(func() {
		ticker := time.NewTicker(200 * time.Millisecond)
		defer ticker.Stop()
		for {
			p.mu.Lock()
			fmt.Fprintf(p.to, "\r\x1b[K%s", p.line(time.Since(p.began)))
			p.mu.Unlock()
			select {
			case <-ticker.C:
			case <-stop:
				fmt.Fprint(p.to, "\r\x1b[K")
				return
			}
		}
	})
	return func() {
		close(stop)
		writing.Wait()
	}
}

func (p *suiteProgress) line(took time.Duration) string {
	return fmt.Sprintf("testing: %d of %d cases, %d failed, %s", p.done, p.all, p.failed, took.Truncate(time.Second))
}
