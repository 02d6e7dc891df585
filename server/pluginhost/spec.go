package pluginhost

import (
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/pluginhost/process"
)

// Spec is one plugin to run.
type Spec struct {
	// Name is the plugin's identity over the host's life: Update compares what runs under a name with what is
	// to run under it. Empty means Path. A name that is given twice counts as another one each time.
	Name string
	// Path of the executable, or of a directory with an executable called plugin in it.
	Path string
	Args []string
	// Builtin marks the plugins that ship in the grapnel binary; Ready waits for them, Update leaves them alone. Only
	// they may call themselves grapnel.
	Builtin bool
	// Disabled plugins do not run. They are known by their Manifest, so that what waits for them can say so.
	Disabled bool
	// Reserves are the kinds of a builtin plugin, with the URI schemes that each is the default for. They are its own
	// from the start, whether it has come up or not: no other plugin may offer them.
	Reserves map[string][]string
	// Own says that the plugin is the server's own program, as in process.Spec.
	Own bool
	// SHA256 pins the plugin, as in process.Spec. Empty runs whatever is there.
	SHA256 string
	// Manifest must say the same as the plugin's own Describe: name, version, capabilities, kinds and their
	// schemas. A plugin that differs does not serve. Nil is not compared.
	Manifest *pluginv1.DescribeResponse
	// SoftMemoryBytes is told to a Go plugin as its GOMEMLIMIT; 0 tells nine tenths of what Limits say, if anything.
	SoftMemoryBytes uint64
	// Limits of the process. Linux only: elsewhere a plugin with limits does not start.
	Limits Limits
	// Yields is by how much the process is nicer than the server, as in process.Spec.
	Yields int
	// User to run as: a name or a number, and after a colon a group. Empty is the server's own. It needs a
	// server that runs as root, on Linux: otherwise the plugin does not start.
	User string
}

// Limits of a plugin process; zero sets none.
type Limits = process.Limits

// Checksum is what Spec.SHA256 is compared with, in lower-case hex.
func Checksum(path string) (string, error) { return process.Checksum(path) }

// program is what has to be known of the spec to run it.
func (s Spec) program() process.Spec {
	return process.Spec{
		Path: s.Path, Args: s.Args, Own: s.Own, SHA256: s.SHA256, SoftMemoryBytes: s.SoftMemoryBytes, Limits: s.Limits, Yields: s.Yields, User: s.User,
	}
}

// equal compares all that has a process started anew. A path's content is compared by its stamp.
func (s Spec) equal(o Spec) bool {
	return s.Path == o.Path && slices.Equal(s.Args, o.Args) && strings.EqualFold(s.SHA256, o.SHA256) &&
		s.Limits == o.Limits && s.User == o.User && proto.Equal(s.Manifest, o.Manifest)
}

// label is what the plugin is called before it has said its name.
func (s Spec) label() string {
	if s.Name != "" {
		return s.Name
	}
	return filepath.Base(s.Path)
}

// keyed is a spec under its identity.
type keyed struct {
	key  string
	spec Spec
}

// parted parts the plugins that are to run from those that are disabled.
func parted(specs []keyed) (run, disabled []keyed) {
	for _, k := range specs {
		if k.spec.Disabled {
			disabled = append(disabled, k)
		} else {
			run = append(run, k)
		}
	}
	return run, disabled
}

// identify gives every spec its identity and its absolute path.
func identify(specs []Spec) ([]keyed, error) {
	out := make([]keyed, 0, len(specs))
	seen := map[string]int{}
	for _, s := range specs {
		path, err := filepath.Abs(s.Path)
		if err != nil {
			return nil, err
		}
		s.Path = path
		key := s.Name
		if key == "" {
			key = s.Path
		}
		if s.Builtin {
			key = "builtin " + key
		}
		if seen[key]++; seen[key] > 1 {
			key += "#" + strconv.Itoa(seen[key])
		}
		out = append(out, keyed{key, s})
	}
	return out, nil
}
