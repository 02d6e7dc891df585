package pluginhost

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grapnel/grapnel/internal/redact"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/pluginhost/wire"
	"github.com/grapnel/grapnel/server/subscription"
)

// plan is how the attempts of one subscription travel: the instances that processes have taken for it.
// It is immutable but for used, and good for as long as its processes live.
type plan struct {
	// used is when it last was, on the host's clock of sweeps.
	used      atomic.Int64
	uid       [16]byte
	revision  int64
	transport *conn
	ref       uint32
	// Signers sign in their configured order: remote ones first, each over its own process's stream, then
	// local, those at the end of the list that live in the transport's process and sign in the same hop.
	remote []hop
	local  []uint32
	// transformer makes, before all that, what is sent; nil without one, and where its process is not there: then only what
	// it has made before can be sent. signed are headers that it may not set.
	transformer *hop
	signed      []string
	shape       wire.Shape
	// headers are those that depend on the event; nil without any.
	headers *eventHeaders
	uri     string
	timeout time.Duration
	grace   time.Duration
	maxBody int      // 0 is no limit
	secrets []string // names
	// own are the values of these secrets, which no record of the subscription shows. Other tenants' are not looked for
	// there: what is taken out of a text that a receiver has a part in would tell it what they are.
	own  redact.Set
	refs []retired // all instances, for the end
	// refusal is set instead of all that when a plugin does not take the config; it holds until.
	refusal string
	until   time.Time
}

// hop is an instance in a process that an attempt goes through before its transport's.
type hop struct {
	conn *conn
	ref  uint32
	id   string // its kind
}

type retired struct {
	conn *conn
	ref  uint32
	at   time.Time
	// release lets go of the instance's secrets.
	release func()
}

// refusalAge is how long a config that a plugin refused is not offered to it again.
const refusalAge = 5 * time.Second

func (pl *plan) usable(sub *subscription.Subscription) bool {
	if pl == nil || pl.revision < sub.Revision {
		return false
	}
	if pl.refusal != "" {
		return time.Now().Before(pl.until)
	}
	return true
}

const planShards = 16

// planTable finds a subscription's plan. Making one is slow, so attempts that come meanwhile wait in its
// entry and none is made twice.
type planTable struct {
	shards [planShards]planShard
}

type planShard struct {
	mu     sync.RWMutex // guards what follows
	plans  map[[16]byte]*plan
	making map[[16]byte]*making
}

type making struct {
	waiting []*pending
	// stale asks for another round: something changed since this one began.
	stale bool
}

func (t *planTable) shard(uid [16]byte) *planShard { return &t.shards[uid[15]%planShards] }

func (t *planTable) get(uid [16]byte) *plan {
	s := t.shard(uid)
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.plans[uid]
}

// invalidate drops the plan; its instances go a little later, since attempts may still name them.
func (t *planTable) invalidate(h *Host, uid [16]byte) {
	s := t.shard(uid)
	s.mu.Lock()
	pl := s.plans[uid]
	delete(s.plans, uid)
	if m := s.making[uid]; m != nil {
		m.stale = true
	}
	s.mu.Unlock()
	h.retire(pl)
}

// idle drops the plans that nobody has used for long, and of many those that were not used lately, the longest first: what
// plugins hold follows who is served, and not who ever was.
func (t *planTable) idle(h *Host, now time.Time) {
	since := now.Add(-h.timing.idle).UnixNano()
	if used := t.used(); len(used) > h.timing.many {
		slices.Sort(used)
		since = max(since, min(used[len(used)-h.timing.many], now.Add(-h.timing.lately).UnixNano()))
	}
	for i := range t.shards {
		s := &t.shards[i]
		var old []*plan
		s.mu.Lock()
		for uid, pl := range s.plans {
			if pl.used.Load() < since {
				delete(s.plans, uid)
				old = append(old, pl)
			}
		}
		s.mu.Unlock()
		for _, pl := range old {
			h.retire(pl)
		}
	}
}

// used is when each plan last was.
func (t *planTable) used() []int64 {
	var all []int64
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		for _, pl := range s.plans {
			all = append(all, pl.used.Load())
		}
		s.mu.RUnlock()
	}
	return all
}

// drop removes pl if it is still the one.
func (t *planTable) drop(h *Host, pl *plan) {
	s := t.shard(pl.uid)
	s.mu.Lock()
	found := s.plans[pl.uid] == pl
	if found {
		delete(s.plans, pl.uid)
	}
	s.mu.Unlock()
	if found {
		h.retire(pl)
	}
}

// using lists the subscriptions whose plans, made or in the making, may use a secret.
func (t *planTable) using(secret string) [][16]byte {
	var uids [][16]byte
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.RLock()
		for uid, pl := range s.plans {
			if slices.Contains(pl.secrets, secret) {
				uids = append(uids, uid)
			}
		}
		for uid := range s.making {
			uids = append(uids, uid)
		}
		s.mu.RUnlock()
	}
	return uids
}

