package delivery

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// eventHead is what a Delivery shows of its event.
type eventHead struct {
	id, eventType string
	accept        time.Time
	// within are the targets, unless they lie apart.
	within targetList
	apart  bool
	purged bool
	// again is set of a delivery that was made again; accept is then when it was.
	again *again
}

// encodeEvent writes the record of an event, with its targets where they are few; the payload comes behind the rest, so
// that readers of that can leave it, and behind it what few events have.
func encodeEvent(b []byte, e *Event, targets []Target) []byte {
	w := newRecord(b)
	w.time(e.AcceptTime)
	place := targetsPlace(targets)
	if w.byte(place); place == targetsWithin {
		w.int(sizeOfTargets(targets))
		w = encodeTargets(w, targets)
	}
	return appendEvent(w, e)
}

// appendEvent adds what comes behind the targets.
func appendEvent(w encoder, e *Event) []byte {
	w.text(e.ID)
	w.text(e.Type)
	w.text(e.Source)
	w.text(e.Subject)
	w.time(e.Time)
	w.text(e.ContentType)
	w.text(e.Schema)
	w.time(e.DeliverTime)
	w.uint(uint64(max(e.TTL, 0)))
	w.int(e.Matched)
	w.int(e.Skipped)
	w = append(w, e.ContentHash[:]...)
	w.int(len(e.Attributes))
	for name, value := range e.Attributes {
		w.text(name)
		w.text(value)
	}
	w.bytes(e.Payload)
	if e.FaultCount > 0 || e.OrderingKey != "" || len(e.Headers) > 0 || e.Trace != nil || e.Purged != nil {
		w.int(e.FaultCount)
		w.int(len(e.Faults))
		for _, f := range e.Faults {
			w.text(f.Subscription)
			w.text(f.Text)
		}
		w.text(e.OrderingKey)
	}
	if e.Purged != nil { // and so has neither headers nor a trace
		e.Purged.append(&w)
		return w
	}
	if len(e.Headers) > 0 || e.Trace != nil {
		w.int(len(e.Headers))
		for name, value := range e.Headers {
			w.text(name)
			w.text(value)
		}
	}
	if e.Trace != nil {
		w = append(w, e.Trace.ID[:]...)
		w = append(w, e.Trace.Span[:]...)
		w.text(e.Trace.State)
	}
	return w
}

// sizeOfEvent bounds what encodeEvent writes, but for targets.
func sizeOfEvent(e *Event) int {
	size := 160 + len(e.ID) + len(e.Type) + len(e.Source) + len(e.Subject) + len(e.ContentType) + len(e.Schema) + len(e.Payload) + len(e.OrderingKey)
	for name, value := range e.Attributes {
		size += 8 + len(name) + len(value)
	}
	for name, value := range e.Headers {
		size += 8 + len(name) + len(value)
	}
	for _, f := range e.Faults {
		size += 16 + len(f.Subscription) + len(f.Text)
	}
	if e.Trace != nil {
		size += 32 + len(e.Trace.State)
	}
	return size
}

// decodeEvent reads an event. Its texts share one string, which is no part of value.
func decodeEvent(value []byte) (*Event, error) {
	d := readRecord(value)
	e := &Event{AcceptTime: d.time()}
	d.targets()
	purged := d.purged
	// All text in one allocation: the head of the record as a string, cut up.
	head := d.b
	text := ""
	cut := func() string {
		part := d.bytes()
		if len(part) == 0 {
			return ""
		}
		if text == "" {
			text = string(head[:min(len(head), headBytes(head))])
		}
		end := len(head) - len(d.b)
		if end > len(text) {
			return string(part)
		}
		return text[end-len(part) : end]
	}
	e.ID, e.Type, e.Source, e.Subject = cut(), cut(), cut(), cut()
	e.Time = d.time()
	e.ContentType, e.Schema = cut(), cut()
	e.DeliverTime, e.TTL = d.time(), time.Duration(d.uint())
	e.Matched, e.Skipped = d.int(), d.int()
	copy(e.ContentHash[:], d.fixed(len(e.ContentHash)))
	e.Attributes = d.pairs()
	e.Payload = slices.Clone(d.bytes())
	if d.err == nil && len(d.b) > 0 {
		e.FaultCount = d.int()
		for n := d.int(); n > 0 && d.err == nil; n-- {
			e.Faults = append(e.Faults, Fault{d.text(), d.text()})
		}
		e.OrderingKey = d.text()
	}
	if purged {
		e.Purged = d.readPurged()
		return e, d.err
	}
	if d.err == nil && len(d.b) > 0 {
		e.Headers = d.pairs()
	}
	if d.err == nil && len(d.b) > 0 {
		e.Trace = &Trace{}
		copy(e.Trace.ID[:], d.fixed(len(e.Trace.ID)))
		copy(e.Trace.Span[:], d.fixed(len(e.Trace.Span)))
		e.Trace.State = d.text()
	}
	return e, d.err
}

