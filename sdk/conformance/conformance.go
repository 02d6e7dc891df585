// Package conformance tests a Grapnel plugin from outside, over the protocol that the server speaks, so
// that the plugin may be written in any language: it starts the program as the server would, plays the
// server and the receivers, and says case by case what holds.
//
// Each case has an id that stays the same from release to release, says what it protects, and runs in
// processes of its own, so that one failure does not bring about another. What a plugin does not offer is
// skipped with a reason. The package knows the protocol only: not the SDK, and not the server.
//
//	report, err := conformance.Run(ctx, conformance.Options{Command: []string{"./acme"}}, nil)
//	if err == nil && !report.Passed() { … }
package conformance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Groups of cases, in the order of a report.
const (
	GroupHandshake   = "handshake"
	GroupConfig      = "config"
	GroupSigner      = "signer"
	GroupTransport   = "transport"
	GroupTransformer = "transformer"
	GroupFlow        = "flow"
	GroupSoak        = "soak"
)

const (
	// caseLimit ends a case that hangs.
	caseLimit = time.Minute
	// soakLimit is the same for the group soak.
	soakLimit = 15 * time.Minute
	// defaultWorkers are enough to fill the time that cases spend waiting.
	defaultWorkers = 8
)

// Options say what to run.
type Options struct {
	// Command starts the plugin. Words that are names of existing files are made absolute, since the plugin
	// starts in another directory. Required.
	Command []string
	// Fixture tells what Describe cannot; nil does without.
	Fixture *Fixture
	// Only are ids or groups; empty runs all but the group soak.
	Only []string
	// Soak adds the group soak, which takes minutes.
	Soak bool
	// Workers is how many cases run at once; 0 means 8.
	Workers int
}

// Case is one promise of a plugin.
type Case struct {
	// ID is stable, such as "HS-03".
	ID string `json:"id"`
	// Group is one of the constants.
	Group string `json:"group"`
	// Title is the promise.
	Title string `json:"title"`
	// Protects says what goes wrong in production when it is broken.
	Protects string `json:"protects"`

	run func(*trial) error
	// soak cases run for minutes.
	soak bool
	// limit stands in for caseLimit, where that depends on how busy the machine is.
	limit time.Duration
}

// Outcome is how a case ended.
type Outcome string

// Outcomes.
const (
	Passed  Outcome = "passed"
	Failed  Outcome = "failed"
	Skipped Outcome = "skipped"
)

// Result is one case as it went.
type Result struct {
	Case
	Outcome Outcome `json:"outcome"`
	// Detail says what was wrong, or why the case was skipped; empty when it passed.
	Detail string `json:"detail,omitempty"`
	// Reproduce is a shell command that runs this case alone.
	Reproduce string        `json:"reproduce"`
	Duration  time.Duration `json:"duration_ns"`
}

// Cases are all there are, in the order of a report.
func Cases() []Case {
	return slices.Concat(handshakeCases(), configCases(), secretCases(), signerCases(), transportCases(), transformerCases(), flowCases(), soakCases())
}

