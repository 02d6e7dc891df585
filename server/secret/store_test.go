package secret_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/secret"
	"github.com/grapnel/grapnel/server/subscription"
)

const (
	opaque = grapnelv1.Secret_KIND_OPAQUE
	hmac   = grapnelv1.Secret_KIND_HMAC
	edwa   = grapnelv1.Secret_KIND_ED25519
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

func prefix(t *testing.T) string { return "/" + t.Name() + "/" }

func key() []byte { return bytes.Repeat([]byte{7}, 32) }

func run(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// store opens one under the test's own prefix, in which the namespace acme exists.
func store(t *testing.T, c *clientv3.Client, onChange ...func(string)) (*secret.Store, *subscription.Registry) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := etcd.Client.Delete(context.Background(), prefix(t), clientv3.WithPrefix()); err != nil {
			t.Error(err)
		}
	})
	r, err := subscription.Open(t.Context(), subscription.Options{Client: c, Prefix: prefix(t)})
	if err != nil {
		t.Fatal(err)
	}
	run(t, r.Run)
	if r.Snapshot().Namespace("acme") == nil {
		if _, err := r.CreateNamespace(t.Context(), "acme", nil); err != nil {
			t.Fatal(err)
		}
	}
	s, err := secret.Open(t.Context(), secret.Options{Client: c, Prefix: prefix(t), Key: key()})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range onChange {
		s.OnChange(f)
	}
	run(t, s.Run)
	return s, r
}

func create(t *testing.T, s *secret.Store, id string, kind grapnelv1.Secret_Kind, value string) (*secret.Secret, string) {
	t.Helper()
	sec, generated, err := put(t, s, "acme", id, kind, value)
	if err != nil {
		t.Fatal(err)
	}
	return sec, generated
}

// put makes a value by its kind and stores it.
func put(t *testing.T, s *secret.Store, ns, id string, kind grapnelv1.Secret_Kind, value string) (*secret.Secret, string, error) {
	t.Helper()
	m, err := secret.Make(kind, value)
	if err != nil {
		return nil, "", err
	}
	sec, err := s.Create(t.Context(), ns, id, m)
	return sec, m.Generated(), err
}

// rotate makes a value of the secret's kind and stores it.
func rotate(t *testing.T, s *secret.Store, ns, id, value string, overlap time.Duration, etag string) (*secret.Secret, string, error) {
	t.Helper()
	kind := hmac
	if sec, err := s.Get(ns, id); err == nil {
		kind = sec.Proto.GetKind()
	}
	m, err := secret.Make(kind, value)
	if err != nil {
		return nil, "", err
	}
	sec, err := s.Rotate(t.Context(), ns, id, m, overlap, etag)
	return sec, m.Generated(), err
}

func name(id string) string { return "namespaces/acme/secrets/" + id }

