package secret

import (
	"fmt"
	"testing"
	"time"

	storev1 "github.com/grapnel/grapnel/proto/grapnel/store/v1"
)

// A version is told of once, when its end is near enough, and the next look is at the time of the next one.
func TestExpiringVersionsAreTold(t *testing.T) {
	begin := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	version := func(n uint32, hours time.Duration) *storev1.SecretVersionRecord {
		v := &storev1.SecretVersionRecord{Version: n}
		if hours > 0 {
			v.ExpireTime = begin.Add(hours * time.Hour).UnixNano()
		}
		return v
	}
	var told []int
	s := &Store{
		tellSoon: func(e Expiring) bool {
			if e.Namespace != "acme" || e.ID != "k" {
				t.Errorf("told of %+v", e)
			}
			told = append(told, e.Version)
			return true
		},
		secrets: map[string]*Secret{"namespaces/acme/secrets/k": {Namespace: "acme", ID: "k", record: &storev1.SecretRecord{
			Versions: []*storev1.SecretVersionRecord{version(4, 0), version(3, 24), version(2, 10), version(1, 1)},
		}}},
	}
	known := make(map[Expiring]bool)
	for _, step := range []struct {
		at, next time.Duration // hours
		want     int
	}{{0, 4, 1}, {3, 4, 0}, {4, 18, 2}, {5, 18, 0}, {18, 0, 3}, {19, 0, 0}, {30, 0, 0}} {
		told = nil
		next := s.tellExpiring(begin.Add(step.at*time.Hour), known)
		if step.want == 0 && len(told) > 0 || step.want > 0 && (len(told) != 1 || told[0] != step.want) {
			t.Errorf("after %d hours told %v, want %d", step.at, told, step.want)
		}
		if want := begin.Add(step.next * time.Hour); step.next > 0 && !next.Equal(want) || step.next == 0 && !next.IsZero() {
			t.Errorf("after %d hours the next look is at %v", step.at, next)
		}
	}
	if len(known) != 0 {
		t.Errorf("%d versions are remembered that are gone", len(known))
	}
}

// What there was no room to tell is told again before long, and nothing twice.
func TestExpiringVersionsAreToldUntilItIsDone(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	room, told := 0, make(map[string]int)
	s := &Store{
		secrets: make(map[string]*Secret),
		tellSoon: func(e Expiring) bool {
			if room == 0 {
				return false
			}
			room--
			told[e.ID]++
			return true
		},
	}
	const many = 300
	for i := range many {
		id := fmt.Sprint("k", i)
		s.secrets["namespaces/acme/secrets/"+id] = &Secret{Namespace: "acme", ID: id, record: &storev1.SecretRecord{
			Versions: []*storev1.SecretVersionRecord{{Version: 2}, {Version: 1, ExpireTime: now.Add(time.Hour).UnixNano()}},
		}}
	}
	known := make(map[Expiring]bool)
	for _, want := range []int{256, many, many} {
		room = 256
		next := s.tellExpiring(now, known)
		if len(told) != want || want < many != next.Equal(now.Add(tellRetry)) || want == many && !next.IsZero() {
			t.Errorf("%d of %d told, want %d; the next look is at %v", len(told), many, want, next)
		}
		now = next
		if next.IsZero() {
			now = time.Date(2026, 1, 2, 3, 10, 0, 0, time.UTC)
		}
	}
	for id, n := range told {
		if n != 1 {
			t.Errorf("%s was told %d times", id, n)
		}
	}
}
