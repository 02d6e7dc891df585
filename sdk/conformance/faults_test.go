//go:build unix

package conformance_test

import (
	"flag"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/sdk/conformance"
)

// fault is something that the raw plugin does wrong, and the case that promises it right.
type fault struct{ name, id string }

// faults are by group, since those of different groups do not get in each other's way.
func faults() [][]fault {
	return [][]fault{
		{
			{"wrong-line", "HS-02"}, {"banner", "HS-03"}, {"socket-elsewhere", "HS-04"}, {"no-cookie-check", "HS-05"},
			{"silent-by-hand", "HS-05"}, {"needs-cwd", "HS-06"}, {"stdout-noise", "HS-08"}, {"dies-by-signal", "HS-09"},
			{"outlives-control", "HS-10"}, {"outlives-host", "HS-11"}, {"orphan", "HS-12"}, {"wrong-status", "HS-13"},
		}, {
			{"describe-changes", "CF-01"}, {"bad-header-name", "CF-02"}, {"bad-version", "CF-02"}, {"external-schema", "CF-03"},
			{"unknown-field-taken", "CF-05"}, {"no-pointer", "CF-06"}, {"missing-field-taken", "CF-07"}, {"syntax-error", "CF-08"},
			{"kind-error", "CF-09"}, {"echoes-secret", "CF-10"}, {"logs-secret", "CF-11"}, {"missing-secret-taken", "CF-12"},
			{"statuses-reversed", "CF-13"}, {"not-idempotent", "CF-14"},
		}, {
			{"stale-taken", "CF-15"}, {"bad-generation-drops", "CF-16"}, {"new-replaces-old", "CF-17"}, {"remove-keeps", "CF-18"},
			{"slow-instances", "CF-19"}, {"configure-interrupts", "CF-20"}, {"expired-signs", "CF-21"}, {"validate-configures", "CF-22"},
			{"strict-fields", "CF-23"}, {"same-secret", "CF-24"}, {"malformed-taken", "CF-25"}, {"not-canonical", "CF-26"},
			{"slot-error", "CF-27"}, {"private-jwk", "CF-28"}, {"keeps-connections", "CF-29"},
		}, {
			{"signs-twice", "SG-01"}, {"impure", "SG-02"}, {"own-clock", "SG-03"}, {"index-signed", "SG-04"}, {"text-only", "SG-05"},
			{"undeclared-header", "SG-06"}, {"rewrites-uri", "SG-07"}, {"unknown-ref-fails-batch", "SG-08"},
			{"sign-content-crash", "SG-09"}, {"strict-items", "SG-10"}, {"wrong-vector", "SG-11"}, {"drain-stops-signing", "SG-12"},
		}, {
			{"trims-body", "TR-01"}, {"changes-header", "TR-02"}, {"surprise-header", "TR-03"}, {"ignores-uri", "TR-04"},
			{"odd-status-hidden", "TR-05"}, {"follows-redirects", "TR-06"}, {"truncation-hidden", "TR-07 TR-24"}, {"no-204", "TR-08"},
			{"drops-retry-after", "TR-09"}, {"refused-maybe-sent", "TR-10"}, {"reset-own-fault", "TR-11"}, {"reset-not-sent", "TR-12"},
		}, {
			{"retries", "TR-13"}, {"late-timeout", "TR-14"}, {"late-body", "TR-15"}, {"garbage-own-fault", "TR-16"},
			{"unbounded-header", "TR-17"}, {"no-egress", "TR-18"}, {"no-deny", "TR-18"}, {"no-verify", "TR-19"}, {"no-keep-alive", "TR-20"},
			{"signs-otherwise-here", "TR-21"}, {"dns-own-fault", "TR-22"}, {"mem-fails", "TR-23"}, {"short-answer", "TR-24"},
		}, {
			{"answers-twice", "FL-02"}, {"small-window", "FL-03"}, {"few-workers", "FL-04"}, {"cancel-strict", "FL-05"},
			{"ignores-cancel", "FL-06"}, {"drain-forgets", "FL-07"}, {"drain-waits", "FL-08"}, {"content-crash", "FL-09"},
			{"strict-frames", "FL-10"}, {"unknown-ref-spoils-batch", "FL-11"}, {"unknown-ref-sent", "FL-12"}, {"few-heartbeats", "FL-13"},
			{"no-attempt-one", "FL-14"}, {"small-messages", "FL-16"},
		}, {
			{"transforms-twice", "TF-01"}, {"no-outcome", "TF-01"}, {"batch-transformed-otherwise", "TF-02"}, {"odd-spoils-batch", "TF-03"},
			{"makes-too-much", "TF-04"}, {"no-media-type", "TF-04"}, {"sets-webhook-id", "TF-05"}, {"header-twice", "TF-05"},
			{"transform-unknown-ref", "TF-06"}, {"event-crash", "TF-07"},
		}, {
			{"slow-holds-up", "TF-09"}, {"late-transform", "TF-08"}, {"silent-drop", "TF-10"}, {"config-failure", "TF-10"},
			{"reason-secret", "TF-11"}, {"strict-events", "TF-12"}, {"drain-stops-transforming", "TF-13"}, {"forgets-at-end", "TF-14"},
			{"half-window", "TF-15"}, {"wrong-made", "TF-16 TF-17"}, {"latest-config", "TF-17"}, {"latest-generation", "TF-17"},
		},
	}
}