// Run runs the cases and returns what came of them, in the order of Cases. each, when not nil, is called
// with every result as it comes, one at a time. A plugin that fails is no error: the report says so. An
// error means that the suite could not run: the fixture names what the plugin does not have, or ctx has ended; the
// report then has the cases that came to an end before.
//
// Cases run several at a time. One in which something did not come in time is run once more after the others, alone: a busy
// machine may have been to blame, and what comes of that counts.
func Run(ctx context.Context, o Options, each func(Result)) (*Report, error) {
	chosen, err := o.Cases()
	if err != nil {
		return nil, err
	}
	s, err := newSuite(o)
	if err != nil {
		return nil, err
	}
	defer s.close()
	began := time.Now()
	report := &Report{Command: o.Command, Results: make([]Result, len(chosen))}
	blocked := s.prepare(ctx)
	report.Plugin = s.described
	if s.described != nil {
		if err := s.fixture.fault(s); err != nil {
			return nil, err
		}
	}
	report.Notes = s.notes(chosen)
	ran := make([]bool, len(chosen))
	var mu sync.Mutex // serialises each
	var again []int
	ended := func(i int, r Result) {
		mu.Lock()
		defer mu.Unlock()
		report.Results[i], ran[i] = r, true
		if each != nil {
			each(r)
		}
	}
	work := make(chan int, len(chosen))
	for i := range chosen {
		work <- i
	}
	close(work)
	var workers sync.WaitGroup
	for range s.workers {
		workers.Go(func() {
			for i := range work {
				r, late := s.run(ctx, chosen[i], blocked)
				switch {
				case ctx.Err() != nil:
					return // what it says is of the interruption, not of the plugin
				case late:
					mu.Lock()
					again = append(again, i)
					mu.Unlock()
				default:
					ended(i, r)
				}
			}
		})
	}
	workers.Wait()
	for _, i := range again {
		if r, _ := s.run(ctx, chosen[i], blocked); ctx.Err() == nil {
			ended(i, r)
		}
	}
	report.Duration = time.Since(began)
	if ctx.Err() != nil {
		done := report.Results[:0]
		for i, r := range report.Results {
			if ran[i] {
				done = append(done, r)
			}
		}
		report.Results = done
		return report, fmt.Errorf("the suite was stopped after %d of %d cases: %w", len(done), len(chosen), context.Cause(ctx))
	}
	return report, nil
}

// notes are about what could not be tested.
func (s *suite) notes(chosen []Case) []string {
	if !slices.ContainsFunc(chosen, func(c Case) bool { return c.Group == GroupTransport }) {
		return nil
	}
	var notes []string
	for _, u := range s.subjects {
		if !u.transport() || overHTTP(u) {
			continue
		}
		why := fmt.Sprintf("its schemes (%s) are not http and do not end in +http", oneOf(u.kind.GetTransport().GetUriSchemes()))
		if u.unusable != "" {
			why = u.unusable
		}
		what, rest := "no transport case ran", "; a fixture's receiver says how to get to the suite's"
		if u.fixture.URI != "" && u.unusable == "" {
			what = "the only transport case that ran is TR-23"
		}
		notes = append(notes, fmt.Sprintf("transport %s: %s: %s%s", u.kind.GetId(), what, why, rest))
	}
	return notes
}

// Cases are those that the options ask for, in the order of a report.
func (o Options) Cases() ([]Case, error) {
	var chosen []Case
	matched := map[string]bool{}
	for _, c := range Cases() {
		named := len(o.Only) == 0 && (!c.soak || o.Soak)
		for _, word := range o.Only {
			if strings.EqualFold(word, c.ID) || strings.EqualFold(word, c.Group) {
				matched[word], named = true, true
			}
		}
		if named {
			chosen = append(chosen, c)
		}
	}
	for _, word := range o.Only {
		if !matched[word] {
			return nil, fmt.Errorf("there is no case and no group %q", word)
		}
	}
	return chosen, nil
}

// Describe starts the plugin, asks what it offers and ends it.
func Describe(ctx context.Context, command []string) (*pluginv1.DescribeResponse, error) {
	s, err := newSuite(Options{Command: command})
	if err != nil {
		return nil, err
	}
	defer s.close()
	t := &trial{ctx: ctx, s: s}
	defer t.end()
	ses, err := t.start(launch{})
	if err != nil {
		return nil, err
	}
	return ses.describe(ctx)
}

// suite is what all cases of a run share; but for made it does not change once prepared.
type suite struct {
	command   []string // resolved
	reproduce string
	fixture   *Fixture
	workers   int
	dir       string // private; sockets live below it
	described *pluginv1.DescribeResponse
	subjects  []*subject
	// noWelcome is set when the attempt stream does not open: a case of its own, that others need not fail.
	noWelcome bool
	made      madeSecrets
}

