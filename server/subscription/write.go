package subscription

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
)

const (
	maxConcurrentCreates = 64
	// quotaMargin is how close to the quota creates begin to exclude each other: more than four servers have
	// under way at once. With more of them the quota may be overrun by maxConcurrentCreates for each.
	quotaMargin = 4 * maxConcurrentCreates
	// nearLocks is how many namespaces at most make their last subscriptions at the same time.
	nearLocks = 64
	maxReason = 256
	// maxStrayRefs bounds a search that only a damaged value asks for.
	maxStrayRefs = 100_000
)

// newID makes an ID for a caller who gave none.
func newID() string { return "s-" + strings.ToLower(rand.Text()[:20]) }

// CreateSubscription stores a new subscription; an empty id lets the server pick one. Of p, output only
// fields are ignored. Errors: *InvalidError, ErrExists, *QuotaError, ErrNamespaceDeleted, ErrUnavailable,
// and *NotFoundError for the namespace or a secret.
func (r *Registry) CreateSubscription(ctx context.Context, ns, id string, p *grapnelv1.Subscription, o CreateOptions) (*Subscription, error) {
	req, err := newRequest(ns, id, p, o)
	if err != nil {
		return nil, err
	}
	if id == "" {
		id = newID()
	}
	if err := checkIDs("parent", ns, "subscription_id", id); err != nil {
		return nil, err
	}
	w := &writing{
		registry: r, ns: ns, id: id, create: true, only: o.ValidateOnly, request: req, approve: o.Approve,
		state: o.State, reason: oneLine(o.StateReason),
	}
	return w.run(ctx, func(_ *Namespace, it keyspace.Item) (*grapnelv1.Subscription, error) {
		if it.Revision != 0 && !r.lost(it) {
			return nil, fmt.Errorf("%s %w", it.Key, ErrExists)
		}
		return p, nil
	})
}

// UpdateSubscription lets mutate change a copy of what is stored; output only fields that it changes are
// put back, and defaults are filled in again where it cleared them. mutate may run several times: the
// update is repeated until nobody was faster, unless an etag was given, which must then be current
// (*EtagError). Other errors as for CreateSubscription.
func (r *Registry) UpdateSubscription(ctx context.Context, ns, id, etag string, mutate func(*grapnelv1.Subscription) error, o UpdateOptions) (*Subscription, error) {
	if err := checkIDs("subscription.name", ns, "subscription.name", id); err != nil {
		return nil, err
	}
	w := &writing{registry: r, ns: ns, id: id, only: o.ValidateOnly, approve: o.Approve}
	return w.run(ctx, func(_ *Namespace, it keyspace.Item) (*grapnelv1.Subscription, error) {
		if it.Revision == 0 || r.lost(it) && o.AllowMissing {
			if !o.AllowMissing || etag != "" {
				return nil, &NotFoundError{Name: it.Key}
			}
			p := &grapnelv1.Subscription{Name: it.Key}
			return p, mutate(p)
		}
		old, err := r.subscription(it)
		if err != nil {
			return nil, err
		}
		if err := checkEtag(etag, it); err != nil {
			return nil, err
		}
		p := old.Proto()
		return p, mutate(p)
	})
}

// SetState pauses, resumes or disables a subscription. With a uid that is not zero it is no caller's change, and
// returns a *NotFoundError when the name has been given to another subscription since.
func (r *Registry) SetState(ctx context.Context, ns, id string, uid [16]byte, state grapnelv1.Subscription_State, reason string) (*Subscription, error) {
	return r.setState(ctx, ns, id, uid, "", state, reason)
}

// SetStateAt is SetState of the version that has the etag; an empty one is that of any. Errors also: *EtagError.
func (r *Registry) SetStateAt(ctx context.Context, ns, id, etag string, state grapnelv1.Subscription_State, reason string) (*Subscription, error) {
	return r.setState(ctx, ns, id, [16]byte{}, etag, state, reason)
}

