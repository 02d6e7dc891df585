package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/grapnel/grapnel/sdk/client"
)

// Exit codes that are not a server's answer.
const (
	exitFailed = 1
	exitUsage  = 2
	exitGRPC   = 64  // plus the code
	exitSignal = 128 // plus the signal's number
)

// usageError is a fault of the command line, the environment or the configuration file.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// quietError ends the command with a failure that it has told already.
type quietError struct{}

func (quietError) Error() string { return "failed" }

// report tells err on stderr, in words or as --output json asks, and returns the exit code.
func (c *cli) report(err error) int {
	if err != nil {
		if signal := c.interrupted.Load(); signal != nil {
			if !errors.Is(err, context.Canceled) {
				fmt.Fprintf(c.stderr, "error: %v\n", err)
			}
			return exitSignal + signalNumber(*signal)
		}
	}
	var usage usageError
	var answer *client.Error
	failure := failure{Exit: exitFailed}
	switch {
	case err == nil:
		return 0
	case errors.As(err, new(quietError)):
		return exitFailed
	case errors.As(err, &usage), !c.running:
		failure.Message, failure.Exit = err.Error(), exitUsage
	case errors.As(err, &answer):
		failure = c.failure(answer)
	default:
		failure.Message = err.Error()
	}
	var suggested suggestion
	if errors.As(err, &suggested) {
		failure.Hint = suggested.hint
		failure.Message = withoutList(failure.Message)
	}
	if c.output == formatJSON {
		encoder := json.NewEncoder(c.stderr)
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(map[string]any{"error": failure})
	} else {
		fmt.Fprint(c.stderr, failure.text())
	}
	return failure.Exit
}

// signalNumber is 2 for an interrupt.
func signalNumber(s os.Signal) int {
	if number, ok := s.(syscall.Signal); ok {
		return int(number)
	}
	return int(syscall.SIGINT)
}

// failure is an error as people and programs read it.
type failure struct {
	Code       string      `json:"code,omitempty"`   // of gRPC, such as NOT_FOUND
	Reason     string      `json:"reason,omitempty"` // such as RESOURCE_NOT_FOUND
	Message    string      `json:"message"`
	Violations []violation `json:"violations,omitempty"`
	RequestID  string      `json:"requestId,omitempty"`
	Hint       string      `json:"hint,omitempty"`
	Exit       int         `json:"exit"`
}

type violation struct {
	Field       string `json:"field,omitempty"`
	Description string `json:"description"`
}

// failure is an answer of the server, or the lack of one.
func (c *cli) failure(e *client.Error) failure {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := failure{
		Code: client.CodeName(e.Code), Reason: e.Reason, Message: summary(e), RequestID: e.RequestID, Hint: c.hint(e),
		Exit: exitGRPC + int(e.Code),
	}
	switch {
	case unreached(e):
		f.Message = fmt.Sprintf("cannot reach a server at %s: %s", c.addr, c.connectFault(e.Message))
		return f
	case e.Code == codes.DeadlineExceeded && e.Reason == "":
		f.Message = fmt.Sprintf("no answer from %s in %s", c.addr, shortDuration(c.patience()))
		return f
	}
	if len(e.Violations) == 1 && strings.Contains(e.Message, e.Violations[0].Description) {
		f.Message += c.notGiven(e.Violations[0].Field, e.Message, e.Violations[0].Description)
		return f
	}
	for _, v := range e.Violations {
		f.Violations = append(f.Violations, violation{v.Field, v.Description + c.notGiven(v.Field, v.Description, v.Description)})
	}
	return f
}

// notGiven says what a field was given, behind words that do not say it: a text in quotes, or a number or a time in front of what
// is wrong with it.
func (c *cli) notGiven(field, words, description string) string {
	first, _, _ := strings.Cut(description, " ")
	_, noNumber := strconv.ParseFloat(first, 64)
	_, noTime := time.ParseDuration(first)
	given := givenText(c.asked, field)
	if given == "" || strings.Contains(words, `"`) || noNumber == nil || noTime == nil {
		return ""
	}
	return ", not " + given
}