func values(s *secret.Store, id string) []string {
	versions, _ := s.Versions(name(id))
	var out []string
	for _, v := range versions {
		out = append(out, string(v.Value))
	}
	return out
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("timed out waiting until %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// record reads what is stored of a secret.
func record(t *testing.T, id string) *storev1.SecretRecord {
	t.Helper()
	resp, err := etcd.Client.Get(t.Context(), prefix(t)+"secrets/"+name(id))
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatal(resp, err)
	}
	value, ok := keyspace.CheckSum("secrets/"+name(id), resp.Kvs[0].Value)
	if !ok {
		t.Fatal("stored without a checksum")
	}
	rec := &storev1.SecretRecord{}
	if err := proto.Unmarshal(value, rec); err != nil {
		t.Fatal(err)
	}
	return rec
}

func overwrite(t *testing.T, id string, rec *storev1.SecretRecord) {
	t.Helper()
	value, err := proto.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Client.Put(t.Context(), prefix(t)+"secrets/"+name(id), string(keyspace.AddSum("secrets/"+name(id), value))); err != nil {
		t.Fatal(err)
	}
}

func TestEtcdOfSomebodyElse(t *testing.T) {
	s, _ := store(t, etcd.Client)
	create(t, s, "k", opaque, "value")
	var stranger *secret.StrangerError
	_, err := secret.Open(t.Context(), secret.Options{Client: etcd.Client, Prefix: prefix(t), Key: key(), Identity: "one"})
	if !errors.As(err, &stranger) || stranger.Want != "one" {
		t.Errorf("got %v", err)
	}
}

// A damaged record is not used, and named; what was known of it stays in use.
func TestDamagedRecord(t *testing.T) {
	s, _ := store(t, etcd.Client)
	create(t, s, "k", opaque, "value")
	if _, err := etcd.Client.Put(t.Context(), prefix(t)+"secrets/"+name("k"), "damaged"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is seen", func() bool { return slices.Equal(s.Broken(), []string{name("k")}) })
	if got := values(s, "k"); !slices.Equal(got, []string{"value"}) {
		t.Errorf("in use are %q", got)
	}
	if _, _, err := rotate(t, s, "acme", "k", "next", 0, ""); err == nil {
		t.Error("built on a damaged record")
	}
	if err := s.Delete(t.Context(), "acme", "k", ""); err != nil {
		t.Fatal(err)
	}
	create(t, s, "k", opaque, "again")
	if len(s.Broken()) != 0 {
		t.Errorf("still broken: %q", s.Broken())
	}
}

func TestGeneratedValues(t *testing.T) {
	s, _ := store(t, etcd.Client)
	sec, value := create(t, s, "sym", hmac, "")
	if raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(value, "whsec_")); err != nil || len(raw) != 32 || !strings.HasPrefix(value, "whsec_") {
		t.Errorf("generated %d bytes, %v", len(raw), err)
	}
	if got := values(s, "sym"); !cmp.Equal(got, []string{value}) {
		t.Error("Versions does not give what was generated")
	}
	v := sec.Proto.Versions[0]
	if v.Version != 1 || len(v.Fingerprint) != 12 || v.ExpireTime != nil || sec.Proto.Etag == "" || sec.Proto.Kind != hmac {
		t.Errorf("metadata: %v", sec.Proto)
	}

	sec, value = create(t, s, "asym", edwa, "")
	private, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(value, "whsk_"))
	if err != nil || len(private) != 64 || !bytes.Equal(ed25519.NewKeyFromSeed(private[:32]), private) {
		t.Errorf("generated %d bytes, %v", len(private), err)
	}
	want := "whpk_" + base64.StdEncoding.EncodeToString(private[32:])
	if !cmp.Equal(sec.Proto.PublicKeys, []string{want}) {
		t.Errorf("public keys %q, want %q", sec.Proto.PublicKeys, want)
	}
	if _, other := create(t, s, "sym2", hmac, ""); other == value {
		t.Error("two secrets are equal")
	}
}

func TestGivenValues(t *testing.T) {
	s, _ := store(t, etcd.Client)
	seed := bytes.Repeat([]byte{1}, 32)
	full := ed25519.NewKeyFromSeed(seed)
	broken := append(slices.Clone(seed), bytes.Repeat([]byte{2}, 32)...)
	b64 := base64.StdEncoding.EncodeToString
	key24 := bytes.Repeat([]byte{9}, 24)
	tests := []struct {
		name   string
		kind   grapnelv1.Secret_Kind
		given  string
		want   string
		reason string
	}{
		{"hmac", hmac, "whsec_" + b64(key24), "whsec_" + b64(key24), ""},
		{"unpadded", hmac, "whsec_" + strings.TrimRight(b64(seed), "="), "whsec_" + b64(seed), ""},
		{"seed", edwa, "whsk_" + b64(seed), "whsk_" + b64(full), ""},
		{"seed and public", edwa, "whsk_" + b64(full), "whsk_" + b64(full), ""},
		{"opaque", opaque, "anything\nat all", "anything\nat all", ""},
		{"unspecified", 0, "x", "x", ""},
		{"no prefix", hmac, b64(key24), "", "secret.prefix"},
		{"other prefix", edwa, "whsec_" + b64(seed), "", "secret.prefix"},
		{"no base64", hmac, "whsec_c4n4ry!c4n4ry!c4n4ry!c4n4ry!", "", "secret.base64"},
		{"line break", hmac, "whsec_" + b64(key24[:12]) + "\n" + b64(key24[:12]), "", "secret.base64"},
		{"short", hmac, "whsec_" + b64(key24[:23]), "", "secret.length"},
		{"long", hmac, "whsec_" + b64(bytes.Repeat([]byte{1}, 65)), "", "secret.length"},
		{"mismatch", edwa, "whsk_" + b64(broken), "", "secret.mismatch"},
		{"odd length", edwa, "whsk_" + b64(seed[:31]), "", "secret.length"},
		{"no value", opaque, "", "", "secret.required"},
		{"too long", opaque, strings.Repeat("c4n4ry", 20000), "", "secret.length"},
		{"no kind", 77, "x", "", "enum.defined_only"},
	}
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			id := fmt.Sprint("s", i)
			_, generated, err := put(t, s, "acme", id, tt.kind, tt.given)
			if generated != "" {
				t.Error("a given value came back")
			}
			if tt.reason == "" {
				if got := values(s, id); err != nil || !cmp.Equal(got, []string{tt.want}) {
					t.Errorf("stored %q, %v; want %q", got, err, tt.want)
				}
				return
			}
			var invalid *secret.InvalidError
			if !errors.As(err, &invalid) || invalid.Violations[0].Reason != tt.reason {
				t.Fatalf("got %v, want %s", err, tt.reason)
			}
			if strings.Contains(err.Error(), "c4n4ry") || len(tt.given) > 8 && strings.Contains(err.Error(), tt.given[6:]) {
				t.Errorf("the error repeats the value: %v", err)
			}
		})
	}
}