func (r *Registry) setState(ctx context.Context, ns, id string, uid [16]byte, etag string, state grapnelv1.Subscription_State, reason string) (*Subscription, error) {
	if err := checkIDs("name", ns, "name", id); err != nil {
		return nil, err
	}
	var out *Subscription
	name := subscriptionName(ns, id)
	revision, err := r.space.Edit(ctx, []string{namespaceName(ns), name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		if _, err := r.activeNamespace(items[0]); err != nil {
			return keyspace.Txn{}, err
		}
		old, err := r.subscription(items[1])
		if err != nil {
			return keyspace.Txn{}, err
		}
		if uid != [16]byte{} && uid != old.UID {
			return keyspace.Txn{}, &NotFoundError{Name: name}
		}
		if err := checkEtag(etag, items[1]); err != nil {
			return keyspace.Txn{}, err
		}
		out = old
		p := old.Proto()
		if p.State == state && p.StateReason == oneLine(reason) {
			return keyspace.Txn{}, nil
		}
		p.State, p.StateReason = state, oneLine(reason)
		if uid == [16]byte{} {
			p.UpdateTime = timestamppb.Now()
		}
		if out, err = compile(p, ns, id, old.UID, old.condition, nil); err != nil {
			return keyspace.Txn{}, err
		}
		return r.putSubscription(p)
	})
	return stored(out, revision, err)
}

// DeleteSubscription removes a subscription, leaves its tombstone, and returns what it was. It works in a deleted
// namespace, too. Unless nil, dooms is told which one it will be before anybody can see it gone, and again when the name
// has become another's meanwhile; it must not block.
func (r *Registry) DeleteSubscription(ctx context.Context, ns, id, etag string, dooms func(*Namespace, *Subscription)) (*Subscription, error) {
	if err := checkIDs("name", ns, "name", id); err != nil {
		return nil, err
	}
	var old *Subscription
	name := subscriptionName(ns, id)
	_, err := r.space.Edit(ctx, []string{namespaceName(ns), name}, func(items []keyspace.Item) (keyspace.Txn, error) {
		n, err := r.namespace(items[0])
		if err != nil {
			return keyspace.Txn{}, err
		}
		if old, err = r.subscription(items[1]); err != nil {
			return keyspace.Txn{}, err
		}
		if err := checkEtag(etag, items[1]); err != nil {
			return keyspace.Txn{}, err
		}
		if dooms != nil {
			dooms(n, old)
		}
		grave, err := r.tombstone(Tombstone{UID: old.UID, Name: name, NamespaceUID: n.UID})
		if err != nil {
			return keyspace.Txn{}, err
		}
		ops := []keyspace.Write{grave, keyspace.Delete(name)}
		for secretName := range secretFields(old.Proto()) {
			ops = append(ops, keyspace.Delete(refKey(secretName, name)))
		}
		return keyspace.Txn{Then: ops}, nil
	})
	if err != nil {
		return nil, err
	}
	return old, nil
}

// writing is one call of CreateSubscription or UpdateSubscription.
type writing struct {
	registry *Registry
	ns, id   string
	// create: it is CreateSubscription.
	create, only bool
	request      *request
	approve      Approve
	// state and reason are those of a subscription that is made; 0 is ACTIVE.
	state  grapnelv1.Subscription_State
	reason string

	out *Subscription
	// approved is what approve has said yes to; asked is what it is to be asked about next.
	approved, asked *grapnelv1.Subscription
	slot            bool
	// near is the lock held by one that is near the quota.
	near chan struct{}
}

// errAsk ends a plan that approve has to be asked about first.
var errAsk = fmt.Errorf("to be approved: %w", keyspace.ErrUnread)

// maxAsked bounds how often one write asks: each time somebody else's change has come between.
const maxAsked = 5

// run stores what change makes of the subscription. A plan that needs to be approved is left, asked about
// while nothing is held and no time of the store is running, and made anew.
func (w *writing) run(ctx context.Context, change func(*Namespace, keyspace.Item) (*grapnelv1.Subscription, error)) (*Subscription, error) {
	for try := 1; ; try++ {
		out, err := w.attempt(ctx, change)
		if !errors.Is(err, errAsk) {
			return out, err
		}
		if try > maxAsked {
			return nil, &EtagError{Name: subscriptionName(w.ns, w.id), Current: w.asked.Etag}
		}
		if err := w.approve(ctx, w.asked); err != nil {
			return nil, err
		}
		w.approved = w.asked
	}
}

