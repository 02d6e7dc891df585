package server

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/grapnel/grapnel/server/delivery/highwater"
)

const (
	// marksKey is where etcd keeps the second copy of what the journal has acknowledged.
	marksKey = configPrefix + "journal/highwater"
	// marksEvery is how often it is renewed, when something has changed.
	marksEvery = time.Second
	// marksPatience bounds one renewal.
	marksPatience = 2 * time.Second
)

// checkMarks holds the journal against what etcd remembers of it: the note beside the journal may have gone with it.
func (s *Server) checkMarks(ctx context.Context) error {
	var known []byte
	err := wait(ctx, s.log, "etcd to say what was acknowledged", func(ctx context.Context) error {
		found, err := s.etcd.client.Get(ctx, marksKey)
		if err == nil && len(found.Kvs) > 0 {
			known = found.Kvs[0].Value
		}
		return err
	})
	if err != nil || known == nil {
		return err
	}
	state, err := highwater.Decode("etcd's copy of what was acknowledged", known)
	if err != nil {
		s.log.Error("a loss before this start would not be noticed by it", "err", err)
		return nil
	}
	if state.CheckJournal(s.journal.ID()) != nil {
		return nil // left by another that was adopted away from
	}
	if err := s.journal.Check(state, s.options.AcceptLoss); err != nil {
		return fmt.Errorf("check the journal: %w", err)
	}
	return nil
}

// putMarks renews etcd's copy. Not while a backup is made: etcd's part of it is later than the journal's, and would say
// that this one holds less than was acknowledged.
func (s *Server) putMarks(ctx context.Context, marks []byte) error {
	s.copying.Lock()
	defer s.copying.Unlock()
	bounded, done := context.WithTimeout(ctx, marksPatience)
	defer done()
	_, err := s.etcd.client.Put(bounded, marksKey, string(marks))
	return err
}

// keepMarks renews etcd's copy until ctx ends.
func (s *Server) keepMarks(ctx context.Context) error {
	tick := time.NewTicker(marksEvery)
	defer tick.Stop()
	var last []byte
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := s.journal.Marks().Encode()
		if bytes.Equal(now, last) {
			continue
		}
		err := s.putMarks(ctx, now)
		if err == nil {
			last = now
		} else if !failed && ctx.Err() == nil {
			s.log.Warn("etcd does not take note of what is acknowledged; the file beside the journal does", "err", err)
		}
		failed = err != nil
	}
}
