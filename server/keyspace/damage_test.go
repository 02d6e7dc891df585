package keyspace_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
)

// journal is a log that can be read while it is written.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(b []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(b)
}

func (j *journal) has(parts ...string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for line := range strings.Lines(j.text.String()) {
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(line, p) }) {
			return true
		}
	}
	return false
}

// openAs opens a Space of its own etcd, with an identity.
func openAs(t *testing.T, c *clientv3.Client, prefix, identity string) (*keyspace.Space, *view, *journal, error) {
	t.Helper()
	v, logged := &view{values: make(map[string]string)}, &journal{}
	s, err := keyspace.Open(t.Context(), keyspace.Options{
		Client: c, Prefix: prefix, Watch: []string{"a/", "c/"}, Apply: v.apply, Identity: identity,
		Logger: slog.New(slog.NewTextHandler(logged, nil)),
	})
	return s, v, logged, err
}

func ownEtcd(t *testing.T) *keyspacetest.Etcd {
	t.Helper()
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	return own
}

// flip changes one bit of what is stored under a key, as a disk would.
func flip(t *testing.T, c *clientv3.Client, key string, at int) {
	t.Helper()
	got, err := c.Get(t.Context(), key)
	if err != nil || len(got.Kvs) != 1 {
		t.Fatal(got, err)
	}
	value := bytes.Clone(got.Kvs[0].Value)
	value[at] ^= 4
	if _, err := c.Put(t.Context(), key, string(value)); err != nil {
		t.Fatal(err)
	}
}

func TestSumCoversKeyAndValue(t *testing.T) {
	stored := keyspace.AddSum("a/k", []byte("value"))
	if got, ok := keyspace.CheckSum("a/k", stored); !ok || string(got) != "value" {
		t.Errorf("read back %q, %v", got, ok)
	}
	for i := range 8 * len(stored) {
		damaged := bytes.Clone(stored)
		damaged[i/8] ^= 1 << (i % 8)
		if _, ok := keyspace.CheckSum("a/k", damaged); ok {
			t.Errorf("bit %d was not noticed", i)
		}
	}
	if _, ok := keyspace.CheckSum("a/l", stored); ok {
		t.Error("another key was not noticed")
	}
	for _, short := range []string{"", "abc"} {
		if _, ok := keyspace.CheckSum("a/k", []byte(short)); ok {
			t.Errorf("%q passed", short)
		}
	}
}

func TestDamagedValuesAreNeverServed(t *testing.T) {
	own := ownEtcd(t)
	for _, key := range []string{"first", "later", "whole"} {
		put(t, own.Client, "/damage/a/"+key, "good")
	}
	flip(t, own.Client, "/damage/a/first", 0)
	s, v, logged, err := openAs(t, own.Client, "/damage/", "")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"a/later": "good", "a/whole": "good"}, v.get()); diff != "" {
		t.Errorf("after Open (-want +got):\n%s", diff)
	}
	if !cmp.Equal(s.Broken(), []string{"a/first"}) || !logged.has("ERROR", "/damage/a/first") {
		t.Errorf("broken are %v, logged %s", s.Broken(), logged.text.String())
	}

	stop := run(t, s)
	flip(t, own.Client, "/damage/a/later", 1) // by the watch
	put(t, own.Client, "/damage/a/end", "x")
	eventually(t, "the watch has brought it", func() bool { return v.get()["a/end"] == "x" })
	if got := v.get()["a/later"]; got != "good" {
		t.Errorf("what was known became %q", got)
	}
	if !cmp.Equal(s.Broken(), []string{"a/first", "a/later"}) || !logged.has("ERROR", "/damage/a/later") {
		t.Errorf("broken are %v", s.Broken())
	}
	var broken *keyspace.BrokenError
	_, err = s.Edit(t.Context(), []string{"a/later"}, func(items []keyspace.Item) (keyspace.Txn, error) {
		if items[0].Value != nil {
			t.Errorf("a plan was shown %q", items[0].Value)
		}
		return keyspace.Txn{}, items[0].Err
	})
	if !errors.As(err, &broken) || broken.Key != "/damage/a/later" {
		t.Errorf("got %v", err)
	}

	stop()
	put(t, own.Client, "/damage/a/first", "mended")
	flip(t, own.Client, "/damage/a/whole", 0) // by a listing
	head, err := own.Client.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := own.Client.Compact(t.Context(), head.Header.Revision); err != nil {
		t.Fatal(err)
	}
	run(t, s)
	want := map[string]string{"a/first": "mended", "a/later": "good", "a/whole": "good", "a/end": "x"}
	eventually(t, "the listing is taken in", func() bool { return cmp.Equal(want, v.get()) })
	if got := s.Broken(); !cmp.Equal(got, []string{"a/later", "a/whole"}) {
		t.Errorf("broken are %v", got)
	}
	if _, err := s.Edit(t.Context(), []string{"a/later"}, set(s, "a/later", "again")); err != nil {
		t.Error(err)
	}
	if got := s.Broken(); !cmp.Equal(got, []string{"a/whole"}) || v.get()["a/later"] != "again" {
		t.Errorf("broken are %v, the view holds %v", got, v.get())
	}
}