func (h *Host) retire(pl *plan) {
	if pl == nil {
		return
	}
	at := time.Now().Add(h.timing.retire)
	for _, r := range pl.refs {
		r.at = at
		r.conn.retire(r)
	}
}

// route sends p on its way, by the plan there is or one that is made now. Suspects go to a ward.
func (h *Host) route(p *pending) {
	if h.above == nil {
		if p.suspicion = max(p.job.Suspicion, h.accused.of(p.sub)); p.suspicion > 0 && h.admit(p) {
			return
		}
	}
	pl := h.plans.get(p.sub.UID)
	if !pl.usable(p.sub) {
		h.prepare(p)
		return
	}
	h.submit(p, pl)
}

func (h *Host) submit(p *pending, pl *plan) {
	switch {
	case pl.refusal != "":
		go h.refused(p, pl.refusal) // never on the caller's own stack
		return
	case len(p.jobs) > 1 && !pl.shape.Batched(): // the subscription has changed meanwhile
		go h.complete(p, delivery.Result{Cause: delivery.CauseCrowded})
		return
	case !p.shaped && pl.shape != (wire.Shape{}):
		h.shapeFirst(p, pl)
		return
	case pl.maxBody > 0 && len(p.Content.Body()) > pl.maxBody:
		go h.tooLarge(p, pl.maxBody)
		return
	case len(p.jobs) > 1 && p.Content.Plain() > wire.MaxTogether:
		go h.tooLarge(p, wire.MaxTogether)
		return
	}
	if pl.headers != nil && p.stage == 0 && !p.Ownership {
		headers, err := pl.headers.of(p.event, p.made)
		if err != nil {
			go h.unfit(p, err.Error())
			return
		}
		p.Headers, p.setBy = headers, slices.Repeat([]int{setBySubscription}, len(headers))
	}
	p.plan, p.Timeout = pl, pl.timeout
	if now := h.swept.Load(); pl.used.Load() < now {
		pl.used.Store(now)
	}
	var got outcome
	var at *conn
	if p.stage < len(pl.remote) {
		at = pl.remote[p.stage].conn
		p.Ref = pl.remote[p.stage].ref
		got = at.signs.enqueue(p)
	} else {
		at = pl.transport
		p.Ref, p.SignHere = pl.ref, pl.local
		got = at.attempts.enqueue(p)
	}
	switch got {
	case shut: // the process is gone, or going
		h.plans.drop(h, pl)
		h.restart(p)
	case full:
		go h.unspent(p, shortWords) // never on the caller's own stack
	}
}

// shapeAside is the payload size from which a body is made off the caller's stack, which is to return at once.
const shapeAside = 32 << 10

// shapeFirst makes the body that the plan wants, then submits.
func (h *Host) shapeFirst(p *pending, pl *plan) {
	if pl.shape.Made() && p.made == nil {
		go h.transformFirst(p, pl) // it reads the disk
		return
	}
	if len(p.event.Payload) > shapeAside || len(p.jobs) > 1 {
		go h.shapeNow(p, pl)
		return
	}
	h.shapeNow(p, pl)
}

func (h *Host) shapeNow(p *pending, pl *plan) {
	p.Answer = pl.shape.Batched()
	switch {
	case p.Answer:
		p.Content = h.shapes.Together(p.events(), pl.shape)
	case pl.shape.Made():
		p.Content = h.shapes.Made(p.event, p.made, pl.shape)
	default:
		p.Content = wire.ContentOf(p.event, h.shapes.Get(p.event, pl.shape))
	}
	p.shaped = true
	h.submit(p, pl)
}

// restart has p begin anew, with whatever plan there is by then; it keeps its time and nonce. An ownership
// check, or a try, has no other plan than its own.
func (h *Host) restart(p *pending) {
	if p.Ownership || p.tried {
		h.unspent(p, "the plugin was restarted meanwhile")
		return
	}
	p.plan, p.stage, p.Headers, p.setBy, p.URI = nil, 0, nil, nil, ""
	p.Content, p.shaped, p.Answer = wire.ContentOf(p.event, nil), false, false
	p.told = wire.Timings{}
	p.traced.Sent(time.Time{})
	h.prepare(p)
}

// prepare lets p wait for its plan, and makes it if nobody does.
func (h *Host) prepare(p *pending) {
	uid := p.sub.UID
	s := h.plans.shard(uid)
	s.mu.Lock()
	if pl := s.plans[uid]; pl.usable(p.sub) {
		s.mu.Unlock()
		h.submit(p, pl)
		return
	}
	m := s.making[uid]
	if m != nil {
		m.waiting = append(m.waiting, p)
		s.mu.Unlock()
		return
	}
	if s.making == nil {
		s.making, s.plans = map[[16]byte]*making{}, map[[16]byte]*plan{}
	}
	m = &making{waiting: []*pending{p}}
	s.making[uid] = m
	s.mu.Unlock()
	go h.makePlan(s, uid, m, p.sub)
}

