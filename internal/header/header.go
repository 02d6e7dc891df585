// Package header knows when two names of HTTP headers are one to those who receive them.
package header

import "strings"

// Key is what names have in common that receivers may take for one: lower case, and - for _, since CGI and WSGI, among others,
// cannot tell these apart.
func Key(name string) string { return strings.ReplaceAll(strings.ToLower(name), "_", "-") }
