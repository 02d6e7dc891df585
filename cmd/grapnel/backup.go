package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/grapnel/grapnel/server"
)

// backupSilence is how long a backup may stand still before it is given up.
const backupSilence = time.Minute

func newBackupCommand(c *cli) *cobra.Command {
	var addr string
	var withKey bool
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Back up a running server into a file",
		Long: `Takes a backup of a server that runs, from its admin listener, into a new FILE, a tar archive: the journal as it is at
one moment, and the configuration as it is a moment later. Everything that was acknowledged before the command began
is in it; what is accepted after that moment is not. The file is checked, and appears when it is whole.

The key of the secrets, secret.key in the data directory, is not in it unless --secret-key asks for it: without that
key nobody can read the secrets in the backup. Payloads can be read. Keep a copy of the key somewhere else.`,
		Example: "  grapnel backup grapnel.tar\n  grapnel backup /backups/grapnel.tar --admin-addr 10.0.0.7:7071",
		Args:    exactly("FILE to make, such as grapnel.tar"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.backup(cmd.Context(), addr, args[0], withKey)
		},
	}
	cmd.Flags().StringVar(&addr, "admin-addr", "127.0.0.1:7071", "address of the server's admin listener")
	cmd.Flags().BoolVar(&withKey, "secret-key", false, "with the key of the secrets: whoever has the file can then read them")
	return cmd
}

func (c *cli) backup(ctx context.Context, addr, path string, withKey bool) (err error) {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("%s exists already; name a new file", path)
	}
	began := time.Now()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	still := time.AfterFunc(backupSilence, func() { cancel(fmt.Errorf("nothing has come for %v", backupSilence)) })
	defer still.Stop()
	at := url.URL{Scheme: "http", Host: addr, Path: "/backup", RawQuery: url.Values{"secret-key": {strconv.FormatBool(withKey)}}.Encode()}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return usagef("--admin-addr %s: want host:port, such as 127.0.0.1:7071", addr)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return fmt.Errorf("ask the admin listener at %s (--admin-addr) for a backup: %w", addr, errors.Join(context.Cause(ctx), unwrapURL(err)))
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 4096))
		return fmt.Errorf("the server at %s makes no backup: %s (%s)", addr, bytes.TrimSpace(text), response.Status)
	}
	size, b, err := takeBackup(&watched{response.Body, still}, path)
	if err != nil {
		return fmt.Errorf("take the backup: %w; %s was not made", errors.Join(err, context.Cause(ctx)), path)
	}
	key := "without the key of the secrets"
	if b.SecretKey {
		key = "with the key of the secrets"
	}
	c.said("%s: journal %s of %s, %d bytes, %s, in %v", path, b.Journal, b.Time.Format(time.RFC3339), size, key, time.Since(began).Round(time.Millisecond))
	return nil
}

// unwrapURL is the cause of a request's error, without the words around it.
func unwrapURL(err error) error {
	if wrapped := new(url.Error); errors.As(err, &wrapped) {
		return wrapped.Err
	}
	return err
}

// watched puts an alarm off with everything that is read.
type watched struct {
	io.Reader
	alarm *time.Timer
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Reader.Read(b)
	w.alarm.Reset(backupSilence)
	return n, err
}

// takeBackup writes a backup beside path while it is checked, and gives it its name when it is whole.
func takeBackup(r io.Reader, path string) (size int64, b server.Backup, err error) {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-") // mode 0600
	if err != nil {
		return 0, b, err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			_ = os.Remove(file.Name())
		}
	}()
	through := io.TeeReader(r, file)
	if b, err = server.CheckBackup(through); err != nil {
		return 0, b, err
	}
	if _, err := io.Copy(io.Discard, through); err != nil { // what lies behind the end, of which a tar has some
		return 0, b, err
	}
	if size, err = file.Seek(0, io.SeekCurrent); err != nil {
		return 0, b, err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return 0, b, err
	}
	return size, b, os.Rename(file.Name(), path)
}

func newRestoreCommand(c *cli) *cobra.Command {
	var o server.RestoreOptions
	var logLevel string
	var endpoints []string
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Make a data directory out of a backup",
		Long: `Makes a new data directory out of what grapnel backup has made. Everything is checked: the checksums of the archive,
each record of the journal, that journal and configuration belong together, and that nothing is missing that was
acknowledged before the backup. The directory must be empty, or not be there; until all is well it is none that a server
starts in. FILE may be - for standard input.

A server started with it goes on with the deliveries that were open when the backup was made; what was delivered since
then is delivered again, with the same webhook-id. Never start it beside the server that the backup is of.`,
		Example: "  grapnel restore grapnel.tar --data-dir ./restored\n  grapnel restore grapnel.tar --data-dir ./restored --secret-key ./secret.key",
		Args:    exactly("FILE that grapnel backup has made"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(endpoints) > 0 {
				return usagef("--etcd-endpoints %s: a restore makes an embedded etcd, wherever the configuration was, and puts nothing into an external one; "+
					"leave it out, and start the server without it too", strings.Join(endpoints, ","))
			}
			if o.Logger, err = newLogger(c.stderr, logLevel, "text"); err != nil {
				return usageError{err}
			}
			o.Backup = c.stdin
			if args[0] != "-" {
				file, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer file.Close()
				o.Backup = file
			}
			return c.restore(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.DataDir, "data-dir", "", "`directory` to make")
	cmd.Flags().StringVar(&o.SecretKey, "secret-key", "", "`file` with the key of the secrets, where the backup is without it")
	cmd.Flags().StringVar(&logLevel, "log-level", "warn", "debug, info, warn or error")
	// Whoever runs a server with an external etcd will try it.
	cmd.Flags().StringSliceVar(&endpoints, "etcd-endpoints", nil, "not for a restore")
	must(cmd.Flags().MarkHidden("etcd-endpoints"))
	must(cmd.MarkFlagDirname("data-dir"))
	must(cmd.MarkFlagFilename("secret-key"))
	return cmd
}

func (c *cli) restore(ctx context.Context, o server.RestoreOptions) error {
	if o.DataDir == "" {
		return usagef("--data-dir is missing: the directory to make")
	}
	r, err := server.Restore(ctx, o)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	c.said("%s: journal %s as of %s: %d events, %d deliveries, %d of them open; %d keys of configuration",
		o.DataDir, r.Journal, r.Time.Format(time.RFC3339), r.Events, r.Deliveries, r.Open, r.Keys)
	last := "none had been completed"
	if len(r.Erasures) > 0 {
		last = fmt.Sprintf("the last that it knows is %s of %s", r.Erasures[0].Name, r.Erasures[0].Completed.Format(time.RFC3339))
	}
	c.said("what erasures have purged since then is in it again, and they are to be run again: %s", last)
	if r.KeyWanted {
		fmt.Fprintf(c.stderr, "there are secrets, and the key is not in the backup: put it into %s, mode 0600, before a server is started\n",
			filepath.Join(o.DataDir, "secret.key"))
	}
	return nil
}
