package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
	"github.com/grapnel/grapnel/sdk/webhook"
)

// forwarding brings a namespace's events to a program on this machine, which the server need not reach.
type forwarding struct {
	c                 *cli
	to, shown, secret string
	types             []string
	condition         string
	count             int
	own               bool // the key is of its own making
	key               []byte
	http              http.Client
	parent, temporary string
}

func newListenCommand(c *cli) *cobra.Command {
	l := &forwarding{c: c}
	cmd := &cobra.Command{
		Use: "listen", Short: "Bring a namespace's events to a program on this machine", Args: cobra.NoArgs,
		Long: `Makes a temporary subscription and posts what matches it to --forward, so that a program can be written and tried on a machine
that the server does not reach: requests look as the server's own do, and are signed by standard-webhooks with the key that is
shown at the beginning, or --secret. Each event is posted once, and what comes of it is shown; it is not tried again. Listening
goes on after a connection that broke and a restart of the server, and posts then what has happened meanwhile. The
subscription, whose name begins with listen-, is deleted at the end.`,
		Example: "  grapnel listen -n acme --forward http://127.0.0.1:3000/webhooks\n" +
			"  grapnel listen -n acme --forward http://127.0.0.1:3000 --type 'order.*' --secret @key.txt",
	}
	f := cmd.Flags()
	f.StringVar(&l.to, "forward", "", "`URL` to post to, such as http://127.0.0.1:3000")
	f.StringSliceVar(&l.types, "type", nil, "only of these event `types`; order.* stands for all that begin so")
	f.StringVar(&l.condition, "condition", "", "CEL `expression` over the variable event")
	f.StringVar(&l.secret, "secret", "", "whsec_… key to sign with, or `@file`; default one of its own")
	countVar(f, &l.count, "count", 0, 0, 0, "end after this many events, with success when all were taken; 0 goes on")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := l.prepare(); err != nil {
			return err
		}
		return c.with(cmd, l.run)
	}
	return c.connectFlags(cmd, true)
}

