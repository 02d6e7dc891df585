package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
)

var (
	flipSeeds = flag.Int("flips.seeds", 2, "how many faults TestFlips puts into data at rest")
	flipFirst = flag.Uint64("flips.first", 0, "the first seed of TestFlips")
	flipPlace = flag.String("flips.place", "", "only faults in this place, such as wal or etcd-db")
)

const (
	flipPublishers = 64
	flipEvents     = 1500 // acknowledged in each of two lives
	flipSize       = 3000
	// flipGroup seeds share a data directory: each gets a copy of its own.
	flipGroup = 24
)

// TestFlips holds the promise about data at rest. A server is stopped or killed under 64 publishers; then one bit of
// one file is flipped, or the file is cut off or deleted; then the server starts again. Whatever was acknowledged is there as it was,
// or its loss is told: by a start that is refused, naming the file and a command, or by a line in the log, or by the
// error of whoever asks for it. Nothing is ever served that was not written.
func TestFlips(t *testing.T) {
	bin := buildGrapnel(t)
	count := tally{}
	for group := 0; group < *flipSeeds; group += flipGroup {
		for _, killed := range []bool{false, true} {
			origin := newFlipOrigin(t, bin, killed)
			for n := group; n < min(group+flipGroup, *flipSeeds); n++ {
				if seed := *flipFirst + uint64(n); (seed%2 == 1) == killed {
					origin.try(t, bin, seed, count)
				}
			}
		}
	}
	t.Log("\n" + count.String())
}

// flipOrigin is a data directory at rest and what was promised about it.
type flipOrigin struct {
	dir    string
	killed bool
	rcv    *receiverLedger
	uri    string
	// sent are all events by id; acked those of them that were acknowledged.
	sent  map[string][32]byte
	acked []string
}

func newFlipOrigin(t *testing.T, bin string, killed bool) *flipOrigin {
	t.Helper()
	o := &flipOrigin{
		dir: filepath.Join(t.TempDir(), "data"), killed: killed, rcv: newReceiverLedger(t, "/a"),
		sent: map[string][32]byte{},
	}
	server := httptest.NewServer(o.rcv)
	t.Cleanup(server.Close)
	o.uri = server.URL + "/a"
	// What the first life leaves in the log is in tables in the second one.
	for life := range 2 {
		p, err := startServer(t.Context(), bin, o.dir)
		if err != nil {
			t.Fatal(err)
		}
		if life == 0 {
			if err := p.prepare(t.Context(), namespace, o.uri); err != nil {
				t.Fatal(err)
			}
		}
		end := func() error { p.kill(); return nil }
		if life == 1 && !killed {
			end = p.stop
		}
		if err := o.publish(t.Context(), p, life, end); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

// publish has all publishers send until enough is acknowledged, and ends the server under them.
func (o *flipOrigin) publish(ctx context.Context, p *serverProcess, life int, end func() error) error {
	var (
		client = grapnelv1.NewPublishServiceClient(p.conn)
		mu     sync.Mutex
		wg     sync.WaitGroup
		next   atomic.Int64
		acked  int
		enough = make(chan struct{})
	)
	ctx, cancel := context.WithCancel(ctx)
	for range flipPublishers {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int64(life)*1_000_000 + next.Add(1)
				body := payload(flipSize, i, time.Now())
				e := event(i, body)
				mu.Lock()
				o.sent[e.GetId()] = sha256.Sum256(body)
				mu.Unlock()
				if _, err := client.Publish(ctx, &grapnelv1.PublishRequest{Parent: "namespaces/" + namespace, Event: e}); err != nil {
					continue // it may be there and may be not; after the end all are refused
				}
				mu.Lock()
				o.acked = append(o.acked, e.GetId())
				if acked++; acked == flipEvents {
					close(enough)
				}
				mu.Unlock()
			}
		})
	}
	var err error
	select {
	case <-enough:
	case <-p.ended:
		err = fmt.Errorf("the server ended:\n%s", p.log)
	}
	if err == nil {
		err = end()
	}
	cancel()
	wg.Wait()
	return err
}

// fault is one that was put into a copy.
type fault struct {
	place string // wal, table, manifest, etcd-db, etcd-wal or key
	kind  string // flip, cut or delete
	file  string
	at    int64
}

func (f fault) String() string {
	switch f.kind {
	case "flip":
		return fmt.Sprintf("%s: bit flipped at %d of %s", f.place, f.at, filepath.Base(f.file))
	case "cut":
		return fmt.Sprintf("%s: %s cut off at %d", f.place, filepath.Base(f.file), f.at)
	default:
		return fmt.Sprintf("%s: %s deleted", f.place, filepath.Base(f.file))
	}
}

