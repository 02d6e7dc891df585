package check_test

import (
	"strings"
	"testing"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/pluginhost/check"
)

// TestKindsAreBounded: what a plugin says of a kind is kept in memory and listed to everybody.
func TestKindsAreBounded(t *testing.T) {
	kind := func(change func(*pluginv1.Kind)) *pluginv1.Kind {
		k := &pluginv1.Kind{Id: "mem", Traits: &pluginv1.Kind_Signer{Signer: &pluginv1.SignerTraits{}}}
		change(k)
		return k
	}
	for name, tt := range map[string]struct {
		kind *pluginv1.Kind
		want string // empty: it is taken
	}{
		"as it should be": {kind(func(k *pluginv1.Kind) { k.Description = "Signs." }), ""},
		"a long id":       {kind(func(k *pluginv1.Kind) { k.Id = strings.Repeat("x", 1<<20) }), "the id must match"},
		"a novel":         {kind(func(k *pluginv1.Kind) { k.Description = strings.Repeat("x", 1<<20) }), "longer than 4096 bytes"},
		"a long schema":   {kind(func(k *pluginv1.Kind) { k.ConfigSchema = strings.Repeat(" ", 1<<20) }), "longer than 262144 bytes"},
		"many headers": {kind(func(k *pluginv1.Kind) {
			k.GetSigner().EmitsHeaders = strings.Split(strings.Repeat("x,", 100), ",")
		}), "more than 64"},
		"a long slot": {kind(func(k *pluginv1.Kind) {
			k.SecretSlots = []*pluginv1.SecretSlot{{Name: strings.Repeat("x", 1000)}}
		}), "longer than 128 bytes"},
	} {
		_, err := check.NewKind(tt.kind)
		switch {
		case tt.want == "" && err != nil, tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || len(err.Error()) > 400):
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
