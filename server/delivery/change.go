package delivery

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
)

// Change is that a delivery has been made, has gone on or has ended, as a Watcher tells it. It is shared by all that watch
// and must not be changed.
type Change struct {
	// ID is the delivery's, State where it stands since: never InFlight, which the journal does not know.
	ID    ID
	State State
	// Attempted: an attempt has ended, and that is the change. Else it was made, or somebody has changed it.
	Attempted bool

	at       changeAt
	p        *partition
	lane     LaneKey
	standing standing
	size     int64 // in memory, about

	once     sync.Once
	delivery *Delivery
	err      error
}

// changeAt is where a change lies: in a commit of a partition, behind n others of its namespace; last: none follows.
type changeAt struct {
	partition uint16
	commit    Commit
	n         uint32
	last      bool
}

// Delivery is the delivery as it was right after the change, joined with its event. ErrNotFound says that it is no longer
// retained.
func (ch *Change) Delivery() (*Delivery, error) {
	ch.once.Do(func() {
		leave, err := ch.p.j.enter()
		if err != nil {
			ch.err = err
			return
		}
		defer leave()
		ch.delivery, ch.err = ch.p.changed(ch)
	})
	return ch.delivery, ch.err
}

// changed joins a change with its event, wherever that lies by now.
func (p *partition) changed(ch *Change) (*Delivery, error) {
	r := p.j.db.NewSnapshot() // and not between two commits, one of which may be waiting for the disk
	defer r.Close()
	at := &place{standing: ch.standing, row: Row{Seq: ch.ID.Seq}}
	day, err := p.homeOf(r, ch.lane, ch.ID.Seq, at.origin != 0)
	if err != nil {
		return nil, err
	}
	at.day = day
	head, target, err := p.readJoined(r, ch.lane, at)
	if err != nil {
		return nil, err
	}
	return p.join(ch.lane, at, &head, &target), nil
}

// Changes of a namespace lie in rows by commit, a part of maxNews bytes each:
//
//	u | ns commit part: where it begins, count, whether it is the last; for each change: lane, seq, flags, state,
//		length, standing
//
// which are written in the commit that makes them, while the namespace is watched (see watches).
const maxNews = 64 << 10

// changeHead is what comes before the standing.
const changeHead = 8 + 8 + 1 + 1 + 4

// changeSize is what a change takes in memory beside its standing: itself, and most deliveries that are read for it.
const changeSize = 1 << 10

// news are the changes of one namespace in a commit.
type news struct {
	ns    NamespaceKey
	parts []newsPart
}

type newsPart struct {
	first uint32 // changes in the parts before
	count uint32
	body  []byte
}

func (n *news) size() (size int64) {
	for i := range n.parts {
		size += int64(len(n.parts[i].body))
	}
	return size
}

// changed notes where a delivery stands from this commit on, for those who watch its namespace.
func (c *commit) changed(lane LaneKey, seq uint64, st *standing) {
	if !c.p.j.watches.watched(lane.Namespace) {
		return
	}
	i := slices.IndexFunc(c.news, func(n news) bool { return n.ns == lane.Namespace })
	if i < 0 {
		i = len(c.news)
		c.news = append(c.news, news{ns: lane.Namespace})
	}
	n := &c.news[i]
	if last := len(n.parts) - 1; last < 0 || len(n.parts[last].body) >= maxNews {
		part := newsPart{}
		if last >= 0 {
			part.first = n.parts[last].first + n.parts[last].count
		}
		n.parts = append(n.parts, part)
	}
	part := &n.parts[len(n.parts)-1]
	part.count++
	part.body = append(appendU64(appendU64(part.body, uint64(lane.Subscription)), seq), boolByte(st.attempted), byte(st.state))
	size := len(part.body)
	part.body = encodeStanding(append(part.body, 0, 0, 0, 0), st)
	binary.BigEndian.PutUint32(part.body[size:], uint32(len(part.body)-size-4))
}

// putNews adds the rows of what has been noted.
func (c *commit) putNews() {
	p := c.p
	for i := range c.news {
		n := &c.news[i]
		for k := range n.parts {
			part := &n.parts[k]
			w := newRecord(p.value[:0])
			w.uint(uint64(part.first))
			w.uint(uint64(part.count))
			w.byte(boolByte(k == len(n.parts)-1))
			w = append(w, part.body...)
			p.value = w
			p.key = appendNewsKey(p.key[:0], p.number, n.ns, c.index, k)
			c.set(p.key, p.value)
		}
	}
}

