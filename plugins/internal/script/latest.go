package script

import "sync"

// MaxSource is the most that a program, an expression or a script has: compilers of languages take time with the square of
// it, which nothing can stop.
const MaxSource = 16 << 10

// Latest compiles what is checked and then built once and not twice. It keeps one, until that is built. Safe for concurrent use.
type Latest[T any] struct {
	mu       sync.Mutex // guards what follows
	checked  bool
	source   string
	compiled T
}

// Check compiles a source, and keeps what comes of it.
func (l *Latest[T]) Check(source string, compile func(string) (T, error)) error {
	compiled, err := compile(source)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.checked, l.source, l.compiled = true, source, compiled
	return nil
}

// Build takes what was kept of a source, or compiles it.
func (l *Latest[T]) Build(source string, compile func(string) (T, error)) (T, error) {
	l.mu.Lock()
	var none T
	if taken := l.compiled; l.checked && l.source == source {
		l.checked, l.source, l.compiled = false, "", none
		l.mu.Unlock()
		return taken, nil
	}
	l.mu.Unlock()
	return compile(source)
}
