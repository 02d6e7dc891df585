package eventtype_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	grapnelv1 "github.com/grapnel/grapnel/proto/grapnel/v1"
	"github.com/grapnel/grapnel/server/eventtype"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/keyspace/keyspacetest"
	"github.com/grapnel/grapnel/server/subscription"
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

func prefix(t testing.TB) string { return "/" + t.Name() + "/" }

func run(t testing.TB, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
}

// open opens a store under the test's own prefix, in which the namespace acme exists.
func open(t testing.TB, cache int) (*eventtype.Store, *subscription.Registry) {
	t.Helper()
	t.Cleanup(func() {
		if _, err := etcd.Client.Delete(context.Background(), prefix(t), clientv3.WithPrefix()); err != nil {
			t.Error(err)
		}
	})
	r, err := subscription.Open(t.Context(), subscription.Options{Client: etcd.Client, Prefix: prefix(t)})
	if err != nil {
		t.Fatal(err)
	}
	run(t, r.Run)
	if r.Snapshot().Namespace("acme") == nil {
		if _, err := r.CreateNamespace(t.Context(), "acme", nil); err != nil {
			t.Fatal(err)
		}
	}
	return reopen(t, cache), r
}

func reopen(t testing.TB, cache int) *eventtype.Store {
	t.Helper()
	s, err := eventtype.Open(t.Context(), eventtype.Options{Client: etcd.Client, Prefix: prefix(t), CacheBytes: cache})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s.Run)
	return s
}

// enforced is a type of one schema that is enforced.
func enforced(text string) *grapnelv1.EventType {
	return &grapnelv1.EventType{
		Enforcement: grapnelv1.EventType_ENFORCEMENT_REJECT,
		Schemas:     []*grapnelv1.EventTypeSchema{{Version: "1", JsonSchema: text}},
	}
}

func create(t testing.TB, s *eventtype.Store, id string, p *grapnelv1.EventType) *eventtype.Type {
	t.Helper()
	made, err := s.Create(t.Context(), "acme", id, p, false)
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func check(t testing.TB, s *eventtype.Store, id, dataSchema, payload string) *eventtype.MismatchError {
	t.Helper()
	err := s.In("acme").Get(id).Check(t.Context(), "application/json", dataSchema, []byte(payload))
	bad, ok := errors.AsType[*eventtype.MismatchError](err)
	if err != nil && !ok {
		t.Fatal(err)
	}
	return bad
}

func TestTypesAreStored(t *testing.T) {
	s, r := open(t, 0)
	if s.In("acme") != nil {
		t.Error("a namespace without types has a catalog")
	}
	ids := []string{"a/b c", "order.created", "s3:ObjectCreated:Put", "ünïcode", "%41"}
	for _, id := range ids {
		made := create(t, s, id, enforced(`{"type":"object"}`))
		if got := s.In("acme").Get(id); got == nil || got.Proto.GetEtag() != made.Proto.GetEtag() || got.Proto.GetCreateTime() == nil {
			t.Errorf("%s: %v", id, got)
		}
	}
	if got := s.In("acme").Get("a/b c").Proto.GetName(); got != "namespaces/acme/eventTypes/a%2Fb%20c" {
		t.Error(got)
	}
	_, err := s.Create(t.Context(), "acme", "order.created", nil, false)
	if !errors.Is(err, eventtype.ErrExists) {
		t.Error(err)
	}
	if _, err := s.Create(t.Context(), "none", "x", nil, false); !errors.Is(err, eventtype.ErrNotFound) {
		t.Error(err)
	}
	again := reopen(t, 0)
	var got []string
	for k := range again.In("acme").Types("%41") {
		got = append(got, k.ID)
	}
	if diff := cmp.Diff([]string{"a/b c", "order.created", "s3:ObjectCreated:Put", "ünïcode"}, got); diff != "" {
		t.Error(diff)
	}
	old := s.In("acme")
	if err := s.Delete(t.Context(), "acme", "a/b c", "zz"); !errors.As(err, new(*eventtype.EtagError)) {
		t.Error(err)
	}
	for _, id := range ids {
		if err := s.Delete(t.Context(), "acme", id, ""); err != nil {
			t.Error(err)
		}
	}
	if err := s.Delete(t.Context(), "acme", "a/b c", ""); !errors.Is(err, eventtype.ErrNotFound) {
		t.Error(err)
	}
	if s.In("acme") != nil || old.Get("ünïcode") == nil {
		t.Error("the old catalog changes, or the new one does not")
	}

	create(t, s, "order.created", nil)
	if _, err := r.DeleteNamespace(t.Context(), "acme", "", false); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), "acme", "x", nil, false); !errors.Is(err, eventtype.ErrNamespaceDeleted) {
		t.Error(err)
	}
	if err := r.PurgeNamespace(t.Context(), "acme"); err != nil {
		t.Fatal(err)
	}
	if left := reopen(t, 0).In("acme"); left != nil {
		t.Error("types outlive their namespace")
	}
}

