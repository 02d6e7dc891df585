package server

import (
	"fmt"
	"strings"
	"time"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/dispatch"
	"github.com/grapnel/grapnel/server/ingest"
	"github.com/grapnel/grapnel/server/notice"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

// tellingAtEnd bounds how long a stop waits for operational events to be stored.
const tellingAtEnd = time.Second

// incidentTypes are the types of the operational events that are made of incidents.
var incidentTypes = map[dispatch.IncidentKind]notice.Type{
	dispatch.Failing:   notice.SubscriptionFailing,
	dispatch.Recovered: notice.SubscriptionRecovered,
	dispatch.Disabled:  notice.SubscriptionDisabled,
	dispatch.GivenUp:   notice.DeliveryExhausted,
}

// tellIncident makes an operational event of what has happened in a lane.
func (s *Server) tellIncident(in dispatch.Incident) {
	sub := in.Subscription
	ns, is := delivery.UID(sub.NamespaceUID).NamespaceKey(), incidentTypes[in.Kind]
	if !s.notices.Listens(ns, is) {
		return
	}
	n := notice.Notice{Namespace: ns, Type: is, Subject: sub.Name(), Time: time.Now()}
	state := &notice.State{Subscription: n.Subject, Reason: in.Reason, FailingSince: in.FailingSince, DisableTime: in.DisableTime}
	switch n.Data = state; in.Kind {
	case dispatch.Failing:
		state.LastOutcome, state.LastResponseCode = short(grapnelv1.Attempt_Outcome(in.Outcome).String(), "OUTCOME_"), in.ResponseCode
	case dispatch.GivenUp:
		n.Data = &notice.Exhausted{
			Subscription: n.Subject, Count: 1, FirstTime: in.Time, LastTime: in.Time,
			Deliveries: []notice.Ended{{ID: in.Delivery, State: short(grapnelv1.Delivery_State(in.State).String(), "STATE_"), Reason: in.Reason}},
		}
	}
	s.notices.Tell(n)
}

// short is an enum's value without what all of its values begin with.
func short(value, prefix string) string { return strings.TrimPrefix(value, prefix) }

func (s *Server) tellReplay(r *delivery.Replay) {
	ns := s.registry.Snapshot().NamespaceByKey(uint64(r.Namespace))
	if ns == nil {
		return
	}
	name := "namespaces/" + ns.ID + "/replayJobs/" + r.ID
	s.notices.Tell(notice.Notice{
		Namespace: r.Namespace, Type: notice.ReplayDone, Subject: name, ID: fmt.Sprintf("replay-done-%x", r.Key), Time: r.DoneTime,
		Data: &notice.Replay{
			ReplayJob: name, State: short(grapnelv1.ReplayJob_State(r.State).String(), "STATE_"), Reason: r.Reason,
			CreatedCount: r.Counts.Created, SkippedCount: r.Counts.Skipped, CreateTime: r.CreateTime, CompleteTime: r.DoneTime,
		},
	})
}

func (s *Server) tellPlugin(f pluginhost.Failure) (heard bool) {
	name := "plugins/" + f.Plugin
	return s.notices.TellSystem(notice.Notice{Type: notice.PluginFailed, Subject: name, Time: f.Time, Data: &notice.Plugin{
		Plugin: name, Version: f.Version, CrashCount: f.Crashes, Reason: f.Reason, RetryTime: f.RetryTime,
	}})
}

func (s *Server) tellExpiring(e secret.Expiring) (done bool) {
	ns := s.registry.Snapshot().Namespace(e.Namespace)
	if ns == nil {
		return false
	}
	key, name := delivery.UID(ns.UID).NamespaceKey(), "namespaces/"+e.Namespace+"/secrets/"+e.ID
	return !s.notices.Listens(key, notice.SecretExpiring) || s.notices.Tell(notice.Notice{
		Namespace: key, Type: notice.SecretExpiring, Subject: name,
		ID: fmt.Sprintf("secret-expiring-%s-%d-%d", e.ID, e.Version, e.ExpireTime.Unix()), Time: time.Now(),
		Data: &notice.Secret{Secret: name, Version: e.Version, ExpireTime: e.ExpireTime},
	})
}

func (s *Server) tellNear(n ingest.Near) {
	s.tellQuota(n.Namespace, n.Quota, n.Used, n.Limit, n.Time)
}

func (s *Server) tellQuota(ns *subscription.Namespace, quota string, used, limit int64, now time.Time) {
	name := "namespaces/" + ns.ID
	s.notices.Tell(notice.Notice{
		Namespace: delivery.UID(ns.UID).NamespaceKey(), Type: notice.QuotaNear, Subject: name, Time: now,
		Data: &notice.Quota{Resource: name, Quota: quota, Used: used, Limit: limit},
	})
}

// tellCrowded tells namespaces of which four fifths of max_subscriptions have just been used.
func (s *Server) tellCrowded(changes []subscription.Change) {
	var made map[string]int64
	for _, c := range changes {
		if c.New != nil && c.Old == nil {
			if made == nil {
				made = make(map[string]int64)
			}
			made[c.New.Namespace]++
		}
	}
	snapshot := s.registry.Snapshot()
	for id, n := range made {
		ns := snapshot.Namespace(id)
		if ns == nil || !snapshot.Listens(id) {
			continue
		}
		limit, used := int64(ns.Quota().MaxSubscriptions), int64(snapshot.Count(id))
		if near := limit - limit/5; limit > 0 && used >= near && used-n < near {
			s.tellQuota(ns, "max_subscriptions", used, limit, time.Now())
		}
	}
}

// node is the full name of this one.
func (s *Server) node() string { return "nodes/" + s.options.NodeName }

func (s *Server) tellConfigStore(used, quota int64) (heard bool) {
	return s.notices.TellSystem(notice.Notice{Type: notice.QuotaNear, Subject: s.node(), Time: time.Now(), Data: &notice.Quota{
		Resource: s.node(), Quota: "etcd-quota", Used: used, Limit: quota,
	}})
}

func (s *Server) tellFilling(free, watermark uint64) (heard bool) {
	return s.notices.TellSystem(notice.Notice{Type: notice.DiskFilling, Subject: s.node(), Time: time.Now(), Data: &notice.Disk{
		Node: s.node(), FreeBytes: free, MinFreeBytes: watermark,
	}})
}