func newSuite(o Options) (*suite, error) {
	command, err := Resolve(o.Command)
	if err != nil {
		return nil, err
	}
	s := &suite{command: command, fixture: o.Fixture, workers: o.Workers, reproduce: shellWords(o.Command)}
	if s.fixture == nil {
		s.fixture = &Fixture{}
	}
	if s.workers <= 0 {
		s.workers = defaultWorkers
	}
	if s.dir, err = privateDir(); err != nil {
		return nil, fmt.Errorf("make a directory for sockets: %w", err)
	}
	return s, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Resolve returns a command that means the same in any directory: its program is looked up, and words that
// are names of existing files are made absolute. A directory with a file named plugin stands for that, as it does when
// it is installed; another directory is no program, also when one of its name is elsewhere.
func Resolve(command []string) ([]string, error) {
	if len(command) == 0 {
		return nil, errors.New("no command to start the plugin with")
	}
	program := command[0]
	there, _ := os.Stat(program)
	if there != nil && there.IsDir() {
		if inside := program + string(filepath.Separator) + "plugin"; exists(inside) {
			program, there = inside, nil
		}
	}
	path, err := exec.LookPath(program)
	switch {
	case there != nil && there.IsDir():
		if err == nil {
			return nil, fmt.Errorf("%s is a directory here, without an executable file named plugin in it, and a program elsewhere; say %s if that is meant", program, path)
		}
		return nil, fmt.Errorf("%s is a directory, and one that is a plugin has an executable file named plugin in it", program)
	case err == nil:
	case there != nil && errors.Is(err, exec.ErrNotFound):
		return nil, fmt.Errorf("find the plugin: %w; there is a file %s here: did you mean ./%s?", err, program, program)
	default:
		return nil, fmt.Errorf("find the plugin: %w", err)
	}
	resolved := append([]string{path}, command[1:]...)
	for i, word := range resolved {
		if _, err := os.Stat(word); err != nil || strings.HasPrefix(word, "-") {
			continue
		}
		if resolved[i], err = filepath.Abs(word); err != nil {
			return nil, fmt.Errorf("find %s: %w", word, err)
		}
	}
	return resolved, nil
}

func (s *suite) close() {
	killStrays(s.dir)
	_ = os.RemoveAll(s.dir)
}

// prepare finds out what the cases need to know of the plugin. It returns why they cannot run, or "".
func (s *suite) prepare(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, caseLimit)
	defer cancel()
	t := &trial{ctx: ctx, s: s}
	defer t.end()
	ses, err := t.start(launch{})
	if err != nil {
		return err.Error()
	}
	if s.described, err = ses.describe(ctx); err != nil {
		return err.Error()
	}
	if err := ses.settle(loopbackOpen()); err != nil {
		return err.Error()
	}
	for _, k := range s.described.GetKinds() {
		s.subjects = append(s.subjects, ses.subjectOf(k))
	}
	if s.offers(carrying) {
		_, err := ses.openAttempts()
		s.noWelcome = err != nil
	}
	return ""
}

// run runs one case. blocked is why the plugin does not come up, when it does not: then only the case
// that promises just that is of use. late: it failed because something did not come in time.
func (s *suite) run(ctx context.Context, c Case, blocked string) (r Result, late bool) {
	r = Result{Case: c, Outcome: Passed, Reproduce: fmt.Sprintf("grapnel plugin test --only %s -- %s", c.ID, s.reproduce)}
	began := time.Now()
	limit := cmp.Or(c.limit, caseLimit)
	if c.soak {
		limit = soakLimit
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	t := &trial{ctx: ctx, s: s}
	var err error
	if blocked != "" && !standalone(c.ID) {
		err = skipf("the plugin does not come up (see HS-01): %s", firstLine(blocked))
	} else {
		err = c.run(t)
	}
	t.end()
	r.Duration = time.Since(began)
	var skip skipError
	switch {
	case errors.As(err, &skip):
		r.Outcome, r.Detail = Skipped, skip.reason
	case err != nil:
		r.Outcome, r.Detail = Failed, err.Error()
		late = isLate(err)
	}
	return r, late
}

// skipError says that a case does not apply.
type skipError struct{ reason string }

func (e skipError) Error() string { return e.reason }

func skipf(format string, args ...any) error { return skipError{fmt.Sprintf(format, args...)} }

// lateError says that something did not come in time.
type lateError struct{ error }

func latef(format string, args ...any) error { return lateError{fmt.Errorf(format, args...)} }

func isLate(err error) bool {
	var late lateError
	return errors.As(err, &late) || errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded
}

// shellWords quotes what a shell would take apart.
func shellWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = w
		if w == "" || strings.Trim(w, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=:,@+") != "" {
			quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(quoted, " ")
}
