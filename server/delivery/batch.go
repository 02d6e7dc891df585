package delivery

import (
	"crypto/sha256"
	"net/http"
)

const (
	// splitBy is by how much the company of a delivery shrinks that has failed in it for reasons that may be another's.
	splitBy = 8
	// alone is Job.Parted of a delivery that goes by itself.
	alone = 2
	// keptApart is how much of an answer's body, and of headers, all attempts of a batch keep in sum, leastApart each of them.
	keptApart, leastApart = 16 << 10, 256
)

// Company is how many deliveries a batch may hold, of at most so many, with one that is Parted so often.
func Company(parted uint8, most int) int {
	switch {
	case parted == 0:
		return most
	case parted < alone:
		return max(1, (most+splitBy-1)/splitBy)
	}
	return 1
}

// Part is job.Parted after an attempt in a batch of n, so that one delivery of which a target's request fails does not have
// all others fail for ever. What the target refused with a status that blames the request goes by itself next, what failed
// otherwise in a smaller batch and then by itself. What says nothing about the events leaves their company as it is: no
// connection, 429 and 503. It is not for those that a target has named in a batch that it took.
func Part(job *Job, r Result, n int) uint8 {
	code := r.ResponseCode
	switch {
	case n < 2 || r.Outcome == OutcomeSucceeded || r.Outcome == OutcomeUnreachable || r.Indeterminate,
		r.Cause == CauseUnspent, code == http.StatusTooManyRequests, code == http.StatusServiceUnavailable:
		return job.Parted
	case code/100 == 4 && code != http.StatusRequestTimeout && code != http.StatusTooEarly:
		return alone
	}
	return Crowded(job.Parted)
}

// Crowded is Job.Parted after a batch that was too large to be sent.
func Crowded(parted uint8) uint8 { return min(parted+1, alone) }

// Of is the result of the i'th delivery of a batch of n: the batch's, unless the target has named it. The bodies and headers
// of the attempts are bounded in sum.
func (r *Result) Of(i, n int) Result {
	own := *r
	own.Refused = nil
	if why, refused := r.Refused[i]; refused {
		own.Outcome, own.Error = OutcomeRetryable, why
	} else if r.Outcome == OutcomeSucceeded {
		own.RetryAfter = 0
	}
	if most := max(leastApart, keptApart/n); n > 1 {
		own.ResponseBody = own.ResponseBody[:min(len(own.ResponseBody), most)]
		own.ResponseHeaders, own.RequestHeaders = firstOf(own.ResponseHeaders, most), firstOf(own.RequestHeaders, most)
	}
	return own
}

// firstOf are the first headers, of so many bytes in sum.
func firstOf(headers []Header, room int) []Header {
	for i, h := range headers {
		if room -= len(h.Name) + len(h.Value); room < 0 {
			return headers[:i:i]
		}
	}
	return headers
}

const batchPrefix = "bat_"

// BatchUID is the webhook-id of a request that carries these events: 24 characters after the prefix that follow from theirs,
// in their order, so that the same events have the same one.
func BatchUID(events []*Event) string {
	h := sha256.New()
	for _, e := range events {
		h.Write([]byte(e.UID))
		h.Write([]byte{0})
	}
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	var text [len(batchPrefix) + 24]byte
	copy(text[:], batchPrefix)
	encodeText(text[len(batchPrefix):], sum[:15])
	return string(text[:])
}