func TestRotation(t *testing.T) {
	s, _ := store(t, etcd.Client)
	first, v1 := create(t, s, "k", hmac, "")
	second, v2, err := rotate(t, s, "acme", "k", "", time.Hour, first.Proto.Etag)
	if err != nil {
		t.Fatal(err)
	}
	if got := values(s, "k"); !cmp.Equal(got, []string{v2, v1}) {
		t.Errorf("versions are not newest first: %d of them", len(got))
	}
	versions, _ := s.Versions(name("k"))
	if left := time.Until(versions[1].ExpireTime); versions[0].Number != 2 || !versions[0].ExpireTime.IsZero() || left < 59*time.Minute || left > time.Hour {
		t.Errorf("versions %v, the old one ends in %v", versions, left)
	}
	var etagErr *secret.EtagError
	if _, _, err := rotate(t, s, "acme", "k", "", time.Hour, first.Proto.Etag); !errors.As(err, &etagErr) || etagErr.Current != second.Proto.Etag {
		t.Errorf("a repeated rotation: %v", err)
	}
	// A shorter overlap shortens what ends later; none ends everything old at once.
	if _, _, err := rotate(t, s, "acme", "k", "", time.Minute, ""); err != nil {
		t.Fatal(err)
	}
	versions, _ = s.Versions(name("k"))
	if len(versions) != 3 || time.Until(versions[2].ExpireTime) > time.Minute {
		t.Errorf("versions %v", versions)
	}
	last, v4, err := rotate(t, s, "acme", "k", "", 0, "")
	if err != nil || !cmp.Equal(values(s, "k"), []string{v4}) || len(last.Proto.Versions) != 1 || last.Proto.Versions[0].Version != 4 {
		t.Errorf("%v, %v", last.Proto, err)
	}
	if rec := record(t, "k"); len(rec.Versions) != 1 {
		t.Errorf("%d versions are stored", len(rec.Versions))
	}
	var invalid *secret.InvalidError
	for _, overlap := range []time.Duration{-1, 8 * 24 * time.Hour} {
		if _, _, err := rotate(t, s, "acme", "k", "", overlap, ""); !errors.As(err, &invalid) || invalid.Violations[0].Field != "overlap" {
			t.Errorf("overlap %v: %v", overlap, err)
		}
	}
	if _, _, err := rotate(t, s, "acme", "none", "", 0, ""); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("absent: %v", err)
	}
	create(t, s, "raw", opaque, "a")
	if _, _, err := rotate(t, s, "acme", "raw", "", 0, ""); !errors.As(err, &invalid) {
		t.Errorf("opaque without a value: %v", err)
	}
}

func TestTooManyVersions(t *testing.T) {
	s, _ := store(t, etcd.Client)
	create(t, s, "k", hmac, "")
	for range secret.MaxVersions - 1 {
		if _, _, err := rotate(t, s, "acme", "k", "", time.Hour, ""); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := rotate(t, s, "acme", "k", "", time.Hour, ""); !errors.Is(err, secret.ErrTooManyVersions) {
		t.Errorf("got %v", err)
	}
	if n := len(values(s, "k")); n != secret.MaxVersions {
		t.Errorf("%d versions are live", n)
	}
	if _, _, err := rotate(t, s, "acme", "k", "", 0, ""); err != nil {
		t.Errorf("a rotation that ends the others: %v", err)
	}
}

func TestExpiredVersionsAreErased(t *testing.T) {
	var mu sync.Mutex
	told := 0
	s, _ := store(t, etcd.Client, func(n string) {
		mu.Lock()
		defer mu.Unlock()
		if n != name("k") {
			t.Errorf("told of %q", n)
		}
		told++
	})
	create(t, s, "k", hmac, "")
	_, v2, err := rotate(t, s, "acme", "k", "", 300*time.Millisecond, "")
	if err != nil || len(values(s, "k")) != 2 {
		t.Fatal(err, len(values(s, "k")))
	}
	mu.Lock()
	before := told
	mu.Unlock()
	eventually(t, "the old version is gone from memory", func() bool { return cmp.Equal(values(s, "k"), []string{v2}) })
	eventually(t, "and from etcd", func() bool { return len(record(t, "k").Versions) == 1 })
	eventually(t, "and this was told", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return told > before
	})
	if sec, err := s.Get("acme", "k"); err != nil || len(sec.Proto.Versions) != 1 {
		t.Errorf("metadata: %v, %v", sec, err)
	}
}

