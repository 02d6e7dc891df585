package process

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
)

// account is whom a process runs as.
type account struct{ uid, gid uint32 }

// lookUser finds a Spec's user: name or number, and after a colon a group. Nil is the server's own.
func lookUser(name string) (*account, error) {
	if name == "" {
		return nil, nil
	}
	who, group, hasGroup := strings.Cut(name, ":")
	uid, gid, err := userIDs(who)
	if err != nil {
		return nil, err
	}
	if hasGroup {
		if gid, err = groupID(group); err != nil {
			return nil, err
		}
	}
	if os.Geteuid() != 0 {
		if uid == uint32(os.Geteuid()) && gid == uint32(os.Getegid()) {
			return nil, nil
		}
		return nil, fmt.Errorf("running a plugin as user %q needs a server that runs as root; this one runs as user %d", name, os.Geteuid())
	}
	return &account{uid, gid}, nil
}

// userIDs finds a user and its group. A number that nobody has is good, too; its group is the same.
func userIDs(who string) (uid, gid uint32, err error) {
	u, err := user.Lookup(who)
	if err != nil {
		if !isNumber(who) {
			return 0, 0, fmt.Errorf("there is no user %q to run the plugin as", who)
		}
		if uid, err = number(who); err != nil {
			return 0, 0, err
		}
		if u, err = user.LookupId(who); err != nil {
			return uid, uid, nil
		}
	}
	if uid, err = number(u.Uid); err != nil {
		return 0, 0, err
	}
	gid, err = number(u.Gid)
	return uid, gid, err
}

func groupID(name string) (uint32, error) {
	if g, err := user.LookupGroup(name); err == nil {
		name = g.Gid
	}
	if !isNumber(name) {
		return 0, fmt.Errorf("there is no group %q to run the plugin as", name)
	}
	return number(name)
}

func number(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q is no number of a user or group", s)
	}
	return uint32(n), nil
}

// giveDir makes a directory the process's own.
func (g *Program) giveDir(dir string) error {
	if g.user == nil {
		return nil
	}
	return os.Chown(dir, int(g.user.uid), int(g.user.gid))
}