func TestUpdates(t *testing.T) {
	s, _ := open(t, 0)
	first := create(t, s, "order.created", enforced(`{"type":"object"}`))
	describe := func(text string) func(*grapnelv1.EventType) error {
		return func(p *grapnelv1.EventType) error { p.Description = text; return nil }
	}
	second, err := s.Update(t.Context(), "acme", "order.created", first.Proto.GetEtag(), describe("one"), eventtype.UpdateOptions{})
	if err != nil || second.Proto.GetDescription() != "one" || len(second.Proto.GetSchemas()) != 1 || second.Proto.GetEtag() == first.Proto.GetEtag() {
		t.Fatal(second, err)
	}
	if same, err := s.Update(t.Context(), "acme", "order.created", "", describe("one"), eventtype.UpdateOptions{}); err != nil || same.Proto.GetEtag() != second.Proto.GetEtag() {
		t.Error("no change is a change:", err)
	}
	if _, err := s.Update(t.Context(), "acme", "order.created", first.Proto.GetEtag(), describe("two"), eventtype.UpdateOptions{}); !errors.As(err, new(*eventtype.EtagError)) {
		t.Error(err)
	}
	if _, err := s.Update(t.Context(), "acme", "none", "", describe("x"), eventtype.UpdateOptions{}); !errors.Is(err, eventtype.ErrNotFound) {
		t.Error(err)
	}
	if _, err := s.Update(t.Context(), "acme", "new", "", describe("x"), eventtype.UpdateOptions{AllowMissing: true, ValidateOnly: true}); err != nil || s.In("acme").Get("new") != nil {
		t.Error(err)
	}
	// Nobody's change is lost.
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			_, err := s.Update(context.Background(), "acme", "order.created", "", func(p *grapnelv1.EventType) error { p.Description += "+"; return nil }, eventtype.UpdateOptions{})
			if err != nil && !errors.Is(err, eventtype.ErrUnavailable) {
				t.Error(err)
			} else if err != nil {
				t.Log("gave up:", err)
			}
		})
	}
	all.Wait()
	if got := s.In("acme").Get("order.created").Proto.GetDescription(); !strings.HasPrefix(got, "one+") {
		t.Error(got)
	}
}

func TestContentThatIsRefused(t *testing.T) {
	s, _ := open(t, 0)
	large := `{"description":"` + strings.Repeat("x", 200<<10) + `"}`
	for _, c := range []struct {
		p    *grapnelv1.EventType
		want string
	}{
		{enforced(`{"type":1}`), "event_type.schemas[0].json_schema/type"},
		{enforced(`{"properties":{"a":{"$ref":"https://example.com/x"}}}`), "nothing is fetched"},
		{&grapnelv1.EventType{Schemas: []*grapnelv1.EventTypeSchema{{Version: "1", JsonSchema: "{}"}, {Version: "1", JsonSchema: "{}"}}}, "event_type.schemas[1].version"},
		{&grapnelv1.EventType{Schemas: []*grapnelv1.EventTypeSchema{{Version: "1", JsonSchema: large}, {Version: "2", JsonSchema: large}, {Version: "3", JsonSchema: large}}}, "event_type.schemas: have"},
		{&grapnelv1.EventType{DeprecationReason: "old"}, "event_type.deprecation_reason"},
		{&grapnelv1.EventType{Example: "{"}, "event_type.example: is not JSON"},
		{&grapnelv1.EventType{Example: `{"a":1}`, Schemas: []*grapnelv1.EventTypeSchema{{Version: "1", JsonSchema: `{"properties":{"a":{"type":"string"}}}`}}}, "event_type.example/a: must be a string"},
	} {
		_, err := s.Create(t.Context(), "acme", "x", c.p, false)
		if !errors.As(err, new(*eventtype.InvalidError)) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v; want %s", err, c.want)
		}
	}
	if s.In("acme") != nil {
		t.Error("something is stored")
	}
}