func (w *writing) attempt(ctx context.Context, change func(*Namespace, keyspace.Item) (*grapnelv1.Subscription, error)) (*Subscription, error) {
	r := w.registry
	ctx, cancel := r.space.Bound(ctx)
	defer cancel()
	defer w.release()
	keys := []string{namespaceName(w.ns), subscriptionName(w.ns, w.id), quotaKey(w.ns)}
	if w.request != nil {
		keys = append(keys, w.request.key)
	}
	revision, err := r.space.EditFrom(ctx, keys, w.believed(keys), func(items []keyspace.Item) (keyspace.Txn, error) {
		n, err := r.activeNamespace(items[0])
		if err != nil {
			return keyspace.Txn{}, err
		}
		if w.request != nil && items[3].Revision != 0 {
			made, err := r.made(items[3])
			if err != nil {
				return keyspace.Txn{}, err
			}
			now, err := r.current(ctx, made, items[1])
			if err != nil {
				return keyspace.Txn{}, err
			}
			if now != nil {
				w.out = now
				return keyspace.Txn{}, w.request.sameAs(items[3])
			}
			// What the request made has been deleted, and so is the memory of it.
		}
		p, err := change(n, items[1])
		if err != nil {
			return keyspace.Txn{}, err
		}
		return w.plan(ctx, n, items[1], items[2], p)
	})
	if w.request != nil && errors.Is(err, ErrUnavailable) {
		r.leases.lost.Store(true)
	}
	return stored(w.out, revision, err)
}

// believed is what would be read of the keys, as a rule, for something new; nil when that is not known, or etcd seems to be
// away: nobody's target is to be asked then.
func (w *writing) believed(keys []string) []keyspace.Item {
	snapshot := w.registry.Snapshot()
	n := snapshot.Namespace(w.ns)
	switch {
	case !w.create || w.only || !w.registry.Healthy() || n == nil || n.Deleted() || snapshot.Subscription(w.ns, w.id) != nil:
		return nil
	case w.request != nil && w.approve != nil && w.approved == nil: // one that was answered before is not to be asked about
		return nil
	}
	value, err := n.value()
	if err != nil {
		return nil
	}
	items := make([]keyspace.Item, len(keys))
	for i, key := range keys {
		items[i].Key = key
	}
	items[0].Value, items[0].Revision = value, n.Revision
	items[2].Unread = true
	return items
}

// plan checks the new content in all ways and makes the transaction.
func (w *writing) plan(ctx context.Context, n *Namespace, it, counted keyspace.Item, content *grapnelv1.Subscription) (keyspace.Txn, error) {
	r := w.registry
	var old *Subscription
	if it.Revision != 0 && !r.lost(it) {
		var err error
		if old, err = r.subscription(it); err != nil {
			return keyspace.Txn{}, err
		}
	}
	p, uid := w.withOutput(content, it.Key, old)
	fillDefaults(p)
	cond, err := validate(p, w.ns, r.conditions)
	if err != nil {
		return keyspace.Txn{}, err
	}
	if old != nil && it.Err == nil && sameContent(p, old.Proto()) {
		w.out = old
		return keyspace.Txn{}, nil
	}
	p.UpdateTime = timestamppb.Now()
	secrets := secretFields(p)
	if err := r.secretsExist(ctx, secrets); err != nil {
		return keyspace.Txn{}, err
	}
	if err := r.deadLetterFits(old, p); err != nil {
		return keyspace.Txn{}, err
	}
	near, conds := false, []keyspace.Cond(nil)
	if old == nil {
		if near, conds, err = w.admit(ctx, n, counted); err != nil {
			return keyspace.Txn{}, err
		}
	}
	if w.mustAsk(old, p) {
		w.asked = proto.CloneOf(p)
		w.asked.Etag = etag(it.Revision)
		return keyspace.Txn{}, errAsk
	}
	if w.out, err = compile(p, w.ns, w.id, uid, cond, nil); err != nil || w.only {
		return keyspace.Txn{}, err
	}
	txn, err := r.putSubscription(p)
	if err != nil {
		return keyspace.Txn{}, err
	}
	txn.If = conds
	r.refer(&txn, it.Key, old, secrets)
	if r.lost(it) {
		if err := r.unrefer(ctx, &txn, w.ns, it.Key, secrets); err != nil {
			return keyspace.Txn{}, err
		}
	}
	if w.slot {
		txn.Then = append(txn.Then, keyspace.Put(quotaKey(w.ns), nil))
	}
	if !near {
		txn.Loose = []string{quotaKey(w.ns)}
	}
	if w.request != nil {
		err = r.remember(ctx, w.request, p, &txn)
	}
	return txn, err
}