func TestGetListDelete(t *testing.T) {
	s, _ := store(t, etcd.Client)
	for _, id := range []string{"c", "a", "b"} {
		create(t, s, id, hmac, "")
	}
	if _, _, err := put(t, s, "acme", "a", hmac, ""); !errors.Is(err, secret.ErrExists) {
		t.Errorf("created twice: %v", err)
	}
	if _, _, err := put(t, s, "none", "a", hmac, ""); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("in an absent namespace: %v", err)
	}
	var got []string
	for sec := range s.List("acme", "a") {
		got = append(got, sec.ID)
	}
	if diff := cmp.Diff([]string{"b", "c"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	sec, err := s.Get("acme", "b")
	if err != nil {
		t.Fatal(err)
	}
	var etagErr *secret.EtagError
	if err := s.Delete(t.Context(), "acme", "b", "zz"); !errors.As(err, &etagErr) {
		t.Errorf("old etag: %v", err)
	}
	if err := s.Delete(t.Context(), "acme", "b", sec.Proto.Etag); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("acme", "b"); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if _, ok := s.Versions(name("b")); ok {
		t.Error("its value can still be had")
	}
	if err := s.Delete(t.Context(), "acme", "b", ""); !errors.Is(err, secret.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
	var invalid *secret.InvalidError
	for _, id := range []string{"", "../x", "A", "a/b"} {
		if _, _, err := put(t, s, "acme", id, hmac, ""); !errors.As(err, &invalid) {
			t.Errorf("created %q: %v", id, err)
		}
	}
}

func subscribe(ctx context.Context, r *subscription.Registry, id, secretID string) error {
	_, err := r.CreateSubscription(ctx, "acme", id, &grapnelv1.Subscription{
		Uri:     "https://h/",
		Signers: []*grapnelv1.PluginBinding{{Secrets: map[string]string{"key": name(secretID)}}},
	}, subscription.CreateOptions{})
	return err
}

func TestSecretInUse(t *testing.T) {
	s, r := store(t, etcd.Client)
	create(t, s, "k", hmac, "")
	var want []string
	for i := range 12 {
		id := fmt.Sprintf("s%02d", i)
		if err := subscribe(t.Context(), r, id, "k"); err != nil {
			t.Fatal(err)
		}
		if i < 10 {
			want = append(want, "namespaces/acme/subscriptions/"+id)
		}
	}
	var inUse *secret.InUseError
	if err := s.Delete(t.Context(), "acme", "k", ""); !errors.As(err, &inUse) || !errors.Is(err, secret.ErrInUse) {
		t.Fatalf("got %v", err)
	}
	if diff := cmp.Diff(want, inUse.Users); diff != "" {
		t.Errorf("users (-want +got):\n%s", diff)
	}
	for i := range 12 {
		if _, err := r.DeleteSubscription(t.Context(), "acme", fmt.Sprintf("s%02d", i), "", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Delete(t.Context(), "acme", "k", ""); err != nil {
		t.Errorf("no longer in use: %v", err)
	}
}

// Either the subscription is made or the secret is deleted, never both.
func TestSubscribeWhileDeleting(t *testing.T) {
	s, r := store(t, etcd.Client)
	made, deleted := 0, 0
	for i := range 40 {
		id := fmt.Sprint("k", i)
		create(t, s, id, hmac, "")
		var wg sync.WaitGroup
		var subErr, delErr error
		wg.Go(func() { subErr = subscribe(t.Context(), r, id, id) })
		wg.Go(func() { delErr = s.Delete(t.Context(), "acme", id, "") })
		wg.Wait()
		switch {
		case subErr == nil && errors.Is(delErr, secret.ErrInUse):
			made++
		case delErr == nil && errors.Is(subErr, subscription.ErrNotFound):
			deleted++
		default:
			t.Fatalf("round %d: subscribe %v, delete %v", i, subErr, delErr)
		}
	}
	t.Logf("%d were made, %d deleted", made, deleted)
}

func TestDeletedNamespace(t *testing.T) {
	s, r := store(t, etcd.Client)
	create(t, s, "k", hmac, "")
	create(t, s, "gone", hmac, "")
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", false); err != nil {
		t.Fatal(err)
	}
	_, _, err1 := put(t, s, "acme", "more", hmac, "")
	_, _, err2 := rotate(t, s, "acme", "k", "", 0, "")
	for i, err := range []error{err1, err2} {
		if !errors.Is(err, secret.ErrNamespaceDeleted) {
			t.Errorf("change %d: %v", i+1, err)
		}
	}
	if err := s.Delete(t.Context(), "acme", "gone", ""); err != nil {
		t.Error(err)
	}
	if _, ok := s.Versions(name("k")); !ok {
		t.Error("its secrets are gone before it is erased")
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its secrets are gone", func() bool { _, ok := s.Versions(name("k")); return !ok })
}
