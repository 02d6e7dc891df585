package delivery

import "time"

// Commit is a partition's commit index: it rises by one with each commit, over restarts too. 0 is before the
// first.
type Commit uint64

// Instant is a time as the journal keeps it: microseconds since the start of year 1 (UTC), so that it holds
// every time that the API accepts. The zero Instant is no time.
type Instant int64

const (
	// unixInstant is 1970-01-01T00:00:00Z in seconds since year 1.
	unixInstant = 62_135_596_800
	// maxInstantSeconds is the end of year 9999, the last that the API accepts.
	maxInstantSeconds = 315_537_897_600
)

// InstantOf rounds up to a microsecond, so that nothing is due before its time. The zero time is the zero Instant.
func InstantOf(t time.Time) Instant {
	if t.IsZero() {
		return 0
	}
	seconds := min(max(t.Unix()+unixInstant, 0), maxInstantSeconds)
	return max(Instant(seconds*1_000_000+int64(t.Nanosecond()+999)/1000), 1)
}

// Time is the instant as a wall clock time.
func (i Instant) Time() time.Time {
	if i == 0 {
		return time.Time{}
	}
	return time.Unix(int64(i)/1_000_000-unixInstant, int64(i)%1_000_000*1000)
}

// Kind tells the two orders in which open deliveries wait.
type Kind uint8

// Kinds of rows.
const (
	// FIFO rows wait for their first attempt, in order of their sequences.
	FIFO Kind = iota
	// Timer rows wait for a time: of a retry, or the delivery time of their event.
	Timer
)

// Row is what an open delivery waits by. There is one for each, and its epoch rises with each commit that leaves
// the delivery open: retried, rescheduled by a caller, brought back from its end.
type Row struct {
	Kind Kind
	// Due is zero in the FIFO.
	Due   Instant
	Seq   uint64
	Epoch uint32
}

// Pos is the row's place in the order of its kind.
func (r Row) Pos() Pos { return Pos{Due: r.Due, Seq: r.Seq, Some: true} }

// Pos is a place in the order of the rows of a kind, by due time and then sequence. Without Some it is Nowhere,
// which lies behind every place.
type Pos struct {
	Due  Instant
	Seq  uint64
	Some bool
}

// Before reports whether p lies before q.
func (p Pos) Before(q Pos) bool {
	switch {
	case !p.Some || !q.Some:
		return p.Some
	case p.Due != q.Due:
		return p.Due < q.Due
	}
	return p.Seq < q.Seq
}

// Least is the first of two places.
func Least(p, q Pos) Pos {
	if q.Before(p) {
		return q
	}
	return p
}

// LaneState is where one lane stands in one partition: at or before its first row of each kind; Nowhere when it
// has none.
type LaneState struct {
	Lane        LaneKey
	Partition   uint16
	FIFO, Timer Pos
}

// Read is what Journal.Read found.
type Read struct {
	// Jobs in the order of their rows. Their events are held for the caller, who releases those that it does not
	// keep.
	Jobs []Job
	// Next is the place of the first row that was not returned, due or not; Nowhere at the end.
	Next Pos
	// UpTo is the newest commit that the read has seen: exactly those up to it.
	UpTo Commit
	// Aside are rows that cannot be read. The read has passed over them; they stay on disk.
	Aside []error
}

// Follower learns what commits did to open rows. A partition's calls come in the order of its commits, from its
// committer, after the commit is visible to Read and, where a caller was promised that, durable. They must
// return soon and call nothing of the Journal but Hold, Release and Settle.
type Follower interface {
	// Offer tells of rows of the FIFO that commit c made, all of one partition, in order of their sequences. The
	// slice and its jobs are lent for the call; who keeps a job copies it and holds its event.
	Offer(c Commit, jobs []Job)
	// Timed tells of a row of Timer that commit c made.
	Timed(c Commit, lane LaneKey, partition uint16, row Row)
	// Edited tells that commit c ended or replaced, for a caller, the row with this sequence and epoch; a
	// replacement follows by Timed.
	Edited(c Commit, lane LaneKey, partition uint16, seq uint64, epoch uint32)
}

// Settled is told, as a Follower is, that commit c has done with a row that was settled, whether the settle
// applied or came too late. Where the delivery goes on, the row that follows is told by Timed afterwards.
type Settled interface {
	Settled(c Commit)
}
