package subscription

import (
	"net/url"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

const (
	defaultSigner         = "plugins/standard-webhooks"
	noSigner              = "plugins/none"
	defaultTransport      = "plugins/http"
	defaultAttemptTimeout = 15 * time.Second
	defaultMaxInFlight    = 16
	defaultMaxAge         = 4 * 24 * time.Hour
	defaultDisableAfter   = 5 * 24 * time.Hour
	defaultJitter         = 0.2

	defaultInitialBackoff  = 5 * time.Second
	defaultMaxBackoff      = 6 * time.Hour
	defaultMultiplier      = 2.5
	defaultBackoffAttempts = 12
)

// defaultSchedule is what Standard Webhooks advises.
func defaultSchedule() []time.Duration {
	return []time.Duration{
		5 * time.Second, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 5 * time.Hour,
		10 * time.Hour, 14 * time.Hour, 20 * time.Hour, 24 * time.Hour,
	}
}

// fillDefaults stores the defaults in the message, so that a later change of them does not change what
// exists. Fields that are wrong are left for validation to name.
func fillDefaults(p *grapnelv1.Subscription) {
	if len(p.Signers) == 0 {
		p.Signers = []*grapnelv1.PluginBinding{{}}
	}
	for _, s := range p.Signers {
		if s.Plugin == "" {
			s.Plugin = defaultSigner
		}
	}
	if p.Transport == nil {
		p.Transport = &grapnelv1.PluginBinding{}
	}
	if p.Transport.Plugin == "" {
		p.Transport.Plugin = transportFor(p.Uri)
	}
	if p.PayloadShape == nil {
		p.PayloadShape = &grapnelv1.PayloadShape{}
	}
	if p.PayloadShape.Format == grapnelv1.PayloadShape_FORMAT_UNSPECIFIED {
		p.PayloadShape.Format = grapnelv1.PayloadShape_FORMAT_RAW
	}
	if p.PayloadShape.Compression == grapnelv1.PayloadShape_COMPRESSION_UNSPECIFIED {
		p.PayloadShape.Compression = grapnelv1.PayloadShape_COMPRESSION_NONE
	}
	fillBatching(p.Batching)
	if p.AttemptTimeout == nil {
		p.AttemptTimeout = durationpb.New(defaultAttemptTimeout)
	}
	if p.Ordered && p.OnExhausted == grapnelv1.Subscription_ON_EXHAUSTED_UNSPECIFIED {
		p.OnExhausted = grapnelv1.Subscription_ON_EXHAUSTED_SKIP
	}
	if p.MaxInFlight == 0 {
		p.MaxInFlight = defaultMaxInFlight
	}
	if p.RetryPolicy == nil {
		p.RetryPolicy = &grapnelv1.RetryPolicy{}
	}
	fillRetryPolicy(p.RetryPolicy)
	if p.FailurePolicy == nil {
		p.FailurePolicy = &grapnelv1.FailurePolicy{}
	}
	if p.FailurePolicy.DisableAfter == nil {
		p.FailurePolicy.DisableAfter = durationpb.New(defaultDisableAfter)
	}
	if p.State == grapnelv1.Subscription_STATE_UNSPECIFIED {
		p.State = grapnelv1.Subscription_STATE_ACTIVE
	}
}

func fillRetryPolicy(r *grapnelv1.RetryPolicy) {
	switch {
	case len(r.Schedule) > 0:
		if r.MaxAttempts == 0 {
			r.MaxAttempts = int32(len(r.Schedule)) + 1
		}
	case usesBackoff(r):
		if r.InitialBackoff == nil {
			r.InitialBackoff = durationpb.New(defaultInitialBackoff)
		}
		if r.MaxBackoff == nil {
			r.MaxBackoff = durationpb.New(defaultMaxBackoff)
		}
		if r.Multiplier == 0 {
			r.Multiplier = defaultMultiplier
		}
		if r.MaxAttempts == 0 {
			r.MaxAttempts = defaultBackoffAttempts
		}
	default:
		for _, d := range defaultSchedule() {
			r.Schedule = append(r.Schedule, durationpb.New(d))
		}
		if r.MaxAttempts == 0 {
			r.MaxAttempts = int32(len(r.Schedule)) + 1
		}
	}
	if r.Jitter == nil {
		r.Jitter = proto.Float64(defaultJitter)
	}
	if r.MaxAge == nil {
		r.MaxAge = durationpb.New(defaultMaxAge)
	}
}

func usesBackoff(r *grapnelv1.RetryPolicy) bool {
	return r.GetInitialBackoff() != nil || r.GetMaxBackoff() != nil || r.GetMultiplier() != 0
}

// transportFor returns the default transport of a URI's scheme, empty when there is none.
func transportFor(uri string) string {
	u, err := url.Parse(uri)
	if err != nil {
		return ""
	}
	switch strings.ToLower(u.Scheme) {
	case "http", "https":
		return defaultTransport
	}
	return ""
}
