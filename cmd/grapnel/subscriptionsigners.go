package main

import (
	"cmp"
	"context"
	"errors"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

// signersPath is the field that the flags of signers set.
const signersPath = "signers"

// signerFlags are --signer, --signer-config and --secret. Their order counts: the latter two are about the
// signer named before them, or about the first one.
type signerFlags struct{ all []*signerFlag }

// signerFlag is one signer as the flags name it.
type signerFlag struct {
	plugin, config            string
	secrets                   []string
	named, configured, filled bool // which flags were given, perhaps empty to clear

	// What read makes of them.
	settings *structpb.Struct
	slots    map[string]string
}

// orderedFlag is a flag of which each use is told, in the order of the command line.
type orderedFlag struct {
	kind string
	set  func(string) error
}

func (f orderedFlag) Set(text string) error { return f.set(text) }
func (f orderedFlag) Type() string          { return f.kind }
func (orderedFlag) String() string          { return "" }

func (f *signerFlags) register(cmd *cobra.Command, c *cli) {
	flags := cmd.Flags()
	flags.Var(orderedFlag{"plugin", f.name}, "signer", "plugin that signs; repeat it for several, in their order; default standard-webhooks")
	flags.Var(orderedFlag{"string", func(text string) error {
		last := f.last()
		if last.configured {
			return usagef("is given twice for one --signer")
		}
		last.config, last.configured = text, true
		return nil
	}}, "signer-config", "settings of the --signer before it: JSON or `@file`")
	flags.Var(orderedFlag{"slot=ID", func(text string) error {
		last := f.last()
		last.secrets, last.filled = append(last.secrets, text), true
		return nil
	}}, "secret", "key that the --signer before it signs with: an ID, or `slot=ID` where the plugin has several")
	must(cmd.RegisterFlagCompletionFunc("secret", completeSecrets(c)))
	must(cmd.RegisterFlagCompletionFunc("signer", completePlugins(c)))
}

// name begins another signer, unless the flags so far are about one that has no name yet.
func (f *signerFlags) name(plugin string) error {
	if len(f.all) == 0 || f.last().named {
		f.all = append(f.all, &signerFlag{})
	}
	f.last().plugin, f.last().named = pluginName(plugin), true
	return nil
}

func (f *signerFlags) last() *signerFlag {
	if len(f.all) == 0 {
		f.all = append(f.all, &signerFlag{})
	}
	return f.all[len(f.all)-1]
}

func (f *signerFlags) given() bool { return len(f.all) > 0 }

// read looks up what the flags refer to, once: it may be standard input.
func (f *signerFlags) read(c *cli, parent string) (err error) {
	for _, s := range f.all {
		if s.settings, err = c.readStruct("signer-config", s.config); err != nil {
			return err
		}
		if s.slots, err = secretSlots("secret", parent, s.secrets); err != nil {
			return err
		}
	}
	return nil
}

// merge changes signers as the flags say and returns the new list. Without --signer the flags are about the
// first of them. With it, the flags name all signers there are to be: one that is there already keeps the
// settings and secrets that no flag replaces.
func (f *signerFlags) merge(now []*grapnelv1.PluginBinding) []*grapnelv1.PluginBinding {
	left := slices.Clone(now)
	if !f.all[0].named {
		if len(left) == 0 {
			left = []*grapnelv1.PluginBinding{{}}
		}
		left[0] = f.all[0].change(left[0])
		return left
	}
	var out []*grapnelv1.PluginBinding
	for _, s := range f.all {
		from := &grapnelv1.PluginBinding{}
		if i := slices.IndexFunc(left, func(b *grapnelv1.PluginBinding) bool { return b.GetPlugin() == s.plugin }); i >= 0 {
			from = left[i]
			left = slices.Delete(left, i, i+1)
		}
		out = append(out, s.change(from))
	}
	return out
}

// change returns a copy of b with what the flags give.
func (s *signerFlag) change(b *grapnelv1.PluginBinding) *grapnelv1.PluginBinding {
	b = proto.CloneOf(b)
	if s.named {
		b.Plugin = s.plugin
	}
	if s.configured {
		b.Config = s.settings
	}
	if s.filled {
		b.Secrets = s.slots
	}
	return b
}

// maxUpdates is how often update tries to change signers that others change, too.
const maxUpdates = 5

// update stores a change. Signers are one field, so those that are stored are read first and changed as the
// flags say, on condition that nobody else has changed them since.
func (f *subscriptionFlags) update(ctx context.Context, cl *client.Client, r *grapnelv1.UpdateSubscriptionRequest) (*grapnelv1.UpdateSubscriptionResponse, error) {
	if !slices.Contains(r.GetUpdateMask().GetPaths(), signersPath) {
		return cl.SubscriptionService().UpdateSubscription(ctx, r)
	}
	given := r.GetSubscription().GetEtag()
	for try := 1; ; try++ {
		answer, err := cl.SubscriptionService().GetSubscription(ctx, &grapnelv1.GetSubscriptionRequest{Name: r.GetSubscription().GetName()})
		now := answer.GetSubscription()
		switch {
		case errors.Is(err, client.ErrNotFound) && r.GetAllowMissing():
			r.Subscription.Etag = given
		case err != nil:
			return nil, err
		default:
			r.Subscription.Etag = cmp.Or(given, now.GetEtag())
		}
		r.Subscription.Signers = f.signers.merge(now.GetSigners())
		updated, err := cl.SubscriptionService().UpdateSubscription(ctx, r)
		if err == nil || given != "" || try == maxUpdates || !errors.Is(err, client.ErrEtagMismatch) {
			return updated, err
		}
	}
}