var eachFault = flag.Bool("faults.each", false, "the whole suite on one fault at a time, which takes minutes")

// TestEachFaultFailsItsOwnCase runs the suite against the raw plugin with something wrong: the case that promises it
// right must fail, and no other. With one fault of each group at a time, only those cases are run; -faults.each
// runs all of them.
func TestEachFaultFailsItsOwnCase(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("starts hundreds of plugins")
	}
	// These keep other cases from meaning anything, and so stand alone.
	runs := [][]fault{
		{{"exits", "HS-01"}}, {{"example-refused", "CF-04"}}, {{"no-welcome", "FL-01"}}, {{"no-credits", "FL-01"}},
	}
	for at := 0; ; at++ {
		var together []fault
		for _, group := range faults() {
			if at < len(group) {
				together = append(together, group[at])
			}
		}
		if together == nil {
			break
		}
		if !*eachFault {
			runs = append(runs, together)
			continue
		}
		for _, one := range together {
			runs = append(runs, []fault{one})
		}
	}
	room := make(chan struct{}, 3) // each run waits more than it works; so many fit beside each other
	for _, wrong := range runs {
		var names, want []string
		for _, f := range wrong {
			names, want = append(names, f.name), append(want, strings.Fields(f.id)...)
		}
		t.Run(strings.Join(names, ","), func(t *testing.T) {
			t.Parallel()
			room <- struct{}{}
			defer func() { <-room }()
			o := conformance.Options{Command: self("plugin-raw", strings.Join(names, ",")), Fixture: rawFixture()}
			if !*eachFault {
				o.Only = want
			}
			report := run(t, o)
			ids, reasons := failures(report)
			slices.Sort(want)
			slices.Sort(ids)
			if diff := cmp.Diff(want, ids); diff != "" {
				t.Errorf("failed cases (-want +got):\n%s%s", diff, reasons)
			}
			t.Logf("%v%s", report.Duration, reasons)
		})
	}
}

func TestEveryCaseHasAFault(t *testing.T) {
	tried := []string{"HS-01", "CF-04", "FL-01"}
	for _, group := range faults() {
		for _, f := range group {
			tried = append(tried, strings.Fields(f.id)...)
		}
	}
	// How fast a plugin starts, what a soak shows, and what a slow reader meets depend on more than a fault.
	untried := []string{"HS-07", "FL-15", "SO-01", "SO-02", "SO-03", "SO-04"}
	for _, c := range conformance.Cases() {
		if !slices.Contains(tried, c.ID) && !slices.Contains(untried, c.ID) {
			t.Errorf("no fault breaks %s %s", c.ID, c.Title)
		}
	}
}

// A fixture may have more events than are asked at once: of each configuration one is among those.
func TestEachConfigurationIsAmongManyEvents(t *testing.T) {
	t.Parallel()
	fixture := rawFixture()
	kind := fixture.Kinds["raw-transform"]
	alike, other := kind.Events[0], kind.Events[3]
	kind.Events = append(slices.Repeat([]conformance.EventFixture{alike}, 70), other)
	fixture.Kinds["raw-transform"] = kind
	report := run(t, conformance.Options{Command: self("plugin-raw", "latest-config"), Fixture: fixture, Only: []string{"TF-17"}})
	if ids, reasons := failures(report); !slices.Equal(ids, []string{"TF-17"}) {
		t.Errorf("%q failed:%s", ids, reasons)
	}
}