func TestWhichSchemaApplies(t *testing.T) {
	s, _ := open(t, 0)
	version := func(name, text string, deprecated bool) *grapnelv1.EventTypeSchema {
		return &grapnelv1.EventTypeSchema{Version: name, JsonSchema: text, Deprecated: deprecated}
	}
	create(t, s, "x", &grapnelv1.EventType{
		Enforcement: grapnelv1.EventType_ENFORCEMENT_REJECT,
		Schemas: []*grapnelv1.EventTypeSchema{
			version("1", `{"$id":"https://example.com/x/1","const":1}`, false), version("2", `{"const":2}`, false), version("3", `{"const":3}`, true),
		},
	})
	for _, c := range []struct{ dataSchema, fits, misfits string }{{"", "2", "3"}, {"1", "1", "2"}, {"https://example.com/x/1", "1", "2"}, {"3", "3", "2"}} {
		if bad := check(t, s, "x", c.dataSchema, c.fits); bad != nil {
			t.Errorf("%q: %v", c.dataSchema, bad)
		}
		if bad := check(t, s, "x", c.dataSchema, c.misfits); bad == nil || bad.Field != "payload" {
			t.Errorf("%q: %v", c.dataSchema, bad)
		}
	}
	if bad := check(t, s, "x", "9", "2"); bad == nil || bad.Field != "data_schema" || !strings.Contains(bad.Error(), "there are 1, 2, 3") {
		t.Error(bad)
	}
	known := s.In("acme").Get("x")
	err := known.Check(t.Context(), "text/plain", "", []byte("2"))
	if bad, ok := errors.AsType[*eventtype.MismatchError](err); !ok || bad.Field != "data_content_type" {
		t.Error(err)
	}
	if err := known.Check(t.Context(), "application/vnd.x+json; charset=utf-8", "", []byte("2")); err != nil {
		t.Error(err)
	}
	if n, last := known.Mismatches(); n != 6 || last == nil || last.Text == "" {
		t.Error(n, last)
	}
	sample, of, err := known.Sample(t.Context(), "3")
	if err != nil || string(sample) != "3" || of != "3" {
		t.Error(string(sample), of, err)
	}
	if _, _, err := known.Sample(t.Context(), "9"); !errors.As(err, new(*eventtype.NoSampleError)) {
		t.Error(err)
	}
}

// A cache that holds one schema at a time checks as one that holds all.
func TestLittleRoomForCompiledSchemas(t *testing.T) {
	s, _ := open(t, 1)
	for i := range 5 {
		create(t, s, fmt.Sprint("t", i), enforced(fmt.Sprintf(`{"const":%d}`, i)))
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for n := range 50 {
				i := n % 5
				known := s.In("acme").Get(fmt.Sprint("t", i))
				if err := known.Check(context.Background(), "application/json", "", fmt.Append(nil, i)); err != nil {
					t.Error(err)
				}
				if err := known.Check(context.Background(), "application/json", "", []byte("99")); err == nil {
					t.Error("a mismatch is let through")
				}
			}
		})
	}
	all.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _ = s.Update(t.Context(), "acme", "t0", "", func(p *grapnelv1.EventType) error { p.Schemas[0].JsonSchema = `{"const":7}`; return nil }, eventtype.UpdateOptions{})
	if bad := check(t, s, "t0", "", "0"); bad == nil {
		t.Error("the old schema applies")
	}
	_ = s.In("acme").Get("t1").Check(ctx, "application/json", "", []byte("1")) // must not hang
}

