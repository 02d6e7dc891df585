package api

import (
	"maps"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
)

// A refusal travels in trailers, which clients bound: the oldest that we serve drop a call whose trailers pass 8 KiB,
// and their callers see neither code nor text. So all of a refusal, as it is encoded, is kept below maxTrailers.
const (
	maxTrailers = 4 << 10
	// trailerRoom is for what is not the refusal's: status, request id, push back, and their names.
	trailerRoom = 320
	// maxTold bounds the violations of one refusal, whatever their length.
	maxTold = 50
)

// tellable returns the first faults of a refusal that fit into trailers, and how many of them, at least one, stand in
// the message, too: programs read the details, people mostly the first fault. That is always there, cut when it must be.
func tellable(faults []Violation) (told []Violation, said int) {
	left := maxTrailers - trailerRoom - 480 // for ErrorInfo, with the first field, and what is said of the rest
	for i, f := range faults {
		f.Field, f.Description, f.Reason = cut(f.Field, 160), cut(f.Description, 600), cut(f.Reason, 60)
		for i == 0 && f.inMessage()+f.inDetails() > left {
			f.Description = cut(f.Description, len(f.Description)/2)
		}
		if i == 0 {
			left -= f.inMessage()
		}
		if i == maxTold || f.inDetails() > left {
			break
		}
		left -= f.inDetails()
		told = append(told, f)
	}
	for said = min(1, len(told)); said < len(told) && told[said].inMessage() <= left; said++ {
		left -= told[said].inMessage()
	}
	return told, said
}

// inDetails is what a violation takes of the details, which are in base64.
func (v Violation) inDetails() int {
	return base64Bytes(len(v.Field) + len(v.Description) + len(v.Reason) + 10)
}

// inMessage is what it takes of the message, which stands in the details once more.
func (v Violation) inMessage() int {
	const around = len(": ; ")
	return messageBytes(v.Field) + messageBytes(v.Description) + around + base64Bytes(len(v.Field)+len(v.Description)+around)
}

// messageBytes is how long s is as grpc-message: percent-encoded but for printable ASCII.
func messageBytes(s string) int {
	n := len(s)
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			n += 2
		}
	}
	return n
}

func base64Bytes(n int) int { return (4*n + 2) / 3 }

// cut shortens s to at most most bytes, and shows that it has.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:max(0, most-len("…"))], "") + "…"
}

// bounded is st when its trailers are within bounds. Otherwise it is as much of it as fits: long texts are cut, and of
// lists the beginning is kept.
func (e *Error) bounded() *status.Status {
	st := e.status(e.message, e.details)
	for most := 512; trailerBytes(st) > maxTrailers-trailerRoom && most >= 16; most /= 2 {
		short := *e
		short.metadata = maps.Clone(e.metadata)
		for k, v := range short.metadata {
			short.metadata[k] = cut(v, most)
		}
		details := make([]protoadapt.MessageV1, len(e.details))
		for i, d := range e.details {
			details[i] = shorter(d, most)
		}
		st = short.status(cut(e.message, 2*most), details)
	}
	return st
}

func (e *Error) status(message string, details []protoadapt.MessageV1) *status.Status {
	st := status.New(e.code, strings.ToValidUTF8(message, "\uFFFD"))
	if e.code == codes.OK {
		return st
	}
	all := make([]protoadapt.MessageV1, 0, 1+len(details))
	all = append(all, &errdetails.ErrorInfo{Reason: e.Reason(), Domain: errorDomain, Metadata: e.metadata})
	with, err := st.WithDetails(append(all, details...)...)
	if err != nil {
		return st
	}
	return with
}

func trailerBytes(st *status.Status) int {
	size := messageBytes(st.Message())
	p := st.Proto()
	details := len(p.GetMessage()) + 16
	for _, d := range p.GetDetails() {
		details += len(d.GetTypeUrl()) + len(d.GetValue()) + 16
	}
	return size + base64Bytes(details)
}

// shorter is a copy of a detail with texts of at most most bytes and lists of a length to match.
func shorter(d protoadapt.MessageV1, most int) protoadapt.MessageV1 {
	keep := max(1, most/32)
	switch d := d.(type) {
	case *errdetails.BadRequest:
		out := &errdetails.BadRequest{}
		for _, v := range d.GetFieldViolations()[:min(keep, len(d.GetFieldViolations()))] {
			out.FieldViolations = append(out.FieldViolations, &errdetails.BadRequest_FieldViolation{
				Field: cut(v.GetField(), most), Description: cut(v.GetDescription(), most), Reason: cut(v.GetReason(), most),
			})
		}
		return out
	case *errdetails.PreconditionFailure:
		out := &errdetails.PreconditionFailure{}
		for _, v := range d.GetViolations()[:min(keep, len(d.GetViolations()))] {
			out.Violations = append(out.Violations, &errdetails.PreconditionFailure_Violation{
				Type: v.GetType(), Subject: cut(v.GetSubject(), most), Description: cut(v.GetDescription(), most),
			})
		}
		return out
	case *errdetails.QuotaFailure:
		out := &errdetails.QuotaFailure{}
		for _, v := range d.GetViolations()[:min(keep, len(d.GetViolations()))] {
			out.Violations = append(out.Violations, &errdetails.QuotaFailure_Violation{
				Subject: cut(v.GetSubject(), most), Description: cut(v.GetDescription(), most),
			})
		}
		return out
	case *errdetails.ResourceInfo:
		return &errdetails.ResourceInfo{
			ResourceType: d.GetResourceType(), ResourceName: cut(d.GetResourceName(), most), Description: cut(d.GetDescription(), most),
		}
	}
	return d
}

// andMore is what a message ends with when not everything is told.
func andMore(texts []string, more int) string {
	text := strings.Join(texts, "; ")
	if more > 0 {
		text += "; and " + strconv.Itoa(more) + " more"
	}
	return text
}
