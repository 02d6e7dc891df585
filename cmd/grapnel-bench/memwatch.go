package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// errTooMuch ends a run whose server takes more memory than it may.
var errTooMuch = errors.New("the server was ended")

// sampleEvery is how often the memory of a watched server is read.
const sampleEvery = 50 * time.Millisecond

// memoryReport is what a server took while it was watched, in MiB: the highest of the samples, and the kernel's own
// mark.
type memoryReport struct {
	Peak      float64 `json:"peak_rss_mib"`
	HighWater float64 `json:"vm_hwm_mib"`
}

// add makes r the maximum of both.
func (r *memoryReport) add(o memoryReport) {
	r.Peak, r.HighWater = max(r.Peak, o.Peak), max(r.HighWater, o.HighWater)
}

// memoryWatch samples the memory of one server until it is stopped.
type memoryWatch struct {
	end  chan struct{}
	once sync.Once
	done chan struct{}
	// took is written by the watcher alone until done is closed.
	took memoryReport
}

// watch samples the server's memory from now on. When it passes most MiB the server is killed, for the machine is
// shared, and the context that watch returns is cancelled with errTooMuch. It is cancelled, too, when the server ends by
// itself.
func (p *serverProcess) watch(ctx context.Context, most float64) (*memoryWatch, context.Context) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &memoryWatch{end: make(chan struct{}), done: make(chan struct{})}
	pid := p.cmd.Process.Pid
	go func() {
		defer close(w.done)
		tick := time.NewTicker(sampleEvery)
		defer tick.Stop()
		for {
			w.took.add(memoryOf(pid))
			if most > 0 && w.took.Peak > most {
				_ = p.cmd.Process.Kill()
				cancel(fmt.Errorf("%w when it took %.0f MiB; -most-memory allows %.0f", errTooMuch, w.took.Peak, most))
				return
			}
			select {
			case <-tick.C:
			case <-p.ended:
				cancel(fmt.Errorf("the server ended: %v\n%s", p.cmd.ProcessState, p.log))
				return
			case <-w.end:
				return
			}
		}
	}()
	return w, ctx
}

// stop ends the watch and returns what was seen; it may be called again.
func (w *memoryWatch) stop() memoryReport {
	w.once.Do(func() { close(w.end) })
	<-w.done
	return w.took
}

func memoryOf(pid int) memoryReport {
	return memoryReport{Peak: statusMiB(pid, "VmRSS:"), HighWater: statusMiB(pid, "VmHWM:")}
}

// why is the cause of a context's end in place of an error that only followed from it.
func why(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}
