package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"gopkg.in/yaml.v3"
)

// environmentFlag reports whether a flag can be set by the environment too; of the server, all can.
func environmentFlag(cmd *cobra.Command, name string) bool {
	if cmd.Name() == "server" {
		return configurable(cmd, name)
	}
	return clientEnvironment(name) && cmd.Flags().Lookup(name) != nil && !strings.HasPrefix(cmd.CommandPath(), "grapnel context ")
}

// clientEnvironment reports whether the flag of a client command can be set by the environment.
func clientEnvironment(flag string) bool {
	switch flag {
	case "addr", "admin-addr", "context", "namespace", "output", "plugin-dir", "tls", "tls-ca", "token-file", "timeout":
		return true
	}
	return false
}

// environmentName is GRAPNEL_ and the flag's name in capitals.
func environmentName(flag string) string {
	return "GRAPNEL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// applyEnvironment sets the flags that were not given from the environment.
func (c *cli) applyEnvironment(cmd *cobra.Command) error {
	for _, name := range flagNames(cmd) {
		if !environmentFlag(cmd, name) || cmd.Flags().Changed(name) {
			continue
		}
		value, ok := c.lookupEnv(environmentName(name))
		if !ok || value == "" {
			continue
		}
		if err := cmd.Flags().Set(name, value); err != nil {
			return usagef("environment variable %s: %w", environmentName(name), wrongValue(cmd.Flags().Lookup(name), value))
		}
	}
	return nil
}

// flagNames are the names of a command's flags, in order.
func flagNames(cmd *cobra.Command) []string {
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}

// configurable reports whether a flag of the server may stand in its file and in the environment; not what is meant for
// one start.
func configurable(cmd *cobra.Command, name string) bool {
	switch name {
	case "help", "print-config", "adopt-stores", "accept-loss":
		return false
	}
	return cmd.Flags().Lookup(name) != nil
}

// applyFile sets the flags that were given neither on the command line nor by the environment from a YAML
// file whose keys are flag names. Everything that is wrong with the file is reported, each with its line.
// Values are tried on scratch first, a command of the same flags that is not run.
func applyFile(cmd, scratch *cobra.Command, path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return usagef("read configuration: %w", err)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var document yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return usagef("%s: %w", path, err)
	}
	root := document.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return usagef("%s:%d: must be a mapping of flag names to values", path, root.Line)
	}
	var faults []error
	seen := map[string]int{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		if line, again := seen[key.Value]; again {
			faults = append(faults, fmt.Errorf("%s:%d: %q is set twice, first on line %d", path, key.Line, key.Value, line))
			continue
		}
		seen[key.Value] = key.Line
		if err := applyKey(cmd, scratch, key.Value, value); err != nil {
			faults = append(faults, fmt.Errorf("%s:%d: %w", path, key.Line, err))
		}
	}
	if len(faults) > 0 {
		return usageError{errors.Join(faults...)}
	}
	return nil
}

func applyKey(cmd, scratch *cobra.Command, key string, value *yaml.Node) error {
	if !configurable(cmd, key) || key == "config" {
		return fmt.Errorf("unknown key %q%s", key, nearest(cmd, key))
	}
	text, err := scalarText(value)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	// Checked even where something stronger overrides it: a wrong file should not wait to be found.
	if err := scratch.Flags().Set(key, text); err != nil {
		return fmt.Errorf("%s: %w", key, wrongValue(scratch.Flags().Lookup(key), text))
	}
	if cmd.Flags().Changed(key) {
		return nil
	}
	return cmd.Flags().Set(key, text)
}

// scalarText is a value as it would be written on the command line; a list is joined by commas.
func scalarText(n *yaml.Node) (string, error) {
	switch n.Kind {
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return "", nil
		}
		return n.Value, nil
	case yaml.SequenceNode:
		items := make([]string, len(n.Content))
		for i, item := range n.Content {
			if item.Kind != yaml.ScalarNode {
				return "", errors.New("must be a list of plain values")
			}
			items[i] = item.Value
		}
		return strings.Join(items, ","), nil
	}
	return "", errors.New("must be a plain value or a list")
}

// nearest suggests the flag that a misspelt key may mean.
func nearest(cmd *cobra.Command, key string) string {
	return didYouMean(key, slices.DeleteFunc(flagNames(cmd), func(name string) bool { return !configurable(cmd, name) }))
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		previous := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := previous
			if a[i] != b[j] {
				cost++
			}
			previous = row[j+1]
			row[j+1] = min(cost, row[j]+1, previous+1)
		}
	}
	return row[len(b)]
}

// parsePairs turns k=v words into a map.
func parsePairs(flag string, words []string) (map[string]string, error) {
	pairs := make(map[string]string, len(words))
	for _, word := range words {
		k, v, ok := strings.Cut(word, "=")
		if !ok || k == "" {
			return nil, usagef("--%s %s: must look like name=value", flag, withoutValue(word))
		}
		pairs[k] = v
	}
	return pairs, nil
}

// withoutValue is a word up to where its value may begin, which may be a secret.
func withoutValue(word string) string {
	if i := strings.IndexAny(word, ":= "); i >= 0 {
		return word[:i] + "…"
	}
	return word
}

// pairsText is the reverse of parsePairs, in order.
func pairsText(pairs map[string]string) string {
	var words []string
	for _, k := range slices.Sorted(maps.Keys(pairs)) {
		words = append(words, k+"="+pairs[k])
	}
	return strings.Join(words, " ")
}