// makePlan runs until its plan is made or cannot be, then lets go of all that wait for it. It needs no
// watching: every call in it is bounded, and it ends with what it calls.
func (h *Host) makePlan(s *planShard, uid [16]byte, m *making, sub *subscription.Subscription) {
	for {
		pl, err := h.configure(sub)
		s.mu.Lock()
		newest := sub
		for _, p := range m.waiting {
			if p.sub.Revision > newest.Revision {
				newest = p.sub
			}
		}
		if err == nil && (m.stale || newest != sub && newest.Revision > sub.Revision) {
			m.stale = false
			s.mu.Unlock()
			h.retire(pl)
			sub = newest
			continue
		}
		waiting := m.waiting
		delete(s.making, uid)
		old := s.plans[uid]
		if err == nil {
			pl.used.Store(time.Now().UnixNano())
			s.plans[uid] = pl
		}
		s.mu.Unlock()
		if err == nil {
			h.retire(old)
		}
		for _, p := range waiting {
			if err != nil {
				h.park(p)
			} else {
				h.submit(p, pl)
			}
		}
		return
	}
}

// binding is one plugin binding of a subscription, resolved.
type binding struct {
	role   string // transport, signer or transformer
	id     string // unique in the subscription
	kind   *kind
	conn   *conn
	config []byte
	slots  map[string]string
}

// configure has the processes take the subscription's instances. An error means that a process is not
// there; a refusal is a plan.
func (h *Host) configure(sub *subscription.Subscription) (*plan, error) {
	message := sub.Proto()
	transport, err := h.resolve("transport", transportID(&h.kinds, message), message.GetTransport())
	if err != nil {
		return nil, err
	}
	var bindings []*binding
	here := 0 // bindings from this one on live in the transport's process
	for i, pb := range check.Signers(message) {
		signer, err := h.resolve("signer", check.SignerID(pb), pb)
		if err != nil {
			return nil, err
		}
		signer.id += strconv.Itoa(i)
		bindings = append(bindings, signer)
		if signer.conn != transport.conn {
			here = i + 1
		}
	}
	all := append(bindings, transport)
	var transformer *binding
	if pb := message.GetTransformer(); pb != nil {
		transformer, err = h.resolve("transformer", check.TransformerID(pb), pb)
		switch {
		case err == nil:
			all = append(all, transformer)
		case !errors.Is(err, ErrUnavailable):
			return nil, err
		}
	}
	pl := h.newPlan(sub, message, transport)
	if pl.shape.Batched() && !transport.kind.Proto.GetTransport().GetBatches() {
		pl.refusal, pl.until = check.NoBatches(transport.kind.Kind), time.Now().Add(refusalAge)
		return pl, nil
	}
	for i, b := range all {
		ref, err := h.configureOne(pl, sub, message, b)
		var refused *refusedError
		switch {
		case errors.As(err, &refused):
			h.retire(pl)
			return &plan{
				uid: sub.UID, revision: sub.Revision, refusal: refused.why,
				until: time.Now().Add(refusalAge), secrets: pl.secrets,
			}, nil
		case err != nil:
			h.retire(pl)
			return nil, err
		case b == transport:
			pl.ref = ref
			continue
		case b == transformer:
			pl.transformer = &hop{conn: b.conn, ref: ref, id: b.kind.ID}
			continue
		case i >= here:
			pl.local = append(pl.local, ref)
		default:
			pl.remote = append(pl.remote, hop{conn: b.conn, ref: ref, id: b.kind.ID})
		}
		pl.signed = append(pl.signed, b.kind.Emits()...)
	}
	return pl, nil
}

// newPlan is a plan without instances yet. message is the subscription's.
func (h *Host) newPlan(sub *subscription.Subscription, message *grapnelv1.Subscription, transport *binding) *plan {
	pl := &plan{
		uid: sub.UID, revision: sub.Revision, transport: transport.conn, uri: message.GetUri(),
		timeout: sub.AttemptTimeout, grace: h.timing.grace, shape: wire.ShapeOf(message), headers: eventHeadersOf(message),
		maxBody: int(transport.kind.Proto.GetTransport().GetMaxBodyBytes()),
	}
	if pl.timeout <= 0 {
		pl.timeout = 15 * time.Second
	}
	return pl
}

