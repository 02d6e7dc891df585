package delivery

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/grapnel/grapnel/server/delivery/highwater"
	"github.com/grapnel/grapnel/server/delivery/salvage"
)

// Damage is a record of a journal that cannot be read, or a row whose event is not there.
type Damage struct {
	// Key names the record to SetAside: hexadecimal digits. Empty when a part of the journal could not be read at all,
	// as with a damaged block.
	Key string
	// What the record is, for people.
	What string
	// Reason says what is wrong with it.
	Reason string
}

// Inspection is what Inspect has counted.
type Inspection struct {
	Format, Partitions int
	Events, Deliveries int
	// Open deliveries wait or are to be tried again.
	Open    int
	Damaged int
}

// Inspect reads every record of the journal in dir, which no server may be using, and reports what it cannot read.
// It changes nothing. It ends early with an error when the journal cannot be opened at all; what can be done then is
// told by package salvage.
func Inspect(ctx context.Context, dir string, report func(Damage)) (sum Inspection, err error) {
	defer salvage.LeaveAsFound(dir)()
	j, err := openStopped(dir, true)
	if err != nil {
		return sum, err
	}
	defer func() { err = errors.Join(err, j.db.Close()) }()
	sum.Format, sum.Partitions = layoutFormat, len(j.partitions)
	bad := func(d Damage) {
		sum.Damaged++
		report(d)
	}
	for _, p := range j.partitions {
		for _, tag := range []byte{tagFIFO, tagTimer, tagTurn, tagBlocked, tagRecord, tagFailing, tagJob, tagErasure, tagCursor, tagNews, tagWatched, tagCommit, tagPartition} {
			prefix := appendTag(nil, p.number, tag)
			err := j.scan(j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
				if reason := p.inspect(key, value, &sum); reason != nil {
					bad(Damage{hex.EncodeToString(key), keyText(key), reason.Error()})
				}
				return ctx.Err()
			})
			if ctx.Err() != nil {
				return sum, context.Cause(ctx)
			}
			if err != nil {
				bad(Damage{What: fmt.Sprintf("partition %d, records %c, from some key on", p.number, tag), Reason: err.Error()})
			}
		}
	}
	return sum, nil
}

// inspect reads one record, and counts it.
func (p *partition) inspect(key, value []byte, sum *Inspection) error {
	switch key[tagOffset] {
	case tagFIFO, tagTimer:
		lane, row, ok := splitRow(key)
		if !ok {
			return errBadKey
		}
		sum.Open++
		if row.Kind == FIFO {
			sum.Deliveries++
		}
		pr, err := decodeProgress(value)
		if err != nil {
			return err
		}
		_, err = p.readEvent(p.j.db, lane.Namespace, cmp.Or(pr.origin, row.Seq))
		return err
	case tagTurn, tagBlocked:
		return p.inspectOrder(key, value, sum)
	case tagRecord:
		return p.inspectRecord(key, value, sum)
	case tagFailing:
		d := readRecord(value)
		d.time()
		return d.err
	case tagJob, tagErasure:
		_, err := decodeReplay(value, key[tagOffset] == tagErasure)
		return err
	case tagCursor:
		_, err := decodeCursor(value)
		return err
	case tagNews:
		ns, commit, ok := splitNews(key)
		if !ok {
			return errBadKey
		}
		_, _, err := p.decodeNews(ns, commit, value, 0, nil)
		return err
	case tagWatched:
		_, err := decodeRecorded(value)
		return err
	case tagCommit:
		_, err := decodeCommitMark(value)
		return err
	}
	_, err := decodeMemory(value)
	return err
}

// inspectOrder reads one record of an ordering key. A turn is somebody's, and who waits for one waits for somebody.
func (p *partition) inspectOrder(key, value []byte, sum *Inspection) error {
	if lane, _, ok := splitTurn(key); ok {
		t, err := decodeTurn(value)
		if err != nil {
			return err
		}
		at, err := p.find(p.j.db, lane, t.seq)
		if err == nil && (at == nil || at.open == t.blocks || at.waits || at.state == Succeeded || at.state == Cancelled) {
			err = fmt.Errorf("it is the turn of delivery %s, which has ended", ID{t.seq, p.number, lane.Subscription})
		}
		return err
	}
	lane, order, seq, ok := splitBlocked(key)
	if !ok {
		return errBadKey
	}
	sum.Open++
	w, err := decodeBlocked(value)
	if err != nil {
		return err
	}
	if !w.recorded {
		sum.Deliveries++
	}
	if _, err := p.readEvent(p.j.db, lane.Namespace, cmp.Or(w.origin, seq)); err != nil {
		return err
	}
	if t, err := p.turnOf(p.j.db, lane, order); err == nil && t.seq == 0 {
		return errors.New("it waits for its ordering key, which nothing keeps busy")
	}
	return nil
}

