package keyspace_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
)

var etcd *keyspacetest.Etcd

func TestMain(m *testing.M) {
	var err error
	if etcd, err = keyspacetest.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	etcd.Close()
	os.Exit(code)
}

// view is an owner that keeps the watched keys in a map.
type view struct {
	mu       sync.Mutex
	revision int64
	values   map[string]string
	changes  int
}

func (v *view) apply(revision int64, changes []keyspace.Change) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.revision = revision
	for _, c := range changes {
		v.changes++
		if c.Deleted {
			delete(v.values, c.Key)
		} else {
			v.values[c.Key] = string(c.Value)
		}
	}
}

func (v *view) get() map[string]string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.values)
}

func (v *view) count() int {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changes
}

func open(t *testing.T, c *clientv3.Client, prefix string) (*keyspace.Space, *view) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := etcd.Client.Delete(context.Background(), prefix, clientv3.WithPrefix()); err != nil {
			t.Error(err)
		}
	})
	v := &view{values: make(map[string]string)}
	s, err := keyspace.Open(t.Context(), keyspace.Options{
		Client: c, Prefix: prefix, Watch: []string{"a/", "c/"}, Apply: v.apply,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

// run follows until stop is called, or the test ends.
func run(t *testing.T, s *keyspace.Space) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func set(s *keyspace.Space, key, value string) func([]keyspace.Item) (keyspace.Txn, error) {
	return func([]keyspace.Item) (keyspace.Txn, error) {
		return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(key, []byte(value))}}, nil
	}
}

// put stores a value as a Space would. The prefix is the key's first part.
func put(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	if _, err := c.Put(t.Context(), key, summed(key, value)); err != nil {
		t.Fatal(err)
	}
}

func summed(key, value string) string {
	return string(keyspace.AddSum(key[strings.Index(key[1:], "/")+2:], []byte(value)))
}

// eventually waits for a condition; it says what it waited for when it does not come.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		wait(5 * time.Millisecond)
	}
}

func wait(d time.Duration) { <-time.After(d) }

func TestOpenListsAndRunFollows(t *testing.T) {
	put(t, etcd.Client, "/list/a/1", "one")
	put(t, etcd.Client, "/list/b/3", "three")
	s, v := open(t, etcd.Client, "/list/")
	if diff := cmp.Diff(map[string]string{"a/1": "one"}, v.get()); diff != "" {
		t.Errorf("after Open (-want +got):\n%s", diff)
	}
	run(t, s)
	put(t, etcd.Client, "/list/a/4", "four")
	if _, err := etcd.Client.Delete(t.Context(), "/list/a/1"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "changes arrive", func() bool { return cmp.Equal(map[string]string{"a/4": "four"}, v.get()) })
}

func TestOpenReadsManyPages(t *testing.T) {
	want := make(map[string]string)
	var ops []clientv3.Op
	for i := range 1203 {
		key := fmt.Sprintf("a/%04d", i)
		want[key] = "x"
		if ops = append(ops, clientv3.OpPut("/pages/"+key, summed("/pages/"+key, "x"))); len(ops) == 100 || i == 1202 {
			if _, err := etcd.Client.Txn(t.Context()).Then(ops...).Commit(); err != nil {
				t.Fatal(err)
			}
			ops = nil
		}
	}
	_, v := open(t, etcd.Client, "/pages/")
	if diff := cmp.Diff(want, v.get()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// It holds for a client in the server's process as for one over the network.
func TestEditReturnsWhenApplyHasSeenIt(t *testing.T) {
	for name, client := range map[string]*clientv3.Client{"network": etcd.Client, "process": etcd.Local()} {
		t.Run(name, func(t *testing.T) {
			s, v := open(t, client, "/ryw-"+name+"/")
			run(t, s)
			for i := range 50 {
				want := fmt.Sprint(i)
				revision, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", want))
				if err != nil || revision == 0 {
					t.Fatal(revision, err)
				}
				if got := v.get()["a/k"]; got != want {
					t.Fatalf("after Edit the view holds %q, want %q", got, want)
				}
			}
		})
	}
}

// A watch that has nothing to tell is not taken for a dead one.
func TestIdleStaysHealthy(t *testing.T) {
	t.Parallel()
	for name, client := range map[string]*clientv3.Client{"network": etcd.Client, "process": etcd.Local()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, v := open(t, client, "/idle-"+name+"/")
			run(t, s)
			for range 6 {
				wait(time.Second)
				if !s.Healthy() {
					t.Fatal("it is unhealthy")
				}
			}
			if v.changes != 0 {
				t.Error("changes out of nothing")
			}
		})
	}
}

