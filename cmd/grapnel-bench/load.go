package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// creators is how many calls a part keeps in flight when it makes or changes many things.
const creators = 16

// concurrently calls do for 0 to n-1 from some callers at a time, and returns how many calls succeeded and the first
// error, after which no more are begun.
func concurrently(ctx context.Context, callers, n int, do func(ctx context.Context, i int) error) (int, error) {
	var next, done atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range callers {
		g.Go(func() error {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := do(ctx, int(i)); err != nil {
					return err
				}
				done.Add(1)
			}
			return nil
		})
	}
	err := g.Wait()
	return int(done.Load()), err
}

// product is a size as the flags say it, such as 10x1000: ten times a thousand.
type product struct{ by, of int }

func (p product) String() string { return fmt.Sprintf("%dx%d", p.by, p.of) }

// products is a flag's list of them, such as 1x1000000,10x100000.
type products []product

func (l *products) String() string {
	var out []string
	for _, p := range *l {
		out = append(out, p.String())
	}
	return strings.Join(out, ",")
}

func (l *products) Set(s string) error {
	*l = nil
	for part := range strings.SplitSeq(s, ",") {
		if part == "" {
			continue
		}
		by, of, ok := strings.Cut(part, "x")
		a, errA := strconv.Atoi(by)
		b, errB := strconv.Atoi(of)
		if !ok || errA != nil || errB != nil || a < 1 || b < 1 {
			return fmt.Errorf("%q is no size: two numbers from 1 joined by x, such as 10x1000", part)
		}
		*l = append(*l, product{a, b})
	}
	return nil
}

// numbers is a flag's list of numbers from 0, such as 1,30,64.
type numbers []int

func (l *numbers) String() string {
	var out []string
	for _, n := range *l {
		out = append(out, strconv.Itoa(n))
	}
	return strings.Join(out, ",")
}

func (l *numbers) Set(s string) error {
	*l = nil
	for part := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(part)
		if err != nil || n < 0 {
			return fmt.Errorf("%q is not a number from 0", part)
		}
		*l = append(*l, n)
	}
	return nil
}

// subscribeTo makes subscriptions with the IDs sub-0 to sub-(n-1), made up by each; it returns how many it made.
func (p *serverProcess) subscribeTo(ctx context.Context, ns string, n int, each func(i int) *grapnelv1.Subscription) (int, error) {
	return p.subscribeAs(ctx, ns, "sub", n, each)
}

// subscribeAs is subscribeTo with another beginning of the IDs.
func (p *serverProcess) subscribeAs(ctx context.Context, ns, prefix string, n int, each func(i int) *grapnelv1.Subscription) (int, error) {
	subs := grapnelv1.NewSubscriptionServiceClient(p.conn)
	return concurrently(ctx, creators, n, func(ctx context.Context, i int) error {
		_, err := subs.CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
			Parent: "namespaces/" + ns, SubscriptionId: fmt.Sprintf("%s-%d", prefix, i), Subscription: each(i),
		})
		return err
	})
}

// signed is a subscription as most runs use it, with the key that prepare makes.
func signed(ns, uri string, types ...string) *grapnelv1.Subscription {
	return &grapnelv1.Subscription{
		Uri: uri, EventTypes: types, MaxInFlight: 256,
		Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": "namespaces/" + ns + "/secrets/key"}}},
	}
}

// unsent are the events of a run that have no acknowledgement yet, by their numbers. It outlives the server: what was
// under way at a crash is sent again with the same ID.
type unsent struct {
	todo chan int64
	left atomic.Int64
}

func newUnsent(n int) *unsent {
	u := &unsent{todo: make(chan int64, n)}
	u.left.Store(int64(n))
	for i := range n {
		u.todo <- int64(i)
	}
	return u
}

// publish sends them in batches of size, four calls at a time, until all are acknowledged or a call fails.
func (u *unsent) publish(ctx context.Context, p *serverProcess, ns string, size int, body []byte) error {
	client := grapnelv1.NewPublishServiceClient(p.conn)
	g, ctx := errgroup.WithContext(ctx)
	for range 4 {
		g.Go(func() error {
			for {
				taken := u.take(size)
				if len(taken) == 0 {
					return nil
				}
				req := &grapnelv1.BatchPublishRequest{Parent: "namespaces/" + ns}
				for _, i := range taken {
					req.Events = append(req.Events, event(i, body))
				}
				if err := batchErr(client.BatchPublish(ctx, req)); err != nil {
					for _, i := range taken {
						u.todo <- i
					}
					return err
				}
				u.left.Add(-int64(len(taken)))
			}
		})
	}
	return g.Wait()
}

// take returns up to n numbers; none when nothing is left that is not under way.
func (u *unsent) take(n int) []int64 {
	var out []int64
	for len(out) < n {
		select {
		case i := <-u.todo:
			out = append(out, i)
		default:
			return out
		}
	}
	return out
}

// stopped reports whether err only says that the time of a run is over or that its server was ended.
func stopped(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errTooMuch)
}