func TestNamespacesAreBounded(t *testing.T) {
	s, _ := open(t, 0)
	text := `{"description":"` + strings.Repeat("x", 250<<10) + `"}`
	two := &grapnelv1.EventType{Schemas: []*grapnelv1.EventTypeSchema{{Version: "1", JsonSchema: text}, {Version: "2", JsonSchema: text}}}
	n := 0
	for ; n < 100; n++ {
		if _, err := s.Create(t.Context(), "acme", fmt.Sprint("t", n), two, false); errors.As(err, new(*eventtype.FullError)) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if n != 65 {
		t.Errorf("%d types of 501 KiB fit into 32 MiB", n)
	}
	if _, err := s.Update(t.Context(), "acme", "t0", "", func(p *grapnelv1.EventType) error { p.Schemas = p.Schemas[:1]; return nil }, eventtype.UpdateOptions{}); err != nil {
		t.Error("what becomes smaller is refused:", err)
	}
}

// BenchmarkThousand is the life of a namespace with a thousand types of 1.4 KiB.
func BenchmarkThousand(b *testing.B) {
	text := `{"type":"object","required":["id"],"properties":{"id":{"type":"string"},"n":{"type":"integer","minimum":0}},"description":"` + strings.Repeat("x", 1200) + `"}`
	s, _ := open(b, 0)
	made := 0
	b.Run("create", func(b *testing.B) {
		for b.Loop() {
			create(b, s, fmt.Sprintf("type.%07d", made), enforced(text))
			made++
		}
	})
	for ; made < 1000; made++ {
		create(b, s, fmt.Sprintf("type.%07d", made), enforced(text))
	}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := eventtype.Open(b.Context(), eventtype.Options{Client: etcd.Client, Prefix: "/BenchmarkThousand/"}); err != nil {
				b.Fatal(err)
			}
		}
	})
	payload := []byte(`{"id":"o-1","n":5,"text":"` + strings.Repeat("x", 990) + `"}`)
	n := 0
	b.Run("check", func(b *testing.B) {
		for b.Loop() {
			if err := s.In("acme").Get(fmt.Sprintf("type.%07d", n%1000)).Check(b.Context(), "application/json", "", payload); err != nil {
				b.Fatal(err)
			}
			n++
		}
	})
}

// What is stored but cannot be read is damaged and not absent, whichever way it cannot be read, and may be created again.
func TestUnreadableIsDamaged(t *testing.T) {
	open(t, 0)
	other, err := proto.Marshal(&grapnelv1.EventType{Type: "invoice"})
	if err != nil {
		t.Fatal(err)
	}
	for id, value := range map[string][]byte{"order": []byte("\xff\xff no message"), "payment": other} {
		key := "eventtypes/" + eventtype.Name("acme", id)
		if _, err := etcd.Client.Put(t.Context(), prefix(t)+key, string(keyspace.AddSum(key, value))); err != nil {
			t.Fatal(err)
		}
	}
	s := reopen(t, 0)
	if diff := cmp.Diff([]string{eventtype.Name("acme", "order"), eventtype.Name("acme", "payment")}, s.Broken()); diff != "" {
		t.Error(diff)
	}
	for _, id := range []string{"order", "payment"} {
		if !s.Damaged("acme", id) {
			t.Errorf("%s is taken for absent", id)
		}
		if _, err := s.Update(t.Context(), "acme", id, "", func(*grapnelv1.EventType) error { return nil }, eventtype.UpdateOptions{AllowMissing: true}); err == nil || errors.Is(err, eventtype.ErrNotFound) {
			t.Errorf("%s: %v", id, err)
		}
		create(t, s, id, enforced(`{"type":"object"}`))
		if s.Damaged("acme", id) || s.In("acme").Get(id) == nil {
			t.Errorf("%s is not created again", id)
		}
	}
	if got := s.Broken(); len(got) > 0 {
		t.Error(got)
	}
}

// Samples, however many are asked for and given up, take no place that events need.
func TestSamplesHoldNobodyUp(t *testing.T) {
	s, _ := open(t, 0)
	evil := create(t, s, "evil", enforced(`{"type":"string","minLength":1,"pattern":"((((^)*)*)*)*"}`))
	create(t, s, "good", enforced(`{"type":"object"}`))
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if _, _, err := evil.Sample(context.Background(), ""); !errors.As(err, new(*eventtype.NoSampleError)) {
				t.Error(err)
			}
		})
	}
	if bad := check(t, s, "good", "", `{}`); bad != nil {
		t.Error(bad)
	}
	all.Wait()
}
