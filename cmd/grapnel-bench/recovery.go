package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// The recovery run: one receiver gets recoveryRate events a second. It is well, then hangs, and then is well until
// nothing waits any more.
const (
	recoveryRate  = 200
	recoveryWell  = 8 * time.Second
	recoverySick  = 30 * time.Second
	recoveryAfter = 2 * time.Minute // at the longest
	recoveryEvery = 100 * time.Millisecond
)

// recoverySample is how the lane stood at one moment.
type recoverySample struct {
	Seconds float64 `json:"seconds"`
	// Limit is of attempts in flight, Rate the requests at the receiver a second, and Open the deliveries that are.
	Limit int     `json:"limit"`
	Rate  float64 `json:"per_second"`
	Open  int     `json:"open"`
	// Breaker says that it is not closed.
	Breaker bool `json:"breaker"`
}

type recoveryReport struct {
	Sick float64 `json:"sick_at"`
	Well float64 `json:"well_at"`
	// Drained is when nothing was open any more, at rest since the receiver was well again.
	Drained float64          `json:"drained_at"`
	Most    int              `json:"most_in_flight"`
	Samples []recoverySample `json:"samples"`
}

func (b *bench) recovery(ctx context.Context) error {
	p, err := b.serve(ctx, b.grapnel, b.dataDir())
	if err != nil {
		return err
	}
	defer p.kill()
	if err := b.sink.heal(ctx); err != nil {
		return err
	}
	if err := p.prepare(ctx, "sick"); err != nil {
		return err
	}
	if _, err := p.subscribeAs(ctx, "sick", "sick", 1, func(int) *grapnelv1.Subscription {
		s := signed("sick", b.sink.url("/sick/20s/0"), "sick.0")
		s.MaxInFlight, s.AttemptTimeout = sickInFlight, durationpb.New(time.Second)
		return s
	}); err != nil {
		return err
	}
	feeding, stop := context.WithCancel(ctx)
	defer stop()
	fed := make(chan error, 1)
	go func() {
		_, err := b.feedSick(feeding, p, ailment{receivers: 1, rate: recoveryRate})
		fed <- err
	}()
	r := &recoveryReport{Sick: recoveryWell.Seconds(), Well: (recoveryWell + recoverySick).Seconds()}
	b.report.Recovery = r
	err = b.watchRecovery(ctx, p, r)
	stop()
	if err = errors.Join(err, <-fed); err != nil {
		return err
	}
	if b.picture == "" {
		return nil
	}
	return os.WriteFile(b.picture, []byte(r.svg()), 0o644)
}

// watchRecovery makes the receiver sick and well, and notes how its lane stands meanwhile.
func (b *bench) watchRecovery(ctx context.Context, p *serverProcess, r *recoveryReport) error {
	subs := grapnelv1.NewSubscriptionServiceClient(p.conn)
	tick := time.NewTicker(recoveryEvery)
	defer tick.Stop()
	begin := time.Now()
	turns := []struct {
		at   float64
		turn func(context.Context) error
	}{{r.Sick, b.sink.sicken}, {r.Well, b.sink.heal}}
	var last sickStats
	var since float64
	for r.Drained == 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		at := time.Since(begin).Seconds()
		if len(turns) > 0 && at >= turns[0].at {
			if err := turns[0].turn(ctx); err != nil {
				return err
			}
			turns = turns[1:]
		}
		got, err := subs.GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: "namespaces/sick/subscriptions/sick-0"})
		if err != nil {
			return err
		}
		st := got.GetStatus()
		ill, err := b.sink.sickStats()
		if err != nil {
			return err
		}
		r.Samples = append(r.Samples, recoverySample{
			Seconds: at, Limit: int(st.GetInFlightLimit()), Open: int(st.GetOpenDeliveries()), Rate: float64(ill.Visits-last.Visits) / (at - since),
			Breaker: st.GetBreaker() > grapnelv1.SubscriptionStatus_BREAKER_CLOSED,
		})
		last, since = ill, at
		r.Most = max(r.Most, ill.Most)
		switch {
		case at > r.Well && st.GetOpenDeliveries() <= sickInFlight:
			r.Drained = at
		case at > r.Well+recoveryAfter.Seconds():
			return fmt.Errorf("%d deliveries are open %v after the recovery", st.GetOpenDeliveries(), recoveryAfter)
		}
	}
	return nil
}

