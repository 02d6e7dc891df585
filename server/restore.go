package server

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/delivery"
	"github.com/grapnel/grapnel/server/delivery/highwater"
	"github.com/grapnel/grapnel/server/delivery/salvage"
	"github.com/grapnel/grapnel/server/keyspace"
	"github.com/grapnel/grapnel/server/secret"
)

// RestoreOptions of Restore. DataDir and Backup are required.
type RestoreOptions struct {
	// DataDir is a new data directory: it must be empty, or not be there. What an earlier Restore left that did not come
	// to its end is thrown away.
	DataDir string
	// Backup is read to its end, once.
	Backup io.Reader
	// SecretKey is a file with the key of the secrets, for a backup without it; empty means none.
	SecretKey string
	// Logger, default none.
	Logger *slog.Logger
}

// Restored says what was restored.
type Restored struct {
	Backup
	// Keys of configuration; events, deliveries, and those of them that go on.
	Keys, Events, Deliveries, Open int
	// KeyWanted says that there are secrets, and that the key to them is not in its place.
	KeyWanted bool
}

// restoring is where a restore works, in the data directory. While it is there, no server starts.
const restoring = "restoring"

func restoringDir(o Options) string { return filepath.Join(o.DataDir, restoring) }

// errRestoring refuses a data directory.
func errRestoring(o Options) error {
	if _, err := os.Lstat(restoringDir(o)); err == nil {
		return fmt.Errorf("a restore into %s did not come to its end: run `grapnel restore` again", o.DataDir)
	}
	return nil
}

// Restore makes a data directory out of a backup: everything is checked and made aside, and then moved into place, the
// journal last. Ended at any moment before that, it leaves a directory in which no server starts and in which another
// Restore may be tried. The configuration goes into a new embedded etcd, wherever it was.
func Restore(ctx context.Context, r RestoreOptions) (done Restored, err error) {
	o := Options{DataDir: r.DataDir, EtcdQuota: maxEtcdQuota, Logger: r.Logger}
	if err := o.fill(); err != nil {
		return done, err
	}
	s := &Server{options: o, log: o.Logger.With("component", "restore")}
	var closers stack
	e := newEnding(ctx, nil)
	defer e.release()
	defer func() { err = errors.Join(err, closers.close(e)) }()
	if err := s.takeDir(&closers); err != nil {
		return done, err
	}
	if err := clearForRestore(o); err != nil {
		return done, err
	}
	aside := o
	aside.DataDir = restoringDir(o)
	if err := os.Mkdir(aside.DataDir, 0o700); err != nil {
		return done, err
	}
	about, err := readArchive(r.Backup, func(name string) (io.WriteCloser, error) { return createFile(ctx, aside.DataDir, name) })
	if err != nil {
		return done, errors.Join(err, os.RemoveAll(aside.DataDir))
	}
	done.Backup = about.public()
	if err := placeKey(aside, about, r.SecretKey); err != nil {
		return done, errors.Join(err, os.RemoveAll(aside.DataDir))
	}
	if err := s.rebuild(ctx, aside, about, &done); err != nil {
		return done, errors.Join(err, os.RemoveAll(aside.DataDir))
	}
	return done, moveRestored(o, aside)
}

// clearForRestore wants the data directory empty, but for what an unfinished restore left.
func clearForRestore(o Options) error {
	entries, err := os.ReadDir(o.DataDir)
	if err != nil {
		return err
	}
	unfinished := errRestoring(o) != nil
	for _, f := range entries {
		switch name := f.Name(); {
		case name == "lock" || name == "lost+found" || name == restoring:
		case unfinished && slices.Contains(restored(o), name):
		default:
			return fmt.Errorf("data directory %s is not empty: it holds %s; restore into a new one", o.DataDir, name)
		}
	}
	if !unfinished {
		return nil
	}
	// Itself last: as long as it is there the rest is known to be a restore's.
	for _, name := range append(restored(o), restoring) {
		if err := os.RemoveAll(filepath.Join(o.DataDir, name)); err != nil {
			return err
		}
	}
	return nil
}

