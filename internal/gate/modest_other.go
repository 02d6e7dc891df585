//go:build !linux

package gate

// Modestly calls f, a long calculation, on a thread that gives way, where the system has such.
func Modestly(f func()) { f() }
