package main

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/sdk/client"
)

func newSecretCommand(c *cli) *cobra.Command {
	cmd := group("secret", "Keys that requests are signed with",
		newSecretCreate(c), newSecretGet(c), newSecretList(c), newSecretRotate(c), newSecretDelete(c))
	cmd.Aliases = []string{"secrets"}
	return c.connectFlags(cmd, true)
}

func secretColumns() []column[*grapnelv1.Secret] {
	type secret = *grapnelv1.Secret
	return []column[secret]{
		{head: "ID", value: func(s secret) string { return lastSegment(s.GetName()) }},
		{head: "NAME", detail: true, value: secret.GetName},
		{head: "KIND", value: func(s secret) string { return enumText(s.GetKind()) }},
		{head: "VERSIONS", value: versionsText},
		{head: "PUBLIC KEYS", detail: true, value: func(s secret) string { return strings.Join(s.GetPublicKeys(), " ") }},
		{head: "CREATED", detail: true, value: func(s secret) string { return timeText(s.GetCreateTime()) }},
		{head: "AGE", value: func(s secret) string { return age(s.GetCreateTime()) }},
		{head: "ETAG", detail: true, value: secret.GetEtag},
	}
}

func versionsText(s *grapnelv1.Secret) string {
	var words []string
	for _, v := range s.GetVersions() {
		word := fmt.Sprintf("%d:%s", v.GetVersion(), v.GetFingerprint())
		if v.GetExpireTime() != nil {
			word += fmt.Sprintf(" (until %s)", timeText(v.GetExpireTime()))
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

func completeSecrets(c *cli) cobra.CompletionFunc {
	return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.Secret, error] {
		return cl.Secrets(ctx, c.namespace)
	})
}

// value reads what --value means. A newline at the end, which editors and echo add, is no part of a secret
// unless the kind is opaque.
func (c *cli) secretValue(value string, opaque bool) (string, error) {
	if value == "" {
		return "", nil
	}
	text, err := c.readValue(value)
	if err != nil {
		return "", fmt.Errorf("read --value: %w", err)
	}
	if opaque {
		return string(text), nil
	}
	return strings.TrimSpace(string(text)), nil
}

// showSecret prints the metadata and, this once, a value that the server made. In JSON both are one object,
// so that a script can take the value; the warning goes to stderr in either case.
func (c *cli) showSecret(answer interface {
	GetSecret() *grapnelv1.Secret
	GetGeneratedValue() string
}, whole func() error) error {
	if answer.GetGeneratedValue() != "" {
		fmt.Fprintln(c.stderr, "warning: the value is shown this once and cannot be read again; store it now")
	}
	if c.output == "json" {
		return whole()
	}
	if err := show(c, answer.GetSecret(), secretColumns()); err != nil {
		return err
	}
	if answer.GetGeneratedValue() == "" {
		return nil
	}
	_, err := fmt.Fprintf(c.stdout, "Value:  %s\n", answer.GetGeneratedValue())
	return err
}

func newSecretCreate(c *cli) *cobra.Command {
	var kind, value string
	cmd := &cobra.Command{
		Use: "create ID", Short: "Store a key, or have one made and see it once", Args: oneID,
		Example: `  grapnel secret create orders-key -n acme
  grapnel secret create old-key -n acme --value @key.txt
  grapnel secret create pair -n acme --kind ed25519`,
	}
	cmd.Flags().StringVar(&kind, "kind", "hmac", "hmac, ed25519 or opaque")
	cmd.Flags().StringVar(&value, "value", "", "`@file` or - for standard input; empty makes one")
	must(cmd.RegisterFlagCompletionFunc("kind", fixed("hmac", "ed25519", "opaque")))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		parent, id, err := c.created(secrets, args[0])
		if err != nil {
			return err
		}
		number, ok := grapnelv1.Secret_Kind_value["KIND_"+strings.ToUpper(kind)]
		if !ok || number == 0 {
			return usagef("--kind %s: must be hmac, ed25519 or opaque", kind)
		}
		text, err := c.secretValue(value, kind == "opaque")
		if err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.SecretService().CreateSecret(ctx, &grapnelv1.CreateSecretRequest{
				Parent: parent, SecretId: id, Kind: grapnelv1.Secret_Kind(number), Value: text,
			})
			if err != nil {
				return err
			}
			return c.showSecret(r, func() error { return show(c, r, nil) })
		})
	}
	return cmd
}

func newSecretGet(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "get ID", Short: "Show a secret's metadata, never its value",
		Args: oneID, ValidArgsFunction: firstArg(completeSecrets(c)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := c.name(secrets, args[0])
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				r, err := cl.SecretService().GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: name})
				if err != nil {
					return err
				}
				return show(c, r.GetSecret(), secretColumns())
			})
		},
	}
}

func newSecretList(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List secrets", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ns, err := c.namespaceID()
			if err != nil {
				return err
			}
			return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
				return list(c, cl.Secrets(ctx, ns), 0, secretColumns())
			})
		},
	}
}

func newSecretRotate(c *cli) *cobra.Command {
	var value, etag string
	var overlap time.Duration
	cmd := &cobra.Command{
		Use: "rotate ID", Short: "Add a new version; the old one stays in use for a while",
		Args: oneID, ValidArgsFunction: firstArg(completeSecrets(c)),
		Example: "  grapnel secret rotate orders-key -n acme --overlap 48h",
	}
	cmd.Flags().StringVar(&value, "value", "", "`@file` or - for standard input; empty makes one")
	cmd.Flags().DurationVar(&overlap, "overlap", 24*time.Hour, "how long the old version stays in use, up to 168h")
	cmd.Flags().StringVar(&etag, "etag", "", "fail unless this is the current etag; makes a retry safe")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		name, err := c.name(secrets, args[0])
		if err != nil {
			return err
		}
		text, err := c.secretValue(value, false)
		if err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			r, err := cl.SecretService().RotateSecret(ctx, &grapnelv1.RotateSecretRequest{
				Name: name, Value: text, Overlap: durationpb.New(overlap), Etag: etag,
			})
			if err != nil {
				return err
			}
			return c.showSecret(r, func() error { return show(c, r, nil) })
		})
	}
	return cmd
}

func newSecretDelete(c *cli) *cobra.Command {
	r := &grapnelv1.DeleteSecretRequest{}
	cmd := &cobra.Command{
		Use: "delete ID", Short: "Remove a secret that nothing refers to",
		Args: oneID, ValidArgsFunction: firstArg(completeSecrets(c)),
	}
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&r.AllowMissing, "allow-missing", false, "succeed when it is already gone")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(secrets, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.SecretService().DeleteSecret(ctx, r)
			if err != nil {
				return err
			}
			if c.output == "json" {
				return show(c, answer, nil)
			}
			c.said("%s deleted", r.Name)
			return nil
		})
	}
	return cmd
}