// flipPlaces are the files of a data directory, by what they are.
func flipPlaces() map[string]string {
	return map[string]string{
		"wal":      "journal/*.log",
		"table":    "journal/*.sst",
		"manifest": "journal/MANIFEST-*",
		"etcd-db":  "etcd/member/snap/db",
		"etcd-wal": "etcd/member/wal/*.wal",
		"key":      "secret.key",
	}
}

// inject puts a fault into dir, chosen by rng: of the files in a place one that is not empty, of its bytes one that has
// been written.
func inject(dir string, rng *rand.Rand) (fault, error) {
	places := flipPlaces()
	names := []string{"wal", "wal", "wal", "table", "manifest", "etcd-db", "etcd-wal", "key"} // the log is where most is at stake
	f := fault{place: names[rng.IntN(len(names))], kind: []string{"flip", "flip", "cut", "delete"}[rng.IntN(4)]}
	if *flipPlace != "" {
		f.place = *flipPlace
	}
	files, err := filepath.Glob(filepath.Join(dir, filepath.FromSlash(places[f.place])))
	if err != nil {
		return f, err
	}
	var (
		written [][]byte
		chosen  []string
	)
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return f, err
		}
		if b = bytes.TrimRight(b, "\x00"); len(b) > 0 {
			written, chosen = append(written, b), append(chosen, file)
		}
	}
	if len(chosen) == 0 {
		return f, fmt.Errorf("there is no %s in %s", f.place, dir)
	}
	i := rng.IntN(len(chosen))
	if rng.IntN(2) == 0 {
		i = len(chosen) - 1 // the newest by name, where there are several
	}
	f.file, f.at = chosen[i], rng.Int64N(int64(len(written[i])))
	switch f.kind {
	case "delete":
		return f, os.Remove(f.file)
	case "cut":
		return f, os.Truncate(f.file, f.at)
	}
	return f, flipBit(f.file, f.at, rng.IntN(8))
}

func flipBit(file string, at int64, bit int) (err error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		return err
	}
	b[0] ^= 1 << bit
	_, err = f.WriteAt(b[:], at)
	return err
}

// tally counts outcomes by place.
type tally map[string]map[string]int

func (c tally) add(place, outcome string) {
	if c[place] == nil {
		c[place] = map[string]int{}
	}
	c[place][outcome]++
}

func (c tally) String() string {
	var b strings.Builder
	for _, place := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, "%-9s", place)
		for _, outcome := range slices.Sorted(maps.Keys(c[place])) {
			fmt.Fprintf(&b, "  %s: %d", outcome, c[place][outcome])
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// try puts a fault into a copy, starts a server on it and audits what it does.
func (o *flipOrigin) try(t *testing.T, bin string, seed uint64, count tally) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	defer os.RemoveAll(dir)
	if err := copyTree(dir, o.dir); err != nil {
		t.Fatal(err)
	}
	f, err := inject(dir, rand.New(rand.NewPCG(seed, 11)))
	if err != nil {
		t.Fatal(err)
	}
	what := fmt.Sprintf("seed %d, killed %v, %s", seed, o.killed, f)
	p, err := startServer(t.Context(), bin, dir)
	if err != nil {
		outcome := "refused"
		if bad := poorRefusal(err.Error(), f); bad != "" {
			outcome = "refused poorly"
			t.Errorf("%s: %s:\n%s", what, bad, end(err.Error(), 1500))
		}
		count.add(f.place, outcome)
		if outcome == "refused" && strings.Contains(err.Error(), "grapnel journal salvage") {
			o.rescue(t, bin, dir, what)
		}
		return
	}
	defer p.kill()
	a := o.audit(t, p)
	switch said := told(p.log.String()); {
	case a.altered != "":
		count.add(f.place, "ALTERED")
		t.Errorf("%s: altered: %s", what, a.altered)
	case a.missing > 0 && !said:
		count.add(f.place, "SILENT")
		t.Errorf("%s: %d of %d acknowledged are missing (%s), and nothing says so:\n%s",
			what, a.missing, len(o.acked), a.example, end(p.log.String(), 1500))
	case a.missing > 0:
		count.add(f.place, "missing, told")
	case a.failed > 0:
		count.add(f.place, "asking fails")
	default:
		count.add(f.place, "whole")
	}
	for _, wrong := range o.rcv.faults(o.sent) {
		t.Errorf("%s: the receiver got %s", what, wrong)
	}
}

