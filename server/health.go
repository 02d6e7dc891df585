package server

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	healthEvery = 500 * time.Millisecond
	// syncSlow is the age at which a sync that has not ended is told of, syncHangs that at which nothing more is to
	// be sent here.
	syncSlow  = 2 * time.Second
	syncHangs = 5 * time.Second
	// pluginAbsence is how long the first-party plugins may be away before that counts: a restart takes less.
	pluginAbsence = 5 * time.Second
)

// vital is one thing that the server cannot do without, or can for a while.
type vital struct {
	name string
	// ail says what is wrong now, "" when nothing is. It must not block.
	ail func() string
	// grace is how long it may last before the server counts as not ready; negative is for ever.
	grace time.Duration
	// publishing says that nothing can be published meanwhile.
	publishing bool
	// tell is told when it is no longer well, and when it is again; nil tells nobody.
	tell func(well bool)
	// quiet leaves it to somebody else to log that it is not well.
	quiet bool
}

// health looks after what can go wrong and come right again while the server runs, and tells it while it lasts.
type health struct {
	log    *slog.Logger
	vitals []vital
	// publish is told when the publish service can no longer serve, and when it can again.
	publish func(serving bool)

	mu      sync.Mutex // guards what follows
	states  []ailment  // of vitals
	serving bool
}

// ailment is the state of a vital.
type ailment struct {
	text  string
	since time.Time
	// grave is set when it has lasted longer than its grace.
	grave bool
}

func newHealth(log *slog.Logger, publish func(bool), vitals ...vital) *health {
	return &health{log: log, vitals: vitals, publish: publish, states: make([]ailment, len(vitals)), serving: true}
}

// run looks until ctx ends.
func (h *health) run(ctx context.Context) {
	tick := time.NewTicker(healthEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			h.look(time.Now())
		}
	}
}

func (h *health) look(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	serving := true
	for i, v := range h.vitals {
		was, text := h.states[i], v.ail()
		is := ailment{text: text, since: was.since}
		switch {
		case text == "":
			is.since = time.Time{}
		case was.text == "":
			is.since = now
		}
		is.grave = text != "" && v.grace >= 0 && now.Sub(is.since) >= v.grace
		h.states[i] = is
		if v.tell != nil && (text == "") != (was.text == "") {
			v.tell(text == "")
		}
		if is.grave && v.publishing {
			serving = false
		}
		switch {
		case was.grave && !is.grave || text == "" && was.text != "" && !v.quiet:
			h.log.Info("well again", "what", v.name, "after", now.Sub(was.since).Round(healthEvery))
		case is.grave && !was.grave || text != "" && was.text == "" && !v.quiet:
			h.log.Warn(text, "what", v.name, "ready", !is.grave)
		}
	}
	if serving != h.serving {
		h.serving = serving
		h.publish(serving)
	}
}

// report is what is wrong, a line each, and whether the server is ready all the same.
func (h *health) report() (lines []string, ready bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ready = true
	for i, is := range h.states {
		if is.text != "" {
			lines = append(lines, h.vitals[i].name+": "+is.text)
			ready = ready && !is.grave
		}
	}
	return lines, ready
}

