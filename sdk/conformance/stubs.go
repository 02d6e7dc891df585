package conformance

func flowCases() []Case      { return nil }
func soakCases() []Case      { return nil }