// rescue does what a refusal says: it salvages the journal, and starts on what is there. Nothing of it is altered.
func (o *flipOrigin) rescue(t *testing.T, bin, dir, what string) {
	t.Helper()
	journal, salvaged := filepath.Join(dir, "journal"), filepath.Join(dir, "salvaged")
	out, err := exec.Command(bin, "journal", "salvage", journal, salvaged).CombinedOutput()
	if err == nil {
		err = os.Rename(journal, journal+".damaged")
	}
	if err == nil {
		err = os.Rename(salvaged, journal)
	}
	if err != nil {
		t.Errorf("%s: salvage: %v\n%s", what, err, out)
		return
	}
	p, err := startServer(t.Context(), bin, dir, "--accept-loss")
	if err != nil {
		t.Errorf("%s: the start on what was salvaged: %v\n%s", what, err, out)
		return
	}
	defer p.kill()
	a := o.audit(t, p)
	t.Logf("%s: %d of %d acknowledged are back", what, len(o.acked)-a.missing-a.failed, len(o.acked))
	if a.altered != "" || a.failed > 0 {
		t.Errorf("%s: after salvage: altered %q, %d cannot be read: %s", what, a.altered, a.failed, a.example)
	}
}

// findings are what an audit has found out.
type findings struct {
	missing, failed  int
	example, altered string
}

// audit asks for everything that was acknowledged, and for the configuration.
func (o *flipOrigin) audit(t *testing.T, p *serverProcess) (a findings) {
	t.Helper()
	client := grapnelv1.NewEventServiceClient(p.conn)
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		next atomic.Int64
	)
	for range flipPublishers {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(o.acked)); i = next.Add(1) - 1 {
				id := o.acked[i]
				got, err := client.GetEvent(t.Context(), &grapnelv1.GetEventRequest{
					Name: "namespaces/" + namespace + "/events/" + id, IncludePayload: true,
				})
				mu.Lock()
				a.note(id, err)
				if err == nil && sha256.Sum256(got.GetEvent().GetData()) != o.sent[id] {
					a.altered = "event " + id
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	name := "namespaces/" + namespace + "/subscriptions/sub-0"
	got, err := grapnelv1.NewSubscriptionServiceClient(p.conn).GetSubscription(t.Context(), &grapnelv1.GetSubscriptionRequest{Name: name})
	a.note(name, err)
	if s := got.GetSubscription(); err == nil &&
		(s.GetUri() != o.uri || !slices.Equal(s.GetEventTypes(), []string{"bench.*"}) || s.GetMaxInFlight() != 256) {
		a.altered = s.String()
	}
	return a
}

// note enters an answer. An error other than NotFound tells whoever asks.
func (a *findings) note(name string, err error) {
	switch status.Code(err) {
	case codes.OK:
	case codes.NotFound:
		a.missing++
		a.example = name
	default:
		a.failed++
		a.example = name + ": " + err.Error()
	}
}

var (
	commandWords = regexp.MustCompile(`grapnel [a-z]+ [a-z-]+|--accept-loss|[Rr]estore`)
	lossWords    = regexp.MustCompile(`(?i)level=(warn|error).*(missing|lost|damage|corrupt|checksum|accept-loss)`)
)

// poorRefusal says what a refused start lacks: it names the file, of etcd's at least their directory, and what to do.
func poorRefusal(text string, f fault) string {
	_, said, _ := strings.Cut(text, "\n") // the first line is startServer's
	switch {
	case strings.Contains(text, "was not ready within"):
		return "neither a start nor a refusal"
	case strings.Contains(text, "fatal error:") || strings.Contains(text, "panic:"):
		return "it crashed"
	case !strings.Contains(said, filepath.Base(f.file)) && !(strings.HasPrefix(f.place, "etcd") && strings.Contains(said, lastDirs(f.file))):
		return "the refusal does not name the file"
	case !commandWords.MatchString(said):
		return "the refusal names no command"
	}
	return ""
}

// lastDirs are the two last directories that a file is in, such as member/wal.
func lastDirs(file string) string {
	dir := filepath.Dir(file)
	return filepath.Join(filepath.Base(filepath.Dir(dir)), filepath.Base(dir))
}

// told says whether the log tells of a loss.
func told(log string) bool { return lossWords.MatchString(log) }

// end is the last n bytes of a text.
func end(text string, n int) string { return text[max(0, len(text)-n):] }

// copyTree copies a data directory, whose files have holes that are not worth writing.
func copyTree(to, from string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if d.IsDir() {
			return os.MkdirAll(target, 0o700)
		}
		if !d.Type().IsRegular() {
			return nil // a socket
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(target, bytes.TrimRight(b, "\x00"), 0o600); err != nil {
			return err
		}
		return os.Truncate(target, int64(len(b)))
	})
}
