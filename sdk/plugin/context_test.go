package plugin

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

func TestAttemptContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &attemptContext{deadline: time.Now().Add(time.Second)}
		derived, cancel := context.WithCancel(c)
		defer cancel()
		value, cancelValue := context.WithCancel(context.WithValue(c, t, "v"))
		defer cancelValue()
		calls := 0
		stop := context.AfterFunc(c, func() { calls += 10 })
		context.AfterFunc(c, func() { calls++ })
		if !stop() || stop() {
			t.Error("a function that has not run can be stopped, once")
		}
		if c.Err() != nil || derived.Err() != nil {
			t.Error("it has ended before its time")
		}
		time.Sleep(time.Second)
		if !errors.Is(c.Err(), context.DeadlineExceeded) { // nobody has called end
			t.Errorf("after the deadline: %v", c.Err())
		}
		c.end(context.Canceled)
		synctest.Wait()
		<-c.Done()
		<-derived.Done()
		<-value.Done()
		if !errors.Is(c.Err(), context.DeadlineExceeded) || !errors.Is(context.Cause(derived), context.DeadlineExceeded) || calls != 1 {
			t.Errorf("%v, %v, %d calls", c.Err(), context.Cause(derived), calls)
		}
		late := make(chan struct{})
		context.AfterFunc(c, func() { close(late) })
		<-late
	})
}

func TestOverrunCostsTheAttemptOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		s, err := newServer("x", "1", []Kind{Transport("mem", func(struct{}, Target) (AttemptFunc, error) {
			return func(context.Context, *Request) (*Response, error) {
				<-release
				return &Response{Status: 200}, nil
			}, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Configure(t.Context(), &pluginv1.ConfigureRequest{Instances: []*pluginv1.Instance{{Id: "i", Generation: 1, Ref: 1, Kind: "mem"}}})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		resp, err := s.AttemptOne(t.Context(), &pluginv1.AttemptOneRequest{Attempt: &pluginv1.Attempt{Seq: 9, InstanceRef: 1, TimeoutMs: 2000}})
		f := resp.GetResult().GetFailure()
		if err != nil || resp.GetResult().GetSeq() != 9 || f.GetSource() != pluginv1.Failure_SOURCE_PLUGIN ||
			f.GetWireState() != pluginv1.Failure_WIRE_STATE_MAYBE_SENT {
			t.Errorf("%v, %v", resp, err)
		}
		if took := time.Since(began); took != 2*time.Second+overrunGrace {
			t.Errorf("answered after %v", took)
		}
		if s.inFlight.Load() != 0 || s.overruns.Load() != 1 {
			t.Errorf("%d in flight, %d overruns", s.inFlight.Load(), s.overruns.Load())
		}
		close(release)
		synctest.Wait()
		if s.overruns.Load() != 0 {
			t.Errorf("%d overruns after it has returned", s.overruns.Load())
		}
	})
}

func TestInstanceWithManyOverrunsTakesNoMore(t *testing.T) {
	s, err := newServer("x", "1", []Kind{Transport("mem", func(struct{}, Target) (AttemptFunc, error) {
		return func(context.Context, *Request) (*Response, error) { return &Response{Status: 200}, nil }, nil
	})})
	if err != nil {
		t.Fatal(err)
	}
	inst := &instance{life: newLives(nil).begin(), labels: context.Background(), built: built{attempt: func(context.Context, *Request) (*Response, error) { return &Response{Status: 200}, nil }}}
	s.instances.put(1, inst)
	try := func() result { return s.run(t.Context(), &task{attempt: attempt{ref: 1}}, &scratch{}) }
	if r := try(); r.response == nil {
		t.Errorf("%+v", r)
	}
	inst.overruns.Store(maxOverruns)
	if r := try(); r.failure.source != SourcePlugin || r.failure.wire != NotSent {
		t.Errorf("%+v", r)
	}
}

func TestTraceContext(t *testing.T) {
	attempted := &attemptContext{of: &attempt{traceparent: "00-p", tracestate: "a=b"}}
	derived, cancel := context.WithCancel(attempted)
	defer cancel()
	for name, ctx := range map[string]context.Context{"attempt": attempted, "derived": derived, "call": withTrace(t.Context(), "00-p", "a=b")} {
		if parent, state := TraceContext(ctx); parent != "00-p" || state != "a=b" {
			t.Errorf("%s: traceparent %q and tracestate %q", name, parent, state)
		}
	}
	for name, ctx := range map[string]context.Context{"none": t.Context(), "of none": withTrace(t.Context(), "", ""), "empty": &attemptContext{}} {
		if parent, state := TraceContext(ctx); parent != "" || state != "" {
			t.Errorf("%s: traceparent %q and tracestate %q", name, parent, state)
		}
	}
}
