package api

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/api/filter"
	"github.com/grapnel/grapnel/server/delivery"
)

// maxAttemptsPage is the most attempts of one page, and of one delivery's usual life.
const maxAttemptsPage = 100

// GetDelivery reads one delivery.
func (s deliveryService) GetDelivery(_ context.Context, r *grapnelv1.GetDeliveryRequest) (*grapnelv1.GetDeliveryResponse, error) {
	ns, d, err := s.delivery("name", r.GetName())
	if err != nil {
		return nil, err
	}
	return &grapnelv1.GetDeliveryResponse{Delivery: s.deliveryProto(ns, d, s.inFlight(d))}, nil
}

// ListDeliveries reads one page, newest first. A page may be short, or empty, before the end.
func (s deliveryService) ListDeliveries(_ context.Context, r *grapnelv1.ListDeliveriesRequest) (*grapnelv1.ListDeliveriesResponse, error) {
	ns, space, err := s.existingNamespace("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := pageSize(r.GetPageSize())
	if err != nil {
		return nil, err
	}
	f, err := parseFilter(r.GetFilter(), deliveryFields(ns))
	if err != nil {
		return nil, err
	}
	query := []string{"ListDeliveries", r.GetParent(), r.GetFilter()}
	after, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	// Whether an attempt runs can change from one look to the next: it is looked up once per delivery, so
	// that what is shown is what the filter saw.
	running := map[delivery.ID]bool{}
	q := delivery.Query{Namespace: space, Limit: size, After: after}
	if !s.narrow(&q, ns, f) {
		return &grapnelv1.ListDeliveriesResponse{}, nil
	}
	q.Match = func(d *delivery.Delivery) bool {
		busy := s.inFlight(d)
		if !f.Match(shownDelivery{d, busy}) {
			return false
		}
		if busy {
			running[d.ID] = true
		}
		return true
	}
	page, err := s.Journal.Deliveries(q)
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	out := &grapnelv1.ListDeliveriesResponse{}
	var bytes pageBytes
	for i, d := range page.Deliveries {
		m := s.deliveryProto(ns, d, running[d.ID])
		if bytes.full(m) {
			page.Next = page.Deliveries[i-1].ID.String()
			break
		}
		out.Deliveries = append(out.Deliveries, m)
	}
	out.NextPageToken = s.pages.seal(page.Next, query...)
	return out, nil
}

// ListAttempts reads the attempts of one delivery, first to last.
func (s deliveryService) ListAttempts(_ context.Context, r *grapnelv1.ListAttemptsRequest) (*grapnelv1.ListAttemptsResponse, error) {
	_, d, err := s.delivery("parent", r.GetParent())
	if err != nil {
		return nil, err
	}
	size, err := boundedPageSize(r.GetPageSize(), maxAttemptsPage, maxAttemptsPage)
	if err != nil {
		return nil, err
	}
	query := []string{"ListAttempts", r.GetParent()}
	token, err := s.pages.open(r.GetPageToken(), query...)
	if err != nil {
		return nil, err
	}
	after, _ := strconv.Atoi(token) // "" is before the first
	attempts, err := s.Journal.Attempts(d.Namespace, d.ID)
	if err != nil {
		return nil, toStatus(err, r.GetParent())
	}
	out := &grapnelv1.ListAttemptsResponse{}
	var bytes pageBytes
	for i := range attempts {
		if attempts[i].Number <= after {
			continue
		}
		m := s.attemptProto(&attempts[i], r.GetIncludeBodies())
		if n := len(out.Attempts); n == size || bytes.full(m) {
			last := out.Attempts[n-1].GetNumber()
			out.NextPageToken = s.pages.seal(strconv.Itoa(int(last)), query...)
			break
		}
		out.Attempts = append(out.Attempts, m)
	}
	return out, nil
}

// RetryDelivery makes a delivery due now.
func (s deliveryService) RetryDelivery(ctx context.Context, r *grapnelv1.RetryDeliveryRequest) (*grapnelv1.RetryDeliveryResponse, error) {
	ns, d, err := s.delivery("name", r.GetName())
	if err != nil {
		return nil, err
	}
	attempts := -1
	if r.IfAttemptCount != nil {
		attempts = int(r.GetIfAttemptCount())
	}
	if d.State == delivery.Succeeded && r.GetAllowSucceeded() {
		return s.sendAgain(ctx, r.GetName(), ns, d, attempts)
	}
	held := s.Engine.HeldBy(laneOf(d))
	after, err := s.Engine.Retry(ctx, d.ID, laneOf(d), attempts)
	if errors.Is(err, delivery.ErrInvalidState) {
		return nil, s.cannot("retried", r.GetName(), d, attempts)
	}
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.RetryDeliveryResponse{Delivery: s.deliveryProto(ns, after, false), Lifted: held}, nil
}

// sendAgain makes another delivery of one that has succeeded.
func (s deliveryService) sendAgain(ctx context.Context, name, ns string, d *delivery.Delivery, attempts int) (*grapnelv1.RetryDeliveryResponse, error) {
	sub := s.Registry.Snapshot().SubscriptionByKey(uint64(d.ID.Subscription))
	if sub == nil {
		return nil, invalidState(name, "the delivery's subscription, "+subscriptionName(ns, d.Subscription)+", is deleted")
	}
	to := delivery.Target{Subscription: sub.ID, UID: sub.UID, MaxAttempts: sub.MaxAttempts, MaxAge: sub.MaxAge, Ordered: sub.Ordered}
	made, err := s.Journal.Resend(ctx, laneOf(d), d.ID, to, attempts)
	if errors.Is(err, delivery.ErrInvalidState) {
		return nil, s.cannot("sent again: its event is no longer retained", name, d, attempts)
	}
	if err != nil {
		return nil, toStatus(err, name)
	}
	return &grapnelv1.RetryDeliveryResponse{Delivery: s.deliveryProto(ns, made, false)}, nil
}

// CancelDelivery stops a delivery for good; an attempt that is running is left to end.
func (s deliveryService) CancelDelivery(ctx context.Context, r *grapnelv1.CancelDeliveryRequest) (*grapnelv1.CancelDeliveryResponse, error) {
	ns, d, err := s.delivery("name", r.GetName())
	if err != nil {
		return nil, err
	}
	after, err := s.Engine.Cancel(ctx, d.ID, laneOf(d))
	if errors.Is(err, delivery.ErrFinal) {
		return nil, s.cannot("cancelled", r.GetName(), d, -1)
	}
	if err != nil {
		return nil, toStatus(err, r.GetName())
	}
	return &grapnelv1.CancelDeliveryResponse{Delivery: s.deliveryProto(ns, after, false)}, nil
}

// delivery reads the delivery of a name. One of another namespace does not exist.
func (s *Server) delivery(field, name string) (ns string, d *delivery.Delivery, err error) {
	ns, id, err := parseDelivery(field, name)
	if err != nil {
		return "", nil, err
	}
	space, err := s.space(ns, name)
	if err != nil {
		return "", nil, err
	}
	if d, err = s.Journal.Delivery(space, id); err != nil {
		return "", nil, toStatus(err, name)
	}
	return ns, d, nil
}

func laneOf(d *delivery.Delivery) delivery.LaneKey {
	return delivery.LaneKey{Namespace: d.Namespace, Subscription: d.ID.Subscription}
}

// cannot says why a delivery cannot be retried or cancelled, as it stands now.
func (s *Server) cannot(what, name string, was *delivery.Delivery, attempts int) error {
	d, err := s.Journal.Delivery(was.Namespace, was.ID)
	if err != nil {
		return toStatus(err, name)
	}
	state := stateText(d, s.inFlight(d))
	if attempts >= 0 && d.Attempts != attempts {
		return invalidState(name, fmt.Sprintf("the delivery has ended %d attempts, not %d as if_attempt_count says; its state is %s", d.Attempts, attempts, state))
	}
	return invalidState(name, "the delivery is "+state+" and cannot be "+what)
}

// inFlight reports whether an attempt of the delivery runs now; on disk it has the state it would be
// resumed in.
func (s *Server) inFlight(d *delivery.Delivery) bool {
	return !d.State.Final() && s.Engine.InFlight(d.ID, laneOf(d))
}

// shownDelivery is a delivery as callers see it.
type shownDelivery struct {
	*delivery.Delivery
	inFlight bool
}

func stateText(d *delivery.Delivery, inFlight bool) string {
	return strings.TrimPrefix(stateOf(d, inFlight).String(), "STATE_")
}

func stateOf(d *delivery.Delivery, inFlight bool) grapnelv1.Delivery_State {
	if inFlight {
		return grapnelv1.Delivery_STATE_IN_FLIGHT
	}
	return grapnelv1.Delivery_State(d.State)
}

// narrow puts into q what the journal can use of f. It reports false when nothing can pass.
func (s *Server) narrow(q *delivery.Query, ns string, f *filter.Filter[shownDelivery]) bool {
	q.Since, q.Until = f.Between("create_time")
	if values, known := f.OneOf("subscription"); known {
		if len(values) == 0 {
			return false
		}
		// A name that is not in use may have had deliveries; only their events know of it.
		if sub := s.Registry.Snapshot().Subscription(ns, values[0]); sub != nil && len(values) == 1 {
			q.Subscription = delivery.UID(sub.UID).SubscriptionKey()
		}
	}
	if values, known := f.OneOf("subscription_uid"); known {
		if len(values) == 0 {
			return false
		}
		if u, err := uuid.Parse(values[0]); err == nil && len(values) == 1 {
			q.Subscription = delivery.UID(u).SubscriptionKey()
		}
	}
	if values, known := f.OneOf("event_uid"); known {
		if len(values) == 0 {
			return false
		}
		if len(values) == 1 {
			q.EventUID = values[0]
		}
	}
	if values, known := f.OneOf("event"); known {
		if len(values) == 0 {
			return false
		}
		if len(values) == 1 {
			q.EventID = values[0]
		}
	}
	if values, known := f.OneOf("state"); known {
		if len(values) == 0 {
			return false
		}
		q.States = storedStates(values)
	}
	return true
}

// storedStates are those that deliveries shown in the given states have on disk.
func storedStates(names []string) []delivery.State {
	var states []delivery.State
	for _, name := range names {
		state := delivery.State(grapnelv1.Delivery_State_value["STATE_"+name])
		if state == delivery.InFlight {
			states = append(states, delivery.Pending, delivery.Scheduled)
			continue
		}
		states = append(states, state)
	}
	return states
}

func deliveryFields(ns string) []filter.Field[shownDelivery] {
	type field = filter.Field[shownDelivery]
	return []field{
		{
			Name: "state", Text: func(d shownDelivery) string { return stateText(d.Delivery, d.inFlight) },
			Values: enumNames(grapnelv1.Delivery_State_name, "STATE_"), Prefix: "STATE_",
		},
		{
			Name: "subscription", Text: func(d shownDelivery) string { return d.Subscription },
			Canonical: ownID(ns, collectionSubscriptions),
		},
		{Name: "subscription_uid", Text: func(d shownDelivery) string { return uuid.UUID(d.SubscriptionUID).String() }},
		{Name: "event_uid", Text: func(d shownDelivery) string { return d.EventUID }},
		{Name: "event", Text: func(d shownDelivery) string { return d.EventID }, Canonical: ownEvent(ns)},
		{Name: "event_type", Text: func(d shownDelivery) string { return d.EventType }},
		{
			Name: "trigger", Text: func(d shownDelivery) string {
				return strings.TrimPrefix(grapnelv1.Delivery_Trigger(d.Trigger).String(), "TRIGGER_")
			},
			Values: enumNames(grapnelv1.Delivery_Trigger_name, "TRIGGER_"), Prefix: "TRIGGER_",
		},
		{
			Name: "replay_job", Text: func(d shownDelivery) string { return d.ReplayJob },
			Canonical: ownID(ns, collectionReplayJobs),
		},
		{Name: "create_time", Time: func(d shownDelivery) time.Time { return d.CreateTime }},
		{Name: "next_attempt_time", Time: func(d shownDelivery) time.Time { return d.NextAttempt }},
		{
			Name: "scheduled", Values: []string{"true", "false"},
			Text: func(d shownDelivery) string {
				return strconv.FormatBool(!d.State.Final() && !d.inFlight && d.NextAttempt.After(time.Now()))
			},
		},
		{Name: "attempt_count", Int: func(d shownDelivery) int64 { return int64(d.Attempts) }},
		{
			Name: "last_attempt.outcome", Text: func(d shownDelivery) string {
				if d.Last == nil {
					return ""
				}
				return strings.TrimPrefix(grapnelv1.Attempt_Outcome(d.Last.Outcome).String(), "OUTCOME_")
			},
			Values: enumNames(grapnelv1.Attempt_Outcome_name, "OUTCOME_"), Prefix: "OUTCOME_",
		},
		{Name: "last_attempt.response_code", Int: func(d shownDelivery) int64 {
			if d.Last == nil {
				return 0
			}
			return int64(d.Last.ResponseCode)
		}},
	}
}

// enumNames lists the values of an enum that stand for something, without their prefix, in order.
func enumNames(names map[int32]string, prefix string) []string {
	var out []string
	for n := int32(1); len(out) < len(names)-1; n++ {
		if name, ok := names[n]; ok {
			out = append(out, strings.TrimPrefix(name, prefix))
		}
	}
	return out
}

// ownID turns a resource name of the namespace into its id; an id stays as it is.
func ownID(ns, collection string) func(string) (string, error) {
	return func(value string) (string, error) {
		if !strings.Contains(value, "/") {
			return value, nil
		}
		id, ok := strings.CutPrefix(value, resourceName(ns, collection, ""))
		if !ok || strings.Contains(id, "/") {
			return "", errors.New("is an id, or a name that begins with " + resourceName(ns, collection, ""))
		}
		return id, nil
	}
}

// ownEvent turns the name of an event of the namespace into its id; whatever else there is, slashes and all, is an id.
func ownEvent(ns string) func(string) (string, error) {
	return func(value string) (string, error) {
		segment, ok := strings.CutPrefix(value, resourceName(ns, collectionEvents, ""))
		if !ok {
			if strings.HasPrefix(value, "namespaces/") {
				return "", errors.New("is an id, or a name that begins with " + resourceName(ns, collectionEvents, ""))
			}
			return value, nil
		}
		id, ok := unescapeID(segment)
		if !ok {
			return "", errors.New("is not the name of an event: in it, what is not a letter, digit or one of . _ ~ - is %XX")
		}
		return id, nil
	}
}

func (s *Server) deliveryProto(ns string, d *delivery.Delivery, inFlight bool) *grapnelv1.Delivery {
	m := &grapnelv1.Delivery{
		Name:            deliveryName(ns, d.ID),
		Event:           eventName(ns, d.EventID),
		EventType:       d.EventType,
		Subscription:    subscriptionName(ns, d.Subscription),
		State:           stateOf(d, inFlight),
		Trigger:         grapnelv1.Delivery_Trigger(d.Trigger),
		AttemptCount:    int32(d.Attempts),
		MaxAttempts:     int32(d.MaxAttempts),
		NextAttemptTime: stamp(d.NextAttempt),
		ExpireTime:      stamp(d.Expire),
		CreateTime:      stamp(d.CreateTime),
		CompleteTime:    stamp(d.CompleteTime),
		StateReason:     d.StateReason,
		SubscriptionUid: uuid.UUID(d.SubscriptionUID).String(),
		EventUid:        d.EventUID,
		OrderingGap:     clampInt32(int64(d.OrderingGap)),
	}
	if d.ReplayJob != "" {
		m.ReplayJob = replayJobName(ns, d.ReplayJob)
	}
	if d.Last != nil {
		m.LastAttempt = s.attemptProto(d.Last, false)
	}
	if !d.State.Final() && !d.WaitsForKey {
		m.StateReason = s.Engine.WaitReason(d.ID, laneOf(d))
	}
	return m
}

func (s *Server) attemptProto(a *delivery.Attempt, bodies bool) *grapnelv1.Attempt {
	m := &grapnelv1.Attempt{
		Number:       int32(a.Number),
		StartTime:    stamp(a.Start),
		Duration:     durationpb.New(a.Duration),
		Outcome:      grapnelv1.Attempt_Outcome(a.Outcome),
		ResponseCode: int32(a.ResponseCode),
		Error:        a.Error,
		Peer:         a.Peer,
		Node:         nodeName(s.NodeName),
		Manual:       a.Manual,
		BatchId:      a.Batch,
		BatchSize:    clampInt32(int64(a.BatchSize)),
	}
	if a.RetryAfter > 0 {
		m.RetryAfter = durationpb.New(a.RetryAfter)
	}
	if bodies {
		m.ResponseBody = a.ResponseBody
		m.ResponseHeaders = headerMap(a.ResponseHeaders)
		m.RequestHeaders = headerMap(a.RequestHeaders)
	}
	return m
}

// headerMap joins the values of a name as HTTP does.
func headerMap(headers []delivery.Header) map[string]string {
	if len(headers) == 0 {
		return nil
	}
	m := make(map[string]string, len(headers))
	for _, h := range headers {
		if before, ok := m[h.Name]; ok {
			m[h.Name] = before + ", " + h.Value
		} else {
			m[h.Name] = h.Value
		}
	}
	return m
}
