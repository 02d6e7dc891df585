package pluginhost

import (
	"strings"
	"sync"
)

const redacted = "[redacted]"

// redactor takes secrets out of texts that come from plugins.
type redactor struct {
	mu     sync.RWMutex // guards values; a plan's own one is used by its maker only
	values map[string]struct{}
}

func (r *redactor) remember(value string) {
	if r.values == nil {
		r.values = map[string]struct{}{}
	}
	r.values[value] = struct{}{}
}

func (r *redactor) merge(from *redactor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for v := range from.values {
		r.remember(v)
	}
}

// clean returns text without secrets.
func (r *redactor) clean(text string) string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for v := range r.values {
		text = cut(text, v)
		if i := strings.IndexByte(v, '_'); i > 0 && i < 12 {
			text = cut(text, v[i+1:]) // whsec_…: the part that counts
		}
	}
	return text
}

func cut(text, value string) string {
	if len(value) < 6 {
		return text // would tear ordinary words apart and protects nothing
	}
	return strings.ReplaceAll(text, value, redacted)
}
