package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/grapnel/grapnel/sdk/client"
)

// Exit codes that are not a server's answer.
const (
	exitFailed = 1
	exitUsage  = 2
	exitGRPC   = 64 // plus the code
)

// usageError is a fault of the command line, the environment or the configuration file.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// quietError ends the command with a failure that it has told already.
type quietError struct{}

func (quietError) Error() string { return "failed" }

// report tells err on stderr in words and returns the exit code.
func (c *cli) report(err error) int {
	var usage usageError
	var answer *client.Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(quietError)):
		return exitFailed
	case errors.As(err, &usage), !c.running:
		fmt.Fprintf(c.stderr, "error: %v\n", err)
		return exitUsage
	case errors.As(err, &answer):
		if unreached(answer) {
			fmt.Fprintf(c.stderr, "error: cannot reach a server at %s: %s\n", c.addr, connectFault(answer.Message))
		} else {
			fmt.Fprintf(c.stderr, "error: %s", describe(answer))
		}
		if hint := c.hint(answer); hint != "" {
			fmt.Fprintf(c.stderr, "hint: %s\n", hint)
		}
		return exitGRPC + int(answer.Code)
	}
	fmt.Fprintf(c.stderr, "error: %v\n", err)
	return exitFailed
}

// describe returns an answer in words: the message, then every violation on a line of its own.
func describe(e *client.Error) string {
	var b strings.Builder
	name := e.Reason
	if name == "" {
		name = client.CodeName(e.Code)
	}
	if len(e.Violations) == 1 && strings.Contains(e.Message, e.Violations[0].Description) || len(e.Violations) == 0 {
		fmt.Fprintf(&b, "%s (%s)\n", e.Message, name)
	} else {
		fmt.Fprintf(&b, "%s (%s)\n", summary(e), name)
		for _, v := range e.Violations {
			fmt.Fprintf(&b, "  %s: %s\n", v.Field, v.Description)
		}
	}
	if e.RequestID != "" {
		fmt.Fprintf(&b, "  request %s in the server's log\n", e.RequestID)
	}
	return b.String()
}

// summary is the message, or a count where the message would only repeat a violation.
func summary(e *client.Error) string {
	for _, v := range e.Violations {
		if v.Description != "" && strings.Contains(e.Message, v.Description) && len(e.Violations) > 1 {
			return fmt.Sprintf("%d things are wrong with the request", len(e.Violations))
		}
	}
	return e.Message
}

// unreached reports whether the error is that of the connection, not a server's answer.
func unreached(e *client.Error) bool { return e.Code == codes.Unavailable && e.Reason == "" }

// connectFault is the innermost cause in gRPC's nested message about a connection.
func connectFault(message string) string {
	if _, cause, ok := strings.Cut(message, "transport: "); ok {
		cause = strings.TrimPrefix(strings.TrimRight(cause, `"`), "Error while dialing: ")
		return strings.ReplaceAll(cause, `\"`, `"`)
	}
	return message
}

// hint says what to do next where that is not obvious.
func (c *cli) hint(e *client.Error) string {
	switch {
	case unreached(e):
		return fmt.Sprintf("is `grapnel server` running at %s? (--addr, GRAPNEL_ADDR)", c.addr)
	case errors.Is(e, client.ErrEtagMismatch):
		return "it changed since it was read; read it again"
	case e.RetryAfter > 0:
		return fmt.Sprintf("try again in %s", e.RetryAfter.Round(time.Millisecond))
	case e.Code == codes.Unimplemented:
		return "the server is of another version; see grapnel cluster"
	}
	return ""
}
