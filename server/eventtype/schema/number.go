package schema

import (
	"bytes"
	"math/big"
	"strconv"
)

// decimal is a JSON number, exactly: 0.digits × 10^exponent. Zero has no digits.
type decimal struct {
	negative bool
	// digits neither begin nor end with a zero.
	digits   []byte
	exponent int
	// small is the value where it is an integer of at most 18 digits that is written without point and exponent.
	small   int64
	isSmall bool
}

// farExponent stands for every exponent that is further out: beside it only the sign counts.
const farExponent = 1 << 30

// number reads a number that the parser has let through. It may share text.
func number(text []byte) decimal {
	var d decimal
	if text[0] == '-' {
		d.negative, text = true, text[1:]
	}
	if point := bytes.IndexAny(text, ".eE"); point < 0 {
		d.exponent = len(text)
		d.digits = text
		if len(text) <= 18 {
			d.isSmall = true
			for _, c := range text {
				d.small = d.small*10 + int64(c-'0')
			}
			if d.negative {
				d.small = -d.small
			}
		}
	} else {
		mantissa, exponent := text, 0
		if e := bytes.IndexAny(text, "eE"); e >= 0 {
			mantissa = text[:e]
			n, err := strconv.Atoi(string(text[e+1:]))
			if err != nil { // only its size can be wrong
				n = farExponent
				if text[e+1] == '-' {
					n = -farExponent
				}
			}
			exponent = max(-farExponent, min(n, farExponent))
		}
		whole, fraction, _ := bytes.Cut(mantissa, []byte("."))
		d.digits = append(append(make([]byte, 0, len(whole)+len(fraction)), whole...), fraction...)
		d.exponent = exponent + len(whole)
	}
	for len(d.digits) > 0 && d.digits[0] == '0' {
		d.digits = d.digits[1:]
		d.exponent--
	}
	d.digits = bytes.TrimRight(d.digits, "0")
	if len(d.digits) == 0 {
		d.negative, d.exponent = false, 0
	}
	return d
}

// integer reports whether it has no fraction: 1.0 and 1e2 have none.
func (d decimal) integer() bool { return d.isSmall || d.exponent >= len(d.digits) }

// cmp is below, at or above zero as d is below, at or above e.
func (d decimal) cmp(e decimal) int {
	if d.isSmall && e.isSmall {
		switch {
		case d.small < e.small:
			return -1
		case d.small > e.small:
			return 1
		}
		return 0
	}
	sign := func(x decimal) int {
		switch {
		case len(x.digits) == 0:
			return 0
		case x.negative:
			return -1
		}
		return 1
	}
	if s, t := sign(d), sign(e); s != t {
		return s - t
	} else if s == 0 {
		return 0
	} else if d.exponent != e.exponent {
		if d.exponent > e.exponent {
			return s
		}
		return -s
	} else {
		return s * bytes.Compare(d.digits, e.digits)
	}
}

// longest is how many digits a number may have, its zeros included, to be divided.
const longest = 400

// alike are two numbers, times one power of ten, as integers, where those are small.
func alike(d, e decimal) (n, m int64, ok bool) {
	if d.isSmall && e.isSmall {
		return d.small, e.small, true
	}
	if len(d.digits) == 0 {
		return 0, 1, true
	}
	last := min(d.exponent-len(d.digits), e.exponent-len(e.digits))
	if max(d.exponent, e.exponent)-last > 18 {
		return 0, 0, false
	}
	return d.times(last), e.times(last), true
}

// times is the number, its sign left out, by 10^exponent, which must be an integer of at most 18 digits.
func (d decimal) times(exponent int) (n int64) {
	for k := range d.exponent - exponent {
		if n *= 10; k < len(d.digits) {
			n += int64(d.digits[k] - '0')
		}
	}
	return n
}

// divisionSteps is about how many steps multipleOf takes.
func (d decimal) divisionSteps(e decimal) int {
	if _, _, ok := alike(d, e); ok {
		return 1
	}
	return 200 + min(len(d.digits), longest) + min(max(d.exponent-e.exponent, e.exponent-d.exponent), 2*longest)
}

// multipleOf reports whether d is a whole multiple of e, which is above zero. divided is false for a number that is too
// long to be asked.
func (d decimal) multipleOf(e decimal) (is, divided bool) {
	if n, m, ok := alike(d, e); ok {
		return n%m == 0, true
	}
	n, nx, ok := d.scaled()
	m, mx, fine := e.scaled()
	if !ok || !fine {
		return false, false
	}
	// n·10^nx by m·10^mx.
	if shift := nx - mx; shift >= 0 {
		n.Mul(n, power(shift))
	} else {
		m.Mul(m, power(-shift))
	}
	return n.Rem(n, m).Sign() == 0, true
}

// scaled is d as an integer times a power of ten.
func (d decimal) scaled() (n *big.Int, exponent int, ok bool) {
	if len(d.digits) > longest || d.exponent > longest || d.exponent < -longest {
		return nil, 0, false
	}
	n, ok = new(big.Int).SetString(string(d.digits), 10)
	return n, d.exponent - len(d.digits), ok
}

func power(n int) *big.Int { return new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(n)), nil) }