func (p *partition) inspectRecord(key, value []byte, sum *Inspection) (err error) {
	_, _, kind, _, ok := splitRecord(key)
	if !ok {
		return errBadKey
	}
	switch kind {
	case kindEvent:
		sum.Events++
		if _, err = decodeEvent(value); err == nil {
			_, err = decodeHead(value) // with the targets that are within
		}
	case kindTargets:
		_, err = decodeTargets(value)
	case kindIdentity:
		_, err = decodeKnown(value)
	case kindDelivery:
		sum.Deliveries++
		_, err = decodeStanding(value)
	case kindAttempt:
		_, err = decodeAttempt(value)
	case kindDead:
		_, err = decodeDead(value)
	case kindAgain:
		_, err = decodeAgain(value)
	case kindReplay:
		d := readRecord(value)
		d.uint()
		err = d.err
	case kindMade:
		_, err = decodeMade(value)
	case kindSwept:
		if len(key) == recordPrefix {
			_, err = decodeSwept(value)
		}
	default:
		err = errBadKey
	}
	return err
}

// openStopped opens a journal without its committers.
func openStopped(dir string, readOnly bool) (*Journal, error) {
	j, po := stopped(dir)
	po.ReadOnly = readOnly
	po.ErrorIfNotExists = true
	db, err := pebble.Open(dir, po)
	if err != nil {
		return nil, fmt.Errorf("open journal %s: %w", dir, err)
	}
	j.db = db
	var m meta
	found, err := j.get(db, metaKey(), func(value []byte) (err error) {
		m, err = decodeMeta(value)
		return err
	})
	switch {
	case err == nil && !found:
		err = errors.New("it has no meta record: this is no journal, or its oldest table is missing")
	case err == nil && m.format != layoutFormat:
		err = fmt.Errorf("its format is %d, this release knows %d only", m.format, layoutFormat)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open journal %s: %w", dir, err), db.Close())
	}
	j.id = m.id
	for i := range m.partitions {
		p := newPartition(j, uint16(i))
		p.swept.Store(&sweptDays{upTo: kept - 1}) // look in both places always
		j.partitions = append(j.partitions, p)
	}
	return j, nil
}

// stopped is a journal that is not open, and how its engine is to be.
func stopped(dir string) (*Journal, *pebble.Options) {
	o := Options{Dir: dir, MinFreeBytes: -1, BallastBytes: -1, Logger: slog.New(slog.DiscardHandler)}
	j := newJournal(&o)
	j.space = newSpace(o, j.log)
	return j, j.pebbleOptions(o)
}

