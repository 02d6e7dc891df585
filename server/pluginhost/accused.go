package pluginhost

import (
	"encoding/hex"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/pluginhost/check"
	"github.com/grapnel/grapnel/server/subscription"
)

// A process may die of what a receiver sends on a connection that no attempt uses any more. The deliveries that brought
// the connection about are over by then, often well, so that looking at what was in flight would find others, or
// nobody. What a Go program says of its end bears the instance it was at work for; the subscription is accused from then
// on, and its attempts are made in wards, as those of suspects are.

const (
	// accusedFor is how long an accusation stands after the latest crash.
	accusedFor = time.Hour
	// accusedMost is how many accused subscriptions of one tenant make all of the tenant's accused.
	accusedMost = 3
)

// accused are the subscriptions that processes have died of.
type accused struct {
	any atomic.Bool // spares the lock while there are none

	mu      sync.Mutex // guards what follows
	subs    map[[16]byte]*charge
	tenants map[string]int // how many of subs are theirs
}

type charge struct {
	tenant  string
	crashes int
	latest  time.Time
}

// add accuses a subscription once more, and returns how often it has been.
func (a *accused) add(c culprit, now time.Time) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.expire(now)
	if a.subs == nil {
		a.subs, a.tenants = map[[16]byte]*charge{}, map[string]int{}
	}
	ch := a.subs[c.uid]
	if ch == nil {
		ch = &charge{tenant: c.tenant()}
		a.subs[c.uid] = ch
		a.tenants[ch.tenant]++
	}
	ch.crashes, ch.latest = ch.crashes+1, now
	a.any.Store(true)
	return ch.crashes
}

// of is how often a subscription has been accused: 0 for innocents.
func (a *accused) of(sub *subscription.Subscription) int {
	if !a.any.Load() {
		return 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.expire(time.Now())
	if ch := a.subs[sub.UID]; ch != nil {
		return ch.crashes
	}
	if a.tenants[sub.Namespace] >= accusedMost {
		return 1
	}
	return 0
}

// expire is called under the lock.
func (a *accused) expire(now time.Time) {
	for uid, ch := range a.subs {
		if now.Sub(ch.latest) < accusedFor {
			continue
		}
		delete(a.subs, uid)
		if a.tenants[ch.tenant]--; a.tenants[ch.tenant] == 0 {
			delete(a.tenants, ch.tenant)
		}
	}
	if len(a.subs) == 0 {
		a.any.Store(false)
	}
}

// culprit is whose instance a process has died of.
type culprit struct {
	uid  [16]byte
	name string // the subscription's
}

func (c culprit) tenant() string { return check.NamespaceOf(c.name) }

// instanceID is what an instance of a subscription is called towards its process.
func instanceID(sub *subscription.Subscription, binding string) string {
	return hex.EncodeToString(sub.UID[:]) + "/" + binding + "@" + sub.Name()
}

// culprit is for a process that has ended, by its own doing: whom its report names. It reports false when that is nobody.
func (c *conn) culprit() (culprit, bool) {
	if !c.ownDoing() {
		return culprit{}, false
	}
	id, name, _ := strings.Cut(c.out.Culprit(plugin.InstanceLabel), "@")
	uid, err := hex.DecodeString(strings.SplitN(id, "/", 2)[0])
	if err != nil || len(uid) != 16 {
		return culprit{}, false
	}
	return culprit{uid: [16]byte(uid), name: name}, true
}

// accuse has the attempts of a subscription made apart from now on.
func (c *conn) accuse(of culprit) {
	root := c.host
	if root.above != nil {
		root = root.above
	}
	crashes := root.accused.add(of, time.Now())
	c.log.Warn("the plugin died of what it was given by, or for, one subscription; its deliveries are tried apart from others",
		"subscription", of.name, "crashes", crashes)
}
