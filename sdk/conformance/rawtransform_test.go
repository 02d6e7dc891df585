//go:build unix

package conformance_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

const rawMaxMade = 256 << 10

// rawTransforms is one Transform call of the raw plugin: a goroutine per item, results sent one by one.
type rawTransforms struct {
	r       *raw
	s       grpc.BidiStreamingServer[pluginv1.TransformRequest, pluginv1.TransformResponse]
	work    sync.WaitGroup
	sending sync.Mutex
	// others is held by slow items, and wanted by the rest, where slow ones hold up others.
	others sync.RWMutex
}

func (r *raw) Transform(s grpc.BidiStreamingServer[pluginv1.TransformRequest, pluginv1.TransformResponse]) error {
	t := &rawTransforms{r: r, s: s}
	defer t.work.Wait()
	for windows := 0; ; {
		req, err := s.Recv()
		if err != nil {
			return nil
		}
		of := func(id string) bool {
			return slices.ContainsFunc(req.GetEvents(), func(e *pluginv1.Event) bool { return e.GetMessageId() == id })
		}
		if of("evt_window") {
			if windows++; windows > 1 && r.is("half-window") {
				return status.Error(codes.ResourceExhausted, "one batch at a time")
			}
		}
		if r.is("forgets-at-end") && of("evt_last") {
			continue
		}
		spoilt := r.is("odd-spoils-batch") && len(req.GetItems()) > 1 && slices.ContainsFunc(req.GetEvents(), func(e *pluginv1.Event) bool {
			return bytes.HasPrefix(e.GetData(), []byte{0xff})
		})
		for i, item := range req.GetItems() {
			t.work.Go(func() {
				res := t.item(req, item)
				switch {
				case spoilt:
					res.Outcome = rawNotTransformed("transform", "there is an odd one")
				case r.is("batch-transformed-otherwise") && len(req.GetItems()) > 10 && res.GetTransformed() != nil:
					res.GetTransformed().Body = append(res.GetTransformed().GetBody(), strconv.Itoa(i)...)
				}
				t.send(res)
				if r.is("transforms-twice") && i == 0 {
					t.send(res)
				}
			})
		}
	}
}

func (t *rawTransforms) send(res *pluginv1.TransformResult) {
	t.sending.Lock()
	defer t.sending.Unlock()
	_ = t.s.Send(&pluginv1.TransformResponse{Results: []*pluginv1.TransformResult{res}})
}

func rawNotTransformed(code, message string) *pluginv1.TransformResult_Failure {
	f := rawFailure(pluginv1.Failure_SOURCE_PLUGIN, code, pluginv1.Failure_WIRE_STATE_NOT_SENT)
	f.Message = message
	return &pluginv1.TransformResult_Failure{Failure: f}
}

func (t *rawTransforms) item(req *pluginv1.TransformRequest, item *pluginv1.TransformItem) *pluginv1.TransformResult {
	r, out := t.r, &pluginv1.TransformResult{Seq: item.GetSeq()}
	in := r.get(item.GetInstanceRef())
	switch {
	case in == nil || in.pb.GetKind() != "raw-transform":
		f := rawNotTransformed("config", "there is no such instance")
		if f.Failure.Source = pluginv1.Failure_SOURCE_CONFIG; r.is("transform-unknown-ref") && len(req.GetItems()) == 4 {
			f.Failure.Source = pluginv1.Failure_SOURCE_PLUGIN
		}
		out.Outcome = f
	case int(item.GetEvent()) >= len(req.GetEvents()):
		if r.is("event-crash") {
			os.Exit(2)
		}
		out.Outcome = rawNotTransformed("protocol", "there is no such event")
	case in.label() == "slow":
		t.others.RLock()
		defer t.others.RUnlock()
		wait := time.Duration(item.GetTimeoutMs()) * time.Millisecond
		if r.is("late-transform") {
			wait += 450 * time.Millisecond
		}
		<-time.After(wait)
		out.Outcome = rawNotTransformed("timeout", "it took too long")
	default:
		if r.is("slow-holds-up") {
			t.others.Lock()
			defer t.others.Unlock()
		}
		e := req.GetEvents()[item.GetEvent()]
		if r.is("strict-events") && len(e.ProtoReflect().GetUnknown()) > 0 {
			out.Outcome = rawNotTransformed("transform", "unknown fields")
			break
		}
		if r.is("latest-config") {
			r.mu.RLock()
			in = r.latest
			r.mu.RUnlock()
		}
		if r.is("latest-generation") {
			in = r.latestOf(in.pb.GetId())
		}
		r.transform(in, e, out)
	}
	return out
}

// latestOf is the newest generation of an instance.
func (r *raw) latestOf(id string) (latest *rawInstance) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, i := range r.instances {
		if i.pb.GetId() == id && i.pb.GetGeneration() >= latest.generation() {
			latest = i
		}
	}
	return latest
}

func (i *rawInstance) generation() uint64 {
	if i == nil {
		return 0
	}
	return i.pb.GetGeneration()
}

func (i *rawInstance) label() string {
	var config struct{ Label string }
	_ = json.Unmarshal(i.pb.GetConfigJson(), &config)
	return config.Label
}

// transform puts JSON into an object beside the label, and drops what is empty.
func (r *raw) transform(in *rawInstance, e *pluginv1.Event, out *pluginv1.TransformResult) {
	usual := e.GetMessageId() == "evt_usual"
	if len(e.GetData()) == 0 {
		reason := "there is nothing in it"
		if r.is("silent-drop") {
			reason = ""
		}
		if out.Outcome = (&pluginv1.TransformResult_Dropped{Dropped: &pluginv1.Dropped{Reason: reason}}); r.is("config-failure") {
			f := rawNotTransformed("config", "nothing in it")
			f.Failure.Source = pluginv1.Failure_SOURCE_CONFIG
			out.Outcome = f
		}
		return
	}
	if !json.Valid(e.GetData()) {
		message := "it is no JSON"
		if r.is("reason-secret") {
			message += fmt.Sprintf(", and the token is %s", in.pb.GetSecrets()["token"].GetVersions()[0].GetValue())
		}
		out.Outcome = rawNotTransformed("transform", message)
		return
	}
	if r.is("no-outcome") && e.GetMessageId() == "evt_b" {
		return
	}
	made := &pluginv1.Transformed{
		Body: fmt.Appendf(nil, `{"label":%q,"type":%q,"data":%s}`, in.label(), e.GetType(), e.GetData()), ContentType: "application/vnd.raw+json",
		Headers: []*pluginv1.Header{{Name: "x-raw-label", Value: in.label()}},
	}
	switch {
	case len(made.GetBody()) > rawMaxMade && !r.is("makes-too-much"):
		out.Outcome = rawNotTransformed("transform", "it is too large")
		return
	case r.is("no-media-type") && usual:
		made.ContentType = "json"
	case r.is("sets-webhook-id") && usual:
		made.Headers = append(made.Headers, &pluginv1.Header{Name: "webhook-id", Value: "1"})
	case r.is("header-twice") && usual:
		made.Headers = append(made.Headers, made.GetHeaders()...)
	case r.is("wrong-made") && e.GetMessageId() == "evt_fixture":
		made.Body = []byte(`{}`)
	}
	out.Outcome = &pluginv1.TransformResult_Transformed{Transformed: made}
}