// patience is how long the server was waited for.
func (c *cli) patience() time.Duration {
	took := time.Since(c.began)
	if c.timeout > 0 && took > c.timeout*9/10 {
		return c.timeout
	}
	return took.Round(100 * time.Millisecond)
}

// text is the failure in words: the message, then every violation on a line of its own.
func (f failure) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "error: %s", cleanLines(f.Message))
	if name := cmp.Or(f.Reason, f.Code); name != "" {
		fmt.Fprintf(&b, " (%s)", clean(name))
	}
	b.WriteByte('\n')
	for _, v := range f.Violations {
		fmt.Fprintf(&b, "  %s: %s\n", clean(v.Field), clean(v.Description))
	}
	if f.RequestID != "" {
		fmt.Fprintf(&b, "  request %s in the server's log\n", clean(f.RequestID))
	}
	if f.Hint != "" {
		fmt.Fprintf(&b, "hint: %s\n", f.Hint)
	}
	return b.String()
}

// summary is the message, or a count where the message would only repeat the violations.
func summary(e *client.Error) string {
	if errors.Is(e, client.ErrInUse) && len(e.Violations) > 1 {
		return fmt.Sprintf("it is in use by %d others", len(e.Violations))
	}
	for _, v := range e.Violations {
		if v.Description != "" && strings.Contains(e.Message, v.Description) && len(e.Violations) > 1 {
			return fmt.Sprintf("%d things are wrong with the request", len(e.Violations))
		}
	}
	return cmp.Or(e.Message, "no message")
}

// unreached reports whether the error is that of the connection, not a server's answer.
func unreached(e *client.Error) bool { return e.Code == codes.Unavailable && e.Reason == "" }

// connectFault is the innermost cause in gRPC's nested message about a connection.
func (c *cli) connectFault(message string) string {
	if _, cause, ok := strings.Cut(message, "transport: "); ok {
		cause = strings.TrimPrefix(strings.TrimRight(cause, `"`), "Error while dialing: ")
		return strings.ReplaceAll(cause, `\"`, `"`)
	}
	if host, _, err := net.SplitHostPort(c.addr); err == nil || !strings.Contains(c.addr, ":") {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		var unknown *net.DNSError
		if _, err := net.DefaultResolver.LookupHost(ctx, cmp.Or(host, c.addr)); errors.As(err, &unknown) {
			return fmt.Sprintf("%s: %s", unknown.Err, unknown.Name)
		}
	}
	return strings.TrimPrefix(message, "connection error: desc = ")
}

// hint says what to do next where that is not obvious.
func (c *cli) hint(e *client.Error) string {
	switch {
	case unreached(e) && strings.Contains(e.Message, "first record does not look like a TLS handshake"):
		return "there is no TLS at that address: leave out --tls and --tls-ca"
	case unreached(e) && !c.tls && c.tlsCA == "" && strings.Contains(e.Message, "server preface"):
		return "something else than gRPC answers there, or TLS does: --tls connects with it"
	case unreached(e):
		return fmt.Sprintf("is `grapnel server` running at %s? (--addr, GRAPNEL_ADDR, grapnel context)", c.addr)
	case errors.Is(e, client.ErrDraining):
		return "the server is about to stop; try again when it is back"
	case errors.Is(e, client.ErrEtagMismatch):
		return "it changed since it was read; read it again"
	case e.RetryAfter > 0:
		return fmt.Sprintf("try again in %s", e.RetryAfter.Round(time.Millisecond))
	case e.Code == codes.DeadlineExceeded && e.Reason == "":
		return "is that the address of a `grapnel server`? --timeout says how long to wait"
	case e.Code == codes.Unimplemented:
		return fmt.Sprintf("is %s the address of the public API, and not the admin listener's? If it is, the server is of another version", c.addr)
	}
	return ""
}
