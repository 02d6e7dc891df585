package main

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestSizes(t *testing.T) {
	var sizes products
	if err := sizes.Set("1x1000000,10x20"); err != nil || !slices.Equal(sizes, products{{1, 1_000_000}, {10, 20}}) || sizes.String() != "1x1000000,10x20" {
		t.Errorf("sizes = %v, %v", sizes, err)
	}
	if err := sizes.Set(""); err != nil || len(sizes) != 0 {
		t.Errorf("no sizes = %v, %v", sizes, err)
	}
	for _, bad := range []string{"10", "x", "0x5", "5x-1", "ax1", "1x1x1"} {
		if err := new(products).Set(bad); err == nil {
			t.Errorf("%q was taken for a size", bad)
		}
	}
	var ns numbers
	if err := ns.Set("1,30,0"); err != nil || !slices.Equal(ns, numbers{1, 30, 0}) || ns.String() != "1,30,0" {
		t.Errorf("numbers = %v, %v", ns, err)
	}
	for _, bad := range []string{"", "-1", "1,,2", "x"} {
		if err := new(numbers).Set(bad); err == nil {
			t.Errorf("%q was taken for numbers", bad)
		}
	}
}

func TestConcurrently(t *testing.T) {
	did := make([]bool, 100)
	n, err := concurrently(t.Context(), 8, len(did), func(_ context.Context, i int) error {
		did[i] = true
		return nil
	})
	if n != len(did) || err != nil || slices.Contains(did, false) {
		t.Errorf("did %d of %d: %v", n, len(did), err)
	}
	refused := errors.New("refused")
	n, err = concurrently(t.Context(), 1, 100, func(_ context.Context, i int) error {
		if i == 10 {
			return refused
		}
		return nil
	})
	if n != 10 || !errors.Is(err, refused) {
		t.Errorf("did %d: %v, want 10 and the error of the 11th", n, err)
	}
}
