package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"strings"
	"time"
	"unicode/utf8"

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
		{head: "PLUGIN", value: secretPlugin},
		{head: "ALGORITHM", value: func(s secret) string { return newestVersion(s).GetAlgorithm() }},
		{head: "VERSIONS", value: versionsText},
		{head: "KEY IDS", detail: true, value: keyIDsText},
		{head: "PUBLIC KEYS", detail: true, value: publicKeysText},
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

// secretPlugin names the plugin that a secret is for, and its slot where that is not the usual one.
func secretPlugin(s *grapnelv1.Secret) string {
	id := lastSegment(s.GetPlugin())
	if slot := s.GetSlot(); slot != "" && slot != usualSlot {
		return id + "/" + slot
	}
	return id
}

func newestVersion(s *grapnelv1.Secret) *grapnelv1.SecretVersion {
	if versions := s.GetVersions(); len(versions) > 0 {
		return versions[0]
	}
	return nil
}

func keyIDsText(s *grapnelv1.Secret) string {
	var words []string
	for _, v := range s.GetVersions() {
		if v.GetKeyId() != "" {
			words = append(words, fmt.Sprintf("%d:%s", v.GetVersion(), v.GetKeyId()))
		}
	}
	return strings.Join(words, ", ")
}

// publicKeysText lists the public keys that fit on a line; showPublicKeys prints the others.
func publicKeysText(s *grapnelv1.Secret) string {
	var words []string
	for _, v := range s.GetVersions() {
		if key := strings.TrimSpace(v.GetPublicKey()); key != "" && !strings.Contains(key, "\n") {
			words = append(words, key)
		}
	}
	return strings.Join(words, " ")
}

// showSecretMetadata prints one secret; in a table, public keys of several lines stand below it as they are.
func (c *cli) showSecretMetadata(s *grapnelv1.Secret) error {
	if err := show(c, s, secretColumns()); err != nil || c.forPrograms() {
		return err
	}
	for _, v := range s.GetVersions() {
		key := strings.TrimSpace(v.GetPublicKey())
		if !strings.Contains(key, "\n") {
			continue
		}
		if _, err := fmt.Fprintf(c.stdout, "Public key of version %d:\n", v.GetVersion()); err != nil {
			return err
		}
		for line := range strings.SplitSeq(key, "\n") {
			if _, err := fmt.Fprintln(c.stdout, clean(line)); err != nil {
				return err
			}
		}
	}
	return nil
}

func completeSecrets(c *cli) cobra.CompletionFunc {
	return complete(c, func(ctx context.Context, cl *client.Client) iter.Seq2[*grapnelv1.Secret, error] {
		return cl.Secrets(ctx, c.namespace)
	})
}

// valueFlags are those that give a key.
func valueFlags(cmd *cobra.Command, value *string, literal *bool) {
	cmd.Flags().StringVar(value, "value", "", "the key: `@file`, or - for standard input; without it one is made")
	cmd.Flags().BoolVar(literal, "literal", false, "--value is the key itself; others can read it in the shell's history and in the list of processes")
}

// secretValue reads what --value means. A newline at the end, which editors and echo add, is no part of a secret
// unless the kind is opaque. Errors never show what may be a key.
func (c *cli) secretValue(cmd *cobra.Command, value string, literal, opaque bool) (string, error) {
	if err := needs(cmd, "literal", "value"); err != nil || !cmd.Flags().Changed("value") {
		return "", err
	}
	if value == "" {
		return "", usagef("--value is empty: want @FILE or - for standard input; without --value a key is made")
	}
	text := []byte(value)
	if !literal {
		if value != "-" && !strings.HasPrefix(value, "@") {
			if _, err := os.Stat(value); err == nil {
				return "", usagef("--value takes @FILE or - for standard input; there is a file %s: did you mean --value @%s?", value, value)
			}
			return "", usagef("--value takes @FILE or - for standard input, for the command line is no place for keys; --literal takes what is given as the key itself")
		}
		var err error
		if text, err = c.readValue(value); err != nil {
			return "", fmt.Errorf("read --value: %w", err)
		}
	}
	if !opaque {
		text = bytes.TrimSpace(text)
	}
	if len(text) == 0 {
		return "", usagef("--value %s: there is nothing in it", value)
	}
	if !utf8.Valid(text) {
		return "", usagef("--value: it is not UTF-8 text; a key of bytes is written as its scheme has it, such as whsec_ and base64")
	}
	return string(text), nil
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
	if c.forPrograms() {
		return whole()
	}
	if err := c.showSecretMetadata(answer.GetSecret()); err != nil {
		return err
	}
	if answer.GetGeneratedValue() == "" {
		return nil
	}
	between := "  "
	if strings.Contains(strings.TrimSpace(answer.GetGeneratedValue()), "\n") {
		between = "\n"
	}
	_, err := fmt.Fprintf(c.stdout, "Value:%s%s\n", between, strings.TrimRight(answer.GetGeneratedValue(), "\n"))
	return err
}

