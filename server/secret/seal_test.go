package secret_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/secret"
)

func TestNothingIsStoredInClear(t *testing.T) {
	s, _ := store(t, etcd.Client)
	const canary = "c4n4ry-c4n4ry"
	sec, _ := create(t, s, "k", opaque, canary)
	_, generated := create(t, s, "g", hmac, "")
	resp, err := etcd.Client.Get(t.Context(), prefix(t), clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		if bytes.Contains(kv.Value, []byte(canary)) || bytes.Contains(kv.Value, []byte(generated)) {
			t.Errorf("%s holds a value in clear", kv.Key)
		}
	}
	versions, _ := s.Versions(name("k"))
	asJSON, err := json.Marshal([]any{sec, versions})
	if err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "sec", sec, "versions", versions)
	raw := fmt.Sprint([]byte(canary))
	for _, text := range []string{fmt.Sprintf("%v %+v %#v %s %+v", sec, sec, sec, sec, *sec), fmt.Sprintf("%v %+v %#v", versions, versions, versions), string(asJSON), logged.String()} {
		if strings.Contains(text, canary) || strings.Contains(text, strings.Trim(raw, "[]")) || strings.Contains(text, base64.StdEncoding.EncodeToString([]byte(canary))) {
			t.Errorf("a value is printed: %s", text)
		}
	}
}

func TestFingerprints(t *testing.T) {
	s, r := store(t, etcd.Client)
	if _, err := r.CreateNamespace(t.Context(), "other", nil); err != nil {
		t.Fatal(err)
	}
	print := func(ns, id, value string) string {
		sec, _, err := put(t, s, ns, id, opaque, value)
		if err != nil {
			t.Fatal(err)
		}
		return sec.Proto.Versions[0].Fingerprint
	}
	one := print("acme", "a", "same")
	if print("acme", "b", "same") != one {
		t.Error("equal values of a namespace do not show as equal")
	}
	if print("other", "a", "same") == one || print("acme", "c", "different") == one {
		t.Error("different values, or those of another namespace, show as equal")
	}
}

func TestSwappedAndDamagedValuesAreNotUsed(t *testing.T) {
	tests := []struct {
		name   string
		tamper func(mine, other *storev1.SecretRecord)
		want   error
	}{
		{"value of another secret", func(m, o *storev1.SecretRecord) { m.Versions[0].Sealed = o.Versions[0].Sealed }, secret.ErrTampered},
		{"another version", func(m, o *storev1.SecretRecord) { m.Versions[0].Version = 2 }, secret.ErrTampered},
		{"another kind", func(m, o *storev1.SecretRecord) { m.Kind = uint32(opaque) }, secret.ErrTampered},
		{"flipped bit", func(m, o *storev1.SecretRecord) { m.Versions[0].Sealed[20] ^= 1 }, secret.ErrTampered},
		{"cut off", func(m, o *storev1.SecretRecord) { m.Versions[0].Sealed = m.Versions[0].Sealed[:5] }, secret.ErrTampered},
		{"another key", func(m, o *storev1.SecretRecord) { m.Versions[0].KeyId = "0011223344556677" }, secret.ErrWrongKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var mu sync.Mutex
			changes := 0
			s, _ := store(t, etcd.Client, func(string) { mu.Lock(); changes++; mu.Unlock() })
			create(t, s, "mine", hmac, "")
			create(t, s, "other", hmac, "")
			mine := record(t, "mine")
			tt.tamper(mine, record(t, "other"))
			mu.Lock()
			before := changes
			mu.Unlock()
			overwrite(t, "mine", mine)
			eventually(t, "the change is seen", func() bool { mu.Lock(); defer mu.Unlock(); return changes > before })
			if v, ok := s.Versions(name("mine")); ok {
				t.Errorf("it is used: %v", v)
			}
			sec, err := s.Get("acme", "mine")
			if err != nil || !errors.Is(sec.Fault, tt.want) || !strings.Contains(sec.Fault.Error(), name("mine")) {
				t.Errorf("fault %v, %v; want %v", sec, err, tt.want)
			}
			if _, ok := s.Versions(name("other")); !ok {
				t.Error("the other one suffers")
			}
		})
	}
	t.Run("whole record", func(t *testing.T) {
		s, _ := store(t, etcd.Client)
		create(t, s, "mine", hmac, "")
		create(t, s, "other", hmac, "")
		overwrite(t, "mine", record(t, "other"))
		eventually(t, "it is refused", func() bool { _, ok := s.Versions(name("mine")); return !ok })
	})
}

func TestOpenRefusesAnotherKey(t *testing.T) {
	s, _ := store(t, etcd.Client)
	create(t, s, "k", hmac, "")
	other := bytes.Repeat([]byte{8}, 32)
	_, err := secret.Open(t.Context(), secret.Options{Client: etcd.Client, Prefix: prefix(t), Key: other})
	if !errors.Is(err, secret.ErrWrongKey) || !strings.Contains(err.Error(), "right key file") {
		t.Errorf("got %v", err)
	}
	if _, err := secret.Open(t.Context(), secret.Options{Client: etcd.Client, Prefix: prefix(t), Key: other[:16]}); err == nil {
		t.Error("a short key was taken")
	}
	again, err := secret.Open(t.Context(), secret.Options{Client: etcd.Client, Prefix: prefix(t), Key: key()})
	if err != nil || !cmp.Equal(values(again, "k"), values(s, "k")) {
		t.Errorf("opened again: %v", err)
	}
}

func TestEtcdOutage(t *testing.T) {
	own, err := keyspacetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	s, _ := store(t, own.Client)
	_, v1 := create(t, s, "k", hmac, "")
	_, v2, err := rotate(t, s, "acme", "k", "", 4*time.Second, "")
	if err != nil || !cmp.Equal(values(s, "k"), []string{v2, v1}) {
		t.Fatal(err)
	}
	own.Stop()
	if _, _, err := rotate(t, s, "acme", "k", "", 0, ""); !errors.Is(err, secret.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	eventually(t, "the version expires although etcd is away", func() bool { return cmp.Equal(values(s, "k"), []string{v2}) })
	eventually(t, "it is unhealthy", func() bool { return !s.Healthy() })
	if err := own.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "writes work again", func() bool {
		_, _, err := rotate(t, s, "acme", "k", "", 0, "")
		return err == nil
	})
	eventually(t, "it is healthy", s.Healthy)
}
