package main

import (
	"context"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"

	"github.com/grapnel/grapnel/sdk/plugin"
)

type spoolConfig struct {
	Dir string `json:"dir" doc:"Folder to write to; it must exist." required:"true"`
}

// Spool writes each request to a file named after its id, so that a repeated attempt changes nothing.
func Spool() plugin.Kind {
	return plugin.Transport("file-spool", func(c spoolConfig, _ plugin.Target) (plugin.AttemptFunc, error) {
		return func(_ context.Context, r *plugin.Request) (*plugin.Response, error) {
			text, err := json.MarshalIndent(r, "", "  ")
			if err != nil {
				return nil, err
			}
			path := filepath.Join(c.Dir, url.PathEscape(r.MessageID)+".json")
			if err := os.WriteFile(path+".tmp", text, 0o600); err != nil {
				return nil, &plugin.Failure{Source: plugin.SourceEndpoint, Code: plugin.CodeConnect, Message: "cannot write to the folder", WireState: plugin.NotSent}
			}
			if err := os.Rename(path+".tmp", path); err != nil {
				return nil, err
			}
			return &plugin.Response{Status: 201}, nil
		}, nil
	}, plugin.Doc("Writes requests to a folder"), plugin.Schemes("file-spool"), plugin.Example(spoolConfig{Dir: "/var/spool/hooks"}))
}
