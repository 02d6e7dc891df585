//go:build unix

package conformance_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// raw is a plugin written against the protocol alone: no SDK and no go-plugin, as one in another language
// would be. It keeps every promise but the one that its faults name.
type raw struct {
	pluginv1.UnimplementedPluginServiceServer
	pluginv1.UnimplementedSignerServiceServer
	pluginv1.UnimplementedTransportServiceServer
	pluginv1.UnimplementedTransformerServiceServer
	faults []string
	began  time.Time
	pool   *rawPool

	mu           sync.RWMutex // guards what follows
	instances    map[uint32]*rawInstance
	egress, deny []string
	describes    int
	settled      int
	leaked       [][]byte
	latest       *rawInstance
}

type rawInstance struct {
	pb   *pluginv1.Instance
	keys []string
}

func (r *raw) is(fault string) bool { return slices.Contains(r.faults, fault) }

const rawCookie = "b6f1c1a2-6b1e-4a57-9c0f-5d8f0e6a7c31"

// serveRaw is a whole plugin process.
func serveRaw(faults string) {
	r := &raw{faults: strings.Split(faults, ","), began: time.Now(), instances: map[uint32]*rawInstance{}}
	r.pool = newRawPool(r)
	if os.Getenv("GRAPNEL_PLUGIN") != rawCookie && !r.is("no-cookie-check") {
		if !r.is("silent-by-hand") {
			fmt.Fprintln(os.Stderr, "this is a Grapnel plugin; the server starts it")
		}
		os.Exit(1)
	}
	cwd, _ := os.Getwd()
	if r.is("exits") || r.is("needs-cwd") && cwd == "/" {
		os.Exit(3)
	}
	if !r.is("dies-by-signal") {
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT)
	}
	dir := os.Getenv("PLUGIN_UNIX_SOCKET_DIR")
	if r.is("socket-elsewhere") {
		dir, _ = os.MkdirTemp(filepath.Dir(dir), "elsewhere")
	}
	l, err := net.Listen("unix", filepath.Join(dir, "raw.sock"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if r.is("orphan") {
		helper := exec.Command("/bin/sleep", "600")
		helper.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		_ = helper.Start()
	}
	limit := 4 << 20
	if r.is("small-messages") {
		limit = 3 << 19
	}
	opts := []grpc.ServerOption{grpc.MaxRecvMsgSize(limit)}
	if len(os.Args) > 3 {
		opts = append(opts, (&recorder{path: os.Args[3], seen: map[string]bool{}}).options()...)
	}
	if r.is("wrong-status") {
		opts = append(opts, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return status.Error(codes.Internal, "what?") }))
	}
	g := grpc.NewServer(opts...)
	pluginv1.RegisterPluginServiceServer(g, r)
	pluginv1.RegisterSignerServiceServer(g, r)
	pluginv1.RegisterTransportServiceServer(g, r)
	pluginv1.RegisterTransformerServiceServer(g, r)
	if r.is("banner") {
		fmt.Println("Welcome to the raw plugin!")
	}
	protocol := "grpc"
	if r.is("wrong-line") {
		protocol = "netrpc"
	}
	fmt.Printf("1|1|unix|%s|%s|\n", l.Addr(), protocol)
	_ = g.Serve(l)
}

const (
	rawSchema = `{"$schema":"https://json-schema.org/draft/2020-12/schema","type":"object","additionalProperties":false,
		"properties":{"label":{"type":"string"},"level":{"type":"integer","minimum":0}},"required":["label"]}`
	rawExample = `{"label":"x","level":3}`
)