// Complete gives a journal that was salvaged without its first record, which says how it is laid out, that record anew, from the
// high-water marks at a path. False: it has one. Those who watched it are to begin anew.
func Complete(dir, marks string) (made bool, err error) {
	j, po := stopped(dir)
	po.ErrorIfNotExists = true
	if j.db, err = pebble.Open(dir, po); err != nil {
		return false, fmt.Errorf("open journal %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, j.db.Close()) }()
	if err := forgetWatches(j.db, maxPartitions); err != nil { // there may be gaps in what they were to be told
		return false, err
	}
	if found, err := j.has(j.db, metaKey()); err != nil || found {
		return false, err
	}
	known, err := highwater.Read(marks)
	if err != nil {
		return false, fmt.Errorf("its first record is missing, and cannot be made anew: %w", err)
	}
	m := meta{format: layoutFormat, partitions: len(known.Marks)}
	id, err := hex.DecodeString(known.Journal)
	if err != nil || len(id) != len(m.id) {
		return false, fmt.Errorf("high-water marks %s: %q is not the id of a journal", marks, known.Journal)
	}
	copy(m.id[:], id)
	return true, j.db.Set(metaKey(), encodeMeta(nil, m), pebble.Sync)
}

// EngineOptions are those that a journal's files are made with, for package salvage.
func EngineOptions() *pebble.Options {
	_, po := stopped("")
	return po
}

// SetAside takes one record, named by its key, out of the journal in dir, which no server may be using. The record is
// written to out first, as a line of JSON.
func SetAside(dir, key string, out io.Writer) (err error) {
	raw, err := hex.DecodeString(key)
	if err != nil || len(raw) <= bodyOffset {
		return fmt.Errorf("key %q is not one that `journal check` has named: those are hexadecimal digits", key)
	}
	j, err := openStopped(dir, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.db.Close()) }()
	line := struct {
		Key   string `json:"key"`
		What  string `json:"what"`
		Value string `json:"value,omitempty"`
		Error string `json:"error,omitempty"`
	}{Key: key, What: keyText(raw)}
	value, closer, err := j.db.Get(raw)
	switch {
	case errors.Is(err, pebble.ErrNotFound):
		return fmt.Errorf("there is no record %s (%s) in %s", key, line.What, dir)
	case err != nil:
		line.Error = err.Error()
	default:
		line.Value = base64.StdEncoding.EncodeToString(value)
		if err := closer.Close(); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(out).Encode(line); err != nil {
		return fmt.Errorf("write the record: %w", err)
	}
	if tag := raw[tagOffset]; tag == tagNews || tag == tagWatched { // those who watch would pass over the gap
		return forgetWatches(j.db, maxPartitions)
	}
	return j.db.Delete(raw, pebble.Sync)
}

// Exported is a line of Export: an event, with where each of its deliveries stands.
type Exported struct {
	Namespace  string             `json:"namespace_key"`
	ID         string             `json:"id"`
	UID        string             `json:"uid"`
	Source     string             `json:"source"`
	Type       string             `json:"type"`
	Subject    string             `json:"subject,omitempty"`
	Time       time.Time          `json:"time"`
	AcceptTime time.Time          `json:"accept_time"`
	Content    string             `json:"data_content_type,omitempty"`
	Schema     string             `json:"data_schema,omitempty"`
	Attributes map[string]string  `json:"attributes,omitempty"`
	Headers    map[string]string  `json:"headers,omitempty"`
	Ordering   string             `json:"ordering_key,omitempty"`
	Payload    []byte             `json:"data_base64"`
	Deliveries []ExportedDelivery `json:"deliveries,omitempty"`
}

// ExportedDelivery is where one delivery of an event stands. Trigger is that of grapnel.v1.Delivery.
type ExportedDelivery struct {
	ID              string `json:"id"`
	Subscription    string `json:"subscription"`
	SubscriptionUID string `json:"subscription_uid"`
	State           int    `json:"state"`
	Attempts        int    `json:"attempts"`
	Trigger         int    `json:"trigger"`
	ReplayJob       string `json:"replay_job,omitempty"`
}

// Export writes every event of the journal in dir that can be read to out, one line of JSON each (Exported), and
// reports those that cannot. No server may be using the journal; nothing is changed.
func Export(ctx context.Context, dir string, out io.Writer, report func(Damage)) (n int, err error) {
	defer salvage.LeaveAsFound(dir)()
	j, err := openStopped(dir, true)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, j.db.Close()) }()
	lines := json.NewEncoder(out)
	for _, p := range j.partitions {
		err := p.eachDay(j.db, 0, func(d dayKey) error {
			return p.eachSpace(j.db, d, func(ns NamespaceKey) error {
				prefix := appendKind(nil, p.number, d, ns, kindEvent)
				return j.scan(j.db, prefix, prefixEnd(prefix), func(key, value []byte) error {
					line, err := p.export(d, ns, key, value)
					if err != nil {
						report(Damage{hex.EncodeToString(key), keyText(key), err.Error()})
					} else if line != nil {
						n++
						if err := lines.Encode(line); err != nil {
							return fmt.Errorf("write: %w", err)
						}
					}
					return ctx.Err()
				})
			})
		})
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// export makes the line of an event; nil for one that lies in kept too, from where it is exported.
func (p *partition) export(d dayKey, ns NamespaceKey, key, value []byte) (*Exported, error) {
	e, err := decodeEvent(value)
	if err != nil {
		return nil, err
	}
	seq, ok := recordSeq(kindEvent, key[min(recordPrefix, len(key)):])
	if !ok {
		return nil, errBadKey
	}
	home, err := p.home(p.j.db, ns, seq)
	if err != nil || home != d {
		return nil, err
	}
	p.place(e, ns, seq)
	line := &Exported{
		Namespace: fmt.Sprintf("%016x", uint64(ns)), ID: e.ID, UID: e.UID, Source: e.Source, Type: e.Type, Subject: e.Subject,
		Time: e.Time.UTC(), AcceptTime: e.AcceptTime.UTC(), Content: e.ContentType, Schema: e.Schema, Attributes: e.Attributes, Headers: e.Headers, Ordering: e.OrderingKey, Payload: e.Payload,
	}
	head, err := decodeHead(value)
	if err != nil {
		return line, err
	}
	var targets targetList
	if err := p.targets(p.j.db, d, ns, seq, &head, func(list *targetList) { targets = list.clone() }); err != nil {
		return line, err
	}
	add := func(lane LaneKey, own uint64) error {
		at, err := p.find(p.j.db, lane, own)
		if err != nil || at == nil {
			return err
		}
		delivery, err := p.deliveryOf(p.j.db, lane, at)
		if err != nil {
			return err
		}
		line.Deliveries = append(line.Deliveries, ExportedDelivery{
			ID: delivery.ID.String(), Subscription: delivery.Subscription, SubscriptionUID: fmt.Sprintf("%x", delivery.SubscriptionUID[:]),
			State: int(delivery.State), Attempts: delivery.Attempts, Trigger: int(delivery.Trigger), ReplayJob: delivery.ReplayJob,
		})
		return nil
	}
	for i := range targets.n {
		if err := add(LaneKey{ns, targets.uid(i).SubscriptionKey()}, seq); err != nil {
			return nil, err
		}
	}
	if err := p.eachReplay(p.j.db, d, ns, seq, func(lane LaneKey, own, _ uint64) error { return add(lane, own) }); err != nil {
		return nil, err
	}
	return line, nil
}