func (h *Host) resolve(role, id string, pb *grapnelv1.PluginBinding) (*binding, error) {
	k := h.kinds.get(id)
	if k == nil {
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, id)
	}
	c := k.proc.conn.Load()
	if c == nil || (role == "transport" && c.attempts == nil) || (role == "signer" && c.signs == nil) || (role == "transformer" && c.transforms == nil) {
		return nil, fmt.Errorf("%w: %s", ErrUnavailable, id)
	}
	b := &binding{role: role, id: role, kind: k, conn: c, slots: pb.GetSecrets()}
	if pb.GetConfig() != nil {
		var err error
		if b.config, err = pb.GetConfig().MarshalJSON(); err != nil {
			return nil, fmt.Errorf("marshal config: %w", err)
		}
	}
	return b, nil
}

type refusedError struct{ why string }

func (e *refusedError) Error() string { return e.why }

func (h *Host) configureOne(pl *plan, sub *subscription.Subscription, message *grapnelv1.Subscription, b *binding) (uint32, error) {
	in := &pluginv1.Instance{
		Id: instanceID(sub, b.id), Generation: h.generation.Add(1), Ref: b.conn.nextRef(),
		Kind: b.kind.ID, Tenant: sub.Namespace, ConfigJson: b.config, Target: targetOf(message),
		MaxInFlight: uint32(max(0, sub.MaxInFlight)), Secrets: map[string]*pluginv1.SecretVersions{},
	}
	for slot, name := range b.slots {
		pl.secrets = append(pl.secrets, name)
		versions, ok := h.opts.Secrets(name)
		if !ok || len(versions) == 0 {
			return 0, &refusedError{fmt.Sprintf("%s plugin %s: secret %s has no live version", b.role, b.kind.ID, name)}
		}
		in.Secrets[slot] = secretVersions(versions)
		for _, v := range versions {
			pl.own.Add(string(v.Value))
		}
	}
	release, taken := b.conn.secrets.hold(in), false
	defer func() {
		if !taken {
			b.conn.forget(release)
		}
	}()
	ctx, cancel := context.WithTimeout(b.conn.ctx, h.timing.call)
	defer cancel()
	resp, err := b.conn.plugin.Configure(ctx, &pluginv1.ConfigureRequest{Instances: []*pluginv1.Instance{in}})
	if err != nil {
		return 0, fmt.Errorf("configure %s: %s", b.kind.ID, redact.Line(&pl.own, err.Error(), maxSaid))
	}
	if len(resp.GetStatuses()) != 1 || resp.GetStatuses()[0].GetRef() != in.GetRef() {
		return 0, &refusedError{fmt.Sprintf("%s plugin %s did not say whether it takes the config", b.role, b.kind.ID)}
	}
	for _, d := range resp.GetStatuses()[0].GetDiagnostics() {
		if d.GetSeverity() != pluginv1.Diagnostic_SEVERITY_WARNING {
			return 0, &refusedError{fmt.Sprintf("%s plugin %s refused its config: %s", b.role, b.kind.ID, redact.Line(&pl.own, d.GetSummary(), maxSaid))}
		}
	}
	pl.refs = append(pl.refs, retired{conn: b.conn, ref: in.GetRef(), release: release})
	taken = true
	return in.GetRef(), nil
}

func secretVersions(versions []SecretVersion) *pluginv1.SecretVersions {
	out := &pluginv1.SecretVersions{}
	for _, v := range versions {
		pv := &pluginv1.SecretVersion{Version: int32(v.Number), Value: v.Value}
		if !v.Expire.IsZero() {
			pv.ExpireTime = timestamppb.New(v.Expire)
		}
		out.Versions = append(out.Versions, pv)
	}
	return out
}

// targetOf is where requests go. Static headers never replace what identifies a message or says how to read
// a body that is not the payload as it is.
func targetOf(sub *grapnelv1.Subscription) *pluginv1.Target {
	t := &pluginv1.Target{Method: "POST", Uri: sub.GetUri()}
	if method := sub.GetTransport().GetConfig().GetFields()["method"].GetStringValue(); method != "" {
		t.Method = method
	}
	made := wire.ShapeOf(sub) != wire.Shape{}
	for _, name := range slices.Sorted(maps.Keys(sub.GetHeaders())) {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "webhook-") || strings.HasPrefix(lower, "ce-") ||
			made && (lower == "content-type" || lower == "content-encoding") {
			continue
		}
		t.Headers = append(t.Headers, &pluginv1.Header{Name: lower, Value: sub.GetHeaders()[name]})
	}
	return t
}

// transportID is the transport that the subscription names, else the default one for its scheme, else
// the scheme itself, for the message that there is none.
func transportID(kinds *kindTable, sub *grapnelv1.Subscription) string {
	if id := strings.TrimPrefix(sub.GetTransport().GetPlugin(), "plugins/"); id != "" {
		return id
	}
	u, err := url.Parse(sub.GetUri())
	if err != nil {
		return ""
	}
	return kinds.byScheme(strings.ToLower(u.Scheme))
}
