package check

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Manifest says where a plugin describes itself otherwise than its manifest does; nil when it does not.
func Manifest(manifest, desc *pluginv1.DescribeResponse) error {
	var differences []string
	compare := func(what, m, d string) {
		if m != d {
			differences = append(differences, fmt.Sprintf("%s: %s in the manifest, %s as described", what, m, d))
		}
	}
	compare("name", quoted(manifest.GetName()), quoted(desc.GetName()))
	compare("version", quoted(manifest.GetVersion()), quoted(desc.GetVersion()))
	compare("capabilities", listed(manifest.GetCapabilities()), listed(desc.GetCapabilities()))
	described := kindsByID(desc)
	compare("kinds", listed(sortedKinds(kindsByID(manifest))), listed(sortedKinds(described)))
	for _, k := range manifest.GetKinds() {
		if d := described[k.GetId()]; d != nil {
			differences = append(differences, kindDiffers(k, d)...)
		}
	}
	if len(differences) == 0 {
		return nil
	}
	return fmt.Errorf("it is not what its manifest says; %s; install it again", strings.Join(differences, "; "))
}

// kindDiffers compares what operators and subscriptions rely on. Schemas are compared as JSON, not as text.
func kindDiffers(m, d *pluginv1.Kind) []string {
	var out []string
	if !sameJSON(m.GetConfigSchema(), d.GetConfigSchema()) {
		out = append(out, fmt.Sprintf("kind %q: the config schema differs", m.GetId()))
	}
	m, d = proto.CloneOf(m), proto.CloneOf(d)
	for _, k := range []*pluginv1.Kind{m, d} {
		k.ConfigSchema, k.ConfigExample, k.Description = "", "", ""
	}
	if !proto.Equal(m, d) {
		out = append(out, fmt.Sprintf("kind %q: role, headers, schemes, limits or secret slots differ", m.GetId()))
	}
	return out
}

func sameJSON(a, b string) bool {
	if a == b {
		return true
	}
	var x, y any
	return json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil && reflect.DeepEqual(x, y)
}

func kindsByID(d *pluginv1.DescribeResponse) map[string]*pluginv1.Kind {
	out := map[string]*pluginv1.Kind{}
	for _, k := range d.GetKinds() {
		out[k.GetId()] = k
	}
	return out
}

func sortedKinds(m map[string]*pluginv1.Kind) []string { return slices.Sorted(maps.Keys(m)) }

func quoted(s string) string { return strconv.Quote(s) }

func listed(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(slices.Values(s)), ", ")
}