func (l *forwarding) prepare() error {
	ns, err := l.c.namespaceID()
	if err != nil {
		return err
	}
	l.parent = "namespaces/" + ns
	to, err := url.Parse(l.to)
	if err != nil || to.Host == "" || to.Scheme != "http" && to.Scheme != "https" {
		return usagef("--forward %q: want the URL of a program that listens, such as http://127.0.0.1:3000", clean(l.to))
	}
	l.shown = to.Redacted()
	secret, err := l.c.readValue(l.secret)
	if err != nil {
		return fmt.Errorf("read --secret: %w", err)
	}
	if l.secret == "" {
		key := make([]byte, 32)
		_, _ = rand.Read(key) // never fails
		l.own, secret = true, []byte("whsec_"+base64.StdEncoding.EncodeToString(key))
	}
	l.secret = strings.TrimSpace(string(secret))
	if _, err := webhook.NewVerifier(l.secret); err != nil {
		return usagef("--secret: %w", err)
	}
	encoded, shared := strings.CutPrefix(l.secret, "whsec_")
	if !shared {
		return usagef("--secret: want a key that signs, whsec_…, and not a public one")
	}
	if l.key, err = base64.StdEncoding.DecodeString(encoded); err != nil {
		return usagef("--secret: the part after whsec_ is not base64")
	}
	l.http = http.Client{
		Timeout:       30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

// run makes the subscription, which is disabled: the server records what it matches and sends nothing.
func (l *forwarding) run(ctx context.Context, cl *client.Client) error {
	l.temporary = "listen-" + strings.ToLower(rand.Text()[:10])
	defer l.clear(ctx, cl)
	made, err := cl.SubscriptionService().CreateSubscription(ctx, &grapnelv1.CreateSubscriptionRequest{
		Parent: l.parent, SubscriptionId: l.temporary, RequestId: client.NewID(),
		Subscription: &grapnelv1.Subscription{
			DisplayName: "grapnel listen, temporary", Uri: "https://listen.invalid/", EventTypes: l.types, Condition: l.condition,
			Signers: []*grapnelv1.PluginBinding{{Plugin: "plugins/none"}},
		},
		InitialState: grapnelv1.Subscription_STATE_DISABLED, StateReason: "grapnel listen forwards its events",
	})
	if err != nil {
		return err
	}
	begun := false
	watch := cl.WatchDeliveries(ctx, strings.TrimPrefix(l.parent, "namespaces/"),
		client.Filter(fmt.Sprintf("state = SKIPPED AND subscription_uid = %q", made.GetSubscription().GetUid())), client.Watching(func(string) {
			if !begun {
				begun = true
				with := "--secret"
				if l.own {
					with = l.secret
				}
				l.c.said("forwarding %s to %s, signed with %s", l.parent, l.shown, with)
			}
		}))
	n, failed := 0, 0
	for ch, err := range watch {
		if err != nil {
			return err
		}
		taken, err := l.forward(ctx, cl, ch.Delivery)
		if err != nil {
			return err
		}
		if !taken {
			failed++
		}
		if n++; n == l.count {
			break
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d events were not taken", failed, n)
	}
	return nil
}

// clear deletes the temporary subscription, also one that was made although nobody heard of it.
func (l *forwarding) clear(ctx context.Context, cl *client.Client) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	name := l.parent + "/subscriptions/" + l.temporary
	if _, err := cl.SubscriptionService().DeleteSubscription(ctx, &grapnelv1.DeleteSubscriptionRequest{Name: name, AllowMissing: true}); err != nil {
		fmt.Fprintf(l.c.stderr, "the temporary subscription %s may be left: %v\n", name, err)
	}
}

// event reads the event of a delivery, as soon as the server is there.
func (l *forwarding) event(ctx context.Context, cl *client.Client, d *grapnelv1.Delivery) (*grapnelv1.Event, error) {
	for {
		r, err := cl.EventService().GetEvent(ctx, &grapnelv1.GetEventRequest{Name: l.parent + "/events/" + d.GetEventUid(), IncludePayload: true})
		if !errors.Is(err, client.ErrUnavailable) {
			return r.GetEvent(), err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

// forward posts the event of a delivery, and reports whether it was taken.
func (l *forwarding) forward(ctx context.Context, cl *client.Client, d *grapnelv1.Delivery) (bool, error) {
	e, err := l.event(ctx, cl, d)
	if errors.Is(err, client.ErrNotFound) {
		l.tell(d, "is no longer retained", 0)
		return false, nil
	}
	if err != nil {
		return false, err
	}
	began := time.Now()
	status, err := l.post(ctx, e)
	took := time.Since(began)
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case err != nil:
		l.tell(d, clean(err.Error()), took)
		return false, nil
	}
	l.tell(d, strconv.Itoa(status), took)
	return status >= 200 && status < 300, nil
}

func (l *forwarding) tell(d *grapnelv1.Delivery, what string, took time.Duration) {
	l.c.said("%s  %s  %s  %s in %s", time.Now().Format("15:04:05.000"), clean(d.GetEventType()), clean(eventID(d.GetEvent())), what, roundDuration(took))
}

// post makes the request as the server does.
func (l *forwarding) post(ctx context.Context, e *grapnelv1.Event) (status int, err error) {
	body := e.GetData()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, l.to, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	for name, value := range eventHeaders(e) {
		r.Header.Set(name, value)
	}
	r.Header.Set("User-Agent", "grapnel/"+version().number)
	l.sign(r.Header, e.GetUid(), body)
	answer, err := l.http.Do(r)
	if err != nil {
		var failed *url.Error
		if errors.As(err, &failed) {
			err = failed.Err
		}
		return 0, err
	}
	defer answer.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(answer.Body, 64<<10))
	return answer.StatusCode, nil
}

// sign is what the signer standard-webhooks does.
func (l *forwarding) sign(h http.Header, id string, body []byte) {
	at := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, l.key)
	mac.Write([]byte(id + "." + at + "."))
	mac.Write(body)
	h.Set(webhook.HeaderID, id)
	h.Set(webhook.HeaderTimestamp, at)
	h.Set(webhook.HeaderSignature, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
}

// eventHeaders are an event's attributes in the binary mode of CloudEvents.
func eventHeaders(e *grapnelv1.Event) map[string]string {
	h := map[string]string{"ce-specversion": "1.0", "ce-id": e.GetId(), "ce-source": e.GetSource(), "ce-type": e.GetType()}
	if e.GetTime() != nil {
		h["ce-time"] = e.GetTime().AsTime().UTC().Format(time.RFC3339Nano)
	}
	if e.GetSubject() != "" {
		h["ce-subject"] = e.GetSubject()
	}
	if e.GetDataSchema() != "" {
		h["ce-dataschema"] = e.GetDataSchema()
	}
	for _, name := range slices.Sorted(maps.Keys(e.GetAttributes())) {
		if name != "traceparent" {
			h["ce-"+name] = e.GetAttributes()[name]
		}
	}
	for name, value := range h {
		h[name] = headerText(value)
	}
	if e.GetDataContentType() != "" {
		h["content-type"] = e.GetDataContentType()
	}
	return h
}

// headerText is CloudEvents' percent-encoding of header values.
func headerText(text string) string {
	var b strings.Builder
	for _, c := range []byte(text) {
		if c > ' ' && c < 0x7f && c != '"' && c != '%' {
			b.WriteByte(c)
			continue
		}
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}
