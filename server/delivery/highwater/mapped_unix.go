//go:build unix

package highwater

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// memoryOf maps the file where the file system can do that.
func memoryOf(f *os.File, size int) memory {
	data, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return plain{f}
	}
	return mapped{file: f, data: data}
}

// mapped stores to the pages that the kernel writes to the file, whatever becomes of this process.
type mapped struct {
	file *os.File
	data []byte
}

// store fails where the page cannot be had: the file has been cut off, or its disk does not answer.
func (m mapped) store(offset int, b []byte) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("store to the mapped file: %v", r)
		}
	}()
	copy(m.data[offset:], b)
	return nil
}

// sync does both, as not every system counts mapped pages among what it syncs of a file.
func (m mapped) sync() error { return errors.Join(unix.Msync(m.data, unix.MS_SYNC), m.file.Sync()) }

func (m mapped) close() error { return unix.Munmap(m.data) }
