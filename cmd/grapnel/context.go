package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"
)

// contexts are servers by name, in a file of the user's own. No secret is in it; a token is in a file that it names.
type contexts struct {
	Current  string                    `yaml:"current,omitempty"`
	Contexts map[string]*serverContext `yaml:"contexts,omitempty"`
}

// serverContext is what the flags of the same names would say.
type serverContext struct {
	Addr      string `yaml:"addr,omitempty"`
	TLS       bool   `yaml:"tls,omitempty"`
	TLSCA     string `yaml:"tls-ca,omitempty"`
	TokenFile string `yaml:"token-file,omitempty"`
	Namespace string `yaml:"namespace,omitempty"`
}

// contextsFile is GRAPNEL_CONTEXTS, or grapnel/contexts.yaml where the system keeps settings of programs; empty where it
// keeps none, as for a process without a home.
func (c *cli) contextsFile() string {
	if path, _ := c.lookupEnv("GRAPNEL_CONTEXTS"); path != "" {
		return path
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, "grapnel", "contexts.yaml")
}

// readContexts reads the file; one that is absent holds none.
func (c *cli) readContexts() (contexts, string, error) {
	var all contexts
	path := c.contextsFile()
	if path == "" {
		return all, "", nil
	}
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.ENOTDIR):
		return all, path, nil // also a home that this user has not
	case err != nil:
		return all, path, usagef("read contexts: %w", err)
	}
	if info, err := os.Stat(path); err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		fmt.Fprintf(c.stderr, "warning: contexts in %s are open to others (mode %#o); chmod 600 it\n", path, info.Mode().Perm())
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&all); err != nil && len(bytes.TrimSpace(text)) > 0 {
		return all, path, usagef("%s: %s", path, yamlText(err))
	}
	for name, one := range all.Contexts {
		if one == nil {
			return all, path, usagef("%s: context %q is empty", path, name)
		}
	}
	return all, path, nil
}

// yamlText is the library's first complaint, without names of Go's types.
func yamlText(err error) string {
	text := strings.TrimPrefix(err.Error(), "yaml: unmarshal errors:\n  ")
	text, _, _ = strings.Cut(text, "\n")
	text, _, _ = strings.Cut(text, " in type ")
	return text
}

// write replaces the file in one step; nobody else can read it.
func (all contexts) write(path string) error {
	if path == "" {
		return usagef("there is no place for contexts: set GRAPNEL_CONTEXTS to a file")
	}
	text, err := yaml.Marshal(all)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	file, err := os.CreateTemp(dir, ".contexts-*") // made with mode 0600
	if err != nil {
		return fmt.Errorf("write contexts: %w", err)
	}
	_, err = file.Write(text)
	err = errors.Join(err, file.Close())
	if err == nil {
		err = os.Rename(file.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write contexts: %w", err), os.Remove(file.Name()))
	}
	return nil
}

func (all contexts) names() []string { return slices.Sorted(maps.Keys(all.Contexts)) }

// find returns the context of that name.
func (all contexts) find(name string) (*serverContext, error) {
	if found := all.Contexts[name]; found != nil {
		return found, nil
	}
	return nil, usagef("there is no context %q%s; see grapnel context list", name, didYouMean(name, all.names()))
}

// applyContext sets the flags that were not given from the context: --context, or the current one. Address, TLS and token
// are one thing: where an address was given, those of the context stay out, for its token is for its server.
func (c *cli) applyContext(cmd *cobra.Command) error {
	flags := cmd.Flags()
	if flags.Lookup("context") == nil || flags.Lookup("addr") == nil {
		return nil
	}
	all, _, err := c.readContexts()
	if err != nil {
		return err
	}
	name := all.Current
	if c.context != "" {
		name = c.context
	}
	if name == "" {
		return nil
	}
	one, err := all.find(name)
	if err != nil {
		return err
	}
	if one.Namespace != "" && flags.Lookup("namespace") != nil && !flags.Changed("namespace") {
		if err := flags.Set("namespace", one.Namespace); err != nil {
			return err
		}
	}
	if one.Addr == "" || flags.Changed("addr") {
		return nil
	}
	for flag, value := range map[string]string{
		"addr": one.Addr, "tls": strconv.FormatBool(one.TLS), "tls-ca": one.TLSCA, "token-file": one.TokenFile,
	} {
		if !flags.Changed(flag) {
			if err := flags.Set(flag, value); err != nil {
				return err
			}
		}
	}
	return nil
}

func newContextCommand(c *cli) *cobra.Command {
	cmd := group("context", "Servers by name: address, TLS, token and namespace",
		newContextSet(c), newContextUse(c), newContextList(c), newContextDelete(c))
	cmd.Long = `A context is a server by name: its address, how to connect, and the namespace to work in. Client commands use the one
that --context (GRAPNEL_CONTEXT) names, or else the one in use. Flags go before a context, and so does the environment, unless
--context was given; where an address was given, the context's TLS and token are not used with it.

They are kept in grapnel/contexts.yaml where the system keeps settings, or in the file that GRAPNEL_CONTEXTS names.`
	cmd.Aliases = []string{"contexts"}
	return cmd
}

func completeContexts(c *cli) cobra.CompletionFunc {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		all, _, err := c.readContexts()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return all.names(), cobra.ShellCompDirectiveNoFileComp
	}
}

