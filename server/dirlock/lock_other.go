//go:build !windows && (!unix || solaris || aix)

package dirlock

import (
	"errors"
	"os"
)

// noFollow refuses a link, which could have another file written over.
const noFollow = 0

// lock is not known here.
func lock(*os.File) (held bool, err error) { return false, errors.ErrUnsupported }

func unlock(*os.File) error { return nil }
