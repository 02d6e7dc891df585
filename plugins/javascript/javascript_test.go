package javascript_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/grapnel/grapnel/plugins/internal/script"
	"github.com/grapnel/grapnel/plugins/javascript"
	"github.com/grapnel/grapnel/sdk/plugin"
)

// run has the body of a function transform, or all of a script, make something of an event.
func run(t *testing.T, text, payload string) (string, error) {
	t.Helper()
	if !strings.Contains(text, "transform") {
		text = "function transform(event) { " + text + " }"
	}
	config, err := json.Marshal(map[string]string{"script": text})
	if err != nil {
		t.Fatal(err)
	}
	local, err := plugin.OpenLocal(javascript.Kind(script.NewGuard()), config, nil, plugin.Target{})
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	made, err := local.Transform(context.Background(), &plugin.Event{ID: "1", Type: "t", Data: []byte(payload)})
	if err != nil {
		return "", err
	}
	return string(made.Body), nil
}

// TestLanguage: what is bounded does what the language says.
func TestLanguage(t *testing.T) {
	for body, want := range map[string]string{
		`return ["a".repeat(3), "a".padStart(3), "a".padEnd(3, "xy"), "a".concat("b", 1), "aXa".replace("a", "$&$&"), "aXa".replaceAll("a", "b"), "aXa".replace(/a/g, (m) => m + m)]`:       `["aaa","  a","axy","ab1","aaXa","bXb","aaXaa"]`,
		`return [[3, 1, 2].sort(), [1, [2, [3]]].flat(Infinity), Array.from({length: 2}, (_, i) => i), [1, 2].join("-"), Math.max.apply(null, [1, 2]), Reflect.apply(Math.max, null, [3])]`: `[[1,2,3],[1,2,3],[0,1],"1-2",2,3]`,
		`return (function () { return Array.prototype.slice.call(arguments, 1); })(1, 2, 3)`:                                                                                                `[2,3]`,
		`return Array.prototype.map.call("ab", (c) => c + c)`:                                                                                   `["aa","bb"]`,
		`return JSON.stringify({b: 1, a: {b: 2, c: 3}, z: [{c: 1, a: 2}]}, ["z", "a", "b"])`:                                                    `"{\"z\":[{\"a\":2}],\"a\":{\"b\":2},\"b\":1}"`,
		`return JSON.stringify({a: 1, b: [2]}, (k, v) => k === "a" ? undefined : v, 1)`:                                                         `"{\n \"b\": [\n  2\n ]\n}"`,
		`return [JSON.stringify(undefined) === undefined, JSON.stringify(() => 1) === undefined, JSON.parse("[1]", (k, v) => v === 1 ? 2 : v)]`: `[true,true,[2]]`,
		`return {at: new Date(0), toJSON() { return {at: this.at}; }}`:                                                                          `{"at":"1970-01-01T00:00:00.000Z"}`,
		`try { [].reduce((a, b) => a); } catch (e) { return e instanceof TypeError && run instanceof Function; } function run() {}`:             `true`,
		`async function transform(event) { return {type: (await event).type}; }`:                                                                `{"type":"t"}`,
		`globalThis.JSON = {}; return event.id`:                                                                                                 `"1"`,
		`return event.data`:                                                                                                                     `{"n":1.7976931348623157e+308}`,
	} {
		if got, err := run(t, body, `{"n":1e400}`); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", body, got, err, want)
		}
	}
}

// TestBounds: what could take any time or memory in one step does not, and scripts do not get behind that. On a machine that
// has little time for the test, time is up before.
func TestBounds(t *testing.T) {
	const dag = `let a = [1]; for (let i = 0; i < 40; i++) a = [a, a]; `
	for body, want := range map[string]string{
		`let n = 0; return "x".repeat({valueOf() { return n++ ? 2 ** 31 : 1; }})`:                                            "",
		`String = () => ({length: 0}); return "x".repeat(2 ** 31)`:                                                           "more than",
		`let f; Function.prototype.apply = function () { f = this; return ""; }; "x".repeat(1); return f.call("x", 2 ** 31)`: "TypeError",
		`let n = 0; return Array.prototype.fill.call({get length() { return n++ ? 2 ** 53 - 1 : 1; }}, 0)`:                   "calculated",
		`let n = 0; return Array.prototype.fill.call(new Proxy([], {get() { return n++ ? 2 ** 53 - 1 : 1; }}), 0)`:           "proxy",
		`return Array.prototype.indexOf.call({length: 2 ** 53 - 1}, 1)`:                                                      "more than",
		`return Array.prototype.indexOf.call(Object.create({length: 2 ** 53 - 1}), 1)`:                                       "more than",
		`return Math.max.apply(null, {length: 2 ** 31})`:                                                                     "more than",
		`const b = "x".repeat(1 << 20); return b.replaceAll("x", b)`:                                                         "more than",
		`const b = "x".repeat(1 << 20); return b.replace(/x/g, b)`:                                                           "more than",
		`const b = "x".repeat(1 << 20); return new Array(1 << 20).join(b)`:                                                   "more than",
		`return JSON.parse("[".repeat(1 << 20))`:                                                                             "deep",
		dag + `return a`:                                                                                                     "more than",
		dag + `return JSON.stringify(a, null, 1)`:                                                                            "",
		dag + `return String(a)`:                                                                                             "timeout",
		dag + `drop(a)`:                                                                                                      "timeout",
		`throw {toString() { for (;;); }}`:                                                                                   "timeout",
		`JSON.stringify = () => "not JSON"; return new Function("return 1")()`:                                               "no code but the script's",
		`return (function* () {}).constructor("return 1")`:                                                                   "no code but the script's",
		`return eval("1")`:                         "eval is not defined",
		`return new Promise(() => {})`:             "nothing will keep",
		`return Promise.reject(new Error("mine"))`: "rejected: Error: mine",
		"\n\n  return event.nothing.at":            "at transform (line 3, column",
	} {
		got, err := run(t, body, `{}`)
		if want == "" && len(got) > 10 || want != "" && (err == nil || !strings.Contains(err.Error(), want) && !strings.Contains(err.Error(), "timeout")) {
			t.Errorf("%s: %.100s, %v, want %s", body, got, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "grapnel") {
			t.Errorf("%s tells what this is written in: %v", body, err)
		}
	}
}