func boolByte(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// wanting tells which changes are wanted; nil: all.
type wanting func(sub SubscriptionKey, state State) bool

// decodeNews reads the changes of a row that are wanted, from the skip-th of the commit's on, and says where the row ends.
func (p *partition) decodeNews(ns NamespaceKey, commit Commit, value []byte, skip uint32, want wanting) (changes []*Change, end changeAt, err error) {
	d := readRecord(value)
	first, count, final := uint32(d.uint()), uint32(d.uint()), d.byte() == 1
	if d.err != nil {
		return nil, end, d.err
	}
	changes, err = p.decodeChanges(ns, changeAt{partition: p.number, commit: commit, n: first}, count, final, d.b, skip, want)
	return changes, changeAt{p.number, commit, first + count - 1, final}, err
}

func (p *partition) decodeChanges(ns NamespaceKey, at changeAt, count uint32, final bool, body []byte, skip uint32, want wanting) ([]*Change, error) {
	var changes []*Change
	for i := range count {
		if len(body) < changeHead {
			return nil, errTruncated
		}
		sub, seq := SubscriptionKey(binary.BigEndian.Uint64(body)), binary.BigEndian.Uint64(body[8:])
		attempted, state, size := body[16] == 1, State(body[17]), binary.BigEndian.Uint32(body[18:])
		body = body[changeHead:]
		if uint64(size) > uint64(len(body)) {
			return nil, errTruncated
		}
		if n := at.n + i; n >= skip && (want == nil || want(sub, state)) {
			st, err := decodeStanding(body[:size])
			if err != nil {
				return nil, err
			}
			ch := &Change{
				ID: ID{seq, p.number, sub}, State: st.state, Attempted: attempted, p: p, lane: LaneKey{ns, sub}, standing: st,
				at: changeAt{at.partition, at.commit, n, final && i == count-1}, size: int64(size) + changeSize,
			}
			changes = append(changes, ch)
		}
		body = body[size:]
	}
	return changes, nil
}

// Position is a place in the changes of a namespace: behind some, before others. The zero Position is now, whenever that
// is asked for.
type Position struct {
	// line is drawn when changes begin to be recorded: a position in one means nothing in another.
	line uint64
	at   []seenTo // by partition
}

// seenTo: all of a commit has been seen, and n changes of the one behind it.
type seenTo struct {
	commit Commit
	n      uint32
}

// ErrPosition says that a position was not made by this journal.
var ErrPosition = errors.New("position is not valid")

// String is the position as text of letters, digits, - and _; ParsePosition reads it.
func (p Position) String() string {
	if p.line == 0 {
		return ""
	}
	b := appendU64(nil, p.line)
	for _, s := range p.at {
		b = binary.AppendUvarint(b, uint64(s.commit))
		b = binary.AppendUvarint(b, uint64(s.n))
	}
	return base64.RawURLEncoding.EncodeToString(b)
}

// ParsePosition reads what String wrote; empty text is the zero Position. Its error is ErrPosition.
func ParsePosition(text string) (p Position, err error) {
	if text == "" {
		return Position{}, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(b) < 8 {
		return Position{}, ErrPosition
	}
	d := decoder{b: b[8:]}
	p.line = binary.BigEndian.Uint64(b)
	for len(d.b) > 0 && len(p.at) < maxPartitions {
		p.at = append(p.at, seenTo{Commit(d.uint()), uint32(d.uint())})
	}
	if d.err != nil || len(d.b) > 0 || p.line == 0 {
		return Position{}, ErrPosition
	}
	return p, nil
}

func (p Position) clone() Position {
	p.at = slices.Clone(p.at)
	return p
}

// pass moves the position behind a change.
func (p *Position) pass(at changeAt) {
	if at.last {
		p.reach(at.partition, at.commit)
		return
	}
	p.at[at.partition] = seenTo{at.commit - 1, at.n + 1}
}

// reach moves the position behind a commit.
func (p *Position) reach(partition uint16, commit Commit) { p.at[partition] = seenTo{commit: commit} }

// seen reports whether a change lies before the position.
func (p *Position) seen(at changeAt) bool {
	s := p.at[at.partition]
	return at.commit <= s.commit || at.commit == s.commit+1 && at.n < s.n
}

func appendNewsKey(b []byte, partition uint16, ns NamespaceKey, commit Commit, part int) []byte {
	b = appendU64(appendSpace(b, partition, tagNews, ns), uint64(commit))
	return binary.BigEndian.AppendUint16(b, uint16(min(part, 1<<16-1)))
}

func splitNews(key []byte) (ns NamespaceKey, commit Commit, ok bool) {
	if len(key) != bodyOffset+18 || key[tagOffset] != tagNews {
		return 0, 0, false
	}
	return NamespaceKey(binary.BigEndian.Uint64(key[bodyOffset:])), Commit(binary.BigEndian.Uint64(key[bodyOffset+8:])), true
}
