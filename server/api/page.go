package api

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"strconv"
	"strings"
	"time"
)

// Bounds of a page.
const (
	defaultPageSize = 50
	maxPageSize     = 1000
	pageTokenLife   = 3 * 24 * time.Hour
)

// pageSize reads a page_size: 0 is the default, more than the most is the most.
func pageSize(n int32) (int, error) { return boundedPageSize(n, defaultPageSize, maxPageSize) }

func boundedPageSize(n int32, standard, most int) (int, error) {
	switch {
	case n < 0:
		return 0, invalid(Violation{"page_size", "must be 0 or more; 0 means " + strconv.Itoa(standard), "int32.gte"})
	case n == 0:
		return standard, nil
	}
	return min(int(n), most), nil
}

// pager seals and opens page tokens: {version, expiry, hash of the query, last key} under an HMAC. A token
// is a position, not a permission: it does not widen what its bearer may read.
type pager struct {
	key []byte
}

const (
	pageTokenVersion = 1
	pageTokenHead    = 1 + 8 + 16
	pageTokenMAC     = 16
)

// seal makes the token of the page after last; empty last means that there is none. query is all that must
// stay the same between pages: method, parent, filter and the like.
func (p pager) seal(last string, query ...string) string {
	if last == "" {
		return ""
	}
	b := make([]byte, 0, pageTokenHead+len(last)+pageTokenMAC)
	b = append(b, pageTokenVersion)
	b = binary.BigEndian.AppendUint64(b, uint64(time.Now().Add(pageTokenLife).Unix()))
	b = append(b, hashQuery(query)...)
	b = append(b, last...)
	b = append(b, p.mac(b)...)
	return base64.RawURLEncoding.EncodeToString(b)
}

// open returns the last key that seal was given; "" for the first page.
func (p pager) open(token string, query ...string) (string, error) {
	if token == "" {
		return "", nil
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) < pageTokenHead+pageTokenMAC {
		return "", pageTokenError("the page token is not one that this server made")
	}
	body, mac := b[:len(b)-pageTokenMAC], b[len(b)-pageTokenMAC:]
	if !hmac.Equal(mac, p.mac(body)) || body[0] != pageTokenVersion {
		return "", pageTokenError("the page token is not one that this server made, or has been changed; begin at the first page")
	}
	if time.Now().Unix() > int64(binary.BigEndian.Uint64(body[1:9])) {
		return "", pageTokenError("the page token is older than 3 days; begin at the first page")
	}
	if string(body[9:pageTokenHead]) != string(hashQuery(query)) {
		return "", pageTokenError("the page token belongs to another query; keep parent and filter the same between pages")
	}
	return string(body[pageTokenHead:]), nil
}

func (p pager) mac(b []byte) []byte {
	h := hmac.New(sha256.New, p.key)
	h.Write(b)
	return h.Sum(nil)[:pageTokenMAC]
}

func hashQuery(query []string) []byte {
	var b strings.Builder
	for _, q := range query {
		b.WriteString(strconv.Itoa(len(q)))
		b.WriteByte(':')
		b.WriteString(q)
	}
	sum := sha256.Sum256([]byte(b.String()))
	return sum[:16]
}
