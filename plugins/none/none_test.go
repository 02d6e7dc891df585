package none_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/grapnel/grapnel/plugins/none"
	"github.com/grapnel/grapnel/sdk/plugin"
	"github.com/grapnel/grapnel/sdk/plugintest"
)

func TestNothingIsAdded(t *testing.T) {
	h := plugintest.New(t, none.Kind())
	if k := h.Kind("none"); len(k.GetSecretSlots()) != 0 || len(k.GetSigner().GetEmitsHeaders()) != 0 {
		t.Errorf("%v", k)
	}
	inst := h.Configure(plugintest.Instance{Kind: "none"})
	r := plugin.Request{
		MessageID: "msg_1", Created: time.Unix(1700000000, 0), Body: []byte("x"),
		Headers: []plugin.Header{{Name: "webhook-id", Value: "msg_1"}},
	}
	signed, err := inst.Sign(r)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r.Headers, signed.Headers); diff != "" || signed.URL != r.URL {
		t.Errorf("headers (-want +got):\n%s\nurl %q", diff, signed.URL)
	}
	problems := h.Validate(plugintest.Instance{Kind: "none", Config: map[string]any{"key": "x"}})
	if len(problems) != 1 || problems[0].Pointer != "/config/key" {
		t.Errorf("an unknown field: %+v", problems)
	}
}
