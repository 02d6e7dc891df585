package delivery

import (
	"context"
	"fmt"
)

// What a transformer has made lies with the event, under the subscription that it was made for: a replay to the same
// subscription carries it, too, and it goes when the event goes. A dead letter, which says more than its event, has its own.

// madeKey is where what was made for a job lies while its event's records are in a day.
func (j *Job) madeKey(day dayKey) []byte {
	own := uint64(0)
	if j.Letter != nil {
		own = j.ID.Seq
	}
	return appendMadeKey(nil, j.ID.Partition, day, j.Lane(), j.Event.Seq, own)
}

// Made reads what KeepMade has kept for a delivery, or for another one of its event to the same subscription; nil without.
func (j *Journal) Made(job *Job) (*Made, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	if job.Trial() || int(job.ID.Partition) >= len(j.partitions) {
		return nil, nil
	}
	p := j.partitions[job.ID.Partition]
	r, _ := p.snapshot() // what it shows is durable, and an event may be moved from its day meanwhile
	defer r.Close()
	day, err := p.home(r, job.Event.Namespace, job.Event.Seq)
	if err != nil {
		return nil, err
	}
	var made *Made
	_, err = j.get(r, job.madeKey(day), func(value []byte) (err error) {
		made, err = decodeMade(value)
		return err
	})
	return made, err
}

// KeepMade keeps what a transformer has made for a delivery, durably, and returns what is kept: what was kept before where
// that is the case, so that all that is ever sent is the same. ErrDiskFull says that there is no room, ErrNotFound that
// the event is there no longer, ErrPurged that its payload is not. When ctx ends first it may have been kept all the same.
func (j *Journal) KeepMade(ctx context.Context, job *Job, made *Made) (*Made, error) {
	leave, err := j.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	switch {
	case int(job.ID.Partition) >= len(j.partitions):
		return nil, ErrNotFound
	case len(made.Body) > MaxMade:
		return nil, fmt.Errorf("keep what was made: %d bytes; at most %d are possible", len(made.Body), MaxMade)
	}
	if err := j.space.Err(); err != nil {
		return nil, err
	}
	p, ns, seq := j.partitions[job.ID.Partition], job.Event.Namespace, job.Event.Seq
	kept := make(chan *Made, 1)
	key := *job // the committer may still be at it when the caller has left
	err = p.do(ctx, func(c *commit) error {
		day, err := p.home(c.r, ns, seq)
		if err != nil {
			return err
		}
		at := key.madeKey(day)
		var before *Made
		found, err := j.get(c.r, at, func(value []byte) (err error) {
			before, err = decodeMade(value)
			return err
		})
		if err != nil {
			return err
		}
		if found {
			c.firm = true // it may be of this very commit
			kept <- before
			return nil
		}
		if head, err := p.readHead(c.r, day, ns, seq); err != nil {
			return err
		} else if head.purged {
			return ErrPurged
		}
		p.value = encodeMade(p.value[:0], made)
		c.set(at, p.value)
		c.firm = true
		kept <- made
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-kept, nil
}

func encodeMade(b []byte, m *Made) []byte {
	w := newRecord(b)
	w.text(validText(m.ContentType))
	appendHeaders(&w, m.Headers)
	w.bytes(m.Body)
	return w
}

func decodeMade(value []byte) (*Made, error) {
	d := readRecord(value)
	m := &Made{ContentType: d.text(), Headers: d.headers()}
	m.Body = append([]byte(nil), d.bytes()...)
	return m, d.err
}