// restored is what a restore moves into place, in that order: what says that there is a journal first, the journal last.
func restored(o Options) []string {
	return []string{filepath.Base(pairFile(o)), "secret.key", "journal.highwater", "etcd", "journal"}
}

// createFile makes a file of a backup, whose directories are made with it.
func createFile(ctx context.Context, dir, name string) (io.WriteCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return durable{file}, nil
}

// durable is on the disk when it is closed.
type durable struct{ *os.File }

func (d durable) Close() error { return errors.Join(d.Sync(), d.File.Close()) }

// placeKey has the key that was given in the place of the backup's.
func placeKey(aside Options, about aboutBackup, given string) error {
	_, err := os.Stat(keyFile(aside))
	switch has := err == nil; {
	case has && given != "":
		return errors.New("the key of the secrets is in the backup; leave --secret-key out")
	case has != about.SecretKey:
		return errors.New("the backup is damaged: its secret.key is not what it says")
	case given == "":
		return nil
	}
	text, err := os.ReadFile(given)
	if err != nil {
		return fmt.Errorf("read the key of the secrets: %w", err)
	}
	if err := os.WriteFile(keyFile(aside), text, 0o600); err != nil {
		return err
	}
	if _, err := secret.LoadOrCreateKey(keyFile(aside), nothingSealed); err != nil { // it would name the copy
		return fmt.Errorf("%s is no key of secrets: want the secret.key of the server that was backed up, which is 64 hex digits", given)
	}
	return nil
}

func nothingSealed() (bool, error) { return false, nil }

// rebuild makes stores of the files of a backup, and checks them.
func (s *Server) rebuild(ctx context.Context, aside Options, about aboutBackup, done *Restored) (err error) {
	if err := s.checkJournal(ctx, aside, about, done); err != nil {
		return err
	}
	etcd, err := openEmbedded(ctx, aside)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, etcd.close()) }()
	etcd.log = s.log
	if err := wait(ctx, s.log, "the new etcd to answer", func(ctx context.Context) error { return etcd.meet(ctx, aside) }); err != nil {
		return err
	}
	if done.Keys, err = putConfig(ctx, etcd.client, filepath.Join(aside.DataDir, archivedConfig)); err != nil {
		return fmt.Errorf("restore the configuration: %w", err)
	}
	if done.Keys != about.Keys {
		return fmt.Errorf("the backup is damaged: it has %d keys of %d", done.Keys, about.Keys)
	}
	owner, err := keyspace.Owner(ctx, etcd.client, configPrefix)
	if err != nil || owner != about.Journal {
		return fmt.Errorf("the backup is damaged: its configuration is that of the journal %q, and not of %q: %w", owner, about.Journal, errors.Join(err, errStranger))
	}
	if done.KeyWanted, err = checkKey(ctx, etcd.client, aside, about.Journal); err != nil {
		return err
	}
	return notePair(aside, pair{journal: about.Journal, etcd: etcd.cluster})
}