// One transaction over several watched parts is one step.
func TestPartsChangeTogether(t *testing.T) {
	own := ownEtcd(t)
	var mu sync.Mutex
	apart := false
	s, err := keyspace.Open(t.Context(), keyspace.Options{
		Client: own.Client, Prefix: "/parts/", Watch: []string{"a/", "c/"},
		Apply: func(_ int64, changes []keyspace.Change) {
			mu.Lock()
			defer mu.Unlock()
			seen := 0
			for _, c := range changes {
				if strings.HasPrefix(c.Key, "b/") {
					t.Errorf("told of %s", c.Key)
				}
				seen++
			}
			apart = apart || seen%2 != 0
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	for range 20 {
		_, err := s.Edit(t.Context(), []string{"a/k"}, func([]keyspace.Item) (keyspace.Txn, error) {
			return keyspace.Txn{Then: []keyspace.Write{keyspace.Put("a/k", nil), keyspace.Put("b/k", nil), keyspace.Put("c/k", nil)}}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if apart {
		t.Error("a transaction was told in parts")
	}
}

func TestIdentityAtOpen(t *testing.T) {
	own := ownEtcd(t)
	var stranger *keyspace.StrangerError
	for range 2 { // the first writes it, the second finds it
		s, _, _, err := openAs(t, own.Client, "/new/", "one")
		if err != nil || s.Stranger() != nil || s.ClusterID() == 0 {
			t.Fatal(s, err)
		}
	}
	if _, _, _, err := openAs(t, own.Client, "/new/", "two"); !errors.As(err, &stranger) || stranger.Found != "one" || stranger.Want != "two" {
		t.Errorf("another's: %v", err)
	}
	flip(t, own.Client, "/new/identity", 0)
	if _, _, _, err := openAs(t, own.Client, "/new/", "one"); !errors.As(err, &stranger) || !stranger.Damaged {
		t.Errorf("damaged: %v", err)
	}
	put(t, own.Client, "/used/a/k", "v")
	if _, _, _, err := openAs(t, own.Client, "/used/", "one"); !errors.As(err, &stranger) || stranger.Found != "" || stranger.Keys != 1 {
		t.Errorf("nobody's: %v", err)
	}
	if got, err := own.Client.Get(t.Context(), "/used/identity"); err != nil || got.Count != 0 {
		t.Errorf("it was claimed: %v, %v", got, err)
	}
	if _, _, _, err := openAs(t, own.Client, "/used/", ""); err != nil {
		t.Errorf("without an identity: %v", err)
	}
}

func TestStrangerIsNotListenedTo(t *testing.T) {
	own := ownEtcd(t)
	s, v, logged, err := openAs(t, own.Client, "/who/", "one")
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "known")); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"a/k": "known"}
	for name, pretend := range map[string]func(){
		"emptied": func() {
			if _, err := own.Client.Delete(t.Context(), "/who/identity"); err != nil {
				t.Fatal(err)
			}
		},
		"replaced": func() { put(t, own.Client, "/who/identity", "two") },
	} {
		pretend()
		eventually(t, name+" is noticed", func() bool { return s.Stranger() != nil })
		if s.Healthy() || !errors.Is(s.Stranger(), keyspace.ErrUnavailable) {
			t.Errorf("%s: healthy %v, %v", name, s.Healthy(), s.Stranger())
		}
		if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "written to a stranger")); !errors.Is(err, keyspace.ErrUnavailable) {
			t.Errorf("%s: wrote: %v", name, err)
		}
		if diff := cmp.Diff(want, v.get()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		put(t, own.Client, "/who/identity", "one")
		eventually(t, "it is known again", func() bool { return s.Stranger() == nil && s.Healthy() })
	}
	if !logged.has("ERROR", "/who/", "is not the one it should be") {
		t.Error("nothing was said")
	}
	if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "after")); err != nil || v.get()["a/k"] != "after" {
		t.Errorf("%v, %v", v.get(), err)
	}
}

