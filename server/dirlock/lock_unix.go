//go:build unix && !solaris && !aix

package dirlock

import (
	"errors"
	"os"
	"syscall"
)

// noFollow refuses a link, which could have another file written over.
const noFollow = syscall.O_NOFOLLOW

// lock locks a file that is open, or says that it is held. The lock is of the open file, not of the process: two
// in one process exclude each other, and closing another descriptor of the file does not give it back.
func lock(file *os.File) (held bool, err error) {
	for {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case errors.Is(err, syscall.EWOULDBLOCK):
			return true, nil
		case !errors.Is(err, syscall.EINTR):
			return false, err
		}
	}
}

// unlock gives it back although a child may still have the descriptor, which it inherits for the moment until it runs its own
// program.
func unlock(file *os.File) error { return syscall.Flock(int(file.Fd()), syscall.LOCK_UN) }