// pairs are names and values; nil where there are none.
func (d *decoder) pairs() map[string]string {
	n := d.int()
	if n <= 0 || d.err != nil {
		return nil
	}
	pairs := make(map[string]string, min(n, 64))
	for range n {
		name, value := d.text(), d.text()
		if d.err != nil {
			break
		}
		pairs[name] = value
	}
	return pairs
}

// decodeOrder reads an event's ordering key, and copies nothing else.
func decodeOrder(value []byte) (OrderKey, error) {
	d := readRecord(value)
	d.time()
	d.targets()
	d.b = d.b[headBytes(d.b):]
	d.time()
	d.uint()
	d.int()
	d.int()
	d.fixed(len(Event{}.ContentHash))
	for n := d.int(); n > 0 && d.err == nil; n-- {
		d.bytes()
		d.bytes()
	}
	d.bytes()
	if d.err != nil || len(d.b) == 0 {
		return 0, d.err
	}
	d.int()
	for n := d.int(); n > 0 && d.err == nil; n-- {
		d.bytes()
		d.bytes()
	}
	return orderKeyOf(string(d.bytes())), d.err
}

// headBytes is how long the texts in front of the attributes are.
func headBytes(head []byte) int {
	d := decoder{b: head}
	for range 4 {
		d.bytes()
	}
	d.time()
	d.bytes()
	d.bytes()
	return len(head) - len(d.b)
}

func decodeHead(value []byte) (h eventHead, err error) {
	d := readRecord(value)
	h.accept = d.time()
	within, apart := d.targets()
	h.id, h.eventType, h.apart, h.purged = d.text(), d.text(), apart, d.purged
	if d.err == nil && within != nil {
		h.within, d.err = decodeTargets(slices.Clone(within))
	}
	return h, d.err
}

// progress is what a job's row says beside its key.
type progress struct {
	epoch         uint32
	attempts      int
	maxAttempts   int
	expire        Instant
	indeterminate int
	suspicion     int
	parted        uint8
	manual        bool
	// origin is the sequence of the event that the delivery sends again; 0 where it is the delivery's own.
	origin uint64
	// job is the replay that made or reopened it and bounds how many are open; 0 for none.
	job uint64
	// letter is set of a dead letter.
	letter *Letter
	// order is the ordering key that the delivery keeps busy, or waits for; 0 is none. gap is how many of it had ended
	// without success right before.
	order OrderKey
	gap   int
}

const (
	flagManual = 1 << iota
	flagTroubled
	flagReplayed
	flagLetter
	flagOrdered
	flagParted
)

// flags says which parts of the record there are.
func (p *progress) flags() (flags byte) {
	if p.manual {
		flags |= flagManual
	}
	if p.indeterminate > 0 || p.suspicion > 0 {
		flags |= flagTroubled
	}
	if p.origin != 0 || p.job != 0 {
		flags |= flagReplayed
	}
	if p.letter != nil {
		flags |= flagLetter
	}
	if p.order != 0 {
		flags |= flagOrdered
	}
	if p.parted > 0 {
		flags |= flagParted
	}
	return flags
}

func encodeProgress(b []byte, p *progress) []byte {
	w := newRecord(b)
	flags := p.flags()
	w.byte(flags)
	w.uint(uint64(p.epoch))
	w.int(p.attempts)
	w.int(p.maxAttempts)
	w.instant(p.expire)
	if flags&flagTroubled != 0 {
		w.int(p.indeterminate)
		w.int(p.suspicion)
	}
	if flags&flagReplayed != 0 {
		w.uint(p.origin)
		w.uint(p.job)
	}
	if flags&flagLetter != 0 {
		w.text(p.letter.From)
		w.byte(byte(p.letter.State))
		w.text(validText(p.letter.Reason))
		w.int(p.letter.Attempts)
		w.int(p.letter.ResponseCode)
	}
	if flags&flagOrdered != 0 {
		w = binary.BigEndian.AppendUint64(w, uint64(p.order))
		w.int(p.gap)
	}
	if flags&flagParted != 0 {
		w.byte(p.parted)
	}
	return w
}