func (r *raw) Describe(context.Context, *pluginv1.DescribeRequest) (*pluginv1.DescribeResponse, error) {
	slot := &pluginv1.SecretSlot{
		Name: "key", Required: true, Format: "whsec_ and base64, or ed_ and base64 of a seed", Algorithms: []string{"hmac-sha256", "ed25519"},
	}
	d := &pluginv1.DescribeResponse{
		Name: "raw", Version: "1.2.3", ProtocolMinor: 4,
		Capabilities: []string{"attempt.stream", "attempt.unary", "sign.stream", "transform.stream", "secret.prepare"},
		Kinds: []*pluginv1.Kind{
			{Id: "raw-sign", ConfigSchema: rawSchema, ConfigExample: rawExample, SecretSlots: []*pluginv1.SecretSlot{slot},
				Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{EmitsHeaders: []string{"x-raw-signature"}, Deterministic: true}}},
			{Id: "raw-http", ConfigSchema: rawSchema, ConfigExample: rawExample,
				Traits: &pluginv1.Kind_Transport{Transport: &pluginv1.TransportTraits{UriSchemes: []string{"http", "https"}, MayAddHeaders: []string{"user-agent"}, Batches: true}}},
			{Id: "raw-mem", Traits: &pluginv1.Kind_Transport{Transport: &pluginv1.TransportTraits{UriSchemes: []string{"raw-mem"}}}},
			{Id: "raw-transform", ConfigSchema: rawSchema, ConfigExample: rawExample, SecretSlots: []*pluginv1.SecretSlot{{Name: "token"}},
				Traits: &pluginv1.Kind_Transformer{Transformer: &pluginv1.TransformerTraits{}}},
		},
	}
	carrier := d.GetKinds()[1]
	if r.is("unary") {
		d.Capabilities = slices.Delete(d.GetCapabilities(), 0, 1)
	}
	if r.is("describe-changes") {
		r.mu.Lock()
		r.describes++
		d.Kinds[0].Description = strconv.Itoa(r.describes)
		r.mu.Unlock()
	}
	if r.is("bad-header-name") {
		carrier.GetTransport().MayAddHeaders = append(carrier.GetTransport().MayAddHeaders, "X-Upper")
	}
	if r.is("bad-version") {
		d.Version = "the newest"
	}
	if r.is("external-schema") {
		carrier.ConfigSchema = `{"$ref":"https://schemas.example/config.json"}`
	}
	return d, nil
}

func diagnostic(code, pointer, summary string) *pluginv1.Diagnostic {
	return &pluginv1.Diagnostic{Severity: pluginv1.Diagnostic_SEVERITY_ERROR, Code: code, Pointer: pointer, Summary: summary}
}

// check is all that can be wrong with an instance.
func (r *raw) check(in *pluginv1.Instance, shapeOnly bool) []*pluginv1.Diagnostic {
	if !slices.Contains([]string{"raw-sign", "raw-http", "raw-mem", "raw-transform"}, in.GetKind()) {
		return []*pluginv1.Diagnostic{diagnostic("config.unknown_kind", "", "there is no such kind")}
	}
	ds := r.checkConfig(in)
	for slot, versions := range in.GetSecrets() {
		if in.GetKind() == "raw-transform" && slot == "token" {
			continue
		}
		if in.GetKind() != "raw-sign" || slot != "key" {
			ds = append(ds, diagnostic("secret.unknown_slot", "/secrets/"+slot, "there is no such slot"))
			continue
		}
		for _, v := range versions.GetVersions() {
			if !validKey(string(v.GetValue())) {
				summary := "this is no key"
				if r.is("echoes-secret") {
					summary = "this is no key: " + strings.ToValidUTF8(string(v.GetValue()), "?")
				}
				ds = append(ds, diagnostic("secret.malformed", "/secrets/key", summary))
			}
		}
	}
	if in.GetKind() == "raw-sign" && in.GetSecrets()["key"] == nil && !shapeOnly && !r.is("missing-secret-taken") {
		ds = append(ds, diagnostic("secret.missing", "/secrets/key", "the key is missing"))
	}
	return ds
}

func (r *raw) checkConfig(in *pluginv1.Instance) []*pluginv1.Diagnostic {
	raw := in.GetConfigJson()
	if len(raw) == 0 {
		raw = []byte("{}")
	}
	var tree any
	if err := json.Unmarshal(raw, &tree); err != nil {
		return []*pluginv1.Diagnostic{diagnostic("config.syntax", "/config", "this is no JSON")}
	}
	config, ok := tree.(map[string]any)
	if !ok {
		return []*pluginv1.Diagnostic{diagnostic("config.type", "/config", "this is no object")}
	}
	var ds []*pluginv1.Diagnostic
	for name, value := range config {
		pointer := "/config/" + name
		if r.is("no-pointer") {
			pointer = ""
		}
		_, text := value.(string)
		_, number := value.(float64)
		switch {
		case in.GetKind() == "raw-mem" || name != "label" && name != "level":
			if !r.is("unknown-field-taken") || name != "conformance_unknown" {
				ds = append(ds, diagnostic("config.unknown_field", "/config/"+name, "there is no such field"))
			}
		case name == "label" && !text, name == "level" && !number:
			ds = append(ds, diagnostic("config.type", pointer, "the type is wrong"))
		}
	}
	if _, ok := config["label"]; !ok && in.GetKind() != "raw-mem" && !r.is("missing-field-taken") {
		ds = append(ds, diagnostic("config.missing", "/config/label", "it is missing"))
	}
	if r.is("example-refused") && in.GetKind() == "raw-http" && config["level"] != nil {
		ds = append(ds, diagnostic("config.range", "/config/level", "it is too high"))
	}
	return ds
}

