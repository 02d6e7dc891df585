package httpplugin

import (
	"errors"
	"io"
	"net/http"
)

// maxDrain is how much of a body is read past what is kept, so that the connection can be used again.
const maxDrain = 256 << 10

// body is what was kept of a response's body.
type body struct {
	bytes     []byte
	truncated bool
	// whole says that the end was reached: the connection is where the next response begins.
	whole bool
}

// readBody keeps up to limit bytes and drains the rest within bounds. It has no error: the response
// stands without its body.
func readBody(resp *http.Response, limit int) body {
	if resp.Body == http.NoBody || resp.ContentLength == 0 {
		return body{whole: true}
	}
	size := 512
	if resp.ContentLength > 0 {
		size = int(min(resp.ContentLength, int64(limit)))
	}
	kept := make([]byte, 0, min(size, limit))
	var err error
	for err == nil && len(kept) < limit {
		if len(kept) == cap(kept) {
			kept = append(kept, 0)[:len(kept)]
		}
		var n int
		n, err = resp.Body.Read(kept[len(kept):min(cap(kept), limit)])
		kept = kept[:len(kept)+n]
	}
	b := body{bytes: kept}
	switch {
	case errors.Is(err, io.EOF):
		b.whole = true
	case err != nil:
		b.truncated = true
	default:
		n, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxDrain))
		b.whole = err == nil && n < maxDrain
		b.truncated = err != nil || n > 0
	}
	return b
}
