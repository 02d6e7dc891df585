package subscription

import (
	"testing"

	"github.com/google/uuid"
)

// Two uids whose last 8 bytes are the same would share a queue, so that one is drawn again.
func TestUIDsDifferInTheirLastBytes(t *testing.T) {
	taken := uuid.MustParse("11111111-1111-4111-8111-111111111111")
	twin := uuid.MustParse("22222222-2222-4222-8111-111111111111")
	free := uuid.MustParse("33333333-3333-4333-8333-333333333333")
	snap := NewSnapshot(1, []*Namespace{{ID: "acme", UID: taken}}, nil)
	draws := []uuid.UUID{twin, taken, {}, free}
	got := drawUID(func() uuid.UUID {
		next := draws[0]
		draws = draws[1:]
		return next
	}, snap.taken)
	if got != free {
		t.Errorf("drew %v", got)
	}
}
