package process

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/time/rate"
)

const (
	tailLines = 20
	tailWidth = 512
	// lineRoom is what is looked at of a line.
	lineRoom = 16 << 10
	// briefLines, no wider than briefWidth, are enough for an error's text.
	briefLines = 5
	briefWidth = 160
	// reportLines bounds what is kept of a Go runtime's report.
	reportLines = 5000
	// outputRate and outputBurst, in bytes, bound what reading a process's output may cost: who writes more waits.
	outputRate  = 16 << 20
	outputBurst = 16 << 20
)

// Output keeps the last lines that a process wrote, for the report of its end, and passes lines on at a
// bounded rate. Reading waits for nobody but floods. Lines are cleaned, bounded and made printable once, where they
// come in. It is safe for concurrent use.
type Output struct {
	clean func(line string) string
	pass  func(line string, dropped int)
	limit *rate.Limiter
	pace  *rate.Limiter

	mu      sync.Mutex // guards what follows
	lines   []string
	dropped int
	// report begins where the Go runtime began to say why it ends; before are the lines that came earlier.
	report, before []string
}

// NewOutput passes lines on to pass, with the number of those before it that were too many. Everything goes through
// clean first, which takes out what must not be seen.
func NewOutput(clean func(line string) string, pass func(line string, dropped int)) *Output {
	return &Output{clean: clean, pass: pass, limit: rate.NewLimiter(10, 50), pace: rate.NewLimiter(outputRate, outputBurst)}
}

func (t *Output) read(r *os.File) {
	defer r.Close()
	t.readFrom(t.buffered(r))
}

// buffered reads r, not faster than floods may be.
func (t *Output) buffered(r io.Reader) *bufio.Reader {
	return bufio.NewReaderSize(&pacedReader{r: r, pace: t.pace}, lineRoom)
}

// readFrom takes lines of any length; of long ones the start is kept.
func (t *Output) readFrom(br *bufio.Reader) {
	for {
		line, err := br.ReadSlice('\n')
		t.write(line)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = br.ReadSlice('\n')
		}
		if err != nil {
			return
		}
	}
}

func (t *Output) write(line []byte) {
	text := t.clean(strings.TrimRight(string(line), "\r\n"))
	text = printable(strings.ToValidUTF8(text[:min(len(text), tailWidth)], "\uFFFD"))
	if text == "" {
		return
	}
	t.mu.Lock()
	if beginsReport(text) {
		t.before, t.report = slices.Clone(t.lines), append(t.report[:0], text)
	} else if len(t.report) > 0 && len(t.report) < reportLines {
		t.report = append(t.report, text)
	}
	if len(t.lines) == tailLines {
		t.lines = append(t.lines[:0], t.lines[1:]...)
	}
	t.lines = append(t.lines, text)
	pass := t.limit.Allow()
	dropped := t.dropped
	if pass {
		t.dropped = 0
	} else {
		t.dropped++
	}
	t.mu.Unlock()
	if pass {
		t.pass(text, dropped)
	}
}

// printable replaces control characters, lest a plugin steer the terminal of who reads a log or a status.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return '\uFFFD'
		}
		return r
	}, text)
}

// Brief is for an error's text: the last few lines, or what the Go runtime reported.
func (t *Output) Brief() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := t.lines
	if len(t.report) > 0 {
		if lines = t.before; !asked(t.report) {
			lines = t.head()
		}
	}
	var out []string
	for _, line := range lines[max(0, len(lines)-briefLines):] {
		out = append(out, strings.ToValidUTF8(line[:min(len(line), briefWidth)], ""))
	}
	return strings.Join(out, "; ")
}

// Last is what helps most to see why a process ended, tailLines at most: its last lines, or when the Go runtime
// reported an end, the report's beginning with the goroutine that matters.
func (t *Output) Last() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := slices.Clone(t.lines)
	if len(t.report) > 0 {
		lines = t.digest()
	}
	return lines
}

// Culprit is the value of a label (runtime/pprof) of the goroutine that a Go program's report of its end blames: ""
// when it has none, or the program was asked for its report.
func (t *Output) Culprit(label string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.report) == 0 || asked(t.report) {
		return ""
	}
	at := slices.IndexFunc(t.report, beginsGoroutine)
	if at < 0 {
		return ""
	}
	// goroutine 8 [running labels:{"grapnel.instance": "…"}]:
	_, rest, _ := strings.Cut(t.report[at], `"`+label+`": "`)
	value, _, _ := strings.Cut(rest, `"`)
	return value
}

