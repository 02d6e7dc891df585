package api

import (
	"errors"

	"github.com/grapnel/grapnel/server/api/filter"
)

// parseFilter reads the filter of a list call; its errors are INVALID_FILTER.
func parseFilter[T any](text string, fields []filter.Field[T]) (*filter.Filter[T], error) {
	f, err := filter.Parse(text, fields)
	if bad, ok := errors.AsType[*filter.Error](err); ok {
		return nil, filterError(bad.Message, bad.Offset, bad.Fields)
	}
	return f, err
}
