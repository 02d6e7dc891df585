package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	firstparty "github.com/grapnel/grapnel/plugins"
	pluginv1 "github.com/grapnel/grapnel/proto/grapnel/plugin/v1"
	"github.com/grapnel/grapnel/server/plugindir"
	"github.com/grapnel/grapnel/server/pluginhost"
)

// trialStart is how long a plugin may take to serve under the limits that it is installed with.
const trialStart = 12 * time.Second

// refuseTaken says which of the plugin's names belong to others: kinds and URI schemes of what ships, and of what is
// installed, whether it is enabled or not. Those of an earlier version of the same plugin are its own.
func refuseTaken(manifest *pluginv1.DescribeResponse, installed plugindir.Lock) error {
	owners := map[string]string{}
	for _, k := range firstparty.Kinds() {
		owners["kind "+k.ID()] = "grapnel, which ships it"
		for _, scheme := range k.Schemes() {
			owners["URI scheme "+scheme] = "grapnel, which ships it"
		}
	}
	for _, e := range installed.Plugins {
		var described pluginv1.DescribeResponse
		if e.Name == manifest.GetName() || protojson.Unmarshal(e.Manifest, &described) != nil {
			continue
		}
		for _, name := range namesOf(&described) {
			owners[name] = e.Name + ", which is installed"
		}
	}
	var errs []error
	if manifest.GetName() == "grapnel" {
		errs = append(errs, errors.New(`the plugin calls itself grapnel, as only what ships with it does; want a name such as acme/sign`))
	}
	for _, name := range namesOf(manifest) {
		if owner := owners[name]; owner != "" {
			errs = append(errs, fmt.Errorf("the %s belongs to %s", name, owner))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%s cannot be installed: %w", manifest.GetName(), err)
	}
	return nil
}

// namesOf are the kinds of a plugin and the URI schemes that they are the default for.
func namesOf(d *pluginv1.DescribeResponse) []string {
	var names []string
	for _, k := range d.GetKinds() {
		names = append(names, "kind "+k.GetId())
		for _, scheme := range k.GetTransport().GetUriSchemes() {
			names = append(names, "URI scheme "+scheme)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// tryStart has the server's own host run the plugin as it will be run, when that is otherwise than the suite does it.
func tryStart(ctx context.Context, path string, e plugindir.Entry) error {
	limits := pluginhost.Limits(e.Limits)
	if limits == (pluginhost.Limits{}) && e.User == "" {
		return nil
	}
	dir, err := os.MkdirTemp("", "grapnel-install-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	host, err := pluginhost.New(pluginhost.Options{
		Dir: dir, Secrets: func(string) ([]pluginhost.SecretVersion, bool) { return nil, false },
		Plugins: []pluginhost.Spec{{Path: path, Args: e.Args, Builtin: true, Limits: limits, User: e.User}}, // builtin ones are waited for
	})
	if err != nil {
		return err
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = host.Run(running)
	}()
	defer func() {
		stop()
		<-ended
	}()
	limit, cancel := context.WithTimeout(ctx, trialStart)
	defer cancel()
	if err := host.Ready(limit); err != nil {
		how, _ := json.Marshal(e.Limits)
		return fmt.Errorf("the plugin does not start as it is to be installed, with limits %s and user %q: %w", how, e.User, err)
	}
	return nil
}
