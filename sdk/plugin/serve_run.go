package plugin

// Serve is Main without the exit.
func Serve(name, version string, kinds ...Kind) error { return ErrNotStartedByHost }
