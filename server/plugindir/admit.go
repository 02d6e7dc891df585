package plugindir

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
)

// Admit reports why a plugin that describes itself like this may not be installed. Names belong to whoever had them
// first: what ships with the server, then what is installed. Of two that offered the same one the start would otherwise
// choose, and choose again at the next.
func (d Dir) Admit(manifest, shipped *pluginv1.DescribeResponse) error {
	lock, _, err := d.Read()
	if err != nil {
		return err
	}
	return lock.admit(manifest, shipped)
}

func (l *Lock) admit(manifest, shipped *pluginv1.DescribeResponse) error {
	name, version := manifest.GetName(), manifest.GetVersion()
	own, _, _ := strings.Cut(shipped.GetName(), "/")
	provider, _, _ := strings.Cut(name, "/")
	switch {
	case !validName(name):
		return fmt.Errorf("the plugin calls itself %q; want lower-case letters, digits, '.', '_' and '-', and at most one '/', such as acme/sign", name)
	case !regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$`).MatchString(version):
		return fmt.Errorf("plugin %s says its version is %q; want a semantic version, such as 1.2.0", name, version)
	case own != "" && provider == own:
		return fmt.Errorf("the plugin calls itself %q, and %q is what ships with the server; have it take the name of its own provider, such as acme/sign", name, own)
	}
	if err := collides(manifest, shipped, "ships with the server; have the plugin call its own otherwise"); err != nil {
		return err
	}
	for _, e := range l.Plugins {
		if e.Name == name {
			continue // which this one replaces
		}
		other, err := e.DescribeResponse()
		if err != nil {
			return err
		}
		if err := collides(manifest, other, fmt.Sprintf("belongs to %s, which is installed; remove that one first, or have the plugin call its own otherwise", e.Name)); err != nil {
			return err
		}
	}
	return nil
}

// collides says which kind or scheme two plugins would share.
func collides(manifest, other *pluginv1.DescribeResponse, why string) error {
	for _, k := range manifest.GetKinds() {
		for _, o := range other.GetKinds() {
			if k.GetId() == o.GetId() {
				return fmt.Errorf("plugin %s offers the kind %q, which %s", manifest.GetName(), k.GetId(), why)
			}
			for _, scheme := range k.GetTransport().GetUriSchemes() {
				if slices.Contains(o.GetTransport().GetUriSchemes(), scheme) {
					return fmt.Errorf("plugin %s claims the scheme %q for its kind %q, which %s", manifest.GetName(), scheme, k.GetId(), why)
				}
			}
		}
	}
	return nil
}