func TestConcurrentEditsAllLand(t *testing.T) {
	s, v := open(t, etcd.Client, "/cas/")
	run(t, s)
	const writers, rounds = 8, 10
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range rounds {
				_, err := s.Edit(t.Context(), []string{"a/n"}, func(items []keyspace.Item) (keyspace.Txn, error) {
					return set(s, "a/n", string(items[0].Value)+"x")(items)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(v.get()["a/n"]); got != writers*rounds {
		t.Errorf("%d of %d edits landed", got, writers*rounds)
	}
}

// However many write at once, a few are at it, and all have their turn.
func TestManyEditsTakeTurns(t *testing.T) {
	own := ownEtcd(t)
	s, v := open(t, own.Client, "/turns/")
	run(t, s)
	var now, most atomic.Int64
	var all sync.WaitGroup
	for i := range 50 {
		key := fmt.Sprintf("a/%d", i)
		all.Go(func() {
			_, err := s.Edit(t.Context(), []string{key}, func([]keyspace.Item) (keyspace.Txn, error) {
				for n := now.Add(1); ; {
					if was := most.Load(); n <= was || most.CompareAndSwap(was, n) {
						break
					}
				}
				defer now.Add(-1)
				runtime.Gosched()
				return keyspace.Txn{Then: []keyspace.Write{keyspace.Put(key, []byte("x"))}}, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := most.Load(); n > 4 {
		t.Errorf("%d were made at once", n)
	}
	if n := len(v.get()); n != 50 {
		t.Errorf("%d of 50 were written", n)
	}
}

func TestEditKeepsErrorsAndNothingToDo(t *testing.T) {
	s, _ := open(t, etcd.Client, "/plan/")
	boom := errors.New("boom")
	if _, err := s.Edit(t.Context(), []string{"a/k"}, func([]keyspace.Item) (keyspace.Txn, error) {
		return keyspace.Txn{}, boom
	}); err != boom {
		t.Errorf("got %v, want the plan's own error", err)
	}
	revision, err := s.Edit(t.Context(), []string{"a/k"}, func([]keyspace.Item) (keyspace.Txn, error) { return keyspace.Txn{}, nil })
	if revision != 0 || err != nil {
		t.Errorf("got %d, %v for nothing to do", revision, err)
	}
}

// TestEditFromFindsOutWhatIsWrong: a belief that is right spares a reading, and one that is wrong costs no more than that.
func TestEditFromFindsOutWhatIsWrong(t *testing.T) {
	s, v := open(t, etcd.Client, "/believe/")
	run(t, s)
	keys := []string{"a/k"}
	var seen []keyspace.Item
	write := func(value string) func([]keyspace.Item) (keyspace.Txn, error) {
		return func(items []keyspace.Item) (keyspace.Txn, error) {
			seen = append(seen, items[0])
			return keyspace.Txn{Then: []keyspace.Write{keyspace.Put("a/k", []byte(value))}}, nil
		}
	}
	absent := []keyspace.Item{{Key: "a/k", Unread: true}}
	if _, err := s.EditFrom(t.Context(), keys, absent, write("1")); err != nil || len(seen) != 1 || !seen[0].Unread || v.get()["a/k"] != "1" {
		t.Errorf("%v, %+v, %q", err, seen, v.get())
	}
	seen = nil
	if _, err := s.EditFrom(t.Context(), keys, absent, write("2")); err != nil || len(seen) != 2 || string(seen[1].Value) != "1" || seen[1].Unread || v.get()["a/k"] != "2" {
		t.Errorf("%v, %+v, %q", err, seen, v.get())
	}

	// What is wrong may be what the plan's error is due to, unless that says otherwise.
	for ends, want := range map[error]int{errors.New("boom"): 2, fmt.Errorf("ask first: %w", keyspace.ErrUnread): 1, nil: 2} {
		calls := 0
		_, err := s.EditFrom(t.Context(), keys, absent, func([]keyspace.Item) (keyspace.Txn, error) {
			calls++
			return keyspace.Txn{}, ends
		})
		if err != ends || calls != want {
			t.Errorf("%v: %v after %d plans, want %d", ends, err, calls, want)
		}
	}
}

// TestNotSince: a key that has been written later than a revision fails the condition, and one that never was does not.
func TestNotSince(t *testing.T) {
	s, v := open(t, etcd.Client, "/notsince/")
	run(t, s)
	try := func(revision int64) error {
		_, err := s.EditFrom(t.Context(), []string{"a/k"}, []keyspace.Item{{Key: "a/k", Unread: true}}, func(items []keyspace.Item) (keyspace.Txn, error) {
			if !items[0].Unread {
				return keyspace.Txn{}, errors.New("it was read")
			}
			return keyspace.Txn{
				If:   []keyspace.Cond{keyspace.NotSince("a/mark", revision)},
				Then: []keyspace.Write{keyspace.Put("a/k", nil), keyspace.Put("a/mark", nil)}, Loose: []string{"a/k"},
			}, nil
		})
		return err
	}
	if err := try(1); err != nil {
		t.Errorf("never written: %v", err)
	}
	v.mu.Lock()
	at := v.revision
	v.mu.Unlock()
	if err := try(at - 1); err == nil {
		t.Error("written since, and not noticed")
	}
	if err := try(at); err != nil {
		t.Errorf("written at that revision: %v", err)
	}
}

func TestEditWithoutRunEndsInTime(t *testing.T) {
	s, _ := open(t, etcd.Client, "/norun/")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Edit(ctx, []string{"a/k"}, set(s, "a/k", "v")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the caller's deadline", err)
	}
}

func TestResyncAfterCompaction(t *testing.T) {
	put(t, etcd.Client, "/compact/a/stays", "1")
	put(t, etcd.Client, "/compact/a/changes", "1")
	put(t, etcd.Client, "/compact/a/goes", "1")
	s, v := open(t, etcd.Client, "/compact/")
	stop := run(t, s)
	put(t, etcd.Client, "/compact/a/seen", "1")
	eventually(t, "the watch works", func() bool { return v.get()["a/seen"] == "1" })
	stop()
	before := v.changes

	put(t, etcd.Client, "/compact/a/changes", "2")
	put(t, etcd.Client, "/compact/a/comes", "2")
	resp, err := etcd.Client.Delete(t.Context(), "/compact/a/goes")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Client.Compact(t.Context(), resp.Header.Revision); err != nil {
		t.Fatal(err)
	}
	run(t, s)
	want := map[string]string{"a/stays": "1", "a/changes": "2", "a/comes": "2", "a/seen": "1"}
	eventually(t, "the differences arrive", func() bool { return cmp.Equal(want, v.get()) })
	v.mu.Lock()
	if got := v.changes - before; got != 3 {
		t.Errorf("%d changes were applied, want the 3 that differ", got)
	}
	v.mu.Unlock()
	if _, err := s.Edit(t.Context(), []string{"a/after"}, set(s, "a/after", "3")); err != nil {
		t.Error(err)
	}
}

func TestOutage(t *testing.T) {
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	s, v := open(t, own.Client, "/out/")
	run(t, s)
	if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "before")); err != nil {
		t.Fatal(err)
	}
	if !s.Healthy() {
		t.Error("not healthy while etcd runs")
	}
	own.Stop()
	started := time.Now()
	if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "during")); !errors.Is(err, keyspace.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if took := time.Since(started); took > 8*time.Second {
		t.Errorf("it took %v to say so", took)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := s.Read(ctx, "a/k"); err == nil {
		t.Error("read without etcd")
	}
	eventually(t, "it is unhealthy", func() bool { return !s.Healthy() })
	if got := v.get()["a/k"]; got != "before" {
		t.Errorf("the view holds %q", got)
	}
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is healthy again", s.Healthy)
	eventually(t, "writes work again", func() bool {
		_, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "after"))
		return err == nil
	})
	if got := v.get()["a/k"]; got != "after" {
		t.Errorf("the view holds %q", got)
	}
}

func TestHistoryThatBeginsAnew(t *testing.T) {
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	for range 20 {
		put(t, own.Client, "/past/a/old", "x")
	}
	s, v := open(t, own.Client, "/past/")
	run(t, s)
	own.Stop()
	if err := own.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "etcd answers", func() bool {
		_, err := own.Client.Put(t.Context(), "/past/a/new", summed("/past/a/new", "y"))
		return err == nil
	})
	want := map[string]string{"a/new": "y"}
	eventually(t, "the new history is seen", func() bool { return cmp.Equal(want, v.get()) })
}
