package conformance

func configCases() []Case    { return nil }
func secretCases() []Case    { return nil }
func signerCases() []Case    { return nil }
func transportCases() []Case { return nil }
func flowCases() []Case      { return nil }
func soakCases() []Case      { return nil }