// An etcd that comes up with an empty directory is a stranger, and what was known stays.
func TestWipedEtcdIsAStranger(t *testing.T) {
	own := ownEtcd(t)
	s, v, _, err := openAs(t, own.Client, "/wiped/", "one")
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	for range 20 {
		if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "known")); err != nil {
			t.Fatal(err)
		}
	}
	own.Stop()
	if err := own.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is noticed", func() bool { return s.Stranger() != nil })
	if s.Healthy() || v.get()["a/k"] != "known" {
		t.Errorf("healthy %v, the view holds %v", s.Healthy(), v.get())
	}
}

// Another cluster is a stranger even when it says it is the same, as a copy would.
func TestAnotherClusterIsAStranger(t *testing.T) {
	one, two := ownEtcd(t), ownEtcd(t)
	if _, _, _, err := openAs(t, two.Client, "/same/", "one"); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		put(t, two.Client, "/same/a/k", "another's")
	}
	s, v, _, err := openAs(t, one.Client, "/same/", "one")
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	if _, err := s.Edit(t.Context(), []string{"a/k"}, set(s, "a/k", "known")); err != nil {
		t.Fatal(err)
	}
	endpoints := one.Client.Endpoints()
	one.Client.SetEndpoints(two.Client.Endpoints()...)
	one.Stop()
	eventually(t, "it is noticed", func() bool { return s.Stranger() != nil })
	var stranger *keyspace.StrangerError
	if !errors.As(s.Stranger(), &stranger) || stranger.WantCluster != s.ClusterID() || stranger.FoundCluster == s.ClusterID() {
		t.Errorf("got %v", s.Stranger())
	}
	if got := v.get()["a/k"]; got != "known" {
		t.Errorf("the view holds %q", got)
	}
	if err := one.Restart(); err != nil {
		t.Fatal(err)
	}
	one.Client.SetEndpoints(endpoints...)
	two.Stop()
	eventually(t, "it is known again", func() bool { return s.Stranger() == nil && s.Healthy() })
}

// late is an etcd whose answers to probes come when the watch is further already.
type late struct {
	clientv3.KV
	meanwhile func()
}

func (l late) Get(ctx context.Context, key string, o ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	got, err := l.KV.Get(ctx, key, o...)
	if l.meanwhile != nil {
		l.meanwhile()
	}
	return got, err
}

func TestProbeBehindTheWatchIsNoStepBack(t *testing.T) {
	own := ownEtcd(t)
	client := own.Local()
	s, v, logged, err := openAs(t, client, "/late/", "")
	if err != nil {
		t.Fatal(err)
	}
	rounds := make(chan struct{}, 100)
	client.KV = late{client.KV, func() {
		before := v.count()
		if _, err := own.Client.Put(context.Background(), "/late/a/k", summed("/late/a/k", "v")); err != nil {
			t.Error(err)
		}
		for range 1000 {
			if v.count() > before {
				break
			}
			wait(5 * time.Millisecond)
		}
		rounds <- struct{}{}
	}}
	run(t, s)
	for range 3 {
		<-rounds
	}
	if logged.has("WARN") {
		t.Errorf("it was taken for a step back: %s", logged.text.String())
	}
}
