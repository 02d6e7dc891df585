package dirlock

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// noFollow refuses a link, which could have another file written over.
const noFollow = 0

// lock locks a file that is open, or says that it is held. The byte that is locked lies far behind the text, which
// others could not read otherwise.
func lock(file *os.File) (held bool, err error) {
	at := windows.Overlapped{OffsetHigh: 1}
	err = windows.LockFileEx(windows.Handle(file.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &at)
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return true, nil
	}
	return false, err
}

// unlock leaves it to the closing.
func unlock(*os.File) error { return nil }