// deadLetterFits refuses a dead_letter that is new and leads nowhere, on to another one, or on from one. The snapshot is
// asked: what comes to pass at the same time is met when a delivery ends, of which a dead letter is made once at most.
func (r *Registry) deadLetterFits(old *Subscription, p *grapnelv1.Subscription) error {
	if p.DeadLetter == "" || old != nil && old.DeadLetter == p.DeadLetter {
		return nil
	}
	ns, _, id, _ := splitName(p.DeadLetter)
	_, _, own, _ := splitName(p.Name)
	var c checker
	snapshot := r.Snapshot()
	switch to, from := snapshot.Subscription(ns, id), snapshot.LettersTo(ns, own); {
	case to == nil:
		c.add("subscription.dead_letter", "dead_letter.exists", "there is no %s; make it first", p.DeadLetter)
	case to.DeadLetter != "":
		c.add("subscription.dead_letter", "dead_letter.loop", "%s has a dead_letter itself, %s; what ends there goes nowhere: want one without", p.DeadLetter, to.DeadLetter)
	case from != nil:
		c.add("subscription.dead_letter", "dead_letter.loop", "%s is the dead_letter of %s itself; what ends there goes nowhere: want none", p.Name, from.Name())
	}
	return c.err()
}

// mustAsk reports whether approve has a say in p and has not said yes to the same.
func (w *writing) mustAsk(old *Subscription, p *grapnelv1.Subscription) bool {
	if w.approve == nil || w.only {
		return false
	}
	return (old == nil || !sameTarget(old.Proto(), p)) && (w.approved == nil || !sameTarget(w.approved, p))
}

// sameTarget reports whether who has agreed to a has agreed to b.
func sameTarget(a, b *grapnelv1.Subscription) bool {
	rate := func(p *grapnelv1.Subscription) float64 {
		if p.MaxRate == 0 {
			return math.Inf(1)
		}
		return p.MaxRate
	}
	return a.Uri == b.Uri && proto.Equal(a.Transport, b.Transport) && rate(b) <= rate(a)
}

// admit checks the quota, where there is one, by counting what the snapshot shows. Each create under a quota
// writes the quota's key, so that the snapshot shows all of them once it has come to the revision at which
// that was written last, and what is missing is under way now. Far from the quota creates run side by side;
// near it each one that lands makes those of other servers beside it fail and count again.
func (w *writing) admit(ctx context.Context, n *Namespace, counted keyspace.Item) (near bool, conds []keyspace.Cond, err error) {
	r := w.registry
	limit := n.Quota().MaxSubscriptions
	if limit == 0 {
		return false, nil, nil
	}
	if !w.slot {
		if err := acquire(ctx, r.creates); err != nil {
			return false, nil, err
		}
		w.slot = true
	}
	// Before the namespace was written last there may have been no quota.
	if err := r.space.Wait(ctx, max(counted.Revision, n.Revision)); err != nil {
		return false, nil, err
	}
	snapshot := r.Snapshot()
	count := snapshot.Count(w.ns)
	switch {
	case counted.Unread && count+2*quotaMargin >= limit:
		return false, nil, errNear
	case counted.Unread: // each create takes a revision, so that few more have been made than are shown
		return false, []keyspace.Cond{keyspace.NotSince(counted.Key, snapshot.Revision()+quotaMargin)}, nil
	case count >= limit:
		return false, nil, &QuotaError{Namespace: w.ns, Quota: "max_subscriptions", Limit: limit}
	case count+quotaMargin < limit:
		return false, nil, nil
	}
	if w.near == nil {
		lock := r.near[crc32.ChecksumIEEE([]byte(w.ns))%nearLocks]
		if err := acquire(ctx, lock); err != nil {
			return false, nil, err
		}
		w.near = lock
	}
	return true, nil, nil
}

// errNear ends a plan that has to know when the last one was created.
var errNear = errors.New("near the quota")

func (w *writing) release() {
	if w.slot {
		<-w.registry.creates
	}
	if w.near != nil {
		<-w.near
	}
	w.slot, w.near = false, nil
}