// serveReady answers whether the server is to get calls: with 200 and ok, or with 503. What is wrong is told in
// either case, a line each.
func (s *Server) serveReady(w http.ResponseWriter, _ *http.Request) {
	select {
	case <-s.ready:
	default:
		http.Error(w, "starting", http.StatusServiceUnavailable)
		return
	}
	lines, ready := s.health.report()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	first := "ok"
	if !ready {
		first = "not ready"
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = fmt.Fprintln(w, first)
	for _, line := range lines {
		_, _ = fmt.Fprintln(w, line)
	}
}

// newServerHealth knows what this server depends on.
func (s *Server) newServerHealth(publish func(bool)) *health {
	s.metrics.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_journal_sync_age_seconds", Help: "Age of the oldest sync of the journal that has not ended.",
		}, func() float64 { return s.journal.SyncAge().Seconds() }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "grapnel_plugin_silent", Help: "Plugin processes that leave heartbeats unanswered.",
		}, func() float64 { return float64(len(s.plugins.Silent())) }),
	)
	vitals := s.partVitals()
	return newHealth(s.log, publish, append(vitals,
		vital{name: "journal", publishing: true, grace: syncHangs - syncSlow, ail: func() string {
			if age := s.journal.SyncAge(); age >= syncSlow {
				return fmt.Sprintf("the disk has been at a sync for %v; nothing can be accepted meanwhile", age.Round(time.Second))
			}
			return ""
		}},
		vital{name: "etcd", quiet: true, grace: -1, ail: func() string {
			if err := s.registry.Stranger(); err != nil {
				return err.Error()
			}
			if !s.registry.Healthy() {
				return "it does not answer; configuration cannot be changed, deliveries and events go on"
			}
			return ""
		}},
		vital{name: "disk", quiet: true, grace: -1, ail: func() string { return textOf(s.space.Err()) }},
		vital{name: "configuration", quiet: true, grace: -1, ail: func() string { return textOf(s.etcd.Err()) }},
		vital{name: "damaged configuration", quiet: true, grace: -1, ail: func() string {
			if broken := slices.Concat(s.registry.Broken(), s.secrets.Broken(), s.types.Broken()); len(broken) > 0 {
				return fmt.Sprintf("%d values in etcd cannot be used, such as that of %s", len(broken), broken[0])
			}
			return ""
		}},
		vital{name: "this machine", quiet: true, grace: -1, ail: func() string {
			var words []string
			for name, most := range s.plugins.Short() {
				words = append(words, fmt.Sprintf("%s makes %d attempts at a time", name, most))
			}
			if len(words) == 0 {
				return ""
			}
			slices.Sort(words)
			return "out of file descriptors, sockets or memory; " + strings.Join(words, ", ")
		}},
		vital{name: "third-party plugins", quiet: true, grace: -1, ail: func() string {
			if names := s.silent(); names != "" {
				return names + " does not answer"
			}
			return ""
		}},
	)...)
}

// partVitals are the processes of the bundled plugin. Without those that are not confined nobody's deliveries move. Each
// of their kinds is a service in gRPC's health, plugins/http for one.
func (s *Server) partVitals() []vital {
	parts := s.options.BuiltinParts
	if len(parts) == 0 {
		parts = []BuiltinPart{{}}
	}
	var vitals []vital
	for _, part := range parts {
		v := vital{name: "plugins", quiet: true, grace: pluginAbsence, ail: func() string { return s.partAils(part) }}
		if part.Confined {
			v.name, v.grace = "plugins of "+part.Name, -1
		}
		v.tell = func(well bool) {
			for kind := range part.Kinds {
				s.api.SetServing("plugins/"+kind, well)
			}
		}
		v.tell(true)
		vitals = append(vitals, v)
	}
	return vitals
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// partAils is about one process of the bundled plugin.
func (s *Server) partAils(part BuiltinPart) string {
	what, wait := "the process of the first-party plugins ", "; deliveries wait"
	if part.Confined {
		var kinds []string
		for _, kind := range slices.Sorted(maps.Keys(part.Kinds)) {
			kinds = append(kinds, "plugins/"+kind)
		}
		what, wait = "the process of "+strings.Join(kinds, ", ")+" ", "; their deliveries wait"
	}
	its := func(name string) bool { return part.Name == "" || part.Name == name }
	for _, p := range s.plugins.Silent() {
		if p.Builtin && its(p.Name) {
			return what + "does not answer" + wait
		}
	}
	if slices.ContainsFunc(s.plugins.Down(), its) {
		return what + "is not serving" + wait
	}
	return ""
}

// silent names the third-party plugins that do not answer.
func (s *Server) silent() string {
	var names []string
	for _, p := range s.plugins.Silent() {
		if !p.Builtin {
			names = append(names, p.Name)
		}
	}
	return strings.Join(names, ", ")
}
