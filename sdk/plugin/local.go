package plugin

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Local is an instance of a kind in the caller's own process, without the protocol: for measuring what the
// protocol costs. Tests use sdk/plugintest, which has it.
type Local struct {
	built built
	lives *lives
	life  *life
	emits []string
}

// OpenLocal builds an instance. Secrets are the live versions by slot, newest first. Its error holds all
// that is wrong with the config.
func OpenLocal(k Kind, config []byte, secrets map[string][][]byte, t Target) (*Local, error) {
	if k.err != nil {
		return nil, k.err
	}
	l := &Local{lives: newLives(func([]byte) {})}
	l.life = l.lives.begin()
	t.life = l.life
	b, problems := k.assemble(spec{config: config, secrets: secrets, target: t})
	if !hasErrors(problems) {
		l.built, l.emits = b, k.options.emits
		if k.options.emitsFrom != nil {
			l.emits = b.emits
		}
		return l, nil
	}
	l.Close()
	var words []string
	for _, p := range problems {
		if !p.Warning {
			words = append(words, p.Pointer+": "+p.Summary)
		}
	}
	return nil, fmt.Errorf("kind %q: %s", k.id, strings.Join(words, "; "))
}

// ID is what subscriptions call the kind.
func (k Kind) ID() string { return k.id }

// Close ends the instance when nobody uses it any more, and waits for what it does then.
func (l *Local) Close() {
	l.life.retire()
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	l.lives.end(ctx)
}

// Emits are the names of the headers that a signer's instance sets.
func (l *Local) Emits() []string { return slices.Clone(l.emits) }

// Schemes are the URI schemes that a transport is the default for; none of a signer.
func (k Kind) Schemes() []string { return k.options.schemes }

// Sign signs r. Only instances of signers do.
func (l *Local) Sign(r *Request) error { return l.built.sign(r) }

// Transform transforms e. Only instances of transformers do.
func (l *Local) Transform(ctx context.Context, e *Event) (*Transformed, error) {
	return l.built.transform(ctx, e)
}

// Attempt sends r. Only instances of transports do.
func (l *Local) Attempt(ctx context.Context, r *Request) (*Response, error) {
	return l.built.attempt(ctx, r)
}