// beginsReport knows how the Go runtime begins.
func beginsReport(line string) bool {
	for _, prefix := range []string{"panic: ", "fatal error: ", "runtime: out of memory", "SIGQUIT: ", "SIGABRT: ", "unexpected fault address "} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}

// asked reports whether the runtime was asked for its report, which is how a process that hangs is ended.
func asked(report []string) bool { return strings.HasPrefix(report[0], "SIG") }

// head is what a report says before it lists goroutines.
func (t *Output) head() []string {
	end := slices.IndexFunc(t.report, func(line string) bool {
		return strings.HasPrefix(line, "goroutine ") || strings.HasPrefix(line, "PC=") || strings.HasPrefix(line, "runtime stack:")
	})
	if end < 0 {
		end = len(t.report)
	}
	return t.report[:min(end, briefLines)]
}

// digest is what came before the report, its head, and one goroutine: the first, which is the one that failed, or where
// the process was asked what it does, the one that is furthest in the author's own code.
func (t *Output) digest() []string {
	head := t.head()
	out := slices.Concat(t.before[max(0, len(t.before)-briefLines):], head)
	rest := t.report[len(head):]
	if at := slices.IndexFunc(rest, beginsGoroutine); at >= 0 {
		rest = rest[at:]
	}
	var best []string
	for bestScore := -1; len(rest) > 0; {
		end := len(rest)
		if next := slices.IndexFunc(rest[1:], beginsGoroutine); next >= 0 {
			end = next + 1
		}
		if score := scoreGoroutine(rest[:end]); score > bestScore {
			best, bestScore = rest[:end], score
		}
		if rest = rest[end:]; !asked(t.report) {
			break
		}
	}
	return append(out, best[:min(len(best), tailLines-len(out))]...)
}

func beginsGoroutine(line string) bool {
	return strings.HasPrefix(line, "goroutine ") && strings.HasSuffix(line, ":")
}

// scoreGoroutine tells goroutines at an author's code from those that wait in the SDK or below it.
func scoreGoroutine(lines []string) int {
	score := 0
	for _, line := range lines {
		switch {
		case strings.HasPrefix(line, "github.com/grapnel/grapnel/sdk/plugin.(*server).run("),
			strings.HasPrefix(line, "github.com/grapnel/grapnel/sdk/plugin.(*server).build("):
			score |= 2 // the SDK has called the author's code
		case isAuthors(line):
			score |= 1
		}
	}
	return score
}

// isAuthors reports whether a line of a stack names a function that is neither the standard library's nor of what a
// plugin is built on.
func isAuthors(line string) bool {
	name, _, ok := strings.Cut(line, "(")
	if !ok || strings.HasPrefix(line, "\t") || strings.HasPrefix(line, "created by ") || line == "main.main()" {
		return false
	}
	for _, known := range []string{"github.com/grapnel/grapnel/sdk/", "github.com/grapnel/grapnel/proto/", "google.golang.org/", "golang.org/", "github.com/hashicorp/"} {
		if strings.HasPrefix(name, known) {
			return false
		}
	}
	first, _, below := strings.Cut(name, "/")
	return strings.HasPrefix(name, "main.") || below && strings.Contains(first, ".")
}

// pacedReader makes a reader wait when it gives too much.
type pacedReader struct {
	r    io.Reader
	pace *rate.Limiter
}

func (p *pacedReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b[:min(len(b), outputBurst)])
	if waitErr := p.pace.WaitN(context.Background(), n); waitErr != nil {
		return n, waitErr
	}
	return n, err
}

// Writer returns what takes output by another way than the process's pipes. It is to be used by one goroutine.
func (t *Output) Writer() io.Writer { return &lineWriter{to: t} }

// lineWriter gives what is written to it, in whole lines, to an Output.
type lineWriter struct {
	to   *Output
	rest []byte
}

// Write implements io.Writer.
func (w *lineWriter) Write(b []byte) (int, error) {
	n := len(b)
	if err := w.to.pace.WaitN(context.Background(), min(n, outputBurst)); err != nil {
		return 0, err
	}
	for {
		line, rest, ok := bytes.Cut(b, []byte{'\n'})
		w.rest = append(w.rest, line[:min(len(line), max(0, lineRoom-len(w.rest)))]...)
		if !ok {
			return n, nil
		}
		w.to.write(w.rest)
		w.rest, b = w.rest[:0], rest
	}
}