func newSecretCreate(c *cli) *cobra.Command {
	var kind, value string
	var literal bool
	r := &grapnelv1.CreateSecretRequest{}
	cmd := &cobra.Command{
		Use: "create ID", Short: "Store a key, or have one made and see it once", Args: oneID,
		Long: `Stores a key, or has one made and shows it once. With --plugin the plugin that is to use the key makes or
checks it, by the rules of its scheme; without, --kind says what it is.`,
		Example: `  grapnel secret create orders-key -n acme
  grapnel secret create stripe-key -n acme --plugin stripe
  grapnel secret create pair -n acme --plugin http-signature --algorithm ecdsa-p256-sha256
  grapnel secret create old-key -n acme --value @key.txt`,
	}
	cmd.Flags().StringVar(&kind, "kind", "hmac", "hmac, ed25519 or opaque; not with --plugin")
	cmd.Flags().StringVar(&r.Plugin, "plugin", "", "`plugin` that the key is for")
	cmd.Flags().StringVar(&r.Slot, "slot", "", "secret slot of --plugin; empty is its only one, or the only one it requires")
	cmd.Flags().StringVar(&r.Algorithm, "algorithm", "", "what --plugin is to make, such as ed25519; empty is its default")
	must(cmd.RegisterFlagCompletionFunc("plugin", completePlugins(c)))
	valueFlags(cmd, &value, &literal)
	must(cmd.RegisterFlagCompletionFunc("kind", fixed("hmac", "ed25519", "opaque")))
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Parent, r.SecretId, err = c.created(secrets, args[0]); err != nil {
			return err
		}
		if r.Kind, err = secretKind(kind, r.GetPlugin() != "", cmd.Flags().Changed("kind")); err != nil {
			return err
		}
		r.Plugin = pluginName(r.GetPlugin())
		if r.Value, err = c.secretValue(cmd, value, literal, r.GetKind() == grapnelv1.Secret_KIND_OPAQUE); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			answer, err := cl.SecretService().CreateSecret(ctx, r)
			if err != nil {
				return err
			}
			return c.showSecret(answer, func() error { return show(c, answer, nil) })
		})
	}
	return cmd
}

// secretKind reads --kind, which has no say in a plugin's keys.
func secretKind(kind string, plugin, given bool) (grapnelv1.Secret_Kind, error) {
	if plugin {
		if given {
			return 0, usagef("--kind and --plugin exclude each other: a plugin knows its own keys")
		}
		return grapnelv1.Secret_KIND_UNSPECIFIED, nil
	}
	number, ok := grapnelv1.Secret_Kind_value["KIND_"+strings.ToUpper(kind)]
	if !ok || number == 0 {
		return 0, usagef("--kind %s: must be hmac, ed25519 or opaque%s", kind, didYouMean(kind, []string{"hmac", "ed25519", "opaque"}))
	}
	return grapnelv1.Secret_Kind(number), nil
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
				return c.showSecretMetadata(r.GetSecret())
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
	var value string
	var literal bool
	var overlap time.Duration
	r := &grapnelv1.RotateSecretRequest{}
	cmd := &cobra.Command{
		Use: "rotate ID", Short: "Add a new version; the old one stays in use for a while",
		Args: oneID, ValidArgsFunction: firstArg(completeSecrets(c)),
		Example: "  grapnel secret rotate orders-key -n acme --overlap 48h\n" +
			"  grapnel secret rotate pair -n acme --algorithm ed25519",
	}
	cmd.Flags().StringVar(&r.Algorithm, "algorithm", "", "what the secret's plugin is to make; empty is the same as before")
	valueFlags(cmd, &value, &literal)
	spanVar(cmd.Flags(), &overlap, "overlap", 24*time.Hour, 0, 168*time.Hour, "how long the old version stays in use, up to 168h")
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag; makes a retry safe")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(secrets, args[0]); err != nil {
			return err
		}
		if r.Value, err = c.secretValue(cmd, value, literal, true); err != nil {
			return err
		}
		r.Overlap = durationpb.New(overlap)
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			if trimmed := strings.TrimSpace(r.GetValue()); trimmed != r.GetValue() {
				now, err := cl.SecretService().GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: r.GetName()})
				if err != nil {
					return err
				}
				if s := now.GetSecret(); s.GetKind() != grapnelv1.Secret_KIND_OPAQUE || s.GetPlugin() != "" {
					r.Value = trimmed
				}
			}
			answer, err := cl.SecretService().RotateSecret(ctx, r)
			if err != nil {
				return err
			}
			return c.showSecret(answer, func() error { return show(c, answer, nil) })
		})
	}
	return cmd
}

// secretLoss is what a deletion takes away for good.
func (c *cli) secretLoss(ctx context.Context, cl *client.Client, name string) (string, error) {
	now, err := cl.SecretService().GetSecret(ctx, &grapnelv1.GetSecretRequest{Name: name})
	if errors.Is(err, client.ErrPermissionDenied) { // may delete, and not look
		return "its key", nil
	}
	if n := len(now.GetSecret().GetVersions()); n > 1 {
		return fmt.Sprintf("its key in %d versions, which cannot be read back", n), err
	}
	return "its key, which cannot be read back", err
}

func newSecretDelete(c *cli) *cobra.Command {
	r := &grapnelv1.DeleteSecretRequest{}
	var yes bool
	cmd := &cobra.Command{
		Use: "delete ID", Short: "Remove a secret that nothing refers to",
		Args: oneID, ValidArgsFunction: firstArg(completeSecrets(c)),
	}
	cmd.Flags().StringVar(&r.Etag, "etag", "", "fail unless this is the current etag")
	cmd.Flags().BoolVar(&r.AllowMissing, "allow-missing", false, "succeed when it is already gone")
	yesFlag(cmd, &yes)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var err error
		if r.Name, err = c.name(secrets, args[0]); err != nil {
			return err
		}
		return c.with(cmd, func(ctx context.Context, cl *client.Client) error {
			loss, err := c.secretLoss(ctx, cl, r.GetName())
			if err == nil {
				err = c.confirm(cmd.Context(), yes, r.GetName(), loss)
			}
			if err != nil && !(r.GetAllowMissing() && errors.Is(err, client.ErrNotFound)) {
				return err
			}
			answer, err := cl.SecretService().DeleteSecret(ctx, r)
			if err != nil {
				return err
			}
			if c.forPrograms() {
				return show(c, answer, nil)
			}
			c.said("%s deleted", r.Name)
			return nil
		})
	}
	return cmd
}