func (r *raw) Validate(_ context.Context, req *pluginv1.ValidateRequest) (*pluginv1.ValidateResponse, error) {
	in := req.GetInstance()
	ds := r.check(in, len(in.GetSecrets()) == 0)
	switch {
	case r.is("kind-error") && len(ds) > 0 && ds[0].GetCode() == "config.unknown_kind":
		return nil, status.Error(codes.NotFound, "no such kind")
	case r.is("syntax-error") && len(ds) > 0 && ds[0].GetCode() == "config.syntax":
		return nil, status.Error(codes.InvalidArgument, "no JSON")
	case r.is("strict-fields") && len(in.ProtoReflect().GetUnknown()) > 0:
		ds = append(ds, diagnostic("config.unknown", "", "unknown fields"))
	case r.is("validate-configures"):
		r.put(in)
	}
	return &pluginv1.ValidateResponse{Diagnostics: ds}, nil
}

func (r *raw) put(in *pluginv1.Instance) {
	i := &rawInstance{pb: in}
	for _, v := range in.GetSecrets()["key"].GetVersions() {
		if v.GetExpireTime() == nil || v.GetExpireTime().AsTime().After(time.Now()) || r.is("expired-signs") {
			i.keys = append(i.keys, string(v.GetValue()))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.instances[in.GetRef()], r.latest = i, i
}

func (r *raw) get(ref uint32) *rawInstance {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.instances[ref]
}

// newest is the newest generation of an instance id, 0 for none.
func (r *raw) newest(id string) uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var newest uint64
	for _, i := range r.instances {
		if i.pb.GetId() == id {
			newest = max(newest, i.pb.GetGeneration())
		}
	}
	return newest
}

// forget drops the instance's other generations.
func (r *raw) forget(in *pluginv1.Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for ref, i := range r.instances {
		if i.pb.GetId() == in.GetId() && i.pb.GetGeneration() != in.GetGeneration() {
			delete(r.instances, ref)
		}
	}
}

func (r *raw) Configure(_ context.Context, req *pluginv1.ConfigureRequest) (*pluginv1.ConfigureResponse, error) {
	if set := req.GetSettings(); set != nil {
		r.mu.Lock()
		r.egress, r.deny = set.GetEgressAllow(), set.GetEgressDeny()
		r.mu.Unlock()
	}
	out := &pluginv1.ConfigureResponse{}
	if r.is("configure-interrupts") && len(req.GetInstances()) > 0 {
		r.mu.Lock()
		away := r.instances
		r.instances = map[uint32]*rawInstance{}
		r.mu.Unlock()
		<-time.After(5 * time.Millisecond)
		r.mu.Lock()
		r.instances = away
		r.mu.Unlock()
	}
	for _, in := range req.GetInstances() {
		out.Statuses = append(out.Statuses, &pluginv1.InstanceStatus{Ref: in.GetRef(), Diagnostics: r.configure(in)})
	}
	if r.is("statuses-reversed") {
		slices.Reverse(out.GetStatuses())
	}
	return out, nil
}

func (r *raw) configure(in *pluginv1.Instance) []*pluginv1.Diagnostic {
	newest := r.newest(in.GetId())
	if in.GetGeneration() < newest && !r.is("stale-taken") || r.is("not-idempotent") && in.GetGeneration() == newest {
		return []*pluginv1.Diagnostic{diagnostic("config.stale", "", "it is too old")}
	}
	ds := r.check(in, false)
	switch {
	case r.is("logs-secret"):
		fmt.Fprintln(os.Stderr, "configured with", in.GetSecrets()["key"])
	case r.is("slow-instances") && in.GetKind() == "raw-sign":
		<-time.After(120 * time.Millisecond)
	}
	if len(ds) > 0 {
		if r.is("bad-generation-drops") {
			r.forget(in)
		}
		return ds
	}
	r.put(in)
	if r.is("new-replaces-old") {
		r.forget(in)
	}
	return nil
}

func (r *raw) Remove(_ context.Context, req *pluginv1.RemoveRequest) (*pluginv1.RemoveResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, ref := range req.GetRefs() {
		if !r.is("remove-keeps") {
			delete(r.instances, ref)
		}
	}
	return &pluginv1.RemoveResponse{}, nil
}

func (r *raw) Control(s grpc.BidiStreamingServer[pluginv1.ControlRequest, pluginv1.ControlResponse]) error {
	for beats := 0; ; {
		req, err := s.Recv()
		if err != nil {
			orderly := s.Context().Err() == nil
			if !(r.is("outlives-control") && orderly) && !(r.is("outlives-host") && !orderly) {
				go os.Exit(0)
			}
			<-s.Context().Done()
			return nil
		}
		if req.GetDrain() != nil {
			r.mu.Lock()
			maps.DeleteFunc(r.instances, func(_ uint32, i *rawInstance) bool {
				return r.is("drain-stops-signing") && i.pb.GetKind() == "raw-sign" || r.is("drain-stops-transforming") && i.pb.GetKind() == "raw-transform"
			})
			r.mu.Unlock()
		}
		if hb := req.GetHeartbeat(); hb != nil {
			if beats++; r.is("few-heartbeats") && beats > 3 {
				continue
			}
			_ = s.Send(&pluginv1.ControlResponse{Frame: &pluginv1.ControlResponse_Heartbeat{Heartbeat: hb}})
		}
	}
}

// Keys of the signer: an HMAC key, or the seed of an ed25519 one.
func keyOf(value string) (hmacKey []byte, private ed25519.PrivateKey) {
	encoded, isHMAC := strings.CutPrefix(value, "whsec_")
	if !isHMAC {
		var isSeed bool
		if encoded, isSeed = strings.CutPrefix(value, "ed_"); !isSeed {
			return nil, nil
		}
	}
	b, err := base64.StdEncoding.Strict().DecodeString(strings.TrimRight(encoded, "\n"))
	switch {
	case err != nil || len(b) != 32:
		return nil, nil
	case isHMAC:
		return b, nil
	}
	return nil, ed25519.NewKeyFromSeed(b)
}

func validKey(value string) bool {
	shared, private := keyOf(value)
	return shared != nil || private != nil
}

func (r *raw) PrepareSecret(_ context.Context, req *pluginv1.PrepareSecretRequest) (*pluginv1.PrepareSecretResponse, error) {
	refuse := func(code, pointer string) (*pluginv1.PrepareSecretResponse, error) {
		return &pluginv1.PrepareSecretResponse{Diagnostics: []*pluginv1.Diagnostic{diagnostic(code, pointer, "that is not possible")}}, nil
	}
	if req.GetKind() != "raw-sign" || req.GetSlot() != "key" {
		if r.is("slot-error") {
			return nil, status.Error(codes.NotFound, "no such slot")
		}
		return refuse("secret.unknown_slot", "")
	}
	value := req.GetValue()
	if len(value) == 0 {
		seed := make([]byte, 32)
		if !r.is("same-secret") {
			_, _ = rand.Read(seed)
		}
		prefix := map[string]string{"": "whsec_", "hmac-sha256": "whsec_", "ed25519": "ed_"}[req.GetAlgorithm()]
		if prefix == "" {
			return refuse("secret.algorithm", "/algorithm")
		}
		value = []byte(prefix + base64.StdEncoding.EncodeToString(seed))
	} else if !validKey(string(value)) && !r.is("malformed-taken") {
		return refuse("secret.malformed", "/value")
	}
	resp := &pluginv1.PrepareSecretResponse{Value: value, Algorithm: "hmac-sha256"}
	if r.is("not-canonical") {
		resp.Value = append(bytes.Clone(value), '\n')
	}
	if _, private := keyOf(string(value)); private != nil {
		public := base64.RawURLEncoding.EncodeToString(private[32:])
		resp.Algorithm, resp.PublicKey = "ed25519", public
		resp.Jwk = `{"kty":"OKP","crv":"Ed25519","x":"` + public + `"}`
		if r.is("private-jwk") {
			resp.Jwk = `{"kty":"OKP","crv":"Ed25519","x":"` + public + `","d":"hidden"}`
		}
	}
	return resp, nil
}

func (r *raw) Sign(s grpc.BidiStreamingServer[pluginv1.SignRequest, pluginv1.SignResponse]) error {
	for {
		req, err := s.Recv()
		if err != nil {
			return nil
		}
		out := &pluginv1.SignResponse{}
		unknown := slices.ContainsFunc(req.GetItems(), func(it *pluginv1.SignItem) bool { return r.get(it.GetInstanceRef()) == nil })
		seen := map[string]bool{}
		for i, item := range req.GetItems() {
			res := r.signItem(req, item, i)
			same := fmt.Sprint(item.GetInstanceRef(), item.GetContent(), item.GetCreated())
			if r.is("impure") && seen[same] && res.GetFailure() == nil {
				res.Headers[0].Value += "again"
			}
			seen[same] = true
			if r.is("unknown-ref-fails-batch") && unknown && res.GetFailure() == nil {
				res = &pluginv1.SignResult{Seq: item.GetSeq(), Failure: rawFailure(pluginv1.Failure_SOURCE_PLUGIN, "sign", pluginv1.Failure_WIRE_STATE_NOT_SENT)}
			}
			out.Results = append(out.Results, res)
			if r.is("signs-twice") && i == 0 {
				out.Results = append(out.Results, res)
			}
		}
		if err := s.Send(out); err != nil {
			return err
		}
	}
}

func (r *raw) signItem(req *pluginv1.SignRequest, item *pluginv1.SignItem, at int) *pluginv1.SignResult {
	out := &pluginv1.SignResult{Seq: item.GetSeq()}
	in := r.get(item.GetInstanceRef())
	if in == nil || in.pb.GetKind() != "raw-sign" {
		out.Failure = rawFailure(pluginv1.Failure_SOURCE_CONFIG, "config", pluginv1.Failure_WIRE_STATE_NOT_SENT)
		return out
	}
	if int(item.GetContent()) >= len(req.GetContents()) {
		if r.is("sign-content-crash") {
			os.Exit(2)
		}
		out.Failure = rawFailure(pluginv1.Failure_SOURCE_PLUGIN, "protocol", pluginv1.Failure_WIRE_STATE_NOT_SENT)
		return out
	}
	c := req.GetContents()[item.GetContent()]
	if r.is("text-only") && bytes.HasPrefix(c.GetBody(), []byte{0xff}) || r.is("strict-items") && len(item.ProtoReflect().GetUnknown()) > 0 {
		out.Failure = rawFailure(pluginv1.Failure_SOURCE_PLUGIN, "sign", pluginv1.Failure_WIRE_STATE_NOT_SENT)
		return out
	}
	if r.is("leaks") {
		r.mu.Lock()
		r.leaked = append(r.leaked, bytes.Repeat([]byte{1}, 1024))
		r.mu.Unlock()
	}
	value := in.sign(c, item.GetCreated().AsTime())
	switch {
	case r.is("own-clock") && c.GetMessageId() == "evt_clock":
		value += strconv.FormatInt(r.began.UnixNano(), 10)
	case r.is("index-signed") && len(req.GetItems()) > 10:
		value += strconv.Itoa(at)
	case r.is("wrong-vector") && c.GetMessageId() == "evt_vector":
		value += "!"
	case r.is("undeclared-header") && c.GetMessageId() == "evt_headers":
		out.Headers = append(out.Headers, &pluginv1.Header{Name: "x-surprise", Value: "1"})
	case r.is("rewrites-uri"):
		out.Uri = "https://elsewhere.example/"
	}
	out.Headers = append([]*pluginv1.Header{{Name: "x-raw-signature", Value: value}}, out.GetHeaders()...)
	return out
}

func (i *rawInstance) sign(c *pluginv1.Content, created time.Time) string {
	var all []string
	for _, value := range i.keys {
		text := append(fmt.Appendf(nil, "%s.%d.", c.GetMessageId(), created.Unix()), c.GetBody()...)
		if shared, private := keyOf(value); private != nil {
			all = append(all, hex.EncodeToString(ed25519.Sign(private, text)))
		} else {
			mac := hmac.New(sha256.New, shared)
			mac.Write(text)
			all = append(all, hex.EncodeToString(mac.Sum(nil)))
		}
	}
	return strings.Join(all, " ")
}

func rawFailure(source pluginv1.Failure_Source, code string, state pluginv1.Failure_WireState) *pluginv1.Failure {
	return &pluginv1.Failure{Source: source, Code: code, Message: "of the raw plugin", WireState: state}
}