func (r *recoveryReport) print(out io.Writer) {
	opened, limit := 0.0, 0
	for _, s := range r.Samples {
		if s.Breaker && opened == 0 {
			opened = s.Seconds
		}
		if s.Seconds > r.Well {
			limit = max(limit, s.Limit)
		}
	}
	fmt.Fprintf(out, "recovery         %d/s to one receiver that hangs from %.0f to %.0f s: breaker open at %.1f s, limit back at %d, drained at %.1f s, most in flight %d\n",
		recoveryRate, r.Sick, r.Well, opened, limit, r.Drained, r.Most)
}

// opened are the times, from and to, in which the breaker was not closed.
func (r *recoveryReport) opened() (times [][2]float64) {
	was := false
	for _, s := range r.Samples {
		switch {
		case s.Breaker && !was:
			times = append(times, [2]float64{s.Seconds, s.Seconds})
		case was:
			times[len(times)-1][1] = s.Seconds
		}
		was = s.Breaker
	}
	return times
}

// svg draws limit, rate and backlog over time; the time with the breaker open or half open is shaded.
func (r *recoveryReport) svg() string {
	const width, height, left, gap = 860.0, 110.0, 70.0, 34.0
	end := r.Drained
	if n := len(r.Samples); n > 0 {
		end = max(end, r.Samples[n-1].Seconds)
	}
	x := func(at float64) float64 { return left + at/end*width }
	panels := []struct {
		name, colour string
		of           func(recoverySample) float64
	}{
		{"attempts in flight, limit", "#1f6feb", func(s recoverySample) float64 { return float64(s.Limit) }},
		{"requests at the receiver a second", "#1a7f37", func(s recoverySample) float64 { return s.Rate }},
		{"deliveries that are open", "#9a6700", func(s recoverySample) float64 { return float64(s.Open) }},
	}
	var b strings.Builder
	total := float64(len(panels))*(height+gap) + 50
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="sans-serif" font-size="12">`+"\n", left+width+20, total)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, panel := range panels {
		top := 24 + float64(i)*(height+gap)
		most := 1.0
		for _, s := range r.Samples {
			most = max(most, panel.of(s))
		}
		for _, t := range r.opened() {
			fmt.Fprintf(&b, `<rect x="%.1f" y="%.1f" width="%.1f" height="%.0f" fill="#ffebe9"/>`+"\n", x(t[0]), top, x(t[1])-x(t[0]), height)
		}
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f">%s</text><text x="%.0f" y="%.0f" text-anchor="end">%.0f</text><text x="%.0f" y="%.0f" text-anchor="end">0</text>`+"\n",
			left, top-6, panel.name, left-6, top+10, most, left-6, top+height)
		fmt.Fprintf(&b, `<polyline fill="none" stroke="%s" stroke-width="1.5" points="`, panel.colour)
		for _, s := range r.Samples {
			fmt.Fprintf(&b, "%.1f,%.1f ", x(s.Seconds), top+height-panel.of(s)/most*height)
		}
		fmt.Fprintf(&b, `"/><line x1="%.0f" y1="%.1f" x2="%.0f" y2="%.1f" stroke="#57606a"/>`+"\n", left, top+height, left+width, top+height)
	}
	bottom := 24 + float64(len(panels))*(height+gap) - gap
	for _, mark := range []struct {
		at   float64
		what string
	}{{r.Sick, "hangs"}, {r.Well, "is well again"}, {r.Drained, "caught up"}} {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="24" x2="%.1f" y2="%.1f" stroke="#57606a" stroke-dasharray="4 3"/><text x="%.1f" y="%.0f" text-anchor="end">%s, %.1f s</text>`+"\n",
			x(mark.at), x(mark.at), bottom+6, x(mark.at), bottom+20, mark.what, mark.at)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