// acquire takes a place in a channel used as a semaphore.
func acquire(ctx context.Context, sem chan struct{}) error {
	select {
	case sem <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// withOutput returns a copy of content with the output only fields of what is stored, or new ones.
func (w *writing) withOutput(content *grapnelv1.Subscription, name string, old *Subscription) (*grapnelv1.Subscription, uuid.UUID) {
	p := proto.CloneOf(content)
	if p == nil {
		p = &grapnelv1.Subscription{}
	}
	p.Name, p.Etag = name, ""
	if old != nil {
		was := old.Proto()
		p.Uid, p.State, p.StateReason = was.Uid, was.State, was.StateReason
		p.CreateTime, p.UpdateTime = was.CreateTime, was.UpdateTime
		return p, old.UID
	}
	uid := w.registry.newUID()
	p.Uid, p.State, p.StateReason = uid.String(), cmp.Or(w.state, grapnelv1.Subscription_STATE_ACTIVE), w.reason
	p.CreateTime = timestamppb.Now()
	return p, uid
}

// newUID draws a uid whose key nobody has, nor had for as long as anything knows of it.
func (r *Registry) newUID() uuid.UUID {
	return drawUID(uuid.New, r.Snapshot().taken)
}

func drawUID(draw func() uuid.UUID, taken func(uint64) bool) uuid.UUID {
	for {
		if uid := draw(); !taken(UIDKey(uid)) {
			return uid
		}
	}
}

// sameContent reports whether an update changes nothing.
func sameContent(p, old *grapnelv1.Subscription) bool {
	old.Etag = ""
	return proto.Equal(p, old)
}

// secretFields maps the names of secrets that a subscription refers to, to the fields that do.
func secretFields(p *grapnelv1.Subscription) map[string]string {
	out := make(map[string]string)
	collect := func(field string, b *grapnelv1.PluginBinding) {
		for _, slot := range sortedKeys(b.GetSecrets()) {
			out[b.Secrets[slot]] = fmt.Sprintf("%s.secrets[%q]", field, slot)
		}
	}
	collect("subscription.transport", p.Transport)
	collect("subscription.transformer", p.Transformer)
	for i, s := range p.Signers {
		collect(fmt.Sprintf("subscription.signers[%d]", i), s)
	}
	return out
}

func (r *Registry) secretsExist(ctx context.Context, fields map[string]string) error {
	names := slices.Sorted(maps.Keys(fields))
	keys := make([]string, len(names))
	for i, name := range names {
		keys[i] = secretKey(name)
	}
	missing, err := r.space.Missing(ctx, keys...)
	if err != nil || len(missing) == 0 {
		return err
	}
	name := names[slices.Index(keys, missing[0])]
	return &NotFoundError{Name: name, Field: fields[name]}
}

// refer keeps the reference keys in step, on condition that the secrets still exist: deleting a secret
// asks for the opposite, so that one of the two fails.
func (r *Registry) refer(txn *keyspace.Txn, name string, old *Subscription, secrets map[string]string) {
	before := map[string]string{}
	if old != nil {
		before = secretFields(old.Proto())
	}
	for _, secretName := range slices.Sorted(maps.Keys(secrets)) {
		txn.If = append(txn.If, keyspace.Exists(secretKey(secretName)))
		if _, ok := before[secretName]; !ok {
			txn.Then = append(txn.Then, keyspace.Put(refKey(secretName, name), nil))
		}
	}
	for _, secretName := range slices.Sorted(maps.Keys(before)) {
		if _, ok := secrets[secretName]; !ok {
			txn.Then = append(txn.Then, keyspace.Delete(refKey(secretName, name)))
		}
	}
}

// unrefer removes the references of a subscription that nobody knows any more, but for those it has again.
func (r *Registry) unrefer(ctx context.Context, txn *keyspace.Txn, ns, name string, secrets map[string]string) error {
	keys, _, err := r.space.Below(ctx, refKey(namespaceName(ns), ""), maxStrayRefs)
	for _, key := range keys {
		secretName, ok := strings.CutSuffix(strings.TrimPrefix(key, "refs/"), "/"+name)
		if _, again := secrets[secretName]; ok && !again {
			txn.Then = append(txn.Then, keyspace.Delete(key))
		}
	}
	return err
}

// putSubscription makes the transaction that stores a message, without its etag, which is not known yet.
func (r *Registry) putSubscription(p *grapnelv1.Subscription) (keyspace.Txn, error) {
	p.Etag = ""
	value, err := marshal(p)
	if err != nil {
		return keyspace.Txn{}, err
	}
	return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(p.Name, value)}}, nil
}

// stored completes the result of a write with its revision; zero means that nothing was written.
func stored(s *Subscription, revision int64, err error) (*Subscription, error) {
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, errors.New("nothing was written")
	}
	if revision != 0 {
		s.Revision = revision
	}
	return s, nil
}

// oneLine makes a reason fit to be shown.
func oneLine(s string) string {
	s = strings.Map(func(c rune) rune {
		if unicode.IsControl(c) || c == utf8.RuneError {
			return ' '
		}
		return c
	}, s)
	if utf8.RuneCountInString(s) > maxReason {
		s = string([]rune(s)[:maxReason-1]) + "…"
	}
	return s
}