func decodeProgress(value []byte) (p progress, err error) {
	d := readRecord(value)
	d.progress(&p)
	return p, d.err
}

func (d *decoder) progress(p *progress) {
	flags := d.byte()
	p.manual = flags&flagManual != 0
	p.epoch, p.attempts, p.maxAttempts, p.expire = uint32(d.uint()), d.int(), d.int(), d.instant()
	if flags&flagTroubled != 0 {
		p.indeterminate, p.suspicion = d.int(), d.int()
	}
	if flags&flagReplayed != 0 {
		p.origin, p.job = d.uint(), d.uint()
	}
	if flags&flagLetter != 0 {
		p.letter = &Letter{From: d.text(), State: State(d.byte()), Reason: d.text(), Attempts: d.int(), ResponseCode: d.int()}
	}
	if flags&flagOrdered != 0 {
		if key := d.fixed(8); key != nil {
			p.order = OrderKey(binary.BigEndian.Uint64(key))
		}
		if p.gap = d.int(); p.order == 0 {
			p.gap = 0
		}
	}
	if flags&flagParted != 0 {
		p.parted = d.byte()
	}
}

// standing is the record of a delivery that is not PENDING.
type standing struct {
	// attempted: the last attempt has ended in the commit that is being prepared. It is not on record.
	attempted bool

	progress
	state    State
	reason   string
	due      Instant // while Scheduled; none while it waits for its ordering key
	complete Instant
	last     *Attempt // without bodies
}

func encodeStanding(b []byte, s *standing) []byte {
	w := encoder(encodeProgress(b, &s.progress))
	w.byte(byte(s.state))
	w.text(validText(s.reason))
	w.instant(s.due)
	w.instant(s.complete)
	if s.last == nil {
		w.byte(0)
		return w
	}
	w.byte(1)
	appendAttempt(&w, s.last, false)
	return w
}

func decodeStanding(value []byte) (s standing, err error) {
	d := readRecord(value)
	d.progress(&s.progress)
	s.state, s.reason, s.due, s.complete = State(d.byte()), d.text(), d.instant(), d.instant()
	if d.byte() == 1 {
		s.last = d.attempt()
	}
	return s, d.err
}

func encodeAttempt(b []byte, a *Attempt) []byte {
	w := newRecord(b)
	appendAttempt(&w, a, true)
	return w
}

func decodeAttempt(value []byte) (*Attempt, error) {
	d := readRecord(value)
	a := d.attempt()
	return a, d.err
}

const (
	attemptManual = 1 << iota
	attemptBodies
	attemptBatch
)

func appendAttempt(w *encoder, a *Attempt, bodies bool) {
	bodies = bodies && len(a.ResponseBody)+len(a.ResponseHeaders)+len(a.RequestHeaders) > 0
	flags := byte(0)
	if a.Manual {
		flags |= attemptManual
	}
	if bodies {
		flags |= attemptBodies
	}
	if a.Batch != "" || a.BatchSize > 0 {
		flags |= attemptBatch
	}
	w.byte(flags)
	w.int(a.Number)
	w.time(a.Start)
	w.uint(uint64(max(a.Duration, 0)))
	w.byte(byte(a.Outcome))
	w.int(a.ResponseCode)
	w.uint(uint64(max(a.RetryAfter, 0)))
	w.text(validText(a.Error))
	w.text(validText(a.Peer))
	if bodies {
		w.bytes(a.ResponseBody)
		appendHeaders(w, a.ResponseHeaders)
		appendHeaders(w, a.RequestHeaders)
	}
	if flags&attemptBatch != 0 {
		w.text(a.Batch)
		w.int(a.BatchSize)
	}
}

func appendHeaders(w *encoder, headers []Header) {
	w.int(len(headers))
	for _, h := range headers {
		w.text(validText(h.Name))
		w.text(validText(h.Value))
	}
}