func newContextSet(c *cli) *cobra.Command {
	var given serverContext
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Add a context, or change what the flags name", Args: exactly("NAME"),
		Example: "  grapnel context set staging --addr grapnel.staging.example.com:7070 --tls --token-file ~/.grapnel-token\n" +
			"  grapnel context set staging --namespace acme",
		ValidArgsFunction: firstArg(completeContexts(c)),
	}
	flags := cmd.Flags()
	flags.StringVar(&given.Addr, "addr", "", "address of the server's public API")
	flags.BoolVar(&given.TLS, "tls", false, "connect with TLS and the system's roots")
	flags.StringVar(&given.TLSCA, "tls-ca", "", "connect with TLS and the roots in this PEM `file`")
	flags.StringVar(&given.TokenFile, "token-file", "", "send the bearer token in this `file`; needs TLS")
	flags.StringVarP(&given.Namespace, "namespace", "n", "", "namespace to work in")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if args[0] == "" {
			return usagef("an empty name is no name of a context")
		}
		all, path, err := c.readContexts()
		if err != nil {
			return err
		}
		one, what := all.Contexts[args[0]], "changed"
		if one == nil {
			one, what = &serverContext{}, "added"
		}
		if err := one.change(cmd, given); err != nil {
			return err
		}
		if all.Contexts == nil {
			all.Contexts = map[string]*serverContext{}
		}
		all.Contexts[args[0]] = one
		if err := all.write(path); err != nil {
			return err
		}
		c.said("%s context %s", what, args[0])
		return nil
	}
	return cmd
}

// change takes over what the flags give, and refuses what would never connect.
func (one *serverContext) change(cmd *cobra.Command, given serverContext) error {
	changed := cmd.Flags().Changed
	if changed("addr") {
		one.Addr = given.Addr
	}
	if changed("tls") {
		one.TLS = given.TLS
	}
	for _, file := range []struct {
		flag, value string
		to          *string
	}{{"tls-ca", given.TLSCA, &one.TLSCA}, {"token-file", given.TokenFile, &one.TokenFile}} {
		if !changed(file.flag) {
			continue
		}
		*file.to = file.value
		if file.value != "" { // it is read from any directory
			path, err := filepath.Abs(file.value)
			if err != nil {
				return err
			}
			*file.to = path
		}
	}
	if changed("namespace") {
		one.Namespace = given.Namespace
	}
	if one.Addr == "" {
		return usagef("--addr is required: the address of the server's public API, such as grapnel.example.com:7070")
	}
	if _, err := target(one.Addr); err != nil {
		return err
	}
	if one.TokenFile != "" && !one.TLS && one.TLSCA == "" {
		return usagef("--token-file needs --tls or --tls-ca: a token is never sent in the clear")
	}
	if one.Namespace != "" {
		return checkID("--namespace", namespaces, one.Namespace)
	}
	return nil
}

func newContextUse(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "use NAME", Short: "Use a context from now on", Args: exactly("NAME"), ValidArgsFunction: firstArg(completeContexts(c)),
		RunE: func(_ *cobra.Command, args []string) error {
			return c.editContext(args[0], "using", func(all *contexts) { all.Current = args[0] })
		},
	}
}

func newContextDelete(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME", Short: "Forget a context", Args: exactly("NAME"), ValidArgsFunction: firstArg(completeContexts(c)),
		RunE: func(_ *cobra.Command, args []string) error {
			return c.editContext(args[0], "deleted", func(all *contexts) {
				delete(all.Contexts, args[0])
				if all.Current == args[0] {
					all.Current = ""
				}
			})
		},
	}
}

// editContext has edit change the file for the sake of a context that is in it, and says that it is done.
func (c *cli) editContext(name, done string, edit func(*contexts)) error {
	all, path, err := c.readContexts()
	if err != nil {
		return err
	}
	if _, err := all.find(name); err != nil {
		return err
	}
	edit(&all)
	if err := all.write(path); err != nil {
		return err
	}
	c.said("%s context %s", done, name)
	return nil
}

func newContextList(c *cli) *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Short: "List contexts; * is the one in use", Aliases: []string{"ls"}, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			all, _, err := c.readContexts()
			if err != nil {
				return err
			}
			return c.showContexts(all)
		},
	}
	cmd.Flags().StringVarP(&c.output, "output", "o", formatTable, "table or json")
	must(cmd.RegisterFlagCompletionFunc("output", completeFormats))
	return plain(cmd)
}

// listedContext is a context as JSON shows it.
type listedContext struct {
	Name      string `json:"name"`
	InUse     bool   `json:"inUse"`
	Addr      string `json:"addr"`
	TLS       bool   `json:"tls"`
	TLSCA     string `json:"tlsCa,omitempty"`
	TokenFile string `json:"tokenFile,omitempty"`
	Namespace string `json:"namespace,omitempty"`
}

func (c *cli) showContexts(all contexts) error {
	if c.output == formatJSON {
		encoder := json.NewEncoder(c.stdout)
		for _, name := range all.names() {
			one := all.Contexts[name]
			if err := encoder.Encode(listedContext{
				name, name == all.Current, one.Addr, one.TLS || one.TLSCA != "", one.TLSCA, one.TokenFile, one.Namespace,
			}); err != nil {
				return err
			}
		}
		return nil
	}
	if len(all.Contexts) == 0 {
		fmt.Fprintln(c.stderr, "none found; grapnel context set adds one")
		return nil
	}
	w := tabwriter.NewWriter(c.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "USED\tNAME\tADDRESS\tTLS\tTOKEN FILE\tNAMESPACE")
	for _, name := range all.names() {
		one, used := all.Contexts[name], "-"
		if name == all.Current {
			used = "*"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", used, clean(name), clean(one.Addr), yesNo(one.TLS || one.TLSCA != ""),
			cmp.Or(clean(one.TokenFile), "-"), cmp.Or(clean(one.Namespace), "-"))
	}
	return w.Flush()
}

// yesOnly is empty for no, which then is not shown.
func yesOnly(b bool) string {
	if b {
		return "yes"
	}
	return ""
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
