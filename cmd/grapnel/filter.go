package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

// listFlags are shorthands for terms of a filter, alike for events and deliveries.
type listFlags struct {
	filter, since, until string
	types                []string
	limit                int
}

func (f *listFlags) register(cmd *cobra.Command, fields string) {
	f.registerTerms(cmd, fields)
	flags := cmd.Flags()
	flags.StringVar(&f.since, "since", "", "only from this `time` on: RFC 3339, or how long ago, such as 2h")
	flags.StringVar(&f.until, "until", "", "only from before this `time`: RFC 3339, or how long ago, such as 2h")
	countVar(flags, &f.limit, "limit", 100, 0, 0, "show at most this many; 0 shows all")
}

// registerTerms leaves out what is of lists only.
func (f *listFlags) registerTerms(cmd *cobra.Command, fields string) {
	flags := cmd.Flags()
	flags.StringVar(&f.filter, "filter", "", "`expression` over "+fields)
	flags.StringSliceVar(&f.types, "type", nil, "only of these event `types`; order.* stands for all that begin so")
}

// terms are the flags as terms of a filter over the fields of that name.
func (f *listFlags) terms(typeField, timeField string, now time.Time) (terms, error) {
	var all terms
	all.add(f.filter)
	all.add(anyOf(typeField, f.types, quoteTerm))
	for _, bound := range []struct{ flag, text, operator string }{{"since", f.since, ">="}, {"until", f.until, "<"}} {
		if bound.text == "" {
			continue
		}
		at, err := parsePast(bound.text, now)
		if err != nil {
			return nil, usagef("--%s: %w", bound.flag, err)
		}
		all.add(fmt.Sprintf("%s %s %q", timeField, bound.operator, at.UTC().Format(time.RFC3339Nano)))
	}
	return all, nil
}

// parsePast reads a time, or how long ago it was.
func parsePast(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	at, err := time.Parse(time.RFC3339Nano, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is neither RFC 3339, such as 2026-01-31T12:00:00Z, nor how long ago, such as 2h", text)
	}
	return at, nil
}

// terms of a filter, all of which must hold.
type terms []string

func (t *terms) add(term string) {
	if term != "" {
		*t = append(*t, "("+term+")")
	}
}

func (t terms) String() string { return strings.Join(t, " AND ") }

// anyOf is true of a field that is one of the values.
func anyOf(field string, values []string, write func(string) string) string {
	var words []string
	for _, value := range values {
		words = append(words, field+" = "+write(value))
	}
	return strings.Join(words, " OR ")
}

func quoteTerm(value string) string { return fmt.Sprintf("%q", value) }

func plainTerm(value string) string { return value }

// words are the values of an enum as flags take them: in-flight for STATE_IN_FLIGHT.
func words(names map[int32]string, prefix string) map[string][]string {
	known := map[string][]string{}
	for number, name := range names {
		if number != 0 {
			name = strings.TrimPrefix(name, prefix)
			known[strings.ToLower(strings.ReplaceAll(name, "_", "-"))] = []string{name}
		}
	}
	return known
}

// deliveryStates are the states that --state takes, and two words for several.
func deliveryStates() map[string][]string {
	states := words(grapnelv1.Delivery_State_name, "STATE_")
	states["open"] = []string{"PENDING", "SCHEDULED", "IN_FLIGHT"}
	states["failed"] = []string{"EXHAUSTED", "REJECTED"}
	return states
}

func attemptOutcomes() map[string][]string { return words(grapnelv1.Attempt_Outcome_name, "OUTCOME_") }

// pick turns what a flag gives into names of an enum's values.
func pick(flag string, given []string, known map[string][]string) ([]string, error) {
	var names []string
	for _, word := range given {
		found, ok := known[strings.ToLower(strings.ReplaceAll(word, "_", "-"))]
		if !ok {
			all := slices.Sorted(maps.Keys(known))
			return nil, usagef("--%s %s: must be one of %s%s", flag, word, strings.Join(all, ", "), didYouMean(word, all))
		}
		names = append(names, found...)
	}
	return names, nil
}

// deliveryFlags are the shorthands for deliveries.
type deliveryFlags struct {
	listFlags
	subscription, event string
	states, outcomes    []string
	code                int
	scheduled           bool
}

func (f *deliveryFlags) register(cmd *cobra.Command, c *cli) {
	f.listFlags.register(cmd, deliveryFields)
	f.registerOwn(cmd, c)
	cmd.Flags().BoolVar(&f.scheduled, "scheduled", false, "only those that are open and not to be attempted before a time still to come")
}

const deliveryFields = "state, subscription, subscription_uid, event, event_uid, event_type, trigger, replay_job, create_time, next_attempt_time, scheduled, " +
	"attempt_count, last_attempt.outcome, last_attempt.response_code"

// registerOwn leaves out what is of lists only.
func (f *deliveryFlags) registerOwn(cmd *cobra.Command, c *cli) {
	flags := cmd.Flags()
	flags.StringSliceVar(&f.states, "state", nil, "only in these `states`; open and failed stand for several")
	flags.StringVar(&f.subscription, "subscription", "", "only of this subscription")
	flags.StringVar(&f.event, "event", "", "only of this event")
	flags.StringSliceVar(&f.outcomes, "outcome", nil, "only whose last attempt had one of these `outcomes`")
	countVar(flags, &f.code, "code", 0, 0, 999, "only whose last attempt got this response code")
	must(cmd.RegisterFlagCompletionFunc("state", fixed(slices.Sorted(maps.Keys(deliveryStates()))...)))
	must(cmd.RegisterFlagCompletionFunc("outcome", fixed(slices.Sorted(maps.Keys(attemptOutcomes()))...)))
	must(cmd.RegisterFlagCompletionFunc("subscription", completeSubscriptions(c)))
}

// filter joins the flags.
func (f *deliveryFlags) filter(c *cli, now time.Time) (string, error) {
	all, err := f.terms("event_type", "create_time", now)
	if err != nil {
		return "", err
	}
	states, err := pick("state", f.states, deliveryStates())
	if err != nil {
		return "", err
	}
	all.add(anyOf("state", states, plainTerm))
	outcomes, err := pick("outcome", f.outcomes, attemptOutcomes())
	if err != nil {
		return "", err
	}
	all.add(anyOf("last_attempt.outcome", outcomes, plainTerm))
	if f.scheduled {
		all.add("scheduled = true")
	}
	if f.code != 0 {
		all.add(fmt.Sprintf("last_attempt.response_code = %d", f.code))
	}
	for _, reference := range []struct {
		field, value string
		of           collection
	}{{"subscription", f.subscription, subscriptions}, {"event", f.event, events}} {
		if reference.value == "" {
			continue
		}
		name, err := c.name(reference.of, reference.value)
		if err != nil {
			return "", err
		}
		all.add(fmt.Sprintf("%s = %q", reference.field, name))
	}
	return all.String(), nil
}
