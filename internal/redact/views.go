package redact

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// view is what a part of a text stands for, and where in the text each byte of it is.
type view struct {
	bytes []byte
	// places are those of the bytes; nil where they are written in digits of bits bits each, from from on.
	places     []span
	from, bits int
	// last: it goes up to the end of the text.
	last bool
}

// place is where byte i stands in the text.
func (v *view) place(i int) span {
	if v.places != nil {
		return v.places[i]
	}
	return span{v.from + 8*i/v.bits, v.from + (8*(i+1)+v.bits-1)/v.bits}
}

// views are what a text stands for where it is read as percent-encoded, as quoted by Go or JSON, as hexadecimal digits or
// as base64 of either alphabet, padded or not, at whatever byte that begins: an error may show a whole header or URL of
// which a secret is a part. What would stand for less than least bytes is left out, unless the text ends in it.
func views(text string, least int, look func(*view)) {
	if strings.Contains(text, "%") {
		look(unescaped(text, percent(false)))
		look(unescaped(text, percent(true)))
	}
	if strings.Contains(text, `\`) {
		look(unescaped(text, backslash))
	}
	var hex, base64 int // where the run of such digits began that text[i] may be in
	run := func(from, to, bits, units int, value func(byte) int) {
		last := to == len(text)
		if n := (to - from) * bits / 8; n < shortest || n < least && !last {
			return
		}
		for skip := range units { // at how many digits a byte may begin
			look(decoded(text[:to], from+skip, value, bits, last))
		}
	}
	for i := range len(text) {
		if hexDigit(text[i]) < 0 {
			run(hex, i, 4, 2, hexDigit)
			hex = i + 1
		}
		if base64Digit(text[i]) < 0 {
			run(base64, i, 6, 4, base64Digit)
			base64 = i + 1
		}
	}
	run(hex, len(text), 4, 2, hexDigit)
	run(base64, len(text), 6, 4, base64Digit)
}

// decoded reads digits from a place of the text up to its end.
func decoded(text string, from int, value func(byte) int, bits int, last bool) *view {
	v := &view{bytes: make([]byte, 0, (len(text)-from)*bits/8), from: from, bits: bits, last: last}
	held, number := 0, uint32(0)
	for i := from; i < len(text); i++ {
		number, held = number<<bits|uint32(value(text[i])), held+bits //nolint:gosec // at most 63
		if held >= 8 {
			held -= 8
			v.bytes = append(v.bytes, byte(number>>held))
		}
	}
	return v
}

func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

func base64Digit(c byte) int {
	switch {
	case 'A' <= c && c <= 'Z':
		return int(c - 'A')
	case 'a' <= c && c <= 'z':
		return int(c-'a') + 26
	case '0' <= c && c <= '9':
		return int(c-'0') + 52
	case c == '+' || c == '-':
		return 62
	case c == '/' || c == '_':
		return 63
	}
	return -1
}

// unescaped has next say what text begins with, and how long that is; 0 for what stands for itself.
func unescaped(text string, next func(text string) (stands string, n int)) *view {
	v := &view{last: true}
	for i := 0; i < len(text); {
		stands, n := next(text[i:])
		if n == 0 {
			stands, n = text[i:i+1], 1
		}
		v.bytes = append(v.bytes, stands...)
		for range len(stands) {
			v.places = append(v.places, span{i, i + n})
		}
		i += n
	}
	return v
}

// percent reads %XX, and + as a space where plus says so.
func percent(plus bool) func(string) (string, int) {
	return func(text string) (string, int) {
		switch {
		case plus && text[0] == '+':
			return " ", 1
		case text[0] == '%' && len(text) >= 3 && hexDigit(text[1]) >= 0 && hexDigit(text[2]) >= 0:
			return string([]byte{byte(hexDigit(text[1])<<4 | hexDigit(text[2]))}), 3
		}
		return "", 0
	}
}

// backslash reads what strconv.Quote and encoding/json write.
func backslash(text string) (string, int) {
	if text[0] != '\\' || len(text) < 2 {
		return "", 0
	}
	if text[1] == '/' {
		return "/", 2
	}
	r, multibyte, rest, err := strconv.UnquoteChar(text, '"')
	if err != nil {
		return "", 0
	}
	if !multibyte && r < utf8.RuneSelf || multibyte {
		return string(r), len(text) - len(rest)
	}
	return string([]byte{byte(r)}), len(text) - len(rest) //nolint:gosec // \xff, a byte
}
