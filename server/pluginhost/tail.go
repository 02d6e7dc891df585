package pluginhost

import (
	"bufio"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/time/rate"
)

const (
	tailLines = 20
	tailWidth = 512
)

// tail keeps the last lines that a process wrote, for the report of its end, and passes lines on at a
// bounded rate. Reading never waits for anybody.
type tail struct {
	pass  func(line string, dropped int)
	limit *rate.Limiter

	mu      sync.Mutex // guards what follows
	lines   []string
	dropped int
}

func newTail(pass func(line string, dropped int)) *tail {
	return &tail{pass: pass, limit: rate.NewLimiter(10, 50)}
}

func (t *tail) read(r *os.File) {
	defer r.Close()
	t.readFrom(bufio.NewReaderSize(r, 16<<10))
}

// readFrom takes lines of any length; of long ones the start is kept.
func (t *tail) readFrom(br *bufio.Reader) {
	for {
		line, err := br.ReadSlice('\n')
		t.write(line)
		for err == bufio.ErrBufferFull {
			_, err = br.ReadSlice('\n')
		}
		if err != nil {
			_, _ = io.Copy(io.Discard, br)
			return
		}
	}
}

func (t *tail) write(line []byte) {
	text := strings.TrimRight(strings.ToValidUTF8(string(line[:min(len(line), tailWidth)]), "\uFFFD"), "\r\n")
	if text == "" {
		return
	}
	t.mu.Lock()
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

// String is the last lines.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.lines, "\n")
}