func (d *decoder) attempt() *Attempt {
	flags := d.byte()
	a := &Attempt{Manual: flags&attemptManual != 0}
	a.Number, a.Start, a.Duration = d.int(), d.time(), time.Duration(d.uint())
	a.Outcome, a.ResponseCode, a.RetryAfter = Outcome(d.byte()), d.int(), time.Duration(d.uint())
	a.Error, a.Peer = d.text(), d.text()
	if flags&attemptBodies != 0 {
		a.ResponseBody = append([]byte(nil), d.bytes()...) // nil where there is none
		a.ResponseHeaders, a.RequestHeaders = d.headers(), d.headers()
	}
	if flags&attemptBatch != 0 {
		a.Batch, a.BatchSize = d.text(), d.int()
	}
	return a
}

func (d *decoder) headers() []Header {
	var headers []Header
	for range d.int() {
		h := Header{Name: d.text(), Value: d.text()}
		if d.err != nil {
			return nil
		}
		headers = append(headers, h)
	}
	return headers
}

// validText makes text from outside fit to be stored.
func validText(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// commitMark is the w record: the newest commit of a partition.
type commitMark struct {
	index   Commit
	lastSeq uint64
	at      Instant
}

func encodeCommitMark(b []byte, m commitMark) []byte {
	w := newRecord(b)
	w.uint(uint64(m.index))
	w.uint(m.lastSeq)
	w.instant(m.at)
	return w
}

func decodeCommitMark(value []byte) (m commitMark, err error) {
	d := readRecord(value)
	m.index, m.lastSeq, m.at = Commit(d.uint()), d.uint(), d.instant()
	return m, d.err
}

// memory is the p record: what a partition remembers of itself.
type memory struct {
	journal [idBytes]byte
	swept   sweptDays
	// ahead are sequences that were given while the clock was more than a day ahead; zero when there are none.
	ahead aheadSpan
	// keyed: there have been events with an ordering key, which lie here by that and not by their id.
	keyed bool
}

// sweptDays are those that retention has erased something of: what is open of them may have moved to kept. They are
// all days up to one, and those of a span that lies behind it because a clock that was wrong has made it.
type sweptDays struct{ upTo, low, high dayKey }

func (s sweptDays) has(d dayKey) bool { return d <= s.upTo || s.low <= d && d <= s.high }

func (s sweptDays) with(d dayKey, ahead bool) sweptDays {
	switch {
	case !ahead:
		s.upTo = max(s.upTo, d)
	case s.high == 0:
		s.low, s.high = d, d
	default:
		s.low, s.high = min(s.low, d), max(s.high, d)
	}
	return s
}

// aheadSpan is the part of the future that has events, as noticed at a time.
type aheadSpan struct {
	high    uint64
	noticed Instant
	// times says how often a clock was found to have been ahead.
	times int
}

func encodeMemory(b []byte, m *memory) []byte {
	w := newRecord(b)
	w = append(w, m.journal[:]...)
	for _, d := range [...]dayKey{m.swept.upTo, m.swept.low, m.swept.high} {
		w.uint(uint64(d))
	}
	w.uint(m.ahead.high)
	w.instant(m.ahead.noticed)
	w.int(m.ahead.times)
	keyed := byte(0)
	if m.keyed {
		keyed = 1
	}
	w.byte(keyed)
	return w
}

func decodeMemory(value []byte) (m memory, err error) {
	d := readRecord(value)
	copy(m.journal[:], d.fixed(idBytes))
	m.swept = sweptDays{dayKey(d.uint()), dayKey(d.uint()), dayKey(d.uint())}
	m.ahead = aheadSpan{d.uint(), d.instant(), d.int()}
	m.keyed = d.byte() == 1
	return m, d.err
}

// meta describes a journal; written once, when it is made.
type meta struct {
	format     int
	partitions int
	id         [idBytes]byte
}

func encodeMeta(b []byte, m meta) []byte {
	w := newRecord(b)
	w.int(m.format)
	w.int(m.partitions)
	return append(w, m.id[:]...)
}

// decodeMeta also knows format 1, whose records were protobuf messages behind a version byte 1.
func decodeMeta(value []byte) (m meta, err error) {
	if len(value) > 0 && value[0] == 1 {
		return meta{format: 1}, nil
	}
	d := readRecord(value)
	m.format, m.partitions = d.int(), d.int()
	copy(m.id[:], d.fixed(idBytes))
	if d.err != nil {
		return m, fmt.Errorf("meta record: %w", d.err)
	}
	return m, nil
}