// checkJournal reads the whole journal, and notes what was acknowledged at the backup beside it.
func (s *Server) checkJournal(ctx context.Context, aside Options, about aboutBackup, done *Restored) error {
	dir := journalDir(aside)
	text, err := os.ReadFile(filepath.Join(aside.DataDir, archivedMarks))
	if err != nil {
		return err
	}
	marks, err := highwater.Decode("the backup's marks", text)
	if err != nil {
		return err
	}
	if len(marks.Marks) > 0 {
		note, err := highwater.Create(HighWater(dir), marks.Journal, marks.Marks)
		if err == nil {
			err = note.Close(false)
		}
		if err != nil {
			return err
		}
	}
	files, err := salvage.Check(ctx, dir)
	if err != nil {
		return fmt.Errorf("check the backup's journal: %w", err)
	}
	if files.Damaged() {
		return fmt.Errorf("the journal in the backup is damaged: `grapnel journal check` says where, of what `tar xf` makes of it")
	}
	// Opened for writing, so that its log is in tables, and compared with the marks.
	j, err := delivery.Open(delivery.Options{Dir: dir, HighWater: HighWater(dir), MinFreeBytes: -1, BallastBytes: -1, Logger: s.options.Logger})
	if err != nil {
		return fmt.Errorf("open the backup's journal: %w", err)
	}
	id := j.ID()
	if err := errors.Join(j.ForgetWatches(), j.Close()); err != nil {
		return err
	}
	if id != about.Journal {
		return fmt.Errorf("the backup is damaged: it says that its journal is %s, and has %s", about.Journal, id)
	}
	var damage *delivery.Damage
	sum, err := delivery.Inspect(ctx, dir, func(d delivery.Damage) {
		if damage == nil {
			damage = &d
		}
	})
	if err == nil && damage != nil {
		err = fmt.Errorf("%d records are damaged, such as %s: %s", sum.Damaged, damage.What, damage.Reason)
	}
	if err != nil {
		return fmt.Errorf("check the backup's journal: %w", err)
	}
	done.Events, done.Deliveries, done.Open = sum.Events, sum.Deliveries, sum.Open
	return nil
}

// configBatch bounds a transaction of etcd, which takes 128 changes and 2 MiB at the most.
const (
	configBatch      = 100
	configBatchBytes = 1 << 20
)

// putConfig puts what a backup has of the configuration into an etcd.
func putConfig(ctx context.Context, client *clientv3.Client, path string) (keys int, err error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	var ops []clientv3.Op
	size := 0
	put := func() error {
		if len(ops) == 0 {
			return nil
		}
		bounded, done := context.WithTimeout(ctx, patience)
		defer done()
		_, err := client.Txn(bounded).Then(ops...).Commit()
		ops, size = ops[:0], 0
		return err
	}
	for lines := json.NewDecoder(bufio.NewReader(file)); ; {
		var k configKey
		if err := lines.Decode(&k); errors.Is(err, io.EOF) {
			return keys, put()
		} else if err != nil {
			return keys, fmt.Errorf("%s: %w", archivedConfig, err)
		}
		if n := len(k.Key) + len(k.Value); len(ops) == configBatch || size+n > configBatchBytes {
			if err := put(); err != nil {
				return keys, err
			}
		}
		ops = append(ops, clientv3.OpPut(configPrefix+k.Key, string(k.Value)))
		size += len(k.Key) + len(k.Value)
		keys++
	}
}

// checkKey opens the secrets with the key, if there is one; wanted says that there are secrets without it.
func checkKey(ctx context.Context, client *clientv3.Client, aside Options, journal string) (wanted bool, err error) {
	missing := errors.New("missing")
	key, err := secret.LoadOrCreateKey(keyFile(aside), func() (bool, error) {
		if wanted, err = secret.Sealed(ctx, client, configPrefix); err != nil {
			return false, err
		}
		return false, missing // and made by the first start, if there is nothing to be lost
	})
	switch {
	case errors.Is(err, missing):
		return wanted, nil
	case err != nil:
		return false, err
	}
	if _, err := secret.Open(ctx, secret.Options{Client: client, Identity: journal, Key: key}); err != nil {
		return false, fmt.Errorf("open the secrets: %w", err)
	}
	return false, nil
}

// moveRestored moves what was made aside into place.
func moveRestored(o, aside Options) error {
	for _, name := range []string{archivedAbout, archivedConfig, archivedMarks} {
		if err := os.Remove(filepath.Join(aside.DataDir, name)); err != nil {
			return err
		}
	}
	for _, name := range restored(o) {
		from := filepath.Join(aside.DataDir, name)
		if _, err := os.Lstat(from); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := moveDurably(from, filepath.Join(o.DataDir, name)); err != nil {
			return fmt.Errorf("move %s into place: %w", name, err)
		}
	}
	return errors.Join(os.RemoveAll(aside.DataDir), syncDir(o.DataDir))
}
