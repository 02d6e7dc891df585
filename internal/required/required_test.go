package required_test

import (
	"errors"
	"testing"

	"github.com/grapnel/grapnel/internal/required"
)

func TestTool(t *testing.T) {
	t.Setenv("GRAPNEL_REQUIRE", "node,nginx")
	if !required.Named("node") || !required.Named("nginx") || required.Named("python") || required.Named("ngin") {
		t.Error("node and nginx are named, and nothing else")
	}
	required.Tool(t, "node", nil, "")
	skipped := t.Run("python", func(t *testing.T) {
		required.Tool(t, "python", errors.New("is not installed"), "install it")
		t.Error("goes on without what it needs")
	})
	if !skipped {
		t.Error("fails for what nobody asks for")
	}
}
