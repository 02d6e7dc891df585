package main

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// bounded is a flag's number or duration that has a least and a most; a most of 0 is none.
type bounded[N int | int32 | time.Duration] struct {
	value       *N
	least, most N
	kind        string // what the help calls it
	parse       func(string) (N, error)
}

func (b *bounded[N]) Type() string { return b.kind }

func (b *bounded[N]) String() string {
	if b.value == nil {
		return ""
	}
	return fmt.Sprint(*b.value)
}

func (b *bounded[N]) Set(text string) error {
	n, err := b.parse(text)
	if err == nil && (n < b.least || b.most != 0 && n > b.most) {
		err = errors.New("out of range")
	}
	if err != nil {
		return err
	}
	*b.value = n
	return nil
}

// wants says what the flag takes.
func (b *bounded[N]) wants() string {
	if b.kind == "duration" {
		least := shortDuration(time.Duration(b.least))
		if b.most != 0 {
			return fmt.Sprintf("a duration from %s to %s", least, shortDuration(time.Duration(b.most)))
		}
		return fmt.Sprintf("a duration of %s or more, such as 30s", least)
	}
	return fmt.Sprintf("a whole number from %d to %d", b.least, b.most)
}

// countVar is IntVar with bounds.
func countVar[N int | int32](flags *pflag.FlagSet, to *N, name string, value, least, most N, usage string) {
	*to = value
	if most == 0 {
		most = math.MaxInt32
	}
	flags.Var(&bounded[N]{value: to, least: least, most: most, kind: "int", parse: func(text string) (N, error) {
		n, err := strconv.ParseInt(text, 10, 32)
		return N(n), err
	}}, name, usage)
}

// spanVar is DurationVar with bounds.
func spanVar(flags *pflag.FlagSet, to *time.Duration, name string, value, least, most time.Duration, usage string) {
	*to = value
	flags.Var(&bounded[time.Duration]{value: to, least: least, most: most, kind: "duration", parse: time.ParseDuration}, name, usage)
}

// flagError says in words what is wrong with a flag of the command line.
func flagError(cmd *cobra.Command, err error) error {
	see := fmt.Sprintf("; see %s --help", cmd.CommandPath())
	var unknown *pflag.NotExistError
	var bare *pflag.ValueRequiredError
	var wrong *pflag.InvalidValueError
	switch {
	case errors.As(err, &unknown):
		near := ""
		if name := closest(unknown.GetSpecifiedName(), flagNames(cmd)); name != "" && len(unknown.GetSpecifiedName()) > 1 {
			near = fmt.Sprintf("; did you mean --%s?", name)
		}
		return usagef("%w%s%s", err, near, see)
	case errors.As(err, &bare):
		return usagef("--%s wants a value, %s%s", bare.GetFlag().Name, wanted(bare.GetFlag()), see)
	case errors.As(err, &wrong):
		var told usageError
		if errors.As(err, &told) {
			return usagef("--%s %w%s", wrong.GetFlag().Name, told, see)
		}
		return usagef("--%s %s: must be %s%s", wrong.GetFlag().Name, wrong.GetValue(), wanted(wrong.GetFlag()), see)
	}
	return usagef("%w%s", err, see)
}

// wanted says what a flag takes, where the flag library would tell of strconv.
func wanted(flag *pflag.Flag) string {
	if own, ok := flag.Value.(interface{ wants() string }); ok {
		return own.wants()
	}
	switch flag.Value.Type() {
	case "int", "int32":
		return "a whole number"
	case "float64":
		return "a number"
	case "duration":
		return "a duration such as 30s"
	case "size":
		return "a size such as 64MiB"
	case "bool":
		return "true or false"
	}
	name, _ := pflag.UnquoteUsage(flag)
	return "a " + cmp.Or(name, flag.Value.Type())
}

// wrongValue is about a value from the environment or a file.
func wrongValue(flag *pflag.Flag, value string) error {
	return fmt.Errorf("%q is not %s", value, wanted(flag))
}

// excludes refuses any of the others beside flag, where flag was given; why says what sense there is in that.
func excludes(cmd *cobra.Command, flag, why string, others ...string) error {
	if !cmd.Flags().Changed(flag) {
		return nil
	}
	for _, other := range others {
		if cmd.Flags().Changed(other) {
			return usagef("--%s and --%s exclude each other: %s", flag, other, why)
		}
	}
	return nil
}

// needs refuses flag without what.
func needs(cmd *cobra.Command, flag, what string) error {
	if cmd.Flags().Changed(flag) && !cmd.Flags().Changed(what) {
		return usagef("--%s goes with --%s only", flag, what)
	}
	return nil
}

// didYouMean suggests the candidate that a misspelt word may mean: "; did you mean x?", or nothing.
func didYouMean(word string, candidates []string) string {
	if near := closest(word, candidates); near != "" {
		return fmt.Sprintf("; did you mean %q?", near)
	}
	return ""
}

// closest is the candidate with the fewest other letters, at most two and fewer than half of them; or "".
func closest(word string, candidates []string) string {
	word = strings.ReplaceAll(strings.ToLower(word), "_", "-")
	best, bestDistance := "", min(3, len(word)/2+1)
	for _, name := range slices.Sorted(slices.Values(candidates)) {
		if d := distance(word, name); d < bestDistance {
			best, bestDistance = name, d
		}
	}
	return best
}

// either joins words as a sentence does: a, b or c.
func either(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

// thousands writes 13112 as 13,112.
func thousands[N int | int32 | int64](n N) string {
	text := strconv.FormatInt(int64(n), 10)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// several is a number and its noun: 1 subscription, 2 subscriptions.
func several[N int | int32 | int64](n N, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return thousands(n) + " " + more
}
