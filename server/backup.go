package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grapnel/grapnel/server/delivery"
)

// A backup is the journal at one moment, and the configuration at one a little later: so what a delivery needs is there,
// or its deletion is. It is made beside the journal, in links and copies, and then sent.

const (
	// backupPatience is how long a backup may wait for whoever takes it: meanwhile it holds space on the disk.
	backupPatience = 30 * time.Second
	// configPage is how many keys of etcd are read at once, each up to 2 MiB.
	configPage = 64
)

// backupDir is where the copy is until it has been sent: on the journal's disk.
func backupDir(o Options) string { return filepath.Join(journalDir(o), "backup") }

// aboutBackup is the first file of a backup.
type aboutBackup struct {
	// Format is 1.
	Format int `json:"format"`
	// Journal is the journal's ID, Version the server's.
	Journal    string    `json:"journal"`
	Partitions int       `json:"partitions"`
	Version    string    `json:"version"`
	Time       time.Time `json:"time"`
	// Keys counts what there is in configuration.
	Keys int `json:"keys"`
	// SecretKey says that the key of the secrets is in it.
	SecretKey bool `json:"secret_key"`
	// Erasures had been completed.
	Erasures []Erased `json:"erasures,omitempty"`
}

// configKey is a line of a backup's configuration: a key of etcd, without our prefix.
type configKey struct {
	Key   string `json:"key"`
	Value []byte `json:"value"`
}

// serveBackup sends a backup. One at a time is made, none while the disk is nearly full, and it ends when its reader
// stands still or the disk fills up. What was cut off has no end, and says so to whoever reads it.
func (s *Server) serveBackup(w http.ResponseWriter, r *http.Request) {
	withKey := false
	if text := r.FormValue("secret-key"); text != "" {
		var err error
		if withKey, err = strconv.ParseBool(text); err != nil {
			http.Error(w, fmt.Sprintf("secret-key: %q is not true or false", text), http.StatusBadRequest)
			return
		}
	}
	select {
	case <-s.ready:
	default:
		http.Error(w, "the server is starting", http.StatusServiceUnavailable)
		return
	}
	if !s.backups.TryLock() {
		http.Error(w, "another backup is being made", http.StatusConflict)
		return
	}
	defer s.backups.Unlock()
	if err := s.space.Err(); err != nil {
		http.Error(w, "a backup holds space on the disk: "+err.Error(), http.StatusInsufficientStorage)
		return
	}
	dir := backupDir(s.options)
	defer func() { _ = os.RemoveAll(dir) }()
	began := time.Now()
	err := s.copyStores(r.Context(), dir, withKey)
	if err != nil {
		s.log.Error("a backup could not be made", "err", err.Error())
		http.Error(w, "make the backup: "+err.Error(), http.StatusInternalServerError)
		return
	}
	copied := time.Since(began)
	w.Header().Set("Content-Type", "application/x-tar")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	size, err := writeArchive(&patientWriter{w: w, deadline: http.NewResponseController(w).SetWriteDeadline, room: s.space.Err}, dir)
	if err != nil {
		s.log.Warn("a backup was not taken to its end", "err", err.Error())
		panic(http.ErrAbortHandler) // the only way to have the reader see that it is cut off
	}
	s.log.Info("a backup was taken", "bytes", size, "copied_in", copied, "took", time.Since(began), "secret_key", withKey)
}

// beingCopied reports whether a backup is being taken, which has files of the journal that the journal may have done with. What
// a crash has left of one is removed.
func (s *Server) beingCopied() bool {
	if !s.backups.TryLock() {
		return true
	}
	defer s.backups.Unlock()
	if err := os.RemoveAll(backupDir(s.options)); err != nil {
		s.log.Error("what is left of a backup could not be removed", "err", err)
		return true
	}
	return false
}

// patientWriter gives up on a reader that stands still, and when the disk needs what the backup holds.
type patientWriter struct {
	w        io.Writer
	deadline func(time.Time) error
	room     func() error
}

func (p *patientWriter) Write(b []byte) (int, error) {
	if err := p.room(); err != nil {
		return 0, err
	}
	if err := p.deadline(time.Now().Add(backupPatience)); err != nil {
		return 0, err
	}
	return p.w.Write(b)
}

// copyStores copies what a backup is made of to dir.
func (s *Server) copyStores(ctx context.Context, dir string, withKey bool) error {
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return err
	}
	s.copying.Lock()
	defer s.copying.Unlock()
	if err := s.journal.Flush(ctx); err != nil {
		return fmt.Errorf("flush the journal: %w", err)
	}
	erasures, err := s.erasures() // before the copy, which is then without what they have purged
	if err != nil {
		return err
	}
	marks, err := s.journal.Checkpoint(filepath.Join(dir, archivedJournal))
	if err != nil {
		return err
	}
	about := aboutBackup{
		Format: archiveFormat, Journal: s.journal.ID(), Partitions: s.journal.Partitions(), Version: s.options.Version,
		Time: time.Now().UTC().Truncate(time.Second), SecretKey: withKey, Erasures: erasures,
	}
	if about.Keys, err = s.copyConfig(ctx, filepath.Join(dir, archivedConfig)); err != nil {
		return fmt.Errorf("copy the configuration: %w", err)
	}
	text, err := json.Marshal(about)
	if err != nil {
		return err
	}
	if withKey {
		key, err := os.ReadFile(keyFile(s.options))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, archivedKey), key, 0o600)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, archivedMarks), marks.Encode(), 0o600),
		os.WriteFile(filepath.Join(dir, archivedAbout), append(text, '\n'), 0o600),
	)
}

// maxErased bounds what a backup says of erasures, of which there may be hundreds in each namespace.
const maxErased = 200

// erasures lists those that have succeeded, the newest first.
func (s *Server) erasures() (all []Erased, err error) {
	jobs, err := s.journal.Replays(0)
	if err != nil {
		return nil, err
	}
	snapshot := s.registry.Snapshot()
	for _, job := range jobs {
		ns := snapshot.NamespaceByKey(uint64(job.Namespace))
		if ns != nil && job.Spec.Erase && job.State == delivery.ReplaySucceeded {
			all = append(all, Erased{"namespaces/" + ns.ID + "/erasures/" + job.ID, job.DoneTime.UTC().Truncate(time.Second)})
		}
	}
	slices.SortStableFunc(all, func(a, b Erased) int { return b.Completed.Compare(a.Completed) })
	return all[:min(len(all), maxErased)], nil
}

// copyConfig writes all keys of ours at one revision, in order.
func (s *Server) copyConfig(ctx context.Context, path string) (keys int, err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	lines := json.NewEncoder(file)
	options := []clientv3.OpOption{clientv3.WithRange(clientv3.GetPrefixRangeEnd(configPrefix)), clientv3.WithLimit(configPage)}
	for from := configPrefix; ; {
		bounded, done := context.WithTimeout(ctx, patience)
		page, err := s.etcd.client.Get(bounded, from, options...)
		done()
		if err != nil {
			return 0, err
		}
		if from == configPrefix { // and the others at the same
			options = append(options, clientv3.WithRev(page.Header.GetRevision()))
		}
		for _, kv := range page.Kvs {
			if kv.Lease != 0 { // of a node that lives
				continue
			}
			if err := lines.Encode(configKey{string(kv.Key[len(configPrefix):]), kv.Value}); err != nil {
				return 0, err
			}
			keys++
		}
		if !page.More {
			return keys, nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}
