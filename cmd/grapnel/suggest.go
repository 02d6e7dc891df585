package main

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/grapnel/grapnel/sdk/client"
)

// suggestion is an error with a word about what may have been meant.
type suggestion struct {
	error
	hint string
}

func (s suggestion) Unwrap() error { return s.error }

// suggest adds to the server's word that something does not exist the name that comes nearest, if one does.
func (c *cli) suggest(ctx context.Context, cl *client.Client, err error) error {
	var answer *client.Error
	if !errors.As(err, &answer) || ctx.Err() != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	for _, name := range missing(answer) {
		if near := closest(lastSegment(name), siblings(ctx, cl, name)); near != "" {
			return suggestion{err, fmt.Sprintf("did you mean %q?", near)}
		}
	}
	return err
}

// withoutList drops from a message the list of all there is, where the nearest of them is named.
func withoutList(message string) string {
	first, list, ok := strings.Cut(message, "; ")
	if ok && strings.Count(list, "plugins/") > 3 {
		return first
	}
	return message
}

// missing are the resources that an answer says do not exist.
func missing(e *client.Error) []string {
	texts := []string{e.Message}
	for _, v := range e.Violations {
		texts = append(texts, v.Description)
	}
	var names []string
	for _, text := range texts {
		if !errors.Is(e, client.ErrNotFound) && !strings.Contains(text, "there is no ") && !strings.Contains(text, "does not exist") {
			continue
		}
		for word := range strings.FieldsSeq(text) {
			word = strings.Trim(word, `"';,.()`)
			if strings.HasPrefix(word, "plugins/") || strings.HasPrefix(word, "namespaces/") {
				names = append(names, word) // the first is what is missing; others may be what there is
				break
			}
		}
	}
	return names
}

// siblings are the IDs beside a name, at most completionLimit.
func siblings(ctx context.Context, cl *client.Client, name string) []string {
	parts := strings.Split(name, "/")
	switch {
	case len(parts) == 2 && parts[0] == "plugins":
		return someIDs(cl.Plugins(ctx))
	case len(parts) == 2 && parts[0] == "namespaces":
		return someIDs(cl.Namespaces(ctx))
	case len(parts) == 4 && parts[2] == "subscriptions":
		return someIDs(cl.Subscriptions(parts[1]).List(ctx))
	case len(parts) == 4 && parts[2] == "secrets":
		return someIDs(cl.Secrets(ctx, parts[1]))
	}
	return nil
}

// completion limits, so that the Tab key never hangs or floods.
const (
	completionTimeout = time.Second
	completionLimit   = 200
)

// someIDs are the last segments of the first names, as many as can be had.
func someIDs[T interface{ GetName() string }](items iter.Seq2[T, error]) []string {
	var ids []string
	for item, err := range items {
		if err != nil || len(ids) == completionLimit {
			break
		}
		ids = append(ids, lastSegment(item.GetName()))
	}
	return ids
}
