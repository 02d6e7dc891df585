package hmacplugin

import (
	"errors"
	"fmt"

	"github.com/grapnel/grapnel/sdk/plugin"
)

// allKeys is the key of a scheme whose receivers take several signatures: every live version signs.
type allKeys struct {
	Key plugin.Secret `json:"-" slot:"key" doc:"Signing secret. While two versions are live, the request carries a signature of each, newest first." required:"true"`
}

func (a allKeys) live() (keys [][]byte, oldest bool) { return a.Key.Values(), false }

// oneKey is the key of a scheme that has room for one signature.
type oneKey struct {
	Key      plugin.Secret `json:"-" slot:"key" doc:"Signing secret. While two versions are live, sign_with says which of them signs." required:"true"`
	SignWith string        `json:"sign_with" default:"newest" enum:"newest,oldest" doc:"Which of two live versions of the secret signs, where the scheme has room for one signature. newest: the new one at once, so receivers must accept both while they overlap. oldest: the old one until its overlap ends, so that receivers can be switched meanwhile."`
}

func (o oneKey) live() (keys [][]byte, oldest bool) { return o.Key.Values(), o.SignWith == "oldest" }

// keyed is a config with its live keys, newest first.
type keyed interface {
	live() (keys [][]byte, oldest bool)
}

// vendor is a signer of somebody's scheme, declared as data.
type vendor[C keyed] struct {
	id      string
	doc     string
	emits   []string
	example any
	secret  secretText
	// schemes are what a config asks for; most are a single one.
	schemes func(C, plugin.Target) []scheme
	// check adds what is wrong with the config beyond its shape; nil when nothing can be.
	check func(C, plugin.Target) []plugin.Problem
}

func (v vendor[C]) kind() plugin.Kind {
	build := func(c C, t plugin.Target) (plugin.SignFunc, error) {
		keys, oldest := c.live()
		if len(keys) == 0 {
			return nil, errors.New("no secret is given")
		}
		var signers []*signer
		for _, s := range v.schemes(c, t) {
			compiled, faults := compile(s, keys, oldest)
			if len(faults) > 0 {
				return nil, faults[0]
			}
			signers = append(signers, compiled)
		}
		return chain(signers), nil
	}
	options := []plugin.Option{
		plugin.Doc(v.doc), plugin.Emits(v.emits...), plugin.Example(v.example), plugin.Format("key", v.secret.format()),
	}
	if v.check != nil {
		options = append(options, plugin.Check(v.check))
	}
	return plugin.Signer(v.id, build, options...)
}

// headerText complains about a config field that cannot be sent as a header's value.
func headerText(field, value string) []plugin.Problem {
	if isFieldValue(value) {
		return nil
	}
	return []plugin.Problem{{Pointer: "/config/" + field, Code: "config.header_value", Summary: fmt.Sprintf(
		"given %q, want printable ASCII without a blank at either end: it is sent as a header", value)}}
}
