package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime/debug"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	firstparty "github.com/grapnel/grapnel/plugins"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/conformance"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/pluginhost"
	"github.com/grapnel/grapnel/server/subscription"
)

const benchTimeout = 15 * time.Second

func loopback() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
}

// inProcess does the work with the kinds' own code and no process around it: workers that take what is
// there, as the SDK's do.
func inProcess() conformance.Contestant {
	return conformance.Contestant{Name: "delivery, in process", InProcess: true, Start: func(ctx context.Context, w conformance.Work) (*conformance.Running, error) {
		target := plugin.Target{Method: "POST", URL: w.URI, Egress: plugin.NewEgress(loopback()), UserAgent: "grapnel-bench", MaxInFlight: 1024}
		sign, err := openLocal(w.Signer, w.SignerConfig, w.SignerSecrets, target)
		if err != nil {
			return nil, err
		}
		send, err := openLocal(w.Transport, w.TransportConfig, w.TransportSecrets, target)
		if err != nil {
			return nil, err
		}
		collect := debug.SetGCPercent(400) // as the SDK does in a plugin's process
		queue := make(chan func(conformance.Sample), 1<<16)
		for range 1024 {
			go func() {
				for done := range queue {
					done(conformance.Sample{Failed: attemptLocally(ctx, w, sign, send) != nil})
				}
			}()
		}
		return &conformance.Running{
			Attempt: func(done func(conformance.Sample)) { queue <- done },
			Stop: func() {
				close(queue)
				debug.SetGCPercent(collect)
			},
		}, nil
	}}
}

func openLocal(id string, config []byte, secrets map[string][]byte, t plugin.Target) (*plugin.Local, error) {
	for _, k := range firstparty.Kinds() {
		if k.ID() != id {
			continue
		}
		versions := map[string][][]byte{}
		for slot, value := range secrets {
			versions[slot] = [][]byte{value}
		}
		return plugin.OpenLocal(k, config, versions, t)
	}
	return nil, fmt.Errorf("there is no first-party kind %q", id)
}

func attemptLocally(ctx context.Context, w conformance.Work, sign, send *plugin.Local) error {
	ctx, cancel := context.WithTimeout(ctx, benchTimeout)
	defer cancel()
	r := &plugin.Request{
		MessageID: "evt_0123456789abcdef", Created: time.Now(), Method: "POST", URL: w.URI, Body: w.Body, AttemptNumber: 1,
		MaxResponseBody: 4096, Traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		Headers: append(make([]plugin.Header, 0, 16), plugin.Header{Name: "content-type", Value: "application/json"},
			plugin.Header{Name: "webhook-id", Value: "evt_0123456789abcdef"}, plugin.Header{Name: "ce-specversion", Value: "1.0"},
			plugin.Header{Name: "ce-id", Value: "order-1"}, plugin.Header{Name: "ce-source", Value: "/bench"},
			plugin.Header{Name: "ce-type", Value: "order.created"}),
	}
	if err := sign.Sign(r); err != nil {
		return err
	}
	resp, err := send.Attempt(ctx, r)
	if err != nil {
		return err
	}
	if resp.Status < 200 || resp.Status > 299 {
		return fmt.Errorf("the receiver answered %d", resp.Status)
	}
	return nil
}

// serversHost does the work with the server's own host of plugins.
func serversHost(command []string) conformance.Contestant {
	return conformance.Contestant{Name: "delivery, server's host", Start: func(ctx context.Context, w conformance.Work) (*conformance.Running, error) {
		sub, secrets, err := benchSubscription(w)
		if err != nil {
			return nil, err
		}
		if command, err = conformance.Resolve(command); err != nil {
			return nil, err
		}
		dir, err := os.MkdirTemp("", "grapnel-bench-")
		if err != nil {
			return nil, err
		}
		host, err := pluginhost.New(pluginhost.Options{
			Plugins: []pluginhost.Spec{{Path: command[0], Args: command[1:], Builtin: true}}, Dir: dir, EgressAllow: loopback(),
			Secrets: func(name string) ([]pluginhost.SecretVersion, bool) {
				value, ok := secrets[name]
				return []pluginhost.SecretVersion{{Number: 1, Value: value}}, ok
			},
		})
		if err != nil {
			return nil, err
		}
		running, cancel := context.WithCancel(context.WithoutCancel(ctx))
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = host.Run(running) // returns nil
		}()
		stop := func() {
			cancel()
			<-ended
			_ = os.RemoveAll(dir)
		}
		starting, cancelStart := context.WithTimeout(ctx, benchTimeout)
		defer cancelStart()
		if err := host.Ready(starting); err != nil {
			stop()
			return nil, err
		}
		pid := 0
		for _, p := range host.Pids() {
			pid = p
		}
		return &conformance.Running{PID: pid, Stop: stop, Attempt: func(done func(conformance.Sample)) {
			began := time.Now()
			host.Attempt(sub, benchJob(w.Body), benchSink(func(r delivery.Result) {
				done(conformance.Sample{
					Overhead: time.Since(began) - r.Attempt.Duration, Failed: r.Attempt.Outcome != delivery.OutcomeSucceeded,
				})
			}))
		}}, nil
	}}
}

// benchSink is where the host leaves the result of one job.
type benchSink func(delivery.Result)

// Complete is part of delivery.Sink.
func (s benchSink) Complete(_ *delivery.Job, r delivery.Result) { s(r) }

func benchJob(body []byte) *delivery.Job {
	return &delivery.Job{
		MaxAttempts: 1, Expire: time.Now().Add(time.Hour),
		Event: &delivery.Event{
			ID: "order-1", Source: "/bench", Type: "order.created", Time: time.Now(), ContentType: "application/json",
			Payload: body, UID: "evt_0123456789abcdef",
		},
	}
}

// benchSubscription binds the work's kinds, and names its secrets.
func benchSubscription(w conformance.Work) (*subscription.Subscription, map[string][]byte, error) {
	secrets := map[string][]byte{}
	binding := func(id string, config []byte, values map[string][]byte) (*grapnelv1.PluginBinding, error) {
		b := &grapnelv1.PluginBinding{Plugin: "plugins/" + id, Config: &structpb.Struct{}, Secrets: map[string]string{}}
		for slot, value := range values {
			name := "namespaces/bench/secrets/" + id + "-" + slot
			b.Secrets[slot], secrets[name] = name, value
		}
		if len(config) == 0 {
			return b, nil
		}
		return b, protojson.Unmarshal(config, b.Config)
	}
	transport, err := binding(w.Transport, w.TransportConfig, w.TransportSecrets)
	if err != nil {
		return nil, nil, err
	}
	if w.Signer == "" {
		return nil, nil, conformance.ErrCannotCompare // the server would sign in another plugin's process
	}
	signer, err := binding(w.Signer, w.SignerConfig, w.SignerSecrets)
	if err != nil {
		return nil, nil, err
	}
	sub := subscription.Of(&grapnelv1.Subscription{
		Name: "namespaces/bench/subscriptions/bench", Uri: w.URI, Transport: transport, Signers: []*grapnelv1.PluginBinding{signer},
	})
	sub.UID, sub.Revision = [16]byte{1}, 1
	sub.AttemptTimeout, sub.MaxInFlight, sub.MaxAttempts = benchTimeout, 4096, 1
	return sub, secrets, nil
}
