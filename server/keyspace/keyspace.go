package keyspace

import "errors"

// ErrUnavailable means that etcd could not be reached, or did not answer in time.
var ErrUnavailable = errors.New("etcd is unavailable")
